"""Learned positions, the rotary table, and T5's relative bias."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from attention_zoo import (
    AxialAttention,
    CosineSimAttention,
    FullAttention,
    LearnedPositions,
    RelativeBias,
    RelativeGateAttention,
    Rotary,
    TalkingHeadsAttention,
    TextImageLayout,
    TextImageRotary,
)
from tests.formulas import relative_error

CPU = torch.device("cpu")
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}
YARN = {"type": "yarn", "factor": 4, "original_max_seq_len": 4096}


def turned(x: Tensor, start: int, *, width: int, theta: float = 10000.0, freqs: list[float] | None = None) -> Tensor:
    """RoFormer's rotation in float64: pair p of a token at position n turns by n * theta^(-2p / width)."""
    n = torch.arange(start, start + x.shape[-2], dtype=torch.float64)[:, None]
    p = torch.arange(width // 2, dtype=torch.float64)
    turn = torch.tensor(freqs, dtype=torch.float64) if freqs else theta ** (-2 * p / width)
    angle = n * turn
    pairs = torch.complex(x[..., 0:width:2].double(), x[..., 1:width:2].double())
    pairs = pairs * torch.complex(angle.cos(), angle.sin())
    return torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., width:].double()), dim=-1)


def rotary(dim_head: int, *args: object, **kwargs: object) -> Rotary:
    part = Rotary(*args, **kwargs)
    part.prepare(dim_head)
    return part


def test_learned_positions_count_valid_tokens_and_give_leading_padding_the_first_position() -> None:
    table = LearnedPositions(5, 3)
    got = table(torch.tensor([[0, 0, 1, 2], [1, 2, 3, 5]]))
    assert torch.equal(got, table.weight[torch.tensor([[0, 0, 0, 1], [0, 1, 2, 4]])])


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize(
    ("options", "features", "width"),
    [({}, 8, 8), ({}, 7, 6), ({"dim": 4}, 8, 4), ({"theta": 500.0}, 8, 8), ({"dim": 4, "freqs": [0.5, 0.1]}, 8, 4)],
)
def test_rotary_rotates_every_pair_by_its_own_frequency(options: dict, features: int, width: int, start: int) -> None:
    x = torch.randn(2, 3, 11, features)
    rest = {key: value for key, value in options.items() if key != "dim"}
    assert relative_error(rotary(features, **options)(x, start), turned(x, start, width=width, **rest)) < 1e-6


def test_scores_of_rotated_queries_and_keys_depend_only_on_the_distance() -> None:
    part = rotary(8)
    q, k = torch.randn(8), torch.randn(8)
    scores = part(q.expand(1, 1, 50, 8))[0, 0] @ part(k.expand(1, 1, 50, 8))[0, 0].t()
    for distance in (-13, 0, 21):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", [257, 10_000])
def test_casting_a_model_leaves_the_rotary_table_in_float32(dtype: torch.dtype, start: int) -> None:
    block = FullAttention(16, heads=2, dim_head=8, rotary=Rotary()).to(dtype)
    x = torch.randn(1, 2, 5, 8).to(dtype)
    # what is left is the rounding of the result, and of angles in float32 far out
    assert relative_error(block.rotary(x, start), turned(x, start, width=8)) < 5e-3
    assert all(table.dtype == torch.float32 for table in block.rotary.table(0, 5, 8, CPU))


def test_rotary_table_is_neither_parameter_nor_buffer() -> None:
    part = rotary(8)
    part(torch.randn(1, 1, 5, 8))
    assert not part.state_dict()
    assert not list(part.buffers())


def test_rotary_of_a_layer_constructed_on_meta_has_the_right_table() -> None:
    real = FullAttention(16, heads=2, dim_head=8, rotary=Rotary())
    with torch.device("meta"):
        block = FullAttention(16, heads=2, dim_head=8, rotary=Rotary())
        assert block(torch.randn(1, 5, 16)).device.type == "meta"
    block.to_empty(device="cpu")
    block.load_state_dict(real.state_dict())
    x = torch.randn(1, 5, 16)
    assert torch.equal(block(x), real(x))


