"""The check of packed documents fails planted errors and passes right modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import FullAttention, GateLoopAttention, LanguageModel, RelativeBias
from attention_zoo.ops.documents import Documents
from attention_zoo.testing import check_block, check_model
from attention_zoo.testing.report import FAILED, NOT_APPLICABLE, PASSED
from tests.testing.gpt import GPT, NUM_TOKENS

DIM = 16
SMALL: dict[str, Any] = {"heads": 2, "dim_head": 8}


class Loops(GateLoopAttention):
    """A hidden state that is not reset."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask)


class ComparesIds(FullAttention):
    """Ids compared by equality: a later document with the same id is visible."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        same = None if document_ids is None else document_ids[:, :, None] == document_ids[:, None]
        return super().forward(x, mask=mask, attn_mask=same)


class KeepsPositions(FullAttention):
    """Positions that do not restart."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        return super().forward(x + (position * 0.7).sin(), mask=mask, document_ids=document_ids)


class SeesTheFirstToken(FullAttention):
    """Every document attends to the first token of the row."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if document_ids is None:
            return super().forward(x, mask=mask)
        pairs = Documents(document_ids).pairs.clone()
        pairs[:, :, 0] = True
        return super().forward(x, mask=mask, attn_mask=pairs)


class IgnoresTheMask(FullAttention):
    """Padding is ignored where there are documents."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask if document_ids is None else None, document_ids=document_ids)


class OneDocumentOfEachRow(FullAttention):
    """The documents of the first row are used for all rows."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        ids = None if document_ids is None else document_ids[:1].expand_as(document_ids)
        return super().forward(x, mask=mask, document_ids=ids)


class DocumentModel(LanguageModel):
    """A small language model without defects."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"num_tokens": NUM_TOKENS, "dim": DIM, "depth": 1, "attention": "gate_loop", **options})


class CrossesInTheLoss(DocumentModel):
    """A loss that asks a document's last token for the next document's first."""

    def loss(self, tokens: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        logits = self(tokens[:, :-1], document_ids=None if document_ids is None else document_ids[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


class CountsOverRows(DocumentModel):
    """Learned positions that do not restart."""

    def __init__(self) -> None:
        super().__init__(positions="learned", max_seq_len=70)

    def _embed(self, *arguments: Any) -> Any:
        x, count, _ = super()._embed(*arguments[:4])
        return x, count, None if len(arguments) < 5 or arguments[4] is None else Documents(arguments[4])


BROKEN: list[Callable[[], nn.Module]] = [
    lambda: Loops(DIM),
    lambda: Loops(DIM, heads=2),
    lambda: ComparesIds(DIM, **SMALL),
    lambda: KeepsPositions(DIM, **SMALL),
    lambda: SeesTheFirstToken(DIM, **SMALL),
    lambda: IgnoresTheMask(DIM, **SMALL),
    lambda: OneDocumentOfEachRow(DIM, **SMALL),
]


@pytest.mark.parametrize("make", BROKEN)
def test_each_defect_of_a_block_fails_the_check(make: Callable[[], nn.Module]) -> None:
    report = check_block(make, dim=DIM, causal=True, effort="quick", checks=["packed documents"])
    assert report["packed documents"].status == FAILED, str(report)


@pytest.mark.parametrize("make", [CrossesInTheLoss, CountsOverRows])
def test_each_defect_of_a_model_fails_the_check(make: Callable[[], nn.Module]) -> None:
    report = check_model(make, num_tokens=NUM_TOKENS, effort="quick", checks=["packed documents"])
    assert report["packed documents"].status == FAILED, str(report)


def test_right_blocks_and_models_pass() -> None:
    block = check_block(
        lambda: FullAttention(DIM, bias=RelativeBias(2), **SMALL),
        dim=DIM,
        causal=True,
        effort="quick",
        checks=["packed documents"],
    )
    assert block["packed documents"].status == PASSED, str(block)
    model = check_model(DocumentModel, num_tokens=NUM_TOKENS, effort="quick", checks=["packed documents"])
    assert model["packed documents"].status == PASSED, str(model)


def test_modules_without_the_argument_are_not_checked() -> None:
    model = check_model(GPT, num_tokens=NUM_TOKENS, effort="quick", checks=["packed documents"])
    assert model["packed documents"].status == NOT_APPLICABLE
    assert "no argument document_ids" in model["packed documents"].message
