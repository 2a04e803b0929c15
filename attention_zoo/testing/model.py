"""Checks of whole models, from token ids to logits.

The checks of blocks run on a model as well: `TokenModel` takes the ids as its features x.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attention_zoo.generation import generate
from attention_zoo.testing.basics import check_effects
from attention_zoo.testing.expect import FLOAT32_ERROR, GRADIENT_ERROR, expect, expect_close, expect_equal, one_line
from attention_zoo.testing.lifecycle import check_saving, expect_errors
from attention_zoo.testing.report import NotApplicable, Note
from attention_zoo.testing.subject import BATCH, Padding, Subject, seeded

NEW_TOKENS = 8  # tokens generated after each prompt


class TokenModel(nn.Module):
    """A model as a block: (b, n, 1) token ids in float32 -> logits (b, n, v).

    The gradient to x is that to the token embeddings, in one direction of their features. It is 0 for a model that
    computes its embeddings in another way than with `F.embedding` or by indexing a table.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        extra = {} if mask is None else {"mask": mask}
        extra |= {} if document_ids is None else {"document_ids": document_ids}
        if not x.requires_grad:
            return logits_of(self.model(x[..., 0].long(), **extra))
        with _EmbeddingGradient(x):
            return logits_of(self.model(x[..., 0].long(), **extra))


class DecodingTokenModel(TokenModel):
    """A `TokenModel` with `step`."""

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        extra = {} if mask is None else {"mask": mask}
        model: Any = self.model
        with _EmbeddingGradient(x):
            return model.step(x[..., 0].long(), state, **extra)


