"""The loop that samples: greedy and random, padded prompts, ends, modes, and everything refused before any work."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import LanguageModel, generate, generate_stream
from attention_zoo.generation import Sampler

VOCABULARY = 17
MODELS = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "t5": {"positions": "t5"},
    "no positions": {"positions": None},
    "hybrid": {"attention": [["full", ("cosine_sim", {"groups": 3, "kv_heads": 1})], "cosine_sim"]},
}


def build(**options: object) -> LanguageModel:
    """A model whose logits differ enough that rounding does not decide between tokens."""
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
    """The most likely tokens one after another, each from a full pass over all before it."""
    tokens = prompt
    for _ in range(length):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
    return tokens[:, prompt.shape[1] :]


class Script:
    """A model that is no module: row r says the tokens of script r, whatever it is told."""

    def __init__(self, *script: list[int], num_tokens: int = VOCABULARY) -> None:
        self.script = torch.tensor(script)
        self.logits = nn.functional.one_hot(self.script, num_tokens).float() * 1e3
        self.calls = 0

    def step(self, tokens: Tensor, state: int | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, int]:
        self.calls += 1
        at = 0 if state is None else state
        return self.logits[:, at : at + 1].expand(-1, tokens.shape[1], -1), at + 1


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_the_full_pass_token_by_token(name: str) -> None:
    model, prompt = build(**MODELS[name]), ids(3, 7)
    got = generate(model, prompt, 70, temperature=0)
    assert got.shape == (3, 70)
    assert torch.equal(got, greedy(model, prompt, 70))


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_prompts_get_the_tokens_of_each_alone(name: str) -> None:
    model, prompt = build(**MODELS[name]), ids(4, 9)
    lengths = (9, 5, 1, 8)
    mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths])
    got = generate(model, prompt, 20, temperature=0, mask=mask)
    for row, length in enumerate(lengths):
        assert torch.equal(got[row : row + 1], greedy(model, prompt[row : row + 1, 9 - length :], 20))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44, 1e-320])
def test_a_tiny_temperature_is_greedy_and_stays_finite(temperature: float) -> None:
    model, prompt = build(), ids(3, 5)
    assert torch.equal(generate(model, prompt, 9, temperature=temperature), greedy(model, prompt, 9))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_filter_is_greedy_at_any_temperature(options: dict) -> None:
    model, prompt = build(), ids(3, 5)
    assert torch.equal(generate(model, prompt, 9, temperature=5.0, **options), greedy(model, prompt, 9))


def test_top_k_larger_than_the_vocabulary_changes_nothing() -> None:
    model, prompt = build(), ids(3, 5)
    want = generate(model, prompt, 9, generator=seed(1))
    assert torch.equal(generate(model, prompt, 9, top_k=1000, generator=seed(1)), want)


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_one() -> None:
    model, prompt = build(), ids(3, 5)
    torch.manual_seed(5)
    first, after = generate(model, prompt, 30, generator=seed(1)), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(generate(model, prompt, 30, generator=seed(1)), first)
    assert not torch.equal(generate(model, prompt, 30, generator=seed(2)), first)


def test_the_global_seed_serves_where_no_generator_is_given() -> None:
    model, prompt = build(), ids(3, 5)
    torch.manual_seed(5)
    first = generate(model, prompt, 30)
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt, 30), first)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature: float) -> None:
    logits, draws = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20_000
    drawn = Sampler(temperature=temperature, generator=seed(0))(logits.expand(draws, 4))
    want = (logits.double() / temperature).softmax(-1)
    share = torch.bincount(drawn, minlength=4) / draws
    assert ((share - want).abs() < 5 * (want * (1 - want) / draws).sqrt()).all()  # five standard deviations


def test_filters_act_after_the_temperature() -> None:
    logits = torch.tensor([[4.0, 2.0, 0.0, -2.0]]).expand(500, 4)
    # at temperature 4 the probabilities are 0.47, 0.28, 0.17, 0.10; at temperature 1 one token has 0.86
    assert set(Sampler(temperature=4.0, top_p=0.7, generator=seed(0))(logits).tolist()) == {0, 1}
    assert set(Sampler(temperature=4.0, min_p=0.3, generator=seed(0))(logits).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_dtype_may_be_sampled(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, 0.0, -6e4]], dtype=dtype)
    assert Sampler(temperature=0.1)(logits).tolist() == [0]


def test_a_row_stops_at_its_eos_and_is_filled_with_it() -> None:
    model = Script([1, 2, 0, 5, 6], [3, 4, 5, 6, 7], [0, 1, 2, 3, 4])
    got = generate(model, ids(3, 2), 5, temperature=0, eos_token_id=0)
    assert got.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7], [0, 0, 0, 0, 0]]
    assert model.calls == 5


def test_nothing_is_computed_after_every_row_has_ended() -> None:
    model = Script([1, 0, 5, 6, 7, 8], [3, 4, 0, 6, 7, 8])
    got = generate(model, ids(2, 2), 6, temperature=0, eos_token_id=0)
    assert got.tolist() == [[1, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]]
    assert model.calls == 3
    assert len(list(generate_stream(model, ids(2, 2), 6, temperature=0, eos_token_id=0))) == 3


def test_an_eos_in_the_prompt_does_not_end_a_row() -> None:
    model = Script([1, 2, 3])
    assert generate(model, torch.zeros(1, 4, dtype=torch.int64), 3, temperature=0, eos_token_id=0).tolist() == [[1, 2, 3]]


def test_rows_that_have_ended_leave_the_others_alone() -> None:
    model, prompt = build(), ids(4, 5)
    whole = greedy(model, prompt, 20)
    eos = int(whole[0, 2])
    got = generate(model, prompt, 20, temperature=0, eos_token_id=eos)
    for row, want in zip(got.tolist(), whole.tolist(), strict=True):
        end = want.index(eos) if eos in want else len(want)
        assert row == want[:end] + [eos] * (len(want) - end)


def test_a_stream_stacked_is_what_generate_returns() -> None:
    model, prompt = build(), ids(3, 5)
    tokens = list(generate_stream(model, prompt, 12, generator=seed(1)))
    assert all(token.shape == (3,) for token in tokens)
    assert torch.equal(torch.stack(tokens, 1), generate(model, prompt, 12, generator=seed(1)))


def test_a_stream_gives_each_token_before_computing_the_next() -> None:
    model = Script([1, 2, 3, 4])
    tokens = generate_stream(model, ids(1, 2), 4, temperature=0)
    assert model.calls == 0
    for calls, want in enumerate([1, 2, 3, 4], start=1):
        assert next(tokens).item() == want
        assert model.calls == calls


def test_no_new_tokens_asked_for_are_none() -> None:
    model = Script([1])
    assert generate(model, ids(3, 2), 0).shape == (3, 0)
    assert model.calls == 0


def test_the_prompt_and_its_mask_stay_as_they_were() -> None:
    prompt, mask = ids(2, 5), torch.tensor([[False, True, True, True, True], [True] * 5])
    before = prompt.clone(), mask.clone()
    generate(build(), prompt, 9, mask=mask, eos_token_id=3)
    assert torch.equal(prompt, before[0])
    assert torch.equal(mask, before[1])


def test_new_tokens_fed_back_leave_those_already_given_alone() -> None:
    tokens, copies = [], []
    for token in generate_stream(build(), ids(2, 5), 12, eos_token_id=3):
        tokens.append(token)
        copies.append(token.clone())
    assert all(map(torch.equal, tokens, copies))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> LanguageModel:
    """A model in training of which one part is frozen in eval mode."""
    model = build(attn_dropout=0.5).train()
    model.stack.layers[1].eval()
    return model


def test_a_model_in_training_is_sampled_without_dropout() -> None:
    model, prompt = build(attn_dropout=0.5, ff_dropout=0.5), ids(2, 5)
    want = generate(model, prompt, 9, temperature=0)
    assert torch.equal(generate(model.train(), prompt, 9, temperature=0), want)


def test_every_part_gets_back_the_mode_it_had() -> None:
    model = mixed()
    before = modes(model)
    generate(model, ids(2, 5), 3)
    assert modes(model) == before


def test_modes_come_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    before = modes(model)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.stack, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, ids(2, 5), 3)
    assert modes(model) == before


def test_modes_come_back_when_a_stream_is_closed() -> None:
    model = mixed()
    before = modes(model)
    tokens = generate_stream(model, ids(2, 5), 9)
    next(tokens)
    tokens.close()
    assert modes(model) == before


def test_between_tokens_the_model_has_its_own_mode() -> None:
    model = mixed()
    before = modes(model)
    for _ in generate_stream(model, ids(2, 5), 3):
        assert modes(model) == before


def test_streams_of_one_model_may_run_side_by_side() -> None:
    model, prompt = build(attn_dropout=0.5), ids(1, 5)
    want = generate(model, prompt, 9, temperature=0)
    short, long = (generate_stream(model.train(), prompt, length, temperature=0) for length in (3, 9))
    tokens = []
    for _ in range(3):
        tokens.append(next(long))
        next(short)
    assert next(short, None) is None  # the one that began second ends first
    assert torch.equal(torch.stack([*tokens, *long], 1), want)
    assert model.training


def test_modes_come_back_when_the_callers_loop_fails() -> None:
    model = mixed()
    before = modes(model)

    def fail_at_the_first() -> None:
        for _ in generate_stream(model, ids(2, 5), 9):
            raise KeyError

    with pytest.raises(KeyError):
        fail_at_the_first()
    assert modes(model) == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_grad_mode_is_its_own_between_tokens(enabled: bool) -> None:
    model = build()
    with torch.set_grad_enabled(enabled):
        for token in generate_stream(model, ids(2, 5), 4):
            assert torch.is_grad_enabled() == enabled
            assert not token.requires_grad
            loss = model.loss(ids(2, 5))
            assert loss.requires_grad == enabled
        assert torch.is_grad_enabled() == enabled


def test_no_graph_is_recorded_while_a_token_is_computed() -> None:
    recorded = []

    class Watching(Script):
        def step(self, *args: object, **kwargs: object) -> tuple[Tensor, int]:
            recorded.append(torch.is_grad_enabled())
            return super().step(*args, **kwargs)

    generate(Watching([1, 2, 3]), ids(1, 2), 3)
    assert recorded == [False] * 3


def test_a_stream_may_be_stopped_inside_no_grad_and_go_on_outside() -> None:
    model, prompt = build(), ids(2, 5)
    tokens = generate_stream(model, prompt, 6, temperature=0)
    with torch.no_grad():
        first = [next(tokens) for _ in range(3)]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.stack([*first, *tokens], 1), greedy(model, prompt, 6))


def test_sampling_works_in_inference_mode() -> None:
    model, prompt = build(), ids(2, 5)
    with torch.inference_mode():
        got = generate(model, prompt, 70, temperature=0)
    assert torch.equal(got, greedy(model, prompt, 70))


def test_a_prompt_and_new_tokens_may_fill_max_seq_len() -> None:
    model = build(max_seq_len=8)
    assert generate(model, ids(1, 5), 4).shape == (1, 4)  # the last token is never fed back
    assert generate(model, ids(1, 8), 1).shape == (1, 1)


class Untouchable(nn.Module):
    """A model that must not be run."""

    num_tokens = VOCABULARY
    max_seq_len = 8

    def step(self, *args: object, **kwargs: object) -> None:
        pytest.fail("work was done")


RIGHT_PADDED = torch.tensor([[True] * 4 + [False], [True] * 5])
HOLES = torch.tensor([[True, False, True, True, True], [True] * 5])
BAD = {
    "too long": ({"max_new_tokens": 5}, ValueError, "max_new_tokens must leave prompt and new tokens within max_seq_len=8, got .* 5"),
    "a prompt too long": ({"prompt": torch.zeros(1, 9).long(), "max_new_tokens": 1}, ValueError, "within max_seq_len=8"),
    "a negative length": ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got max_new_tokens=-1"),
    "a broken length": ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an int, got max_new_tokens=2.5"),
    "a float prompt": ({"prompt": torch.zeros(2, 5)}, TypeError, "prompt must be an int64 or int32 tensor .*float32"),
    "a list": ({"prompt": [1, 2]}, TypeError, "prompt must be an int64 or int32 tensor of ids, got list"),
    "too large an id": ({"prompt": torch.full((2, 5), 17)}, ValueError, "prompt must lie in 0 .* = 16, got .*17"),
    "a negative id": ({"prompt": torch.full((2, 5), -1)}, ValueError, "prompt must lie in 0 .*, got ids from -1"),
    "an empty prompt": ({"prompt": torch.zeros(2, 0).long()}, ValueError, r"prompt must be \(b, n\) with n >= 1"),
    "one axis": ({"prompt": torch.zeros(5).long()}, ValueError, r"prompt must be \(b, n\) .*got shape \(5,\)"),
    "mask shape": ({"mask": RIGHT_PADDED[:, :4]}, ValueError, r"mask must be \(b, n\) = \(2, 5\), got shape \(2, 4\)"),
    "mask dtype": ({"mask": torch.ones(2, 5)}, TypeError, "mask must be a boolean tensor"),
    "padding on the right": ({"mask": RIGHT_PADDED}, ValueError, "mask must pad prompts on the left"),
    "holes": ({"mask": HOLES}, ValueError, "mask must pad prompts on the left"),
    "nothing but padding": ({"mask": torch.zeros(2, 5).bool()}, ValueError, "mask must pad prompts on the left"),
    "temperature": ({"temperature": -0.5}, ValueError, "temperature must be at least 0, got temperature=-0.5"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "temperature must be at least 0, got .*nan"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be at least 1, got top_k=0"),
    "a broken top_k": ({"top_k": 0.9}, TypeError, "top_k must be an int, got top_k=0.9"),
    "top_p": ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got top_p=0.0"),
    "top_p above 1": ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got top_p=1.5"),
    "min_p": ({"min_p": 1.5}, ValueError, r"min_p must lie in \[0, 1\], got min_p=1.5"),
}


@pytest.mark.parametrize("how", [generate, generate_stream])
@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit_are_named_at_the_call_before_any_work(case: str, how) -> None:
    changes, error, message = BAD[case]
    arguments = {"prompt": torch.zeros(2, 5, dtype=torch.int64), "max_new_tokens": 3, **changes}
    with pytest.raises(error, match=message):
        how(Untouchable(), **arguments)


def test_a_progress_bar_counts_the_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    generate(Script([1, 2, 3]), ids(1, 2), 3, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_without_tqdm_a_progress_bar_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_tqdm(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install attention-zoo\[examples\]"):
        generate_stream(Script([1]), ids(1, 2), 1, progress=True)


def test_without_a_progress_bar_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    generate(Script([1, 2, 3]), ids(1, 2), 3)
    assert capfd.readouterr() == ("", "")


def test_anything_with_step_can_be_sampled() -> None:
    class Echo:
        """Says the token that it was told last."""

        def step(self, tokens: Tensor, state: None = None, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return nn.functional.one_hot(tokens, 30).float(), None

    assert generate(Echo(), torch.tensor([[3, 29], [4, 5]]), 3, temperature=0).tolist() == [[29] * 3, [5] * 3]


def test_a_stream_is_an_iterator() -> None:
    assert isinstance(generate_stream(Script([1]), ids(1, 2), 1), Iterator)


def test_an_eos_outside_the_vocabulary_is_refused_before_any_work() -> None:
    model = LanguageModel(num_tokens=7, dim=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"eos_token_id must lie in 0 \.\.\. num_tokens - 1 = 6, got eos_token_id=7"):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), 3, eos_token_id=7)


def test_sampled_tokens_are_ordinary_tensors_that_a_training_step_may_use() -> None:
    model = LanguageModel(num_tokens=7, dim=16, depth=1, heads=2)
    tokens = generate(model, torch.zeros(2, 2, dtype=torch.int64), 5)
    assert not tokens.is_inference()
    model.loss(tokens).backward()


def test_a_model_without_step_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="model must have step to be sampled from, got Linear"):
        generate(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64), 3)  # type: ignore[arg-type]
