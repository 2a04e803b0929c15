"""Recurrences as loops compiled by numba: a single pass over the tokens, with the features in the inner loop.

The functions are compiled on first use, which takes some seconds per dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class GateLoopKernels(NamedTuple):
    """The compiled loops of the gate loop over heads of size 1, for one dtype.

    forward: (q, k, v, z, mask, starts, state, out); `state` holds the initial state and is overwritten by the final
        one.
    backward: (grad_out, q, k, v, z, mask, starts, state, grad_q, grad_k, grad_v, grad_z, grad_state); `state` is the
        initial state, and `grad_state` holds the gradient of the final state and is overwritten by that of the initial
        one.

    Shapes: q, k, v, out (b, n, d); z (b, n, 2 d), real and imaginary part of a feature side by side; mask and
    starts (b, n), or (0, 0) for none; state (b, 2, d), real, then imaginary part.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


@functools.cache
def recurrence_kernel() -> Callable[..., None]:
    """The compiled loop of the linear recurrence, (a, x, state, out), for any dtype."""
    import numba

    def run(a: Any, x: Any, state: Any, out: Any) -> None:
        b, n, d = x.shape
        for row in range(b):
            for c in range(d):
                out[row, 0, c] = a[row, 0, c] * state[row, c] + x[row, 0, c]
            for t in range(1, n):
                for c in range(d):
                    out[row, t, c] = a[row, t, c] * out[row, t - 1, c] + x[row, t, c]

    compiled: Callable[..., None] = numba.njit(run, nogil=True, fastmath={"contract"})
    return compiled