class _EmbeddingGradient(TorchFunctionMode):
    """Adds x - x in a fixed direction to the embeddings of the ids x, (b, n, 1), so that x has a gradient."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.ids, self.zero = x.detach()[..., 0].long(), x - x.detach()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (F.embedding, Tensor.__getitem__) or not self.zero.requires_grad:
            return out
        index = args[1] if func is Tensor.__getitem__ else args[0]
        indices = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor)]
        if not out.is_floating_point() or not any(
            torch.equal(i, self.ids) for i in indices if not i.dtype.is_floating_point
        ):
            return out
        direction = torch.arange(out.shape[-1], device=out.device).mul(2.4).cos()
        return out + (self.zero * direction).to(out.dtype)


def logits_of(out: Any) -> Tensor:
    """The logits of what a model returns: the tensor itself, its field `logits`, or the first item of a tuple.

    Raises:
        AssertionError: it has no logits.
    """
    logits: Any = getattr(out, "logits", out[0] if isinstance(out, tuple) and out else out)
    expect(isinstance(logits, Tensor), f"forward returned {type(out).__name__}, not logits")
    return logits


MODEL_LENGTHS = (1, 2, 7, 65)
MODEL_LONG_LENGTHS = (255, 256, 257, 513)


@dataclass(frozen=True)
class ModelSubject(Subject):
    """A model and what the checks need to know about it. `dim` is the number of tokens v; the rest as in `Subject`."""

    noun: ClassVar[str] = "model"
    takes_tokens: ClassVar[bool] = True
    takes_mask: bool = True
    max_seq_len: int | None = None

    def adapt(self, block: nn.Module) -> nn.Module:
        return (DecodingTokenModel if callable(getattr(block, "step", None)) else TokenModel)(block)

    def x(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Random token ids (b, n, 1), in float32."""
        with seeded(seed):
            return torch.randint(self.dim, (batch, length, 1)).to(self.device, torch.float32)

    def other(self, length: int, *, batch: int = BATCH) -> Tensor:
        """Other token ids."""
        return self.x(length, batch=batch, seed=9)

    def weight(self, length: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        with seeded(5):
            return torch.randn(BATCH, length, self.dim).to(self.device, dtype)

    def paddings(self, length: int, *, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> dict[str, Padding]:
        paddings = super().paddings(length, batch=batch, dtype=dtype)
        return paddings if self.takes_mask else {"no mask": paddings["no mask"]}

    def need_mask(self, block: nn.Module) -> None:
        if not self.takes_mask:
            raise NotApplicable("forward has no argument mask")

    def is_strict(self, block: nn.Module) -> bool:
        return super().is_strict(block.model if isinstance(block, TokenModel) else block)

    def tokens(self, length: int, *, seed: int = 1) -> Tensor:
        """Random token ids (b, n), int64."""
        return self.x(length, seed=seed)[..., 0].long()


def make_model_subject(
    make_model: Callable[[], nn.Module],
    *,
    num_tokens: int,
    causal: bool = True,
    lengths: Sequence[int] = (),
    **options: Any,
) -> ModelSubject:
    """The subject of the checks of a model, with lengths cut to what it accepts: `max_seq_len` or `segment_len`."""
    model = make_model()
    parameters = inspect.signature(model.forward).parameters.values()
    takes_mask = any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters)
    limits = [getattr(model, name, None) for name in ("max_seq_len", "segment_len")]
    limit = min((limit for limit in limits if isinstance(limit, int)), default=None)
    cut = sorted({n if limit is None else min(n, limit) for n in lengths or MODEL_LENGTHS})
    if not lengths and options.get("effort") != "quick":
        options["long_lengths"] = [n for n in MODEL_LONG_LENGTHS if limit is None or n <= limit]
    return ModelSubject(make_model, num_tokens, causal, cut, takes_mask=takes_mask, max_seq_len=limit, **options)


def check_logits(subject: ModelSubject) -> None:
    """Logits are (b, n, num_tokens) and floating point, tokens are not modified, and eval mode is deterministic."""
    block = subject.block()
    model: Any = block.model
    declared = getattr(model, "causal", subject.causal)
    expect(declared == subject.causal, f"the model says causal={declared}, but causal={subject.causal} was expected")
    for n in subject.lengths:
        tokens = subject.tokens(n)
        before = tokens.clone()
        logits = logits_of(model(tokens))
        expect(torch.equal(tokens, before), f"forward modified the tokens in place (n={n})")
        shape, want = tuple(logits.shape), (*tokens.shape, subject.dim)
        expect(shape == want, f"the logits are {shape}, not (b, n, num_tokens) = {want}")
        expect(logits.is_floating_point(), f"the logits are {logits.dtype}, not floating point")
    check_effects(subject, block)


def check_generation(subject: ModelSubject) -> None:
    """Greedy decoding with `step` chooses the tokens that full forward passes choose, for padded prompts too."""
    if not subject.causal:
        raise NotApplicable("the model is not causal")
    block = subject.block()
    if not isinstance(block, DecodingTokenModel):
        raise NotApplicable("the model has no step")
    block.train()  # generate decodes in eval mode
    model: Any = block.model
    for n in subject.lengths:
        new = NEW_TOKENS if subject.max_seq_len is None else min(NEW_TOKENS, subject.max_seq_len - n)
        if new < 1:
            continue
        paddings = subject.paddings(n)
        for name in ("no mask", "left padding"):
            if name in paddings:
                mask, tokens = paddings[name].mask, subject.tokens(n)
                chosen = generate(model, tokens, new, temperature=0.0, mask=mask)
                extra = {} if mask is None else {"mask": F.pad(mask, (0, new), value=True)}
                with torch.no_grad():
                    logits = logits_of(model.eval()(torch.cat((tokens, chosen), dim=1), **extra))[:, n - 1 : -1]
                model.train()
                gap = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
                # two tokens may be equally likely up to rounding
                wrong = gap > 1e-4 * logits.abs().amax(-1)
                first = int(wrong.any(0).float().argmax())
                what = f"generate chose another token than a full forward pass after {n + first} tokens"
                expect(not wrong.any(), f"{what} ({paddings[name].where})")


def check_loss(subject: ModelSubject) -> None:
    """The loss is the mean cross entropy of the valid next tokens, and does not depend on masked tokens."""
    block = subject.block()
    model: Any = block.model
    if not callable(getattr(model, "loss", None)):
        raise NotApplicable("the model has no loss")
    if not subject.causal:
        raise NotApplicable("the model is not causal")
    parameters = inspect.signature(model.loss).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) != 1:
        raise NotApplicable(f"loss takes {required}, not the tokens alone")
    for n in subject.lengths:
        if n < 2:
            continue
        tokens = subject.tokens(n)
        for padding in subject.paddings(n).values():
            if padding.mask is not None and "mask" not in parameters:
                continue
            loss = model.loss(tokens, **padding.extra)
            expect(loss.ndim == 0 and loss.isfinite(), f"loss must be a finite scalar, got {loss} ({padding.where})")
            want = _mean_cross_entropy(model, tokens, padding)
            what = f"the loss differs from the mean cross entropy of the valid next tokens ({padding.where})"
            expect_close(loss, want, FLOAT32_ERROR, what)
            if padding.mask is not None:
                _check_masked_targets(
                    model, tokens, torch.where(padding.mask, tokens, subject.tokens(n, seed=9)), padding
                )


