"""`LanguageModel` with any blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import FullAttention, LanguageModel, RelativeBias, Rotary
from tests.formulas import relative_error

SMALL = {"num_tokens": 17, "dim": 12, "depth": 2, "heads": 2, "dim_head": 6, "max_seq_len": 31}
HYBRIDS = {
    "full": {},
    "cosine_sim": {"attention": "cosine_sim"},
    "hybrid": {"attention": ["full", ("cosine_sim", {"groups": 3, "kv_heads": 1})]},
    "two blocks a layer": {"attention": [["full", "cosine_sim"], "full"], "depth": 3},
    "deepnorm, rms": {"residual": "deepnorm", "norm": "rms", "feedforward": "swiglu"},
    "tied": {"tie_embeddings": True, "residual": "sandwich"},
}
POSITIONS = ("auto", "rotary", "learned", "t5", None)


class Plain(nn.Module):
    """A user-defined block without shared arguments."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = FullAttention(dim, heads=2, dim_head=6)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.block(x, mask=mask)


def build(**options: object) -> LanguageModel:
    return LanguageModel(**{**SMALL, **options}).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(SMALL["num_tokens"], shape)


def block_of(model: LanguageModel, layer: int) -> nn.Module:
    return model.stack.layers[layer].sublayers[0].block


def test_forward_returns_one_logit_per_token_id() -> None:
    assert build()(ids(3, 7)).shape == (3, 7, 17)


def test_logits_do_not_depend_on_later_tokens() -> None:
    model, tokens = build(attention=["full", "cosine_sim"]), ids(2, 9)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 17
    assert torch.equal(model(tokens)[:, :5], model(changed)[:, :5])


def test_auto_positions_give_rotary_only_to_blocks_that_take_it() -> None:
    model = LanguageModel(num_tokens=17, dim=12, depth=2, attention=["full", Plain])
    assert isinstance(block_of(model, 0).rotary, Rotary)
    assert model.positions is None
    assert LanguageModel(num_tokens=17, dim=12, depth=1, attention=Plain).positions is None


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_models_with_positions_depend_on_the_order_of_the_past(positions: str | None) -> None:
    model = build(positions=positions, depth=1).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = torch.tensor([[3, 1, 4, 5, 9, 2, 6]])
    shuffled = tokens[:, [4, 2, 0, 3, 5, 1, 6]]
    same = torch.allclose(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-12, rtol=0)
    assert same == (positions is None)


def test_t5_positions_share_one_bias_between_all_blocks() -> None:
    model = build(positions="t5", attention=["full", "cosine_sim"])
    assert isinstance(block_of(model, 0).bias, RelativeBias)
    assert block_of(model, 0).bias is block_of(model, 1).bias
    assert block_of(model, 0).rotary is None


def test_learned_positions_are_added_to_the_embedding() -> None:
    model, tokens = build(positions="learned"), ids(2, 7)
    captured: list[Tensor] = []
    model.stack.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    model(tokens)
    assert torch.equal(captured[0], model.token_embedding.weight[tokens] + model.positions.weight[:7])


