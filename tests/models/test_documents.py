"""Packed documents in models: logits, losses, positions, streams, checkpointing, users' blocks, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import (
    Encoder,
    LanguageModel,
    Memformer,
    MemoryLanguageModel,
    MultiStreamTransformer,
    Stack,
    TextImageLayout,
    TextToImageTransformer,
)

SMALL: dict[str, Any] = {"num_tokens": 11, "dim": 24, "depth": 2}
HEADS: dict[str, Any] = {"heads": 2, "dim_head": 12}
IDS = torch.tensor([[3, 3, 3, 1, 3, 3, 3, 3, 3, 3, 8, 8], [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, -1]])
PARTS = [(0, 0, 3), (0, 3, 4), (0, 4, 10), (0, 10, 12), (1, 0, 7), (1, 7, 11), (1, 11, 12)]
MASK = torch.ones(2, 12, dtype=torch.bool)
MASK[0, 5] = MASK[1, 0] = MASK[1, 9:] = False
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "hybrid": (LanguageModel, {"attention": ["gate_loop", "full", "talking_heads"], "depth": 3}),
    "learned positions": (LanguageModel, {"positions": "learned", "max_seq_len": 12, **HEADS}),
    "t5": (LanguageModel, {"positions": "t5", "attention": ["full", "cosine_sim"], **HEADS}),
    "checkpointed layers": (LanguageModel, {"checkpoint_layers": True, **HEADS}),
    "two blocks a layer": (LanguageModel, {"attention": [["simple_gate_loop", "relative_gate"]]}),
    "streams": (MultiStreamTransformer, {"streams": 3, **HEADS}),
    "streams without mixing": (MultiStreamTransformer, {"attention": ["full", "gate_loop"]}),
    "encoder": (Encoder, {"pooling": None, "num_classes": 11, **HEADS}),
    "encoder, learned": (Encoder, {"pooling": None, "positions": "learned", "max_seq_len": 12, **HEADS}),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls, options = MODELS[name]
    return cls(**{**SMALL, **options}).double()


def tokens() -> Tensor:
    return torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_separate_documents(name: str, padded: bool) -> None:
    model = make(name)
    mask = MASK if padded else None
    out = model(tokens(), mask=mask, document_ids=IDS)
    want = torch.zeros_like(out)
    for row, start, stop in PARTS:
        extra = {} if mask is None else {"mask": mask[row : row + 1, start:stop]}
        want[row, start:stop] = model(tokens()[row : row + 1, start:stop], **extra)[0]
    valid = MASK if padded else torch.ones_like(MASK)
    torch.testing.assert_close(out[valid], want[valid], atol=1e-11, rtol=0)
    parameters = list(model.parameters())
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)) * valid[..., None]
    got = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    gradients = torch.autograd.grad((want * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(got, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-9 * other.norm().clamp(min=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if "encoder" not in name])
def test_loss_is_the_mean_over_the_targets_of_separate_documents(name: str, padded: bool) -> None:
    model = make(name)
    mask = MASK if padded else torch.ones_like(MASK)
    losses, count = torch.zeros((), dtype=torch.float64), 0
    for row, start, stop in PARTS:
        part, valid = tokens()[row : row + 1, start:stop], mask[row : row + 1, start:stop]
        if stop - start < 2:
            continue
        pairs = valid[:, 1:] & valid[:, :-1]
        logits = model(part[:, :-1], mask=valid[:, :-1])
        losses = losses + F.cross_entropy(logits[pairs], part[:, 1:][pairs], reduction="sum")
        count += int(pairs.sum())
    loss = model.loss(tokens(), mask=mask if padded else None, document_ids=IDS)
    torch.testing.assert_close(loss, losses / count, atol=1e-11, rtol=0)
    (term,) = model.loss_terms(tokens(), mask=mask if padded else None, document_ids=IDS)
    assert int(term.count) == count


def test_documents_of_one_token_have_no_target() -> None:
    model = make("hybrid")
    ids = torch.arange(12).expand(2, 12)
    loss = model.loss(tokens(), document_ids=ids)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_maps_of_packed_rows_are_zero_between_documents() -> None:
    model = make("hybrid").eval()
    for one in model.attention_maps(tokens(), document_ids=IDS):
        assert one[0, :, 4:, :4].abs().max() == 0
        assert one[0, :, :3, :3].abs().max() > 0


class Takes(nn.Linear):
    """A user's block that takes document ids, as a tensor."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        assert document_ids is None or torch.equal(document_ids, IDS)
        return super().forward(x)


class Ignores(nn.Linear):
    """A user's block without the argument."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_users_blocks_get_the_tensor() -> None:
    model = LanguageModel(attention=["full", Takes], **SMALL)
    assert model(tokens(), document_ids=IDS).shape == (2, 12, 11)
    assert model.attention_maps is not None


def test_models_with_a_block_that_cannot_take_documents_refuse_them_by_name() -> None:
    for attention in (["full", Ignores], ["full", ("conv", {"layout": TextImageLayout(4, 2, 4)})]):
        model = LanguageModel(attention=attention, **SMALL)
        name = "Ignores, whose forward takes no" if Ignores in attention else "ConvAttention, whose pattern"
        with pytest.raises(ValueError, match=f"document_ids must be None (with|for) {name}"):
            model.loss(tokens(), document_ids=IDS)


def test_other_models_refuse_documents_by_name() -> None:
    x = torch.randn(2, 12, 24)
    with pytest.raises(ValueError, match="document_ids must be None with reversible=True"):
        Stack(24, 1, reversible=True)(x, document_ids=IDS)
    with pytest.raises(ValueError, match="document_ids must be None with TokenShift"):
        Stack(24, 1, token_shift=TextImageLayout(4, 2, 4))(x, document_ids=IDS)
    with pytest.raises(ValueError, match="document_ids must be None with pooling, got pooling='mean'"):
        Encoder(num_tokens=11, dim=24, depth=1)(tokens(), document_ids=IDS)
    with pytest.raises(ValueError, match="document_ids must be None with a diversity loss"):
        make("streams").loss(tokens(), document_ids=IDS, diversity_weight=0.1)
    memory = MemoryLanguageModel(memory_slots=2, segment_len=12, **SMALL)
    memformer = Memformer(dim=24, memory_slots=2, enc_num_tokens=11, enc_depth=1)
    image = TextToImageTransformer(
        num_text_tokens=11, text_len=12, num_image_tokens=3, height=2, width=2, dim=24, depth=1
    )
    for model in (memory, memformer, image):
        with pytest.raises(TypeError, match="document_ids"):
            model(tokens(), document_ids=IDS)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (IDS.float(), TypeError, "document_ids must be an integer tensor"),
        (IDS[:, 1:], ValueError, r"document_ids must be \(b, n\) = \(2, 12\), got shape \(2, 11\)"),
        (IDS.tolist(), TypeError, "document_ids must be an integer tensor, got list"),
    ],
)
def test_bad_document_ids_of_a_model_raise(ids: Any, error: type[Exception], message: str) -> None:
    model = LanguageModel(**SMALL)
    for call in (model, model.loss, MultiStreamTransformer(**SMALL).loss):
        with pytest.raises(error, match=message):
            call(tokens(), document_ids=ids)


def test_a_forward_without_documents_does_not_depend_on_them() -> None:
    model = make("hybrid").eval()
    whole = model(tokens())
    torch.testing.assert_close(model(tokens(), document_ids=torch.zeros(2, 12).long()), whole, atol=1e-12, rtol=0)
