"""The gate loop of heads of size 1 as loops of numba, the features inside: one pass over memory, gates included.

The functions here are compiled when they are first used, which takes some seconds for each dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Kernels(NamedTuple):
    """The compiled loops of one dtype.

    forward: (q, k, v, z, mask, h, out), where h is the memory before, and becomes that after.
    backward: (to_out, q, k, v, z, mask, start, to_q, to_k, to_v, to_z, to_h), where to_h is the gradient to the memory
        after all tokens, and becomes that to the memory before them.

    Shapes: q, k, v, out (b, n, d); z (b, n, 2 d), the real and imaginary part of a feature side by side; mask (b, n)
    or (0, 0) for none; memories (b, 2, d), real over imaginary.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


@functools.cache
def kernels(double: bool) -> Kernels:
    """The loops in float64 or float32."""
    import numba
    import numpy as np

    real = np.float64 if double else np.float32
    one, half, zero = real(1), real(0.5), real(0)
    decay = _double_decay() if double else _single_decay()

    @numba.njit(inline="always")
    def polar(re: Any, im: Any) -> Any:
        """The gate, the unit vector of z, sigma(|z|), and sigma(|z|) / |z|; the last three 0 where z is 0."""
        square = re * re + im * im
        size = np.sqrt(square)
        inverse = zero if square == zero else one / size
        sigma = one / (one + decay(size))
        scale = sigma * inverse
        real_part = half if square == zero else scale * re
        return real_part, scale * im, re * inverse, im * inverse, sigma, scale

    @numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    def gates(z: Any, w: Any) -> None:
        """Fill w (6, d) with what `polar` gives for each feature of one token. A function of its own, and loops that do
        little each: only so does the compiler see that it may compute many features at a time.
        """
        for c in range(w.shape[1]):
            w[0, c], w[1, c], w[2, c], w[3, c], w[4, c], w[5, c] = polar(z[2 * c], z[2 * c + 1])

    def forward(q: Any, k: Any, v: Any, z: Any, mask: Any, h: Any, out: Any) -> None:
        b, n, d = q.shape
        for row in range(b):
            for t in range(n):
                if mask.size and not mask[row, t]:
                    for c in range(d):
                        out[row, t, c] = q[row, t, c] * h[row, 0, c]
                    continue
                for c in range(d):
                    a_re, a_im, _, _, _, _ = polar(z[row, t, 2 * c], z[row, t, 2 * c + 1])
                    re, im = h[row, 0, c], h[row, 1, c]
                    new = a_re * re - a_im * im + k[row, t, c] * v[row, t, c]
                    h[row, 1, c] = a_re * im + a_im * re
                    h[row, 0, c] = new
                    out[row, t, c] = q[row, t, c] * new

    def backward(
        to_out: Any, q: Any, k: Any, v: Any, z: Any, mask: Any, start: Any,
        to_q: Any, to_k: Any, to_v: Any, to_z: Any, to_h: Any,
    ) -> None:  # fmt: skip
        b, n, d = q.shape
        h = np.empty((n + 1, 2, d), q.dtype)  # of one row, the memory before and after every token
        now = np.empty((2, d), q.dtype)  # the gradient to the memory after a token
        w = np.empty((6, d), q.dtype)
        for row in range(b):
            h[0] = start[row]
            for t in range(n):
                if mask.size and not mask[row, t]:
                    h[t + 1] = h[t]
                    continue
                gates(z[row, t], w)
                for c in range(d):
                    h[t + 1, 0, c] = w[0, c] * h[t, 0, c] - w[1, c] * h[t, 1, c] + k[row, t, c] * v[row, t, c]
                    h[t + 1, 1, c] = w[0, c] * h[t, 1, c] + w[1, c] * h[t, 0, c]
            for back in range(n):
                t = n - 1 - back
                if mask.size and not mask[row, t]:
                    for c in range(d):
                        to_q[row, t, c] = to_out[row, t, c] * h[t, 0, c]
                        to_h[row, 0, c] += q[row, t, c] * to_out[row, t, c]
                        to_k[row, t, c] = zero
                        to_v[row, t, c] = zero
                        to_z[row, t, 2 * c] = zero
                        to_z[row, t, 2 * c + 1] = zero
                    continue
                for c in range(d):
                    to_q[row, t, c] = to_out[row, t, c] * h[t + 1, 0, c]
                    now[0, c] = to_h[row, 0, c] + q[row, t, c] * to_out[row, t, c]
                    now[1, c] = to_h[row, 1, c]
                for c in range(d):
                    to_k[row, t, c] = v[row, t, c] * now[0, c]
                    to_v[row, t, c] = k[row, t, c] * now[0, c]
                gates(z[row, t], w)
                for c in range(d):
                    # the gradient to the gate, and its part along z, in which the gate grows by sigma'
                    re = now[0, c] * h[t, 0, c] + now[1, c] * h[t, 1, c]
                    im = now[1, c] * h[t, 0, c] - now[0, c] * h[t, 1, c]
                    along = re * w[2, c] + im * w[3, c]
                    slope = w[4, c] * (one - w[4, c]) * along - w[5, c] * along
                    to_z[row, t, 2 * c] = w[5, c] * re + slope * w[2, c]
                    to_z[row, t, 2 * c + 1] = w[5, c] * im + slope * w[3, c]
                for c in range(d):
                    to_h[row, 0, c] = w[0, c] * now[0, c] + w[1, c] * now[1, c]
                    to_h[row, 1, c] = w[0, c] * now[1, c] - w[1, c] * now[0, c]

    # contract: multiply and add in one instruction. numpy's division by 0 instead of Python's lets loops be vectors.
    compiled = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    return Kernels(compiled(forward), compiled(backward))


def _double_decay() -> Any:
    """e^-x."""
    import numba

    @numba.njit(inline="always")
    def decay(x: Any) -> Any:
        return math.exp(-x)

    return decay


def _single_decay() -> Any:
    """e^-x for x >= 0 in float32 by arithmetic alone, which, unlike a call of exp, the compiler turns into vectors.

    e^-x = 2^whole * 2^part: the whole number is written into the exponent's bits, the series of 2^part = e^(part ln 2)
    with |part| <= 1/2 ends where float32 does.
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