def _mean_cross_entropy(model: nn.Module, tokens: Tensor, padding: Padding) -> Tensor:
    """The mean over tokens that are valid and follow a valid token, computed row by row."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if padding.mask is None else padding.mask
    extra = {} if padding.mask is None else {"mask": padding.mask[:, :-1]}
    with torch.no_grad():
        log_p = logits_of(model(tokens[:, :-1], **extra)).float().log_softmax(-1)
    pairs = valid[:, :-1] & valid[:, 1:]
    losses = -log_p.gather(-1, tokens[:, 1:, None])[..., 0][pairs]
    return losses.mean() if losses.numel() else losses.new_zeros(())


def _check_masked_targets(model: Any, tokens: Tensor, changed: Tensor, padding: Padding) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    losses = [model.loss(ids, **padding.extra) for ids in (tokens, changed)]
    expect_equal(losses[1], losses[0], f"the loss changes with masked tokens ({padding.where})")
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    what = f"the gradient of the loss changes with masked tokens ({padding.where})"
    expect_close(gradients[1], gradients[0], GRADIENT_ERROR, what)


def check_model_saving(subject: ModelSubject) -> None:
    """As for blocks; and where the model has them, `save` followed by `load` gives an equal model."""
    finding = None
    try:
        check_saving(subject)
    except Note as note:
        finding = note
    model: Any = subject.block().model
    if callable(getattr(model, "save", None)) and callable(getattr(type(model), "load", None)):
        tokens = subject.tokens(max(subject.lengths))
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save(folder)
            except (TypeError, ValueError) as error:  # a model that cannot be saved says so
                raise Note(f"save raises {type(error).__name__}: {one_line(error)}") from error
            loaded = type(model).load(folder).to(subject.device).eval()
        expect_equal(logits_of(loaded(tokens)), logits_of(model(tokens)), "a saved and loaded model gives other logits")
    if finding is not None:
        raise finding


def check_model_arguments(subject: ModelSubject) -> None:
    """Invalid arguments raise ValueError or TypeError; the message names the argument and its value."""
    block = subject.block()
    model: Any = block.model
    n = next((n for n in subject.lengths if n > 2), max(subject.lengths))
    tokens = subject.tokens(n)
    mask = torch.ones(BATCH, n, dtype=torch.bool, device=subject.device)
    name = next(iter(inspect.signature(model.forward).parameters))
    wrong: list[tuple[str, str, Callable[[], object]]] = [
        (name, "float32", lambda: model(tokens.float())),
        (name, str(subject.dim), lambda: model(tokens.clone().fill_(subject.dim))),
        (name, str((n,)), lambda: model(tokens[0])),
        (name, "0", lambda: model(tokens[:, :0])),
    ]
    if subject.takes_mask:
        wrong.append(("mask", "float32", lambda: model(tokens, mask=mask.float())))
        wrong.append(("mask", str(n + 1), lambda: model(tokens, mask=F.pad(mask, (0, 1)))))
    if subject.max_seq_len is not None:
        long = subject.max_seq_len + 1
        wrong.append((name, str(long), lambda: model(tokens[:, :1].expand(-1, long))))
    if subject.causal and isinstance(block, DecodingTokenModel):
        with torch.no_grad():
            _, state = model.step(tokens[:, :1])
        wrong.append(("state", str(BATCH), lambda: model.step(tokens[:1, :1], state)))
        wrong.append(("state", "str", lambda: model.step(tokens[:, :1], "state")))
    with subject.note_unless_strict(block):
        expect_errors(wrong)