def test_growing_the_rotary_table_keeps_earlier_positions() -> None:
    part = rotary(8)
    before = [table.clone() for table in part.table(0, 40, 8, CPU)]
    part.table(0, 1000, 8, CPU)
    for old, new in zip(before, part.table(0, 40, 8, CPU), strict=True):
        assert torch.equal(old, new)
    x = torch.randn(1, 1, 3, 8)
    assert relative_error(part(x, 997), turned(x, 997, width=8)) < 1e-4  # float32 angles of some 1000 radians


def test_rotary_table_is_rebuilt_only_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    part, built = rotary(8), []
    build = part._build
    monkeypatch.setattr(part, "_build", lambda *args: built.append(args) or build(*args))
    for position in range(1000):
        part.table(position, position + 1, 8, CPU)
    assert len(built) <= 6


def test_one_rotary_module_serves_heads_of_different_sizes() -> None:
    part = Rotary()
    for size in (8, 6):
        part.prepare(size)
    for size in (8, 6, 8):
        x = torch.randn(1, 1, 5, size)
        assert relative_error(part(x), turned(x, 0, width=size)) < 1e-6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_copied_rotary_module_rotates_identically(duplicate) -> None:
    part, x = rotary(8), torch.randn(1, 1, 5, 8)
    want = part(x)
    assert torch.equal(duplicate(part)(x), want)


def test_rotary_table_built_in_inference_mode_works_in_training() -> None:
    part, x = rotary(8), torch.randn(1, 1, 5, 8, requires_grad=True)
    with torch.inference_mode():
        part(x)
    part(x).sum().backward()
    assert x.grad is not None


