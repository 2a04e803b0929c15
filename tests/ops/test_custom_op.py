"""Custom operators registered through `register_operator`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import attention_zoo
from attention_zoo.layers import GEGLU, BiasedMemoryUpdate, MemoryUpdate
from attention_zoo.ops.custom_op import register_operator
from tests.cases import CASES as LAYERS
from tests.cases import DIM, Case

autocast_was_on: list[bool] = []


class Inputs(NamedTuple):
    """One field of every kind that a schema supports."""

    x: Tensor
    parts: list[Tensor]
    mask: Tensor | None
    offset: Tensor | None
    index: Tensor
    sizes: Sequence[int]
    power: int
    scale: float
    negate: bool
    name: str


def _factor(given: Inputs) -> float:
    return given.scale * (-1 if given.negate else 1) * sum(given.sizes)


def _total(given: Inputs) -> Tensor:
    return sum(((n + 1) * part for n, part in enumerate(given.parts)), torch.ones_like(given.x))


def _forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """scale * sum(sizes) * x^power * (1 + parts[0] + 2 parts[1] ...) + offset, 0 where masked; x^power for backward."""
    autocast_was_on.append(torch.is_autocast_enabled("cpu"))
    assert given.name == "cubic"
    powers = given.x**given.power
    out = _factor(given) * powers * _total(given)
    out = out if given.offset is None else out + given.offset
    return (out if given.mask is None else out.masked_fill(~given.mask, 0.0))[given.index].contiguous(), powers


def _backward(given: Inputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    autocast_was_on.append(torch.is_autocast_enabled("cpu"))
    (gradient,), powers = gradients, outputs[1]
    whole = torch.zeros_like(given.x).index_add_(0, given.index, gradient)
    whole = whole if given.mask is None else whole.masked_fill(~given.mask, 0.0)
    factor = _factor(given)
    to_x = factor * given.power * given.x ** (given.power - 1) * _total(given) * whole
    to_parts = [((n + 1) * factor * powers * whole).t().contiguous().t() for n in range(len(given.parts))]
    return [to_x, *to_parts, *([] if given.offset is None else [whole])]


def _fake(given: Inputs) -> tuple[Tensor, Tensor]:
    return given.x.new_empty(given.index.shape[0], *given.x.shape[1:]), torch.empty_like(given.x)


polynomial = register_operator("test_polynomial", Inputs, _forward, _backward, _fake)

CASES = {
    "everything": (2, True, True),
    "one part": (1, False, False),
    "no parts": (0, False, True),
    "no optional tensor": (3, False, False),
}


def problem(case: str, rows: int = 5) -> tuple[list[Tensor], Tensor | None]:
    """Leaves x, parts and offset in float64, and the mask."""
    parts, masked, shifted = CASES[case]
    leaves = [torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for _ in range(1 + parts + shifted)]
    return leaves, (torch.rand(rows, 3) < 0.6) if masked else None


def build(case: str, mask: Tensor | None, *leaves: Tensor) -> Inputs:
    parts, _, shifted = CASES[case]
    index = torch.arange(leaves[0].shape[0]).flip(0)
    offset = leaves[-1] if shifted else None
    return Inputs(leaves[0], list(leaves[1 : 1 + parts]), mask, offset, index, [2, 3], 3, 0.5, True, "cubic")


@pytest.mark.parametrize("case", CASES)
def test_an_operator_differentiates_every_floating_point_tensor_of_its_inputs(case: str) -> None:
    leaves, mask = problem(case)
    assert torch.autograd.gradcheck(lambda *leaves: polynomial(build(case, mask, *leaves))[0], leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_operator_equals_the_eager_one(case: str, dynamic: bool) -> None:
    torch.compiler.reset()  # all cases compile the same code
    compiled = torch.compile(
        lambda mask, *leaves: polynomial(build(case, mask, *leaves))[0] * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for rows in (5, 7):
        leaves, mask = problem(case, rows)
        got, want = compiled(mask, *leaves), polynomial(build(case, mask, *leaves))[0] * 2
        assert torch.equal(got, want)
        cotangent = torch.randn_like(want)
        grads, want_grads = (torch.autograd.grad(out, leaves, cotangent) for out in (got, want))
        assert all(map(torch.equal, grads, want_grads))


def test_an_operator_and_its_backward_pass_the_checks_of_torch() -> None:
    leaves, mask = problem("everything")
    torch.library.opcheck(torch.ops.attention_zoo.test_polynomial.default, tuple(build("everything", mask, *leaves)))
    # the fake kernel gives every gradient the dtype of its tensor, and contiguous strides
    dtypes = (torch.float64, torch.float32, torch.float32, torch.bfloat16)
    leaves = [leaf.detach().to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    given = build("everything", mask, *leaves)
    outputs = polynomial(given)
    backward = torch.ops.attention_zoo.test_polynomial_backward.default
    torch.library.opcheck(backward, ([torch.ones_like(outputs[0])], outputs, *given))


def test_a_second_derivative_of_an_operator_raises_and_names_the_reference() -> None:
    leaves, mask = problem("everything")
    out = polynomial(build("everything", mask, *leaves))[0]
    (grad, *_) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"test_polynomial has no second derivative.*attention_zoo\.reference\(\)"):
        grad.sum().backward()


def test_an_operator_runs_without_autocast_in_forward_and_backward() -> None:
    leaves, mask = problem("everything")
    autocast_was_on.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = polynomial(build("everything", mask, *leaves))[0]
        torch.autograd.grad(out.sum(), leaves)
    assert autocast_was_on == [False, False]


def test_outputs_beyond_the_differentiable_ones_do_not_require_gradients() -> None:
    leaves, mask = problem("everything")
    out, powers = polynomial(build("everything", mask, *leaves))
    assert out.requires_grad
    assert not powers.requires_grad


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("save", [False, True])
def test_outputs_are_saved_for_backward_only_if_asked_for(save: bool) -> None:
    given: list[int] = []

    def forward(pair: Pair) -> list[Tensor]:
        assert not pair.y.is_conj()
        return [pair.x + pair.y, pair.x * pair.y]

    def backward(pair: Pair, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        given.append(len(outputs))
        assert not any(tensor.is_conj() for tensor in (*pair, *gradients))  # kernels may read the memory
        to_sum, to_product = gradients
        return [to_sum + to_product * pair.y.conj(), to_sum + to_product * pair.x.conj()]

    both = register_operator(
        f"test_both_{save}".lower(),
        Pair,
        forward,
        backward,
        lambda pair: [torch.empty_like(pair.x), torch.empty_like(pair.x)],
        differentiable_outputs=2,
        save_outputs=save,
    )
    x, y = (torch.randn(3, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    total, product = both(Pair(x, y.conj()))
    assert len([tensor for tensor in product.grad_fn.saved_tensors if tensor is not None]) == (4 if save else 2)
    z = y.conj()
    # an output that is not used has gradient 0, and a conjugate view is resolved
    for got, want in ((total, x + z), (product.conj(), (x * z).conj()), (total * product, (x + z) * x * z)):
        cotangent = torch.randn_like(want)
        grads, want_grads = (torch.autograd.grad(out, [x, y], cotangent, retain_graph=True) for out in (got, want))
        torch.testing.assert_close(grads, want_grads, atol=1e-12, rtol=0)
    assert given == [2 if save else 0] * 3


NO_TANGENTS = r"test_polynomial has no forward-mode derivative.*attention_zoo\.reference\(\)"


def nth_leaf(n: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The operator as a function of one of its leaves, and the leaf."""
    leaves, mask = problem("everything")
    leaves = [leaf.detach() for leaf in leaves]
    return lambda leaf: polynomial(build("everything", mask, *leaves[:n], leaf, *leaves[n + 1 :]))[0], leaves[n]


