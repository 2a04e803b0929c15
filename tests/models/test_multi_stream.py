"""MultiStreamTransformer: streams, embeddings, causal decoding, the diversity loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import MultiStreamTransformer, generate
from attention_zoo.training import mask_tokens, masked_token_loss
from tests.formulas import relative_error


def small(**changes: Any) -> MultiStreamTransformer:
    settings: dict[str, Any] = {"num_tokens": 31, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8, "max_seq_len": 80}
    model = MultiStreamTransformer(**{**settings, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"streams": 3, "separate_embeddings": False, "tie_embeddings": True},
    {"streams": 1},
    {"cross_stream": False},
    {"attention": "cosine_sim", "streams": 3},
    {"attention": ["full", "talking_heads"]},
    {"pre_softmax": "mlp", "post_softmax": None},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_over_any_split_equal_the_whole_pass_padded_on_the_left_too(changes: dict[str, Any]) -> None:
    model, tokens = small(**changes), torch.randint(0, 31, (3, 70))
    mask = torch.arange(70) >= torch.tensor([[0], [9], [66]])
    with torch.no_grad():
        whole = model(tokens, mask=mask)
        for splits in ([70], [1, 66, 3], [64, 1, 5]):
            state, outs, start = None, [], 0
            for size in splits:
                piece = slice(start, start + size)
                out, state = model.step(tokens[:, piece], state, mask=mask[:, piece])
                outs.append(out)
                start += size
            assert relative_error(torch.cat(outs, 1)[mask], whole[mask]) < 1e-5
        alone = model(tokens[1:2, 9:])
    assert relative_error(alone, whole[1:2, 9:]) < 1e-5


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_generation_of_padded_prompts_equals_each_prompt_alone(changes: dict[str, Any]) -> None:
    model, prompt = small(**changes), torch.randint(0, 31, (2, 8))
    mask = torch.arange(8) >= torch.tensor([[0], [5]])
    together = generate(model, prompt, 6, temperature=0, mask=mask)
    assert torch.equal(together[1:], generate(model, prompt[1:, 5:], 6, temperature=0))


def test_reordering_a_state_reorders_rows_with_all_their_streams() -> None:
    model, tokens = small(attention=["full", "talking_heads"]), torch.randint(0, 31, (3, 7))
    index = torch.tensor([2, 0, 0])
    with torch.no_grad():
        _, state = model.step(tokens[:, :6])
        want, _ = model.step(tokens[:, 6:], state)
        got, _ = model.step(tokens[index, 6:], state.reorder(index))
    torch.testing.assert_close(got, want[index], rtol=1e-5, atol=1e-6)


def test_no_logit_of_a_causal_model_depends_on_a_later_token() -> None:
    model, tokens = small(), torch.randint(0, 31, (1, 20))
    changed = tokens.clone()
    changed[:, 11:] = torch.randint(0, 31, (1, 9))
    assert torch.equal(model(tokens)[:, :11], model(changed)[:, :11])
    both_ways = small(causal=False)
    assert not torch.equal(both_ways(tokens)[:, :11], both_ways(changed)[:, :11])


def test_padding_does_not_count_in_the_loss() -> None:
    model, tokens = small(), torch.randint(0, 31, (1, 9))
    padded = torch.cat((torch.randint(0, 31, (1, 4)), tokens), dim=1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(model.loss(padded, mask=mask), model.loss(tokens), rtol=1e-5, atol=1e-6)


def test_the_diversity_loss_is_added_with_its_weight_and_reaches_queries_and_keys() -> None:
    model, tokens = small(), torch.randint(0, 31, (2, 9))
    diversity = model.diversity(tokens[:, :-1])
    assert diversity < 0
    total = model.loss(tokens, diversity_weight=0.1)
    torch.testing.assert_close(total, model.loss(tokens) + 0.1 * diversity, rtol=1e-5, atol=1e-6)
    diversity.backward()
    weight = model.get_parameter("stack.layers.1.sublayers.0.block.block.to_k.weight")
    assert weight.grad is not None
    assert weight.grad.any()
    assert small(streams=1).diversity(tokens) == 0


def test_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    model, tokens = small(streams=3, separate_embeddings=False, tie_embeddings=True), torch.randint(0, 31, (2, 9))
    model.save(tmp_path)
    assert torch.equal(MultiStreamTransformer.load(tmp_path).eval()(tokens), model(tokens))


def test_some_real_tokens_are_hidden_and_no_others_and_the_input_stays_as_it_was() -> None:
    tokens, mask = torch.randint(0, 30, (50, 20)), torch.rand(50, 20) < 0.5
    mask[:, 0] = True
    before = tokens.clone()
    hidden, which = mask_tokens(tokens, 30, probability=0.3, mask=mask)
    assert torch.equal(tokens, before)
    assert not (which & ~mask).any()
    assert which.any(dim=1).all()
    assert torch.equal(hidden, torch.where(which, torch.full_like(tokens, 30), tokens))
    assert 0.2 < which.sum() / mask.sum() < 0.45


def test_a_bidirectional_model_learns_to_fill_in_hidden_tokens() -> None:
    model = small(causal=False).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = (torch.arange(12) + torch.randint(0, 18, (16, 1))) % 30  # each token tells its neighbours
    losses = []
    for _ in range(60):
        loss = masked_token_loss(model, tokens, 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(separate_embeddings=True, tie_embeddings=True), "tie_embeddings needs separate_embeddings=False"),
        (lambda: small(streams=0), "streams must be at least 1, got streams=0"),
        (lambda: small()(torch.zeros(1, 81, dtype=torch.int64)), "max_seq_len=80, got a sequence of 81"),
        (lambda: small(causal=False).loss(torch.zeros(1, 3, dtype=torch.int64)), "loss needs causal=True"),
        (lambda: small(causal=False).step(torch.zeros(1, 3, dtype=torch.int64)), "step needs .*causal=True"),
        (lambda: small(cross_stream=False).diversity(torch.zeros(1, 3, dtype=torch.int64)), "diversity needs streams"),
        (lambda: mask_tokens(torch.zeros(1, 3), 1, probability=0), r"probability must lie in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
