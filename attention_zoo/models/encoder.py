"""A bidirectional encoder of tokens or patches, with pooling and a classifier.

Papers: BERT, https://arxiv.org/abs/1810.04805; Vision Transformer, https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_features, check_int, check_padding, check_positive
from attention_zoo.layers.projections import project_logits
from attention_zoo.layers.residual import Norm
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, FeedForwardSpec
from attention_zoo.models.positions import (
    PositionSpec,
    check_length,
    count_valid_tokens,
    embed_tokens,
    learned_positions,
    position_parts,
)
from attention_zoo.models.stack import Stack
from attention_zoo.ops.documents import Documents, as_documents
from attention_zoo.ops.losses import LossTerm, masked_cross_entropy, total_loss

POOLING = ("mean", "class")


class Encoder(ComposedModel):
    """Features, or logits of classes, of token sequences (b, n) or of sequences of patches (b, n, patch_dim).

    Every token attends to all valid tokens. Cost: that of the blocks; see `Stack`.

    Args:
        dim: features d.
        depth: number of layers.
        num_tokens: size of the vocabulary, for tokens. Exactly one of `num_tokens` and `patch_dim` is given.
        patch_dim: features of a patch, for patches; see `image_to_patches`.
        num_classes: number of classes of the logits. None: the output is the features.
        pooling: "mean" of the features of valid tokens, "class" for those of a learned token before the sequence, or
            None: an output for every token.
        attention, heads, dim_head, feedforward, ff_mult, norm, residual: see `Stack`; the blocks are not causal.
        attn_dropout, ff_dropout, checkpoint_layers: see `Stack`.
        max_seq_len: the longest sequence that the model accepts, in tokens or patches. None: no limit; learned
            positions need one.
        positions: "auto", "rotary", "t5", "alibi", "learned" or None; see `LanguageModel`.

    Raises:
        ValueError, TypeError: an argument is invalid, or a block is always causal; the message names it.

    Example:
        >>> model = Encoder(patch_dim=4, dim=64, depth=3, num_classes=10, max_seq_len=16, positions="learned")
        >>> logits = model(image_to_patches(images, 2))  # images (b, 1, 8, 8)
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_tokens: int | None = None,
        patch_dim: int | None = None,
        num_classes: int | None = None,
        pooling: str | None = "mean",
        attention: AttentionSpec = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        max_seq_len: int | None = None,
        positions: PositionSpec = "auto",
        feedforward: FeedForwardSpec = "gelu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_positive(num_tokens=num_tokens, patch_dim=patch_dim, num_classes=num_classes)
        check_positive(max_seq_len=max_seq_len)
        if (num_tokens is None) == (patch_dim is None):
            raise ValueError(f"num_tokens must be given exactly if patch_dim is not, got {num_tokens=}, {patch_dim=}")
        if pooling is not None:
            check_choice("pooling", pooling, POOLING)
        self.max_seq_len = max_seq_len
        self.pooling = pooling
        self.embedding: nn.Module
        if num_tokens is not None:
            self.embedding = nn.Embedding(num_tokens, dim)
            nn.init.normal_(self.embedding.weight, std=0.02)
        elif patch_dim is not None:
            self.embedding = nn.Linear(patch_dim, dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(dim)) if pooling == "class" else None
        self.positions = learned_positions(positions, max_seq_len, dim)
        self.stack = Stack(
            dim,
            depth,
            attention=attention,
            feedforward=feedforward,
            norm=norm,
            residual=residual,
            heads=heads,
            dim_head=dim_head,
            causal=False,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            checkpoint_layers=checkpoint_layers,
            **position_parts(positions, heads, known=("auto", "rotary", "learned", "t5", "alibi"), causal=False),
        )
        if self.stack.takes_context:
            raise ValueError(f"attention must not read a context in an Encoder, which has none, got {attention!r}")
        self.to_logits = None if num_classes is None else nn.Linear(dim, num_classes)

    def forward(
        self,
        inputs: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Encode sequences.

        Args:
            inputs: (b, n) int tokens, or (b, n, patch_dim) patches.
            mask: (b, n) bool, True = a valid token or patch.
            document_ids: (b, n) int, for packed rows; see `LanguageModel.forward`. Only without pooling.
            inputs_embeds: (b, n, d), embeddings, in place of `inputs`.

        Returns:
            (b, d) with pooling, (b, n, d) without; num_classes in place of d with a classifier. The mean of a row
            without valid tokens is 0.

        Raises:
            TypeError: `inputs` has the wrong dtype, or `mask` is not boolean.
            ValueError: a shape is wrong, an id is out of range, or there are more than max_seq_len tokens.
        """
        x, mask, documents = self._embed(inputs, inputs_embeds, mask, document_ids)
        x = self.stack(x, mask=mask, document_ids=documents)
        if self.pooling == "class":
            x = x[:, 0]
        elif self.pooling == "mean" and mask is not None:
            valid = mask[..., None]
            x = x.masked_fill(~valid, 0.0).sum(1) / valid.sum(1).clamp(min=1)
        elif self.pooling == "mean":
            x = x.mean(1)
        return x if self.to_logits is None else project_logits(self.to_logits, x)

    def loss(self, inputs: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of the labels.

        Args:
            inputs, mask: see `forward`.
            labels: (b,) int with pooling, (b, n) without, where labels of masked tokens do not count.
        """
        return total_loss(self.loss_terms(inputs, labels, mask=mask))

    def loss_terms(self, inputs: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> list[LossTerm]:
        """The loss as a mean and its count of labels. Arguments as in `loss`."""
        if self.to_logits is None:
            raise ValueError("loss needs a classifier, got num_classes=None")
        want = tuple(inputs.shape[: 1 if self.pooling else 2])
        if labels.shape != want or labels.is_floating_point():
            raise ValueError(f"labels must be integers of shape {want}, got {labels.dtype}, {tuple(labels.shape)}")
        logits = self(inputs, mask=mask)
        if self.pooling:
            return [LossTerm(masked_cross_entropy(logits[:, None], labels[:, None]), _count(labels))]
        return [LossTerm(masked_cross_entropy(logits, labels, mask), _count(labels) if mask is None else mask.sum())]

    def attention_maps(self, inputs: Tensor, *, mask: Tensor | None = None) -> list[Tensor]:
        """The attention map (b, h, i, j) of every layer; i and j include a class token. Arguments as in `forward`."""
        x, mask, _ = self._embed(inputs, None, mask)
        return self.stack.attention_maps(x, mask=mask)

    def _embed(
        self,
        inputs: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
        document_ids: Tensor | Documents | None = None,
    ) -> tuple[Tensor, Tensor | None, Documents | None]:
        """Embeddings with positions and the class token, their mask, and the documents."""
        if document_ids is not None and self.pooling is not None:
            raise ValueError(f"document_ids must be None with pooling, got pooling={self.pooling!r}")
        if isinstance(self.embedding, nn.Linear) and inputs is not None and inputs_embeds is None:
            check_features(inputs, self.embedding.in_features, name="inputs")
            x = self.embedding(inputs)
        else:
            x = embed_tokens(self.embedding, inputs, inputs_embeds, dim=self.stack.dim, name="inputs")
        check_padding(mask, x)
        check_length(x, None, self.max_seq_len, name="inputs")
        documents = as_documents(document_ids, x)
        if self.positions is not None:
            x = x + self.positions(count_valid_tokens(x, mask, None, documents))
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
            mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        return x, mask, documents


def image_to_patches(images: Tensor, size: int) -> Tensor:
    """Cut images (b, c, height, width) into patches (b, n, size * size * c), row by row.

    Raises:
        ValueError: `images` has another number of axes, or `size` does not divide height and width.
    """
    check_int(1, size=size)
    if images.ndim != 4 or images.shape[2] % size or images.shape[3] % size:
        raise ValueError(f"images must be (b, c, height, width), divisible by {size=}, got shape {tuple(images.shape)}")
    return rearrange(images, "b c (row p) (column q) -> b (row column) (p q c)", p=size, q=size)


def _count(labels: Tensor) -> Tensor:
    return torch.full((), labels.numel(), device=labels.device)