def test_rotary_compiles_as_one_graph_at_any_start() -> None:
    part, x = rotary(8), torch.randn(1, 2, 5, 8)
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    for start in (0, 3, 300):
        torch.testing.assert_close(compiled(x, start), part(x, start), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(5), "dim must be even, .* got dim=5"),
        (lambda: Rotary(0), "dim must be at least 1, got dim=0"),
        (lambda: Rotary(4, freqs=[1.0, math.inf]), "freqs must be finite, got freqs=inf"),
        (lambda: Rotary(theta=0), "theta must be positive, got theta=0"),
        (lambda: Rotary(theta=10**400), "theta must be finite, got an int above the largest float"),
        (lambda: FullAttention(16, rotary=Rotary(theta=1e-40)), "theta must give finite frequencies"),
        (lambda: Rotary(theta=-1.0), "theta must be positive, got theta=-1.0"),
        (lambda: Rotary(theta=math.inf), "theta must be finite, got theta=inf"),
        (lambda: Rotary(theta=math.nan), "theta must be finite, got theta=nan"),
        (lambda: TextImageRotary(TextImageLayout(2, 3, 4), theta=0), "theta must be positive, got theta=0"),
        (lambda: Rotary(pairing="split"), "pairing must be one of .* got pairing='split'"),
        (lambda: Rotary(scaling={"factor": 2}), r"scaling\['type'\] must be one of .* got scaling\['type'\]=None"),
        (lambda: Rotary(scaling={"type": "yarm"}), "must be one of .*'yarn'.* did you mean 'yarn'"),
        (lambda: Rotary(scaling={"type": "longrope"}), "must not be 'longrope', whose frequencies change"),
        (lambda: Rotary(scaling={"type": "dynamic", "factor": 2}), "must not be 'dynamic', whose frequencies change"),
        (lambda: Rotary(scaling={"type": "linear"}), "scaling 'linear' must have factor, got"),
        (lambda: Rotary(scaling={"type": "yarn", "factor": 2}), "scaling 'yarn' must have original_max_seq_len, got"),
        (lambda: Rotary(scaling={"type": "llama3", "factor": 2}), "must have low_freq_factor, high_freq_factor, orig"),
        (lambda: Rotary(scaling={"type": "ntk", "faktor": 2}), "options of scaling 'ntk' must be .* mean 'factor'"),
        (lambda: Rotary(scaling={"type": "linear", "factor": 0.5}), r"\['factor'\] must be at least 1, got 0.5"),
        (lambda: Rotary(scaling={"type": "linear", "factor": 0}), r"\['factor'\] must lie in \[1e-9, 1e9\], got"),
        (lambda: Rotary(scaling={"type": "ntk", "factor": 1e300}), r"\['factor'\] must lie in \[1e-9, 1e9\], got"),
        (lambda: Rotary(scaling={**YARN, "beta_fast": 1}), r"\['beta_fast'\] must exceed scaling\['beta_slow'\]"),
        (lambda: Rotary(scaling={**YARN, "mscale": 1}), "both or none of mscale and mscale_all_dim"),
        (lambda: Rotary(theta=1, scaling=YARN), "theta must exceed 1 with scaling 'yarn', got theta=1"),
        (lambda: Rotary(2, freqs=[1.0], scaling=YARN), "scaling must be None with freqs, got scaling="),
        (lambda: rotary(3, scaling={"type": "ntk", "factor": 2}), "at least 4 features with scaling 'ntk', got 2"),
        (
            lambda: CosineSimAttention(8, dim_head=8, groups=2, rotary=Rotary(pairing="half")),
            "groups must not split rotary pairs, got groups=2",
        ),
        (
            lambda: RelativeGateAttention(8, rotary=Rotary(pairing="half")),
            "rotary.pairing must be 'interleaved', the pairs of the gates, got 'half'",
        ),
        (lambda: Rotary(xpos_scale_base=99), "xpos_scale_base must be 512 without xpos, got xpos_scale_base=99"),
        (lambda: Rotary(xpos=True, xpos_scale_base=0), "xpos_scale_base must be positive, got xpos_scale_base=0"),
        (
            lambda: FullAttention(8, causal=False, rotary=Rotary(xpos=True)),
            "rotary.xpos must be False with causal=False: scores of later keys would grow",
        ),
        (lambda: Rotary(4, freqs=[1.0]), "freqs must hold dim / 2 numbers, got dim=4 and 1 freqs"),
        (lambda: rotary(8, 10), "rotary must rotate 2 ... dim_head features, got rotary.dim=10, dim_head=8"),
        (lambda: rotary(1), "rotary must rotate 2 ... dim_head features, got rotary.dim=None, dim_head=1"),
        (lambda: LearnedPositions(0, 8), "max_seq_len must be at least 1, got max_seq_len=0"),
        (lambda: RelativeBias(0), "heads must be at least 1, got heads=0"),
        (lambda: RelativeBias(2, max_distance=16), "max_distance must exceed .* got max_distance=16 with buckets=32"),
        (lambda: RelativeBias(2, buckets=2, causal=False), "max_distance must exceed .* got .*buckets=2"),
        (
            lambda: FullAttention(8, heads=4, bias=RelativeBias(2)),
            "bias must have one column per head, got 2 ",
        ),
    ],
)
def test_position_modules_name_invalid_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["type", *LLAMA3, *YARN, "beta_fast", "beta_slow", "attention_factor", "truncate"])
def test_any_value_of_an_option_of_scaling_works_or_is_named(name: str) -> None:
    values = ["1", None, math.inf, math.nan, -1, 0, 1.5, True, object(), [], {}, 10**30, 1e-320, torch.zeros(2)]
    for scaling in (LLAMA3, YARN):
        for value in values:
            with contextlib.suppress(TypeError, ValueError):
                rotary(8, scaling={**scaling, name: value})(torch.randn(1, 1, 3, 8))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("yarn", "scaling must be of type Mapping, got str"),
        ({"type": "linear", "factor": "2"}, r"scaling\['factor'\] must be a number, got .*'2'"),
        (
            {"type": "yarn", "factor": 2, "original_max_seq_len": 9.5},
            r"scaling\['original_max_seq_len'\] must be an int",
        ),
        ({"type": "yarn", "factor": 2, "original_max_seq_len": 9, "truncate": 1}, r"\['truncate'\] must be a bool"),
    ],
)
def test_options_of_scaling_of_another_type_are_named(scaling: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Rotary(scaling=scaling)


def t5_bucket(distance: int, *, buckets: int, max_distance: int, causal: bool) -> int:
    """T5's bucket of key position - query position, in whole numbers.

    Half of the buckets hold one distance each. Distance n of the others lies in the t-th where
    t <= log(n / exact) / log(max_distance / exact) * room, that is (max_distance / exact)^t <= (n / exact)^room.
    """
    first = 0
    if causal:
        n = max(-distance, 0)
    else:
        buckets //= 2
        first = buckets if distance > 0 else 0
        n = abs(distance)
    exact = buckets // 2
    if n < exact:
        return first + n
    room, t = buckets - exact, 0
    while t < room - 1 and Fraction(max_distance, exact) ** (t + 1) <= Fraction(n, exact) ** room:
        t += 1
    return first + exact + t


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (32, 20), (32, 1000), (8, 64), (33, 100), (16, 128), (4, 3)]
)
def test_relative_bias_buckets_equal_those_of_t5(buckets: int, max_distance: int, causal: bool) -> None:
    bias = RelativeBias(1, buckets=buckets, max_distance=max_distance, causal=causal)
    distances = range(-max_distance - 60, max_distance + 61)
    want = [t5_bucket(d, buckets=buckets, max_distance=max_distance, causal=causal) for d in distances]
    assert bias.bucket(torch.tensor(distances)).tolist() == want