@functools.cache
def gate_loop_kernels(double: bool) -> GateLoopKernels:
    """The loops for float64 or float32."""
    import numba
    import numpy as np

    real = np.float64 if double else np.float32
    one, half, zero = real(1), real(0.5), real(0)
    decay = _double_decay() if double else _single_decay()

    @numba.njit(inline="always")
    def polar(re: Any, im: Any) -> Any:
        """The gate (2 numbers), the unit vector of z (2), sigma(|z|) and sigma(|z|) / |z|; 0 / 0 is taken as 0."""
        square = re * re + im * im
        size = np.sqrt(square)
        inverse = zero if square == zero else one / size
        sigma = one / (one + decay(size))
        scale = sigma * inverse
        real_part = half if square == zero else scale * re
        return real_part, scale * im, re * inverse, im * inverse, sigma, scale

    @numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    def gates(z: Any, w: Any) -> None:
        """Fill w (6, d) with the results of `polar` for all features of a token.

        A separate function of one short loop, because only such loops are vectorised by the compiler.
        """
        for c in range(w.shape[1]):
            w[0, c], w[1, c], w[2, c], w[3, c], w[4, c], w[5, c] = polar(z[2 * c], z[2 * c + 1])

    def forward(q: Any, k: Any, v: Any, z: Any, mask: Any, starts: Any, state: Any, out: Any) -> None:
        b, n, d = q.shape
        for row in range(b):
            for t in range(n):
                if starts.size and starts[row, t]:
                    state[row] = zero
                if mask.size and not mask[row, t]:
                    for c in range(d):
                        out[row, t, c] = q[row, t, c] * state[row, 0, c]
                    continue
                for c in range(d):
                    a_re, a_im, _, _, _, _ = polar(z[row, t, 2 * c], z[row, t, 2 * c + 1])
                    re, im = state[row, 0, c], state[row, 1, c]
                    new = a_re * re - a_im * im + k[row, t, c] * v[row, t, c]
                    state[row, 1, c] = a_re * im + a_im * re
                    state[row, 0, c] = new
                    out[row, t, c] = q[row, t, c] * new

    def backward(
        grad_out: Any, q: Any, k: Any, v: Any, z: Any, mask: Any, starts: Any, state: Any,
        grad_q: Any, grad_k: Any, grad_v: Any, grad_z: Any, grad_state: Any,
    ) -> None:  # fmt: skip
        b, n, d = q.shape
        states = np.empty((n + 1, 2, d), q.dtype)  # of one row, before and after each token
        grad = np.empty((2, d), q.dtype)  # of the state after a token
        w = np.empty((6, d), q.dtype)
        for row in range(b):
            states[0] = state[row]
            for t in range(n):
                reset = starts.size and starts[row, t]
                if mask.size and not mask[row, t]:
                    if reset:
                        states[t + 1] = zero
                    else:
                        states[t + 1] = states[t]
                    continue
                if reset:
                    for c in range(d):
                        states[t + 1, 0, c] = k[row, t, c] * v[row, t, c]
                        states[t + 1, 1, c] = zero
                    continue
                gates(z[row, t], w)
                for c in range(d):
                    states[t + 1, 0, c] = (
                        w[0, c] * states[t, 0, c] - w[1, c] * states[t, 1, c] + k[row, t, c] * v[row, t, c]
                    )
                    states[t + 1, 1, c] = w[0, c] * states[t, 1, c] + w[1, c] * states[t, 0, c]
            for back in range(n):
                t = n - 1 - back
                reset = starts.size and starts[row, t]
                if mask.size and not mask[row, t]:
                    for c in range(d):
                        grad_q[row, t, c] = grad_out[row, t, c] * states[t + 1, 0, c]
                        grad_state[row, 0, c] += q[row, t, c] * grad_out[row, t, c]
                        grad_k[row, t, c] = zero
                        grad_v[row, t, c] = zero
                        grad_z[row, t, 2 * c] = zero
                        grad_z[row, t, 2 * c + 1] = zero
                    if reset:
                        grad_state[row] = zero
                    continue
                for c in range(d):
                    grad_q[row, t, c] = grad_out[row, t, c] * states[t + 1, 0, c]
                    grad[0, c] = grad_state[row, 0, c] + q[row, t, c] * grad_out[row, t, c]
                    grad[1, c] = grad_state[row, 1, c]
                for c in range(d):
                    grad_k[row, t, c] = v[row, t, c] * grad[0, c]
                    grad_v[row, t, c] = k[row, t, c] * grad[0, c]
                if reset:
                    grad_state[row] = zero
                    grad_z[row, t] = zero
                    continue
                gates(z[row, t], w)
                for c in range(d):
                    # gradient of the gate, and its part along z, where the derivative of the gate is sigma'
                    re = grad[0, c] * states[t, 0, c] + grad[1, c] * states[t, 1, c]
                    im = grad[1, c] * states[t, 0, c] - grad[0, c] * states[t, 1, c]
                    along = re * w[2, c] + im * w[3, c]
                    slope = w[4, c] * (one - w[4, c]) * along - w[5, c] * along
                    grad_z[row, t, 2 * c] = w[5, c] * re + slope * w[2, c]
                    grad_z[row, t, 2 * c + 1] = w[5, c] * im + slope * w[3, c]
                for c in range(d):
                    grad_state[row, 0, c] = w[0, c] * grad[0, c] + w[1, c] * grad[1, c]
                    grad_state[row, 1, c] = w[0, c] * grad[1, c] - w[1, c] * grad[0, c]

    # contract: fused multiply-add. numpy's rule for division by 0 instead of Python's exception permits vectorisation.
    compiled = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    return GateLoopKernels(compiled(forward), compiled(backward))


def _double_decay() -> Any:
    """e^-x."""
    import numba

    @numba.njit(inline="always")
    def decay(x: Any) -> Any:
        return math.exp(-x)

    return decay


def _single_decay() -> Any:
    """e^-x for x >= 0 in float32 from arithmetic alone, which the compiler vectorises, unlike a call of exp.

    e^-x = 2^whole * 2^part: the integer goes into the exponent bits, and the series of 2^part = e^(part ln 2) with
    |part| <= 1/2 is truncated at float32's precision.
    """
    import numba
    import numpy as np

    rate = np.float32(-1 / math.log(2))
    smallest, half, one = np.float32(-126), np.float32(0.5), np.float32(1)
    c1, c2, c3, c4, c5, c6, c7 = (np.float32(math.log(2) ** power / math.factorial(power)) for power in range(1, 8))
    bias, shift = np.int32(127), np.int32(23)

    @numba.njit(inline="always")
    def decay(x: Any) -> Any:
        power = max(x * rate, smallest)
        whole = np.floor(power + half)
        part = power - whole
        series = ((((((c7 * part + c6) * part + c5) * part + c4) * part + c3) * part + c2) * part + c1) * part + one
        return series * np.int32((np.int32(whole) + bias) << shift).view(np.float32)

    return decay
