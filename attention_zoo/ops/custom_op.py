"""Registration of custom operators: one place for fake kernels, autograd formulas and errors of second derivatives.

A loop over tiles or chunks is one operator, because torch.compile would unroll it, and recompile it for every length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attention_zoo.ops.precision import no_autocast


def register_operator(
    name: str,
    inputs: type[NamedTuple],  # type: ignore[valid-type]  # a class derived from NamedTuple
    forward: Callable[[Any], Sequence[Tensor]],
    backward: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    fake: Callable[[Any], Sequence[Tensor]],
    *,
    differentiable_outputs: int = 1,
) -> Callable[[Any], list[Tensor]]:
    """Register `attention_zoo::name` with its backward and fake kernels.

    The NamedTuple `inputs` is the only place where the arguments are listed: the schema is read from its annotations,
    and every function below takes it whole. Fields may be Tensor, Tensor | None, list[Tensor], Sequence[int], bool,
    int, float or str. A gradient is computed for each floating point or complex Tensor field and each list[Tensor]
    field; tensors that are optional, boolean or integer get none.

    Args:
        name: name of the operator.
        inputs: NamedTuple class of the arguments.
        forward: inputs -> outputs.
        backward: (inputs, outputs, gradients of the differentiable outputs) -> gradients of the tensors of `inputs` that
            get one, in their order and with lists flattened.
        fake: inputs -> empty outputs with the shapes, dtypes and strides of `forward`'s.
        differentiable_outputs: how many of the outputs, from the first, receive gradients; the others are saved for
            backward and must not be differentiated.

    Returns:
        A function from `inputs` to the list of outputs. Its backward saves inputs and outputs. A second derivative
        raises RuntimeError, naming `attention_zoo.reference()`.
    """
    hints = get_type_hints(inputs)
    arguments = ", ".join(f"{_schema_type(hint)} {field}" for field, hint in hints.items())

    def run_forward(*args: Any) -> list[Tensor]:
        return list(forward(inputs(*args)))  # type: ignore[call-arg]

    def run_backward(gradients: list[Tensor], outputs: list[Tensor], *args: Any) -> list[Tensor]:
        given = inputs(*args)  # type: ignore[call-arg]
        found = backward(given, outputs, gradients)
        wanted = _differentiable(given, hints)
        return [gradient.to(tensor.dtype) for gradient, tensor in zip(found, wanted, strict=True)]

    def fake_backward(gradients: list[Tensor], outputs: list[Tensor], *args: Any) -> list[Tensor]:
        wanted = _differentiable(inputs(*args), hints)  # type: ignore[call-arg]
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted]

    operator = torch.library.custom_op(
        f"attention_zoo::{name}", run_forward, mutates_args=(), schema=f"({arguments}) -> Tensor[]"
    )
    operator_backward = torch.library.custom_op(
        f"attention_zoo::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor[] gradients, Tensor[] outputs, {arguments}) -> Tensor[]",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        leaves, ctx.structure = pytree.tree_flatten((inputs, list(output)))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaves[place] for place in ctx.places))

    def differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        leaves = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            leaves[place] = tensor
        args, outputs = pytree.tree_unflatten(leaves, ctx.structure)
        given = [
            torch.zeros_like(output) if gradient is None else gradient.resolve_conj()
            for gradient, output in zip(gradients, outputs[:differentiable_outputs], strict=False)
        ]
        with no_autocast(outputs[0]):
            found = iter(operator_backward(given, outputs, *args))
        return tuple(_take(found, value, hint) for value, hint in zip(args, hints.values(), strict=True))

    def refuse(ctx: Any, gradients: Sequence[Tensor | None]) -> None:
        raise RuntimeError(
            f"{name} has no second derivative on its fast path: compute it inside `with attention_zoo.reference():`"
        )

    operator.register_fake(lambda *args: list(fake(inputs(*args))))  # type: ignore[call-arg]
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=setup_context)
    operator_backward.register_autograd(refuse)

    def call(given: Any) -> list[Tensor]:
        outputs: list[Tensor] = operator(*given)
        return outputs

    return call


def _schema_type(hint: Any) -> str:
    names = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}
    if hint in names:
        return names[hint]
    (kind, *_) = get_args(hint)
    return f"{names[kind]}?" if type(None) in get_args(hint) else f"{names[kind]}[]"


def _differentiable(given: Any, hints: dict[str, Any]) -> list[Tensor]:
    """The tensors of the inputs that get gradients, lists flattened."""
    tensors: list[Tensor] = []
    for value, hint in zip(given, hints.values(), strict=True):
        if hint is Tensor and (value.is_floating_point() or value.is_complex()):
            tensors.append(value)
        elif hint == list[Tensor]:
            tensors.extend(value)
    return tensors


def _take(found: Iterator[Tensor], value: Any, hint: Any) -> Any:
    """The gradient, or the list of gradients, that belongs to one input."""
    if hint == list[Tensor]:
        return [next(found) for _ in value]
    takes = hint is Tensor and (value.is_floating_point() or value.is_complex())
    return next(found) if takes else None