def test_relative_bias_distances_beyond_max_distance_share_the_last_bucket() -> None:
    assert RelativeBias(1, max_distance=50).bucket(torch.tensor([-50, -51, -5000])).tolist() == [31, 31, 31]
    both = RelativeBias(1, max_distance=50, causal=False)
    assert both.bucket(torch.tensor([-5000, -50, 50, 5000])).tolist() == [15, 15, 31, 31]
    assert both.bucket(torch.tensor([-1, 0, 1])).tolist() == [1, 0, 17]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 150), (7, 150), (150, 7)])
def test_relative_bias_of_every_pair_is_that_of_its_bucket_and_head(queries: int, keys: int, causal: bool) -> None:
    bias = RelativeBias(3, causal=causal)
    pairs = bias(queries, keys, CPU).pairs(queries, keys)
    for i in range(queries):
        for j in range(0, keys, 11):
            distance = j - (i + keys - queries)  # the last query stands at the last key
            bucket = t5_bucket(distance, buckets=32, max_distance=128, causal=causal)
            assert torch.equal(pairs[:, i, j], bias.weight[bucket])


def test_relative_bias_gradients_are_summed_in_float32() -> None:
    bias = RelativeBias(2).bfloat16()
    out = bias(1031, 1031, CPU).pairs(1031, 1031)
    out.sum().backward()
    wide = RelativeBias(2).double()
    wide(1031, 1031, CPU).pairs(1031, 1031).sum().backward()
    assert relative_error(bias.weight.grad, wide.weight.grad) < 4e-3  # one rounding to bfloat16


def test_relative_bias_gets_gradients_through_a_layer() -> None:
    block = FullAttention(8, heads=2, dim_head=4, bias=RelativeBias(2))
    block(torch.randn(1, 5, 8)).sum().backward()
    used = block.bias.weight.grad.any(-1)
    assert used[:5].all()  # distances 0 to 4
    assert not used[5:].any()


@pytest.mark.parametrize("theta", [10000.0, 500000])
@pytest.mark.parametrize("dim", [8, 100])
def test_rotary_frequencies_equal_those_of_rotary_embedding_torch(dim: int, theta: float) -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding
    assert rotary(dim, theta=theta)._freqs[dim] == library(dim, theta=theta).freqs.tolist()
    for scaling, options in (
        ({"type": "linear", "factor": 2.5}, {"interpolate_factor": 2.5}),
        ({"type": "ntk", "factor": 4.0}, {"theta_rescale_factor": 4.0}),
    ):
        x = torch.randn(1, 2, 40, dim)
        want = library(dim, theta=theta, **options).rotate_queries_or_keys(x)
        torch.testing.assert_close(rotary(dim, theta=theta, scaling=scaling)(x), want, atol=1e-5, rtol=0)


def test_a_single_pair_turns_by_one_radian_per_token() -> None:
    x = torch.randn(1, 2, 9, 5)
    assert relative_error(rotary(5, 2)(x), turned(x, 0, width=2, freqs=[1.0])) < 1e-6


