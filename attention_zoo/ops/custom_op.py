"""Registration of custom operators: schema, fake kernels, autograd formula and the error of a second derivative.

A loop over tiles or chunks is one operator, because torch.compile would unroll it, and recompile it for every length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from attention_zoo.ops.precision import no_autocast

TENSOR = object()  # placeholder of a saved tensor
SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}


def register_operator(
    name: str,
    inputs: type[NamedTuple],
    forward: Callable[[Any], Sequence[Tensor]],
    backward: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    fake: Callable[[Any], Sequence[Tensor]],
    *,
    differentiable_outputs: int = 1,
    save_outputs: bool = True,
) -> Callable[[Any], list[Tensor]]:
    """Register the operator `attention_zoo::name` and the one of its backward.

    The NamedTuple `inputs` is the only place where the arguments are listed: the schema is read from its annotations
    (Tensor, Tensor | None, list[Tensor], Sequence[int], bool, int, float, str), and the functions take it whole. They
    run without autocast, and must not return an input or a view of one.

    Args:
        name: name of the operator.
        inputs: NamedTuple class of the arguments.
        forward: inputs -> outputs.
        backward: (inputs, outputs, gradients of the differentiable outputs) -> gradients of all floating point and
            complex tensors of `inputs`, in their order and with lists flattened. Each is cast to its tensor's dtype.
        fake: inputs -> empty outputs with the shapes, dtypes and strides of `forward`'s.
        differentiable_outputs: number of outputs, from the first, that receive gradients. The others do not require
            gradients; they are intermediate results for `backward`.
        save_outputs: whether the outputs are saved for backward as the inputs are; if not, `backward` gets none.

    Returns:
        A function from `inputs` to the list of outputs. Its second derivative and its forward-mode derivative raise
        RuntimeError, naming `attention_zoo.reference()`; tensors partly on the meta device raise RuntimeError too.
    """
    hints = get_type_hints(inputs)
    arguments = ", ".join(f"{_schema_type(hint)} {field}" for field, hint in hints.items())

    def run_forward(*args: Any) -> list[Tensor]:
        with no_autocast(next(_tensors(args))):
            return list(forward(inputs(*args)))

    def run_backward(gradients: list[Tensor], outputs: list[Tensor], *args: Any) -> list[Tensor]:
        with no_autocast(next(_tensors(args))):
            found = backward(inputs(*args), outputs, gradients)
        pairs = zip(found, filter(_has_gradient, _tensors(args)), strict=True)
        return [gradient.to(tensor.dtype).contiguous() for gradient, tensor in pairs]

    def fake_backward(gradients: list[Tensor], outputs: list[Tensor], *args: Any) -> list[Tensor]:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _tensors(args) if _has_gradient(t)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.mark_non_differentiable(*output[differentiable_outputs:])
        values = (*inputs, output if save_outputs else [])
        ctx.save_for_backward(*_tensors(values))
        ctx.values = _map(lambda value: TENSOR if isinstance(value, Tensor) else value, values)

    def differentiate(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        *args, outputs = _map(lambda value: next(saved) if value is TENSOR else value, ctx.values)
        found = iter(operator_backward(list(gradients[:differentiable_outputs]), outputs, *args))
        return tuple(_take(found, value) for value in args)

    def raise_second_derivative(ctx: Any, gradients: Sequence[Tensor]) -> None:
        raise RuntimeError(
            f"{name} has no second derivative on its fast path: compute it inside `with attention_zoo.reference():`"
        )

    def call(given: Any) -> list[Tensor]:
        if not torch.compiler.is_compiling():
            _check_tensors(name, list(_tensors(given)))
        return operator(*given)

    # a seed is read on the host: torch.compile(mode="reduce-overhead") must not capture the operator in a CUDA graph
    tags = (torch.Tag.cudagraph_unsafe,) if "seed" in hints else ()
    operator = torch.library.custom_op(
        f"attention_zoo::{name}", run_forward, mutates_args=(), schema=f"({arguments}) -> Tensor[]", tags=tags
    )
    operator_backward = torch.library.custom_op(
        f"attention_zoo::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor[] gradients, Tensor[] outputs, {arguments}) -> Tensor[]",
        tags=tags,
    )
    operator.register_fake(lambda *args: list(fake(inputs(*args))))
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=setup_context)
    operator_backward.register_autograd(raise_second_derivative)
    return call


def _check_tensors(name: str, tensors: list[Tensor]) -> None:
    """Check for inputs for which an operator would return wrong values without an error.

    Raises:
        RuntimeError: a tensor has a tangent, which torch would drop; or one is on the meta device while another is not,
            in which case the fake kernel would return uninitialised memory. Scalars, such as seeds, may be anywhere.
    """
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{name} has no forward-mode derivative on its fast path: compute it inside "
            f"`with attention_zoo.reference():`"
        )
    if len({tensor.is_meta for tensor in tensors if tensor.ndim}) > 1:
        raise RuntimeError(f"{name} must be given tensors with data, got some on the meta device")


def _schema_type(hint: Any) -> str:
    (kind, *rest) = get_args(hint) or (hint,)
    return SCHEMA_TYPES[kind] + ("?" if type(None) in rest else "" if kind is hint else "[]")


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among values, lists flattened."""
    for value in values:
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor))


def _map(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """Apply a function to every value, and to every item of a list."""
    return [[function(item) for item in value] if isinstance(value, list) else function(value) for value in values]


def _take(found: Iterator[Tensor], value: Any) -> Any:
    """The gradient, or the list of gradients, of one argument."""
    if isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
        return [_take(found, item) for item in value]
    return next(found) if _has_gradient(value) else None
