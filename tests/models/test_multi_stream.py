"""`MultiStreamTransformer`: streams, embeddings, causal decoding, the diversity loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import MultiStreamTransformer, generate
from tests.formulas import relative_error


def small(**changes: Any) -> MultiStreamTransformer:
    settings: dict[str, Any] = {"num_tokens": 31, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8, "max_seq_len": 80}
    model = MultiStreamTransformer(**{**settings, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


PAIRS = ("talking_heads", {"streams": 2})
VARIANTS: list[dict[str, Any]] = [
    {},
    {"streams": 3, "separate_embeddings": False, "tie_embeddings": True},
    {"streams": 1},
    {"cross_stream": False},
    {"attention": "cosine_sim", "streams": 3},
    {"attention": ["full", "talking_heads"]},
    {"pre_softmax": "mlp", "post_softmax": None},
    {"streams": 4, "attention": PAIRS},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_over_any_split_equal_forward_with_left_padding(changes: dict[str, Any]) -> None:
    model, tokens = small(**changes), torch.randint(0, 31, (3, 70))
    mask = torch.arange(70) >= torch.tensor([[0], [9], [66]])
    with torch.no_grad():
        full = model(tokens, mask=mask)
        for splits in ([70], [1, 66, 3], [64, 1, 5]):
            state, outs, start = None, [], 0
            for size in splits:
                piece = slice(start, start + size)
                out, state = model.step(tokens[:, piece], state, mask=mask[:, piece])
                outs.append(out)
                start += size
            assert relative_error(torch.cat(outs, 1)[mask], full[mask]) < 1e-5
        alone = model(tokens[1:2, 9:])
    assert relative_error(alone, full[1:2, 9:]) < 1e-5


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_left_padded_prompts_generate_the_same_tokens_as_unpadded_prompts(changes: dict[str, Any]) -> None:
    model, prompt = small(**changes), torch.randint(0, 31, (2, 8))
    mask = torch.arange(8) >= torch.tensor([[0], [5]])
    together = generate(model, prompt, 6, temperature=0, mask=mask)
    assert torch.equal(together[1:], generate(model, prompt[1:, 5:], 6, temperature=0))


def test_reordered_state_has_all_streams_of_each_row() -> None:
    model, tokens = small(attention=["full", "talking_heads"]), torch.randint(0, 31, (3, 7))
    index = torch.tensor([2, 0, 0])
    with torch.no_grad():
        _, state = model.step(tokens[:, :6])
        want, _ = model.step(tokens[:, 6:], state)
        got, _ = model.step(tokens[index, 6:], state.reorder(index))
    torch.testing.assert_close(got, want[index], rtol=1e-5, atol=1e-6)


def test_groups_of_streams_equal_a_block_diagonal_mix_of_all_streams() -> None:
    pairs, whole = small(streams=4, attention=PAIRS), small(streams=4)
    weights = pairs.state_dict()
    for name in [name for name in weights if "_softmax.weight" in name]:
        weights[name] = torch.block_diag(weights[name], weights[name])
    whole.load_state_dict(weights)
    tokens, ids = torch.randint(0, 31, (2, 9)), torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    torch.testing.assert_close(pairs(tokens), whole(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pairs(tokens, document_ids=ids), whole(tokens, document_ids=ids), rtol=1e-5, atol=1e-5)


def test_logits_of_a_causal_model_do_not_depend_on_later_tokens() -> None:
    model, tokens = small(), torch.randint(0, 31, (1, 20))
    changed = tokens.clone()
    changed[:, 11:] = torch.randint(0, 31, (1, 9))
    assert torch.equal(model(tokens)[:, :11], model(changed)[:, :11])
    both_ways = small(causal=False)
    assert not torch.equal(both_ways(tokens)[:, :11], both_ways(changed)[:, :11])


def test_loss_ignores_padding() -> None:
    model, tokens = small(), torch.randint(0, 31, (1, 9))
    padded = torch.cat((torch.randint(0, 31, (1, 4)), tokens), dim=1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(model.loss(padded, mask=mask), model.loss(tokens), rtol=1e-5, atol=1e-6)


def test_loss_terms_have_the_counts_of_targets_and_of_queries() -> None:
    model, tokens = small(), torch.randint(0, 31, (2, 9))
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    for given, counts in ((None, [16, 16]), (mask, [12, 12])):
        terms = model.loss_terms(tokens, mask=given, diversity_weight=0.1)
        assert [int(term.count) for term in terms] == counts
        assert [term.weight for term in terms] == [1.0, 0.1]
        total = sum(term.weight * term.mean for term in terms)
        torch.testing.assert_close(model.loss(tokens, mask=given, diversity_weight=0.1), total)


def test_diversity_loss_is_a_weighted_term_with_gradients_to_queries_and_keys() -> None:
    model, tokens = small(), torch.randint(0, 31, (2, 9))
    diversity = model.diversity(tokens[:, :-1])
    assert diversity < 0
    total = model.loss(tokens, diversity_weight=0.1)
    torch.testing.assert_close(total, model.loss(tokens) + 0.1 * diversity, rtol=1e-5, atol=1e-6)
    diversity.backward()
    weight = model.get_parameter("stack.layers.1.sublayers.0.block.block.to_qkv.weight")
    assert weight.grad is not None
    assert weight.grad.any()
    assert small(streams=1).diversity(tokens) == 0


def test_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model, tokens = small(streams=3, separate_embeddings=False, tie_embeddings=True), torch.randint(0, 31, (2, 9))
    model.save(tmp_path)
    assert torch.equal(MultiStreamTransformer.load(tmp_path).eval()(tokens), model(tokens))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: small(separate_embeddings=True, tie_embeddings=True),
            "tie_embeddings needs separate_embed",
        ),
        (lambda: small(streams=0), "streams must be at least 1, got streams=0"),
        (lambda: small()(torch.zeros(1, 81, dtype=torch.int64)), "max_seq_len=80, got a sequence of 81"),
        (lambda: small(causal=False).loss(torch.zeros(1, 3, dtype=torch.int64)), "loss needs causal=True"),
        (lambda: small(causal=False).step(torch.zeros(1, 3, dtype=torch.int64)), "step needs .*causal=True"),
        (lambda: small(cross_stream=False).diversity(torch.zeros(1, 3, dtype=torch.int64)), "diversity needs streams"),
        (
            lambda: small(streams=4, attention=PAIRS).diversity(torch.zeros(1, 3, dtype=torch.int64)),
            "diversity needs heads mixed across all 4 streams, got 2",
        ),
        (lambda: small(streams=3, attention=PAIRS), "must divide the streams of the model, 3, got streams=2"),
    ],
)
def test_invalid_arguments_raise(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