def scaled_frequencies(dim: int, theta: float, scaling: dict) -> list[float]:
    """Frequencies in Python's floats, a pair at a time."""
    s, kind = scaling["factor"], scaling["type"]
    freqs = []
    for p in range(dim // 2):
        freq = theta ** (-2 * p / dim)
        turns = scaling.get("original_max_seq_len", 0) * freq / (2 * math.pi)
        if kind == "linear":
            freq /= s
        elif kind == "ntk":
            freq /= s ** (2 * p / (dim - 2))  # 1 for the first pair, s for the last
        elif kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if turns < low:
                freq /= s
            elif turns <= high:
                part = (turns - low) / (high - low)
                freq = part * freq + (1 - part) * freq / s
        else:

            def pair_of(turns: float) -> float:
                """The pair, a fraction, that makes these turns: length * theta^(-2p / dim) = 2 pi turns."""
                return dim / 2 * math.log(scaling["original_max_seq_len"] / (2 * math.pi * turns), theta)

            first, last = pair_of(scaling.get("beta_fast", 32)), pair_of(scaling.get("beta_slow", 1))
            if scaling.get("truncate", True):
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            ramp = min(max((p - first) / (last - first), 0), 1)
            freq = ramp * freq / s + (1 - ramp) * freq
        freqs.append(freq)
    return freqs


SCALINGS = [
    {"type": "linear", "factor": 4},
    {"type": "ntk", "factor": 4.0},
    LLAMA3,
    {**LLAMA3, "original_max_seq_len": 100, "factor": 1},
    YARN,
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 16, "beta_slow": 2.5, "original_max_seq_len": 1000},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("dim", "theta"), [(64, 5e5), (32, 10000.0)])
def test_scaled_frequencies_follow_their_formulas(scaling: dict, dim: int, theta: float) -> None:
    got = rotary(dim + 3, dim, theta=theta, scaling=scaling)._freqs[dim]
    assert got == pytest.approx(scaled_frequencies(dim, theta, scaling), rel=2e-6)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_multiplies_rotated_features_by_its_attention_factor(options: dict, factor: float) -> None:
    x = torch.randn(1, 2, 5, 20)
    out = rotary(20, 16, scaling={**YARN, **options})(x)
    torch.testing.assert_close(out[..., :16].norm(dim=-1), factor * x[..., :16].norm(dim=-1))
    assert torch.equal(out[..., 16:], x[..., 16:])


def xpos_scores(q: Tensor, k: Tensor, i: int, j: int, *, base: float, theta: float = 10000.0) -> Tensor:
    """Scores of rotated queries (..., r) at i and keys at j in float64, a complex number per interleaved pair."""
    r = q.shape[-1]
    p = torch.arange(r // 2, dtype=torch.float64)
    q, k = (torch.view_as_complex(part.double().unflatten(-1, (-1, 2)).contiguous()) for part in (q, k))
    zeta = (2 * p / r + 0.4) / 1.4
    angle = (i - j) * theta ** (-2 * p / r)
    return ((q * k.conj() * torch.polar(torch.ones_like(angle), angle)).real * zeta ** ((i - j) / base)).sum(-1)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2}])
def test_xpos_scores_decay_with_the_distance(pairing: str, scaling: dict | None) -> None:
    part = rotary(11, 8, pairing=pairing, scaling=scaling, xpos=True, xpos_scale_base=20.0)
    q, k = torch.randn(2, 3, 30, 11), torch.randn(2, 1, 30, 11)
    order = torch.arange(8) if pairing == "interleaved" else torch.arange(8).view(2, 4).t().flatten()
    for start in (0, 13, torch.arange(30).expand(2, -1), torch.arange(30).expand(2, -1).to(torch.uint8) + 40):
        queries, keys = part.decay(part(q, start), part(k, start), start)
        scores = queries @ keys.transpose(-1, -2)
        for i in range(0, 30, 7):
            for j in range(0, i + 1, 5):
                factor = 1 if scaling is None else 2
                want = xpos_scores(q[..., i, order], k[..., j, order], i / factor, j / factor, base=20.0) + (
                    q[..., i, 8:] * k[..., j, 8:]
                ).sum(-1)
                torch.testing.assert_close(scores[..., i, j].double(), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"xpos_scale_base": 100}, {"interpolate_factor": 2.5}], ids=str)
