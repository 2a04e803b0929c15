"""Gate loops on other devices than the CPU: operators counted on the meta device, and exactness of batched paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import GateLoopAttention, RelativeGateAttention, SimpleGateLoop
from attention_zoo.ops.gate_loop import gate_loop, gate_products, linear_recurrence
from tests.counting import SYNCHRONISING, OperatorCounter
from tests.formulas import relative_error

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gate_loop": lambda: GateLoopAttention(64, sub_norm=True),
    "gate_loop, 4 heads": lambda: GateLoopAttention(64, heads=4),
    "gate_loop, reverse": lambda: GateLoopAttention(64, heads=4, reverse=True),
    "simple_gate_loop": lambda: SimpleGateLoop(64),
    "relative_gate": lambda: RelativeGateAttention(64, heads=4, dim_head=16),
}


class DoubleCounter(OperatorCounter):
    """Records also whether an operator returned float64."""

    double = False

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        outs = out if isinstance(out, (list, tuple)) else [out]
        self.double |= any(isinstance(t, Tensor) and t.dtype in (torch.float64, torch.complex128) for t in outs)
        return out


def count(run: Callable[[], object]) -> int:
    """The number of operators, none of which waits for the device or computes in float64."""
    with DoubleCounter() as counter:
        run()
    assert not set(counter.names) & set(SYNCHRONISING)
    assert not counter.double
    return len(counter.names)


@pytest.mark.parametrize("name", LAYERS)
def test_operators_on_other_devices_grow_at_most_with_the_logarithm_of_the_length(name: str) -> None:
    block = LAYERS[name]().to("meta")

    def train(n: int) -> int:
        block.zero_grad()
        x = torch.zeros(1, n, 64, device="meta", requires_grad=True)
        mask = torch.ones(1, n, dtype=torch.bool, device="meta")
        return count(lambda: block(x, mask=mask).sum().backward())

    counts = [train(n) for n in (1024, 2048, 4096)]
    assert counts[2] - counts[0] <= 2 * (90 if name == "relative_gate" else 15)
    if name.startswith("gate_loop, "):
        assert counts[0] == counts[2]
    assert counts[2] < (1000 if name == "relative_gate" else 400)


@pytest.mark.parametrize("name", [name for name in LAYERS if "reverse" not in name])
@torch.no_grad()
def test_operators_of_a_step_on_other_devices_do_not_depend_on_the_length(name: str) -> None:
    block, counts = LAYERS[name]().to("meta").eval(), []
    for n in (96, 2080):
        _, state = block.step(torch.zeros(1, n, 64, device="meta"))
        counts.append(count(lambda state=state: block.step(torch.zeros(1, 1, 64, device="meta"), state)))
    assert counts[0] == counts[1] < 200


def test_products_equal_the_definition_with_gates_of_zero() -> None:
    gate = torch.randn(3, 9, dtype=torch.complex128)
    gate[1, 4] = 0
    found = gate_products(gate)
    for i in range(9):
        for j in range(9):
            want = gate[:, j + 1 : i + 1].prod(-1) if j <= i else torch.zeros(3, dtype=torch.complex128)
            torch.testing.assert_close(found[:, i, j], want)


def test_batched_gates_of_mixed_sizes_are_exact_in_float32() -> None:
    """Sums of logarithms in float32 would lose the gates of 0.7 beside those of 1e-20."""
    q, k, v = torch.randn(3, 2, 4, 300, 8).unbind()
    gate = torch.polar(torch.full((2, 4, 300), 0.7), torch.randn(2, 4, 300))
    gate[:, :, ::9] *= 1e-20
    gate[:, :, 100] = 0
    want = gate_loop(*(t.double() for t in (q, k, v)), gate.to(torch.complex128), impl="reference").out
    assert relative_error(gate_loop(q, k, v, gate, impl="batched").out.double(), want) < 1e-6


@pytest.mark.parametrize("n", [5000, 4097])
def test_batched_paths_stay_exact_over_long_sequences(n: int) -> None:
    q, k, v = torch.randn(3, 1, 2, n, 4).unbind()
    gate = torch.polar(1 - 1e-3 * torch.rand(1, 2, n), torch.randn(1, 2, n))
    want = gate_loop(*(t.double() for t in (q, k, v)), gate.to(torch.complex128), impl="chunked").out
    assert relative_error(gate_loop(q, k, v, gate, impl="batched").out.double(), want) < 1e-5
    a, x = gate.transpose(1, 2), torch.complex(k[..., 0], v[..., 0]).transpose(1, 2)
    wide = linear_recurrence(a.to(torch.complex128), x.to(torch.complex128), impl="scan").out
    got = linear_recurrence(a, x, impl="batched").out
    assert relative_error(torch.view_as_real(got).double(), torch.view_as_real(wide)) < 1e-5