@pytest.mark.parametrize("n", [0, 2, 3], ids=["tensor", "item of a list", "optional tensor"])
def test_forward_mode_derivatives_of_an_operator_raise_and_name_the_reference(n: int) -> None:
    function, leaf = nth_leaf(n)
    with pytest.raises(RuntimeError, match=NO_TANGENTS):
        torch.func.jvp(function, (leaf,), (leaf,))
    with pytest.raises(RuntimeError, match=NO_TANGENTS):
        torch.func.jacfwd(function)(leaf)
    for no_grad in (False, True):
        for requires_grad in (False, True):
            with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
                dual = forward_ad.make_dual(leaf.clone().requires_grad_(requires_grad), leaf)
                with pytest.raises(RuntimeError, match=NO_TANGENTS):
                    function(dual)
                function(leaf)  # without a tangent the operator runs in a dual level too


# one layer for each operator, with inputs of one stream and without a context
ONE_OF_EACH = {
    case.name: case
    for case in LAYERS
    if case.name
    in (
        "full: relative bias",
        "talking_heads",
        "gate_loop",
        "gate_loop: 4 heads",
        "simple_gate_loop",
        "relative_gate",
        "axial_row: tiles",
    )
}


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_a_forward_mode_derivative_of_a_layer_raises_or_by_the_reference_is_right(case: Case) -> None:
    block = case.make().double().eval()
    x, tangent = torch.randn(2, 1, max(case.lengths), DIM, dtype=torch.float64).unbind()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*attention_zoo\.reference\(\)"):
            torch.func.jvp(block, (x,), (tangent,))
        with attention_zoo.reference():
            _, got = torch.func.jvp(block, (x,), (tangent,))
            want = (block(x + 1e-6 * tangent) - block(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_tensors_partly_on_the_meta_device_raise() -> None:
    leaves, mask = problem("everything")
    with pytest.raises(RuntimeError, match=r"test_polynomial must be given tensors with data.*meta"):
        polynomial(build("everything", mask, leaves[0], leaves[1].to("meta"), *leaves[2:]))
    assert polynomial(build("everything", mask, *leaves))[0].device.type == "cpu"


PARTS = {name: case.make for name, case in ONE_OF_EACH.items()} | {
    "feedforward": lambda: GEGLU(DIM, bias=True),
    "memory update": lambda: MemoryUpdate(DIM, heads=2),
    "biased memory update": lambda: BiasedMemoryUpdate(DIM, memory_slots=5, heads=2),
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_a_layer_with_one_parameter_on_the_meta_device_raises(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 5, DIM)
    for name, parameter in make().named_parameters():
        layer = make()
        owner, _, leaf = name.rpartition(".")
        layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(parameter.to("meta"))
        with pytest.raises(RuntimeError, match="meta"):
            layer(x, *([x] if isinstance(layer, MemoryUpdate | BiasedMemoryUpdate) else []))


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_a_layer_runs_on_the_meta_device_and_on_fake_tensors(case: Case) -> None:
    n = max(case.lengths)
    assert case.make().to("meta")(torch.empty(2, n, DIM, device="meta")).is_meta
    with FakeTensorMode():
        assert case.make()(torch.empty(2, n, DIM)).device.type == "cpu"