def test_xpos_of_rotary_embedding_torch_is_converted_with_equal_scores(options: dict) -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(8, use_xpos=True, **options)
    block = FullAttention(16, heads=2, dim_head=8, rotary=library)
    q, k = torch.randn(2, 1, 2, 40, 8).unbind()
    scores = [
        (queries @ keys.transpose(-1, -2)).tril()
        for queries, keys in (
            library.rotate_queries_and_keys(q, k),
            block.rotary.decay(block.rotary(q), block.rotary(k), 0),
        )
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["full", "cosine_sim", "talking_heads", "relative_gate"])
def test_layers_apply_xpos_in_every_method(name: str) -> None:
    part = Rotary(xpos=True, xpos_scale_base=10.0)
    block, plain = ROTATING[name](part).eval(), ROTATING[name](Rotary()).eval()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 20, 16)
    out = block(x)
    assert relative_error(plain(x), out) > 1e-3
    values, output = block.values_and_output(x)
    assert relative_error(block.attention_map(x) @ values, output) < 1e-5
    first, state = block.step(x[:, :13])
    second, _ = block.step(x[:, 13:], state)
    assert relative_error(torch.cat((first, second), 1), out) < 1e-5
    ids = torch.arange(40, 60).expand(2, -1)
    torch.testing.assert_close(block(x, position_ids=ids), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 3116), (torch.bfloat16, 31161), (torch.float32, 31161)], ids=str
)
def test_xpos_is_finite_up_to_its_limit_and_refuses_positions_beyond(dtype: torch.dtype, limit: int) -> None:
    part = rotary(8, xpos=True)
    q = torch.randn(1, 1, 2, 8).to(dtype)
    for start in (limit - 1, torch.tensor([[0, limit]])):
        for out in part.decay(part(q, start), part(q, start), start):
            assert out.isfinite().all()
            assert (out != 0).all()
    for start in (limit, torch.tensor([[0, limit + 1]]), torch.tensor([[-limit - 1, 0]])):
        with pytest.raises(
            ValueError, match=f"positions must be at most {limit} with xpos in {dtype}, got {limit + 1}"
        ):
            part.decay(q, q, start)


@pytest.mark.parametrize("dim", [8, 4, None])
def test_half_pairing_rotates_permuted_features_as_interleaved_pairs(dim: int | None) -> None:
    width = 8 if dim is None else dim
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2), torch.arange(width, 8)))
    x = torch.randn(2, 3, 11, 8)
    part = rotary(8, dim, pairing="half")
    for start in (0, 7, torch.randint(0, 50, (2, 11))):
        torch.testing.assert_close(part(x[..., order], start), rotary(8, dim)(x, start)[..., order])


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_explicit_positions_rotate_as_a_table_and_may_be_large(pairing: str) -> None:
    part, x = rotary(8, scaling=YARN, pairing=pairing), torch.randn(2, 3, 11, 8)
    ids = torch.randint(0, 60, (2, 11))
    row = part(x[:, :, :1].expand(-1, -1, 60, -1))  # every position
    for b in range(2):
        for n in range(11):
            one = part(x[b : b + 1, :, n : n + 1], int(ids[b, n]))[0, :, 0]
            torch.testing.assert_close(part(x, ids)[b, :, n], one)
    far = part(x, ids.to(torch.int32) + 10**6)
    assert far.isfinite().all()
    assert relative_error(far, rotary(8, scaling=YARN, pairing=pairing)(x, ids)) > 1e-2
    assert row.shape[2] == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        *(
            scaling for scaling in SCALINGS if scaling["type"] != "ntk"
        ),  # transformers has it with a dynamic factor only
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    ],
    ids=str,
)
def test_rotary_table_equals_that_of_transformers(scaling: dict | None) -> None:
    pytest.importorskip("transformers", reason="needs transformers, in the extra hf")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    names = {"type": "rope_type", "original_max_seq_len": "original_max_position_embeddings"}
    parameters = {names.get(name, name): value for name, value in (scaling or {"type": "default"}).items()}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4 * 4096,
        rope_parameters={"rope_theta": 5e5, **parameters},
    )
    ids = torch.stack((torch.arange(300), 17 * torch.arange(300), torch.arange(300) + 10**6))
    x = torch.randn(3, 4, 300, 64)
    cos, sin = LlamaRotaryEmbedding(config)(x, ids)
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    part = rotary(64, theta=5e5, scaling=scaling, pairing="half")
    assert part._freqs[64] == LlamaRotaryEmbedding(config).inv_freq.tolist()
    torch.testing.assert_close(part(x, ids), want, atol=2e-6, rtol=0)
    torch.testing.assert_close(part(x[:1]), want[:1], atol=2e-6, rtol=0)


