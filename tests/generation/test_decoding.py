"""The decoding loop: greedy and random, padded prompts, end of sequence, modules' modes, errors."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, generate, generate_stream

VOCABULARY = 17
MODELS = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "t5": {"positions": "t5"},
    "no positions": {"positions": None},
    "hybrid": {"attention": [["full", ("cosine_sim", {"groups": 3, "kv_heads": 1})], "cosine_sim"]},
}


def build(**options: object) -> LanguageModel:
    """A model whose largest logits differ by more than rounding."""
    settings = {"num_tokens": VOCABULARY, "dim": 12, "depth": 2, "heads": 2, "dim_head": 6, "max_seq_len": 80}
    model = LanguageModel(**{**settings, **options}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@torch.no_grad()
def greedy(model: LanguageModel, prompt: Tensor, length: int) -> Tensor:
    """The most likely tokens, each computed by a forward pass over all tokens before it."""
    tokens = prompt
    for _ in range(length):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
    return tokens[:, prompt.shape[1] :]


class Script:
    """Not a module: row r predicts the tokens of script r, whatever its input."""

    def __init__(self, *script: list[int], num_tokens: int = VOCABULARY) -> None:
        self.script = torch.tensor(script)
        self.logits = nn.functional.one_hot(self.script, num_tokens).float() * 1e3
        self.calls = 0

    def step(self, tokens: Tensor, state: int | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, int]:
        self.calls += 1
        at = 0 if state is None else state
        return self.logits[:, at : at + 1].expand(-1, tokens.shape[1], -1), at + 1


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_argmax_of_full_forward_passes(name: str) -> None:
    model, prompt = build(**MODELS[name]), ids(3, 7)
    got = generate(model, prompt, 70, temperature=0)
    assert got.shape == (3, 70)
    assert torch.equal(got, greedy(model, prompt, 70))


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_prompts_generate_the_same_tokens_as_unpadded_prompts(name: str) -> None:
    model, prompt = build(**MODELS[name]), ids(4, 9)
    lengths = (9, 5, 1, 8)
    mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths])
    got = generate(model, prompt, 20, temperature=0, mask=mask)
    for row, length in enumerate(lengths):
        assert torch.equal(got[row : row + 1], greedy(model, prompt[row : row + 1, 9 - length :], 20))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44, 1e-320])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    model, prompt = build(), ids(3, 5)
    assert torch.equal(generate(model, prompt, 9, temperature=temperature), greedy(model, prompt, 9))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_tightest_filters_are_greedy_at_any_temperature(options: dict) -> None:
    model, prompt = build(), ids(3, 5)
    assert torch.equal(generate(model, prompt, 9, temperature=5.0, **options), greedy(model, prompt, 9))


def test_top_k_larger_than_the_vocabulary_has_no_effect() -> None:
    model, prompt = build(), ids(3, 5)
    want = generate(model, prompt, 9, generator=seed(1))
    assert torch.equal(generate(model, prompt, 9, top_k=1000, generator=seed(1)), want)


def test_sampling_with_a_generator_is_repeatable_and_does_not_use_the_global_one() -> None:
    model, prompt = build(), ids(3, 5)
    torch.manual_seed(5)
    first, after = generate(model, prompt, 30, generator=seed(1)), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(generate(model, prompt, 30, generator=seed(1)), first)
    assert not torch.equal(generate(model, prompt, 30, generator=seed(2)), first)


def test_sampling_without_a_generator_uses_the_global_seed() -> None:
    model, prompt = build(), ids(3, 5)
    torch.manual_seed(5)
    first = generate(model, prompt, 30)
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt, 30), first)


def test_rows_are_filled_with_eos_after_their_first_eos() -> None:
    model = Script([1, 2, 0, 5, 6], [3, 4, 5, 6, 7], [0, 1, 2, 3, 4])
    got = generate(model, ids(3, 2), 5, temperature=0, eos_token_id=0)
    assert got.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7], [0, 0, 0, 0, 0]]
    assert model.calls == 5


def test_decoding_stops_when_every_row_has_ended() -> None:
    model = Script([1, 0, 5, 6, 7, 8], [3, 4, 0, 6, 7, 8])
    got = generate(model, ids(2, 2), 6, temperature=0, eos_token_id=0)
    assert got.tolist() == [[1, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]]
    assert model.calls == 3
    assert len(list(generate_stream(model, ids(2, 2), 6, temperature=0, eos_token_id=0))) == 3


def test_eos_in_the_prompt_does_not_end_a_row() -> None:
    model = Script([1, 2, 3])
    assert generate(model, torch.zeros(1, 4, dtype=torch.int64), 3, temperature=0, eos_token_id=0).tolist() == [
        [1, 2, 3]
    ]


def test_ended_rows_do_not_change_other_rows() -> None:
    model, prompt = build(), ids(4, 5)
    full = greedy(model, prompt, 20)
    eos = int(full[0, 2])
    got = generate(model, prompt, 20, temperature=0, eos_token_id=eos)
    for row, want in zip(got.tolist(), full.tolist(), strict=True):
        end = want.index(eos) if eos in want else len(want)
        assert row == want[:end] + [eos] * (len(want) - end)


def test_generate_returns_the_stacked_tokens_of_the_stream() -> None:
    model, prompt = build(), ids(3, 5)
    tokens = list(generate_stream(model, prompt, 12, generator=seed(1)))
    assert all(token.shape == (3,) for token in tokens)
    assert torch.equal(torch.stack(tokens, 1), generate(model, prompt, 12, generator=seed(1)))


def test_stream_yields_each_token_before_the_next_step() -> None:
    model = Script([1, 2, 3, 4])
    tokens = generate_stream(model, ids(1, 2), 4, temperature=0)
    assert model.calls == 0
    for calls, want in enumerate([1, 2, 3, 4], start=1):
        assert next(tokens).item() == want
        assert model.calls == calls


def test_zero_new_tokens_run_no_step() -> None:
    model = Script([1])
    assert generate(model, ids(3, 2), 0).shape == (3, 0)
    assert model.calls == 0


def test_prompt_and_mask_are_not_modified() -> None:
    prompt, mask = ids(2, 5), torch.tensor([[False, True, True, True, True], [True] * 5])
    before = prompt.clone(), mask.clone()
    generate(build(), prompt, 9, mask=mask, eos_token_id=3)
    assert torch.equal(prompt, before[0])
    assert torch.equal(mask, before[1])


def test_yielded_tokens_are_not_modified_by_later_steps() -> None:
    tokens, copies = [], []
    for token in generate_stream(build(), ids(2, 5), 12, eos_token_id=3):
        tokens.append(token)
        copies.append(token.clone())
    assert all(map(torch.equal, tokens, copies))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> LanguageModel:
    """A model in training mode with one layer in eval mode."""
    model = build(attn_dropout=0.5).train()
    model.stack.layers[1].eval()
    return model


def test_model_in_training_mode_decodes_without_dropout() -> None:
    model, prompt = build(attn_dropout=0.5, ff_dropout=0.5), ids(2, 5)
    want = generate(model, prompt, 9, temperature=0)
    assert torch.equal(generate(model.train(), prompt, 9, temperature=0), want)


def test_every_submodule_is_restored_to_its_mode() -> None:
    model = mixed()
    before = modes(model)
    generate(model, ids(2, 5), 3)
    assert modes(model) == before


def test_modes_are_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    before = modes(model)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.stack, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, ids(2, 5), 3)
    assert modes(model) == before


def test_modes_are_restored_when_a_stream_is_closed() -> None:
    model = mixed()
    before = modes(model)
    tokens = generate_stream(model, ids(2, 5), 9)
    next(tokens)
    tokens.close()
    assert modes(model) == before


def test_model_has_its_own_mode_between_tokens() -> None:
    model = mixed()
    before = modes(model)
    for _ in generate_stream(model, ids(2, 5), 3):
        assert modes(model) == before


def test_interleaved_streams_of_one_model_are_independent() -> None:
    model, prompt = build(attn_dropout=0.5), ids(1, 5)
    want = generate(model, prompt, 9, temperature=0)
    short, long = (generate_stream(model.train(), prompt, length, temperature=0) for length in (3, 9))
    tokens = []
    for _ in range(3):
        tokens.append(next(long))
        next(short)
    assert next(short, None) is None
    assert torch.equal(torch.stack([*tokens, *long], 1), want)
    assert model.training


def test_modes_are_restored_when_the_callers_loop_raises() -> None:
    model = mixed()
    before = modes(model)

    def fail_at_the_first() -> None:
        for _ in generate_stream(model, ids(2, 5), 9):
            raise KeyError

    with pytest.raises(KeyError):
        fail_at_the_first()
    assert modes(model) == before


@pytest.mark.parametrize("enabled", [True, False])
def test_caller_has_its_own_grad_mode_between_tokens(enabled: bool) -> None:
    model = build()
    with torch.set_grad_enabled(enabled):
        for token in generate_stream(model, ids(2, 5), 4):
            assert torch.is_grad_enabled() == enabled
            assert not token.requires_grad
            loss = model.loss(ids(2, 5))
            assert loss.requires_grad == enabled
        assert torch.is_grad_enabled() == enabled


def test_step_runs_without_grad() -> None:
    recorded = []

    class Watching(Script):
        def step(self, *args: object, **kwargs: object) -> tuple[Tensor, int]:
            recorded.append(torch.is_grad_enabled())
            return super().step(*args, **kwargs)

    generate(Watching([1, 2, 3]), ids(1, 2), 3)
    assert recorded == [False] * 3


def test_stream_started_inside_no_grad_continues_outside() -> None:
    model, prompt = build(), ids(2, 5)
    tokens = generate_stream(model, prompt, 6, temperature=0)
    with torch.no_grad():
        first = [next(tokens) for _ in range(3)]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.stack([*first, *tokens], 1), greedy(model, prompt, 6))


def test_generate_works_in_inference_mode() -> None:
    model, prompt = build(), ids(2, 5)
    with torch.inference_mode():
        got = generate(model, prompt, 70, temperature=0)
    assert torch.equal(got, greedy(model, prompt, 70))


def test_prompt_and_new_tokens_may_fill_max_seq_len() -> None:
    model = build(max_seq_len=8)
    assert generate(model, ids(1, 5), 4).shape == (1, 4)  # the last token is not fed back
    assert generate(model, ids(1, 8), 1).shape == (1, 1)


class Untouchable(nn.Module):
    """A model whose `step` must not be called."""

    num_tokens = VOCABULARY
    max_seq_len = 8

    def step(self, *args: object, **kwargs: object) -> None:
        pytest.fail("step was called")


RIGHT_PADDED = torch.tensor([[True] * 4 + [False], [True] * 5])
HOLES = torch.tensor([[True, False, True, True, True], [True] * 5])
BAD = {
    "too long": (
        {"max_new_tokens": 5},
        ValueError,
        "max_new_tokens must leave .* within max_seq_len=8, got .* 5",
    ),
    "a prompt too long": (
        {"prompt": torch.zeros(1, 9).long(), "max_new_tokens": 1},
        ValueError,
        "within max_seq_len=8",
    ),
    "a negative length": (
        {"max_new_tokens": -1},
        ValueError,
        "max_new_tokens must be at least 0, got .*=-1",
    ),
    "no length": ({"max_new_tokens": None}, TypeError, "max_new_tokens must be an int, got max_new_tokens=None"),
    "a broken end": ({"eos_token_id": 1.5}, TypeError, "eos_token_id must be an int, got eos_token_id=1.5"),
    "a negative end": ({"eos_token_id": -1}, ValueError, "eos_token_id must be at least 0, got eos_token_id=-1"),
    "an end as a bool": ({"eos_token_id": True}, TypeError, "eos_token_id must be an int, got eos_token_id=True"),
    "progress as a string": ({"progress": "no"}, TypeError, "progress must be a bool, got progress='no'"),
    "a broken length": ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an int, got max_new_tokens=2.5"),
    "a float prompt": ({"prompt": torch.zeros(2, 5)}, TypeError, "prompt must be an integer tensor, got .*float32"),
    "a list": ({"prompt": [1, 2]}, TypeError, "prompt must be an integer tensor, got list"),
    "too large an id": ({"prompt": torch.full((2, 5), 17)}, ValueError, "prompt must lie in 0 .* = 16, got .*17"),
    "a negative id": ({"prompt": torch.full((2, 5), -1)}, ValueError, "prompt must lie in 0 .*, got ids from -1"),
    "an empty prompt": ({"prompt": torch.zeros(2, 0).long()}, ValueError, r"prompt must be \(b, n\) with n >= 1"),
    "one axis": ({"prompt": torch.zeros(5).long()}, ValueError, r"prompt must be \(b, n\) .*got shape \(5,\)"),
    "mask shape": ({"mask": RIGHT_PADDED[:, :4]}, ValueError, r"mask must be \(b, n\) = \(2, 5\), got shape \(2, 4\)"),
    "mask dtype": ({"mask": torch.ones(2, 5)}, TypeError, "mask must be a boolean tensor"),
    "padding on the right": ({"mask": RIGHT_PADDED}, ValueError, "mask must pad prompts on the left"),
    "holes": ({"mask": HOLES}, ValueError, "mask must pad prompts on the left"),
    "nothing but padding": ({"mask": torch.zeros(2, 5).bool()}, ValueError, "mask must pad prompts on the left"),
    "temperature": ({"temperature": -0.5}, ValueError, r"temperature must lie in \[0, inf\), got temperature=-0.5"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, r"temperature must lie in \[0, inf\), got .*nan"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be at least 1, got top_k=0"),
    "a broken top_k": ({"top_k": 0.9}, TypeError, "top_k must be an int, got top_k=0.9"),
    "top_p": ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got top_p=0.0"),
    "top_p above 1": ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got top_p=1.5"),
    "min_p": ({"min_p": 1.5}, ValueError, r"min_p must lie in \[0, 1\], got min_p=1.5"),
}


@pytest.mark.parametrize("how", [generate, generate_stream])
@pytest.mark.parametrize("case", BAD)
def test_invalid_arguments_raise_at_the_call_before_any_step(case: str, how) -> None:
    changes, error, message = BAD[case]
    arguments = {"prompt": torch.zeros(2, 5, dtype=torch.int64), "max_new_tokens": 3, **changes}
    with pytest.raises(error, match=message):
        how(Untouchable(), **arguments)


def test_progress_bar_counts_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    generate(Script([1, 2, 3]), ids(1, 2), 3, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_progress_bar_without_tqdm_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_tqdm(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install attention-zoo\[examples\]"):
        generate_stream(Script([1]), ids(1, 2), 1, progress=True)


def test_generate_without_progress_bar_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    generate(Script([1, 2, 3]), ids(1, 2), 3)
    assert capfd.readouterr() == ("", "")


def test_generate_accepts_any_object_with_step() -> None:
    class Echo:
        """Predicts its input."""

        def step(self, tokens: Tensor, state: None = None, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return nn.functional.one_hot(tokens, 30).float(), None

    assert generate(Echo(), torch.tensor([[3, 29], [4, 5]]), 3, temperature=0).tolist() == [[29] * 3, [5] * 3]


def test_generate_stream_returns_an_iterator() -> None:
    assert isinstance(generate_stream(Script([1]), ids(1, 2), 1), Iterator)


def test_eos_token_id_outside_the_vocabulary_raises_before_any_step() -> None:
    model = LanguageModel(num_tokens=7, dim=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"eos_token_id must lie in 0 \.\.\. num_tokens - 1 = 6, got eos_token_id=7"):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), 3, eos_token_id=7)


def test_generated_tokens_are_usable_in_training() -> None:
    model = LanguageModel(num_tokens=7, dim=16, depth=1, heads=2)
    tokens = generate(model, torch.zeros(2, 2, dtype=torch.int64), 5)
    assert not tokens.is_inference()
    model.loss(tokens).backward()


def test_model_without_step_raises() -> None:
    with pytest.raises(TypeError, match="model must have step to be sampled from, got Linear"):
        generate(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_prompts_of_any_integer_dtype_generate_int64_tokens(dtype: torch.dtype) -> None:
    model, prompt = build(), ids(2, 5)
    got = generate(model, prompt.to(dtype), 4, temperature=0)
    assert got.dtype == torch.int64
    assert torch.equal(got, generate(model, prompt, 4, temperature=0))
    assert generate(model, prompt.to(dtype), 0).dtype == torch.int64


def test_greedy_decoding_of_a_diverged_model_raises() -> None:
    model = build()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="logits must not be NaN"):
        generate(model, ids(2, 5), 3, temperature=0)
