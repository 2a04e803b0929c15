"""A text-to-image transformer: text and image tokens are one sequence, predicted token by token.

Paper: DALL-E, https://arxiv.org/abs/2102.12092; classifier-free guidance, https://arxiv.org/abs/2207.12598
Upstream: DALLE-pytorch, DALLE.
Differs: height and width may differ; cached decoding of text and image, with token shift; the caller's tensors are not
modified; values are not rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_int,
    check_number,
    check_padding,
    check_tokens,
)
from attention_zoo.layers.positions import TextImageRotary
from attention_zoo.layers.projections import project_logits
from attention_zoo.layers.residual import Norm
from attention_zoo.layers.state import check_state
from attention_zoo.models.composed_model import ComposedModel
from attention_zoo.models.layer_specs import AttentionSpec, FeedForwardSpec
from attention_zoo.models.positions import PositionSpec, check_length, parse_positions
from attention_zoo.models.stack import Stack, StackState
from attention_zoo.ops import TextImageLayout
from attention_zoo.ops.losses import LossTerm, masked_cross_entropy, total_loss

BOS = 0
POSITIONS = {"rotary": ("theta",), "learned": ()}  # with their options


class TextToImageTransformer(ComposedModel):
    """p(text, image) over the sequence: a start token, text_len text tokens, height x width image tokens.

    Text id 0 is padding. At position i it becomes the id num_text_tokens + i, so that every position has its own
    embedding of padding. Image ids follow the text ids: token = num_text_ids + image id.

    Args:
        num_text_tokens: text ids, 0 (padding) included.
        text_len: text tokens of every sample.
        num_image_tokens: image ids.
        height, width: rows and columns of image tokens.
        dim: features d.
        depth: number of layers.
        attention, heads, dim_head: see `Stack`. Blocks with an argument `layout` ("conv", "axial_row", "axial_col",
            "block_sparse") get the layout of text and image.
        positions: "rotary", for text and image, in the blocks that take it, or ("rotary", {"theta": ...}); or
            "learned": tables of text positions, rows and columns.
        bias: whether output projections and feedforwards have a bias.
        feedforward, ff_mult, norm, residual, layer_scale, shared_attn_ids, shared_ff_ids, reversible: see `Stack`.
        token_shift: whether every sub-layer reads shifted tokens; see `TokenShift`.
        attn_dropout, ff_dropout: see `Stack`.
        image_loss_weight: weight w of the image in the loss (text + w image) / (1 + w).
        tie_embeddings: whether logits and embeddings share one table.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.

    Example:
        >>> blocks = ["full", "axial_row", "axial_col", "conv"]
        >>> model = TextToImageTransformer(num_text_tokens=256, text_len=16, num_image_tokens=17, height=8, width=8,
        ...     dim=128, depth=4, attention=blocks)
        >>> loss = model.loss(text, image)
    """

    def __init__(
        self,
        *,
        num_text_tokens: int,
        text_len: int,
        num_image_tokens: int,
        height: int,
        width: int,
        dim: int,
        depth: int,
        attention: AttentionSpec = "full",
        heads: int | None = None,
        dim_head: int | None = None,
        positions: PositionSpec = "rotary",
        bias: bool = True,
        feedforward: FeedForwardSpec = "geglu",
        ff_mult: float = 4,
        norm: Norm = "layer",
        residual: str = "pre",
        layer_scale: bool = True,
        token_shift: bool = True,
        shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None,
        reversible: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        image_loss_weight: float = 7.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        check_int(1, num_text_tokens=num_text_tokens, text_len=text_len, num_image_tokens=num_image_tokens)
        check_flag(bias=bias, token_shift=token_shift, tie_embeddings=tie_embeddings)
        self.positions, options = parse_positions(positions, known=POSITIONS)
        check_choice("positions", self.positions, POSITIONS)  # None is not among them
        check_number(image_loss_weight=image_loss_weight)
        if not image_loss_weight >= 0:
            raise ValueError(f"image_loss_weight must be at least 0, got {image_loss_weight=}")
        self.num_text_tokens = num_text_tokens
        self.num_image_tokens = num_image_tokens
        self.num_text_ids = num_text_tokens + text_len
        self.num_tokens = self.num_text_ids + num_image_tokens
        self.layout = TextImageLayout(text_len + 1, height, width)
        self.image_loss_weight = image_loss_weight
        defaults: dict[str, Any] = {"layout": self.layout}
        if self.positions == "rotary":
            defaults["rotary"] = TextImageRotary(self.layout, **options)
        if bias:
            defaults["out_bias"] = True
        self.stack = Stack(
            dim,
            depth,
            attention=attention,
            feedforward=(feedforward, {"bias": bias}) if isinstance(feedforward, str) else feedforward,
            norm=norm,
            residual=residual,
            heads=heads,
            dim_head=dim_head,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
            layer_scale=layer_scale,
            token_shift=self.layout if token_shift else None,
            shared_attn_ids=shared_attn_ids,
            shared_ff_ids=shared_ff_ids,
            reversible=reversible,
            defaults=defaults,
        )
        if self.stack.takes_context:
            raise ValueError(f"attention must not read a context in this model, which has none, got {attention!r}")
        self.to_logits = nn.Linear(dim, self.num_tokens)
        self.embedding = None if tie_embeddings else nn.Embedding(self.num_tokens, dim)
        if self.positions == "learned":
            self.text_positions = nn.Parameter(0.02 * torch.randn(self.layout.text_len, dim))
            self.row_positions = nn.Parameter(0.02 * torch.randn(height, dim))
            self.column_positions = nn.Parameter(0.02 * torch.randn(width, dim))

    @property
    def max_seq_len(self) -> int:
        """Tokens of a complete sample, the start token included."""
        return self.layout.length

    def tokens(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        """The start token, text and image as one sequence, the input of `step`.

        Args:
            text: (b, t) int, 0 = padding; t = text_len if there is an image, t <= text_len if not.
            image: (b, m) int, the first m tokens of the image.

        Returns:
            (b, 1 + t + m) int.

        Raises:
            TypeError: the ids are not integers.
            ValueError: an id is out of range, or the number of tokens is wrong.
        """
        text_len = self.layout.text_len - 1
        parts = []
        if text.ndim != 2 or text.shape[1]:
            check_tokens(text, self.num_text_tokens, name="text")
            if text.shape[1] > text_len or (image is not None and text.shape[1] < text_len):
                raise ValueError(f"text must hold text_len = {text_len} tokens, got shape {tuple(text.shape)}")
            place = torch.arange(text.shape[1], device=text.device) + self.num_text_tokens
            parts.append(torch.where(text == 0, place, text.long()))
        elif image is not None:
            raise ValueError(f"text must hold text_len = {text_len} tokens, got shape {tuple(text.shape)}")
        parts.insert(0, torch.full((text.shape[0], 1), BOS, device=text.device))
        if image is not None and not (image.ndim == 2 and image.shape[1] == 0):
            check_tokens(image, self.num_image_tokens, name="image")
            if image.shape[0] != text.shape[0] or image.shape[1] > self.layout.image_len:
                raise ValueError(
                    f"image must be (b, m) with b = {text.shape[0]} as in text and at most {self.layout.image_len} "
                    f"tokens, got shape {tuple(image.shape)}"
                )
            parts.append(image.long() + self.num_text_ids)
        return torch.cat(parts, dim=1)

    def forward(self, text: Tensor, image: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Logits of the token after each token; -inf for image ids in the text and for text ids in the image.

        Args:
            text: (b, text_len) int, 0 = padding.
            image: (b, m) int, the first m tokens of the image; the last token of a complete image is dropped.
            mask: (b, text_len) bool, True = a text token that may be attended to.

        Returns:
            (b, n, num_tokens) with n = 1 + text_len + m, at most text_len + height * width. Text ids come first, then
            padding ids, then image ids.
        """
        tokens = self.tokens(text, image)[:, : self.layout.length - 1]
        return self._logits(self.stack(self._embed(tokens, 0), mask=self._sequence_mask(mask, text, tokens)), 0)

    def attention_maps(self, text: Tensor, image: Tensor | None = None, *, mask: Tensor | None = None) -> list[Tensor]:
        """The attention map (b, h, n, n) of every layer. Arguments as in `forward`."""
        tokens = self.tokens(text, image)[:, : self.layout.length - 1]
        return self.stack.attention_maps(self._embed(tokens, 0), mask=self._sequence_mask(mask, text, tokens))

    def loss(self, text: Tensor, image: Tensor, *, mask: Tensor | None = None, null_prob: float = 0.0) -> Tensor:
        """(cross entropy of text + w cross entropy of image) / (1 + w), in nats per token.

        Args:
            text: (b, text_len) int, 0 = padding.
            image: (b, height * width) int.
            mask: (b, text_len) bool, True = a text token that may be attended to, and is predicted.
            null_prob: probability of replacing a row's text by padding, which trains the model for guidance.
        """
        return total_loss(self.loss_terms(text, image, mask=mask, null_prob=null_prob))

    def loss_terms(
        self, text: Tensor, image: Tensor, *, mask: Tensor | None = None, null_prob: float = 0.0
    ) -> list[LossTerm]:
        """The loss as the means over text and over image tokens and their counts. Arguments as in `loss`."""
        check_fraction(null_prob=null_prob)
        if null_prob:
            kept = torch.rand(text.shape[0], 1, device=text.device) >= null_prob
            text = torch.where(kept, text, torch.zeros_like(text))
        tokens = self.tokens(text, image)
        if tokens.shape[1] != self.layout.length:
            raise ValueError(f"image must hold {self.layout.image_len} tokens, got shape {tuple(image.shape)}")
        border, ids = self.layout.text_len - 1, self.num_text_ids
        x = self.stack(self._embed(tokens[:, :-1], 0), mask=self._sequence_mask(mask, text, tokens[:, :-1]))
        weight, bias = self.to_logits.weight, self.to_logits.bias
        text_logits = F.linear(x[:, :border], weight[:ids], bias[:ids])
        image_logits = F.linear(x[:, border:], weight[ids:], bias[ids:])
        text_count = torch.full((), text.numel(), device=text.device) if mask is None else mask.sum()
        image_count = torch.full((), image.numel(), device=image.device)
        text_loss = masked_cross_entropy(text_logits, tokens[:, 1 : border + 1], mask)
        image_loss = masked_cross_entropy(image_logits, tokens[:, border + 1 :] - ids)
        w = self.image_loss_weight
        return [LossTerm(text_loss, text_count, 1 / (1 + w)), LossTerm(image_loss, image_count, w / (1 + w))]

    def step(
        self, tokens: Tensor, state: StackState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Logits after each new token, given all tokens before it.

        Args:
            tokens: (b, t) int, the next tokens of the sequence that `tokens` returns.
            state: the state returned by the previous step; None for the first. It is not modified.
            mask: (b, t) bool, True = a valid token.

        Returns:
            (b, t, num_tokens) as in `forward`, and the new state.

        Raises:
            TypeError: `state` is not a StackState.
            ValueError: there are more tokens than text and image have, or a text id is in the image or the reverse.
        """
        check_state(state, StackState)
        check_tokens(tokens, self.num_tokens)
        check_padding(mask, tokens)
        check_length(tokens, state, self.layout.length, limit="layout.length")
        start = 0 if state is None else state.token_count
        x, state = self.stack.step(self._embed(tokens, start), state, mask=mask)
        return self._logits(x, start), state

    def _embed(self, tokens: Tensor, start: int | Tensor) -> Tensor:
        self._check_ids(tokens, start)
        table = self.to_logits.weight if self.embedding is None else self.embedding.weight
        x = F.embedding(tokens.long(), table)
        if self.positions == "rotary":
            return x
        rows, columns = self.row_positions[:, None], self.column_positions
        table = torch.cat((self.text_positions, (rows + columns).flatten(0, 1)))
        return x + F.embedding(torch.arange(tokens.shape[1], device=x.device) + start, table)

    def _check_ids(self, tokens: Tensor, start: int | Tensor) -> None:
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        start = int(start)
        border = max(self.layout.text_len - start, 0)
        if bool((tokens[:, :border] >= self.num_text_ids).any() | (tokens[:, border:] < self.num_text_ids).any()):
            raise ValueError(
                f"tokens must be text up to position {self.layout.text_len - 1} and image (ids from "
                f"{self.num_text_ids}) after it, got another id at {start} ... {start + tokens.shape[1] - 1}"
            )

    def _logits(self, x: Tensor, start: int | Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device) + start
        is_image = torch.arange(self.num_tokens, device=x.device) >= self.num_text_ids
        excluded = is_image != (position >= self.layout.text_len - 1)[:, None]
        return project_logits(self.to_logits, x).masked_fill(excluded, -torch.inf)

    def _sequence_mask(self, mask: Tensor | None, text: Tensor, tokens: Tensor) -> Tensor | None:
        if mask is None:
            return None
        check_padding(mask, text)
        sequence_mask = torch.ones(tokens.shape, dtype=torch.bool, device=mask.device)
        sequence_mask[:, 1 : 1 + mask.shape[1]] = mask
        return sequence_mask