ROTATING = {
    "full": lambda rotary: FullAttention(16, heads=2, dim_head=8, rotary=rotary),
    "cosine_sim": lambda rotary: CosineSimAttention(16, heads=2, dim_head=8, rotary=rotary),
    "talking_heads": lambda rotary: TalkingHeadsAttention(16, heads=2, dim_head=8, rotary=rotary),
    "axial": lambda rotary: AxialAttention(16, layout=TextImageLayout(2, 3, 4), heads=2, dim_head=8, rotary=rotary),
    "relative_gate": lambda rotary: RelativeGateAttention(16, heads=2, dim_head=8, rotary=rotary),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"theta": 500.0},
        {"theta_rescale_factor": 4.0},
        {"interpolate_factor": 2.5},
        {"freqs_for": "pixel", "max_freq": 20},
        {"freqs_for": "constant", "num_freqs": 4},
        {"custom_freqs": torch.tensor([0.7, -0.3, 0.1, 0.0])},
        {"cache_if_possible": False},
        {"seq_before_head_dim": True},
        {"dim": 4},
    ],
    ids=str,
)
def test_rotary_embedding_torch_object_is_converted_with_equal_angles(options: dict) -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(**{"dim": 8, **options})
    block = FullAttention(16, heads=2, dim_head=8, rotary=library)
    assert type(block.rotary) is Rotary
    x = torch.randn(1, 2, 40, 8)
    want = library.rotate_queries_or_keys(x, seq_dim=-2)
    torch.testing.assert_close(block.rotary(x), want, atol=3e-6, rtol=0)
    later = library.rotate_queries_or_keys(x[:, :, :5], seq_dim=-2, offset=23)
    torch.testing.assert_close(block.rotary(x[:, :, :5], 23), later, atol=3e-6, rtol=0)


def test_converted_rotary_can_be_rebuilt_from_numbers() -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(8, interpolate_factor=2.0)
    block = FullAttention(16, heads=2, dim_head=8, rotary=library)
    numbers = block.rotary._freqs[8]
    assert all(type(number) is float for number in numbers)
    x = torch.randn(1, 2, 5, 8)
    assert torch.equal(rotary(8, 8, freqs=numbers)(x), block.rotary(x))


@pytest.mark.parametrize("name", ROTATING)
def test_every_layer_with_rotary_takes_true_and_objects_of_rotary_embedding_torch(name: str) -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(8)
    x = torch.randn(2, 9, 16)
    ours = ROTATING[name](Rotary())
    plain = ROTATING[name](False)
    for other in (ROTATING[name](True), ROTATING[name](library)):
        other.load_state_dict(ours.state_dict())
        torch.testing.assert_close(other(x), ours(x), atol=1e-6, rtol=1e-5)
    plain.load_state_dict(ours.state_dict())
    assert plain.rotary is None
    assert relative_error(plain(x), ours(x)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learned_freq": True}, "rotary must have learned_freq=False .*, got True"),
        ({"custom_freqs": torch.ones(2, 4)}, r"rotary.freqs must be \(pairs,\), .* custom_freqs of shape \(2, 4\)"),
        ({"dim": 16}, "rotary must rotate 2 ... dim_head features, got rotary.dim=16, dim_head=8"),
    ],
)
def test_rotary_embedding_torch_object_that_cannot_be_converted_is_refused(options: dict, message: str) -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(**{"dim": 8, **options})
    for make in ROTATING.values():
        with pytest.raises(ValueError, match=message):
            make(library)


def test_frequencies_that_require_gradients_are_refused() -> None:
    library = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(8)
    library.freqs.requires_grad_()
    with pytest.raises(ValueError, match=r"rotary.freqs must not require gradients"):
        ROTATING["full"](library)


@pytest.mark.parametrize("rotary", [8, "rotary", torch.nn.Linear(2, 2), Rotary, [1.0]], ids=str)
@pytest.mark.parametrize("name", ROTATING)
def test_layers_reject_a_rotary_of_another_type(name: str, rotary: object) -> None:
    with pytest.raises(TypeError, match="rotary must be a RotaryEmbedding of attention_zoo or of rotary_embedding_"):
        ROTATING[name](rotary)