def test_tied_embeddings_get_gradients_from_inputs_and_logits() -> None:
    model, tokens = build(tie_embeddings=True), ids(2, 7)
    assert model.to_logits is None
    assert sum(p.shape == (17, 12) for p in model.parameters()) == 1
    hidden: list[Tensor] = []
    model.stack.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    assert relative_error(model(tokens), hidden[0] @ model.token_embedding.weight.t()) < 1e-6
    model.loss(tokens).backward()
    assert model.token_embedding.weight.grad.any(-1).all()  # tokens outside the input get gradients as targets


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_unpadded_rows(side: str, hybrid: str, positions: str | None) -> None:
    model, tokens = build(positions=positions, **HYBRIDS[hybrid]).double(), ids(3, 11)
    lengths = (11, 4, 1)
    mask = torch.stack([torch.arange(11) < length for length in lengths])
    mask = mask.flip(1) if side == "left" else mask
    got = model(tokens, mask=mask)
    for row, valid in enumerate(mask):
        want = model(tokens[row, valid][None])[0]
        # the positions differ: rotary angles are float32
        torch.testing.assert_close(got[row, valid], want, atol=1e-7, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("splits", [[11], [1] * 11, [3, 1, 6, 1]])
@torch.no_grad()
def test_steps_equal_the_full_pass(splits: list[int], hybrid: str, positions: str | None) -> None:
    model, tokens = build(positions=positions, **HYBRIDS[hybrid]).double(), ids(2, 11)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :2] = False
    want = model(tokens, mask=mask)
    outs, state, start = [], None, 0
    for count in splits:
        part = slice(start, start + count)
        out, state = model.step(tokens[:, part], state, mask=mask[:, part])
        outs.append(out)
        start += count
    assert state.length == 11
    torch.testing.assert_close(torch.cat(outs, 1)[mask], want[mask], atol=1e-12, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_older_states_remain_valid_after_newer_steps(positions: str | None) -> None:
    model, tokens = build(positions=positions).double(), ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[2, :3] = False
    _, old = model.step(tokens[:, :5], mask=mask[:, :5])
    newer = old
    for _ in range(3):
        _, newer = model.step(ids(3, 1), newer)
    index = torch.tensor([2, 0, 0, 1])
    got, _ = model.step(tokens[index, 5:], old.reorder(index))
    torch.testing.assert_close(got, model(tokens[index], mask=mask[index])[:, 5:], atol=1e-12, rtol=0)
    again, _ = model.step(tokens[:, 5:], old)
    torch.testing.assert_close(again, model(tokens, mask=mask)[:, 5:], atol=1e-12, rtol=0)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), (n,), for logits (n, num_tokens)."""
    powers = logits.exp()
    return -(powers.gather(-1, targets[:, None])[:, 0] / powers.sum(-1)).log()


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_mean_cross_entropy_of_valid_tokens(masked: bool) -> None:
    model, tokens = build(positions="learned").double(), ids(3, 8)
    mask = None
    rows = list(tokens)
    if masked:
        mask = torch.stack([torch.arange(8) >= 8 - length for length in (8, 3, 2)])
        rows = [row[valid] for row, valid in zip(tokens, mask, strict=True)]
    want = torch.cat([cross_entropies(model(row[None, :-1])[0], row[1:]) for row in rows]).mean()
    assert relative_error(model.loss(tokens, mask=mask), want) < 1e-12


def test_loss_terms_have_the_count_of_targets() -> None:
    model, tokens = build(), ids(2, 8)
    mask = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    for given, count in ((None, 14), (mask, 11)):
        (term,) = model.loss_terms(tokens, mask=given)
        assert (int(term.count), term.weight) == (count, 1.0)
        assert torch.equal(term.mean, model.loss(tokens, mask=given))


def test_tokens_in_padding_change_neither_loss_nor_gradients() -> None:
    model, tokens = build(), ids(2, 8)
    mask = torch.tensor([[False] * 3 + [True] * 5, [True] * 6 + [False] * 2])
    results = []
    for filler in (0, 9):
        model.zero_grad()
        loss = model.loss(tokens.masked_fill(~mask, filler), mask=mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_int32_ids_are_accepted() -> None:
    model, tokens = build(), ids(2, 7)
    assert torch.equal(model(tokens.int()), model(tokens))
    assert torch.equal(model.loss(tokens.int()), model.loss(tokens))


def test_dropout_is_applied_in_training_only() -> None:
    model, tokens = build(attn_dropout=0.3, ff_dropout=0.2, attention=["full", "cosine_sim"]), ids(2, 7)
    for layer in model.stack.layers:
        assert layer.sublayers[0].block.dropout == 0.3
        assert layer.sublayers[1].block.dropout == 0.2
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("positions", POSITIONS)
def test_bfloat16_models_are_close_to_float64(positions: str | None) -> None:
    model, tokens = build(positions=positions, attention=["full", "cosine_sim"]), ids(2, 31)
    mask = torch.ones(2, 31, dtype=torch.bool)
    mask[0, :5] = False
    nn.init.normal_(model.token_embedding.weight)  # large enough that the norms do not amplify rounding
    wide = copy.deepcopy(model).bfloat16().double()
    model = model.bfloat16()
    logits = model(tokens, mask=mask)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits[mask], wide(tokens, mask=mask)[mask]) < 3e-2
    model.loss(tokens, mask=mask).backward()
    wide.loss(tokens, mask=mask).backward()
    grads = [torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (model, wide)]
    assert relative_error(*grads) < 5e-2


def test_autocast_returns_bfloat16_logits_and_a_float32_loss() -> None:
    model, tokens = build(positions="t5"), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens), model.loss(tokens)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert relative_error(logits, model(tokens)) < 3e-2
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("positions", POSITIONS)
def test_copies_compute_the_same_with_separate_weights(duplicate, positions: str | None) -> None:
    model, tokens = build(positions=positions, tie_embeddings=True), ids(2, 7)
    want = model(tokens)
    twin = duplicate(model)
    assert torch.equal(twin(tokens), want)
    nn.init.normal_(twin.token_embedding.weight)
    assert torch.equal(model(tokens), want)


def test_model_overfits_a_sequence() -> None:
    model = build(attention=["full", "cosine_sim"], dim=24).train()
    tokens = ids(1, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # log 17 = 2.8 at the start


def test_sequences_longer_than_max_seq_len_raise() -> None:
    for positions in POSITIONS:
        model = build(positions=positions, max_seq_len=7)
        assert model(ids(1, 7)).shape[1] == 7
        assert model.loss(ids(1, 8)).isfinite()  # the last token is only predicted
        with pytest.raises(ValueError, match="tokens must fit max_seq_len=7, got a sequence of 8 tokens"):
            model(ids(1, 8))
        _, state = model.step(ids(1, 6))
        _, state = model.step(ids(1, 1), state)
        with pytest.raises(ValueError, match="tokens must fit max_seq_len=7, got a sequence of 8 tokens"):
            model.step(ids(1, 1), state)


def test_model_without_max_seq_len_has_no_length_limit() -> None:
    assert build(max_seq_len=None)(ids(1, 600)).shape[1] == 600


BAD = {
    "positions": ({"positions": "rotery"}, ValueError, "positions must be one of .*did you mean 'rotary'"),
    "learned without a limit": (
        {"positions": "learned", "max_seq_len": None},
        ValueError,
        "max_seq_len must be given with positions='learned', got max_seq_len=None",
    ),
    "rotary that no block takes": ({"positions": "rotary", "attention": Plain}, ValueError, "rotary must be taken by"),
    "t5 that no block takes": ({"positions": "t5", "attention": "cross"}, ValueError, "bias must be taken by"),
    "num_tokens": ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1, got num_tokens=0"),
    "dim": ({"dim": -8}, ValueError, "dim must be at least 1, got dim=-8"),
    "depth": ({"depth": 1.0}, TypeError, "depth must be an int, got depth=1.0"),
    "max_seq_len": ({"max_seq_len": -1}, ValueError, "max_seq_len must be at least 1, got max_seq_len=-1"),
    "heads": ({"heads": -1}, ValueError, "heads must be at least 1, got heads=-1"),
    "an odd block": ({"attention": [3]}, TypeError, "attention must be made of blocks, .* got 3"),
    "a block without its name": ({"attention": None}, TypeError, "attention must be a block or a list, .* got None"),
    "an unknown block": ({"attention": "cosin_sim"}, ValueError, r"attention must be one of \[.*mean 'cosine_sim'"),
    "kv_heads": ({"attention": ("full", {"kv_heads": 4})}, ValueError, "kv_heads must divide heads, got kv_heads=4"),
    "attn_dropout": ({"attn_dropout": 1.5}, ValueError, r"attn_dropout must lie in \[0, 1\), got attn_dropout=1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_constructor_arguments_raise(case: str) -> None:
    changes, error, message = BAD[case]
    options = {**SMALL, **changes}
    if options.get("attention") is Plain:
        options = {key: value for key, value in options.items() if key not in ("heads", "dim_head")}
    with pytest.raises(error, match=message):
        LanguageModel(**options)


BAD_INPUTS = {
    "a float dtype": ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens must be an integer tensor.* torch.float32"),
    "a list": ({"tokens": [[1, 2]]}, TypeError, "tokens must be an integer tensor, got list"),
    "too large an id": ({"tokens": torch.full((2, 5), 17)}, ValueError, r"tokens must lie in 0 .* = 16, got ids .*17"),
    "a negative id": ({"tokens": torch.full((2, 5), -1)}, ValueError, "tokens must lie in 0 .*, got ids from -1"),
    "no token": (
        {"tokens": torch.zeros(2, 0).long()},
        ValueError,
        r"tokens must be \(b, n\) with n >= ., got .*\(2, 0",
    ),
    "no batch axis": ({"tokens": torch.zeros(5).long()}, ValueError, r"tokens must be \(b, n\) .*got shape \(5,\)"),
    "mask shape": ({"mask": torch.ones(2, 4).bool()}, ValueError, r"mask must be \(b, n\) = \(2, 5\), got .*\(2, 4\)"),
    "mask dtype": ({"mask": torch.ones(2, 5)}, TypeError, "mask must be a boolean tensor.* torch.float32"),
    "mask of a list": ({"mask": [True]}, TypeError, "mask must be a boolean tensor.* got list"),
}


@pytest.mark.parametrize("how", ["forward", "loss", "step"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_invalid_inputs_raise(case: str, how: str) -> None:
    changes, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        getattr(build(), how)(**{"tokens": torch.zeros(2, 5, dtype=torch.int64), **changes})


def test_loss_of_one_token_raises() -> None:
    with pytest.raises(ValueError, match=r"tokens must be \(b, n\) with n >= 2, got shape \(2, 1\)"):
        build().loss(ids(2, 1))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_state_of_another_batch_raises(positions: str | None, batch: int) -> None:
    model = build(positions=positions)
    _, state = model.step(ids(3, 4))
    with pytest.raises(ValueError, match=r"state must come from this (layer|model) and batch"):
        model.step(ids(batch, 1), state)


def test_state_of_another_model_raises() -> None:
    _, state = build().step(ids(3, 4))
    with pytest.raises(TypeError, match="state must be a LanguageModelState of an earlier step, got StackState"):
        build().step(ids(3, 1), state.stack)
    with pytest.raises(TypeError, match="state must be a StackState of 3 blocks, got one of 2 blocks"):
        build(depth=3).step(ids(3, 1), state)
    with pytest.raises(ValueError, match="state must come from this layer and batch"):
        build(heads=3).step(ids(3, 1), state)
    with pytest.raises(ValueError, match=r"state must come from this model and batch: counts of .* got none"):
        build(positions="learned").step(ids(3, 1), state)
