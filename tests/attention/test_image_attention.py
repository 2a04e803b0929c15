"""Attention along the rows, columns and windows of images: without text and causality, and as DALL-E describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import AxialAttention, BlockSparseAttention, ConvAttention, Encoder, TextImageLayout
from attention_zoo.attention.base import ImageAttention

HEIGHT, WIDTH, DIM = 4, 6, 16
LAYOUT = TextImageLayout(0, HEIGHT, WIDTH)
SIZES: dict[str, Any] = {"layout": LAYOUT, "heads": 2, "dim_head": 8, "causal": False}
MAKE: dict[str, Callable[[], ImageAttention]] = {
    "rows": lambda: AxialAttention(DIM, **SIZES),
    "columns": lambda: AxialAttention(DIM, axis="column", **SIZES),
    "windows": lambda: ConvAttention(DIM, kernel_size=3, **SIZES),
    "blocks": lambda: BlockSparseAttention(DIM, block_size=4, **SIZES),
}


def neighbours(kind: str, row: int, column: int) -> list[tuple[int, int]]:
    """The pixels that a pixel attends to."""
    pixels = [(r, c) for r in range(HEIGHT) for c in range(WIDTH)]
    rule = {
        "rows": lambda r, c: r == row,
        "columns": lambda r, c: c == column,
        "windows": lambda r, c: max(abs(r - row), abs(c - column)) <= 1,
    }[kind]
    return [pixel for pixel in pixels if rule(*pixel)]


def formula(layer: ImageAttention, kind: str, image: Tensor, valid: Tensor) -> Tensor:
    """The layer on images (b, height, width, d), one pixel and head at a time."""
    q, k, v = layer.to_qkv(image).unflatten(-1, (3, 2, 8)).unbind(-3)
    out = torch.zeros_like(q)
    for b in range(len(image)):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                near = [(r, c) for r, c in neighbours(kind, row, column) if valid[b, r, c]]
                for head in range(2 if near else 0):
                    scores = torch.stack([q[b, row, column, head] @ k[b, r, c, head] for r, c in near]) / 8**0.5
                    values = torch.stack([v[b, r, c, head] for r, c in near])
                    out[b, row, column, head] = scores.softmax(0) @ values
    return layer.to_out(out.flatten(-2))


@pytest.mark.parametrize("kind", ["rows", "columns", "windows"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_over_images_equals_attention_one_pixel_at_a_time(kind: str, padded: bool) -> None:
    layer = MAKE[kind]()
    x = torch.randn(2, HEIGHT, WIDTH, DIM)
    valid = torch.rand(2, HEIGHT, WIDTH) < 0.4 if padded else torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)
    valid[0, :, 2] = valid[0, 1] = not padded  # a row and a column without a key
    out = layer(x, mask=valid if padded else None)
    torch.testing.assert_close(out, formula(layer, kind, x, valid), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MAKE)
def test_an_image_is_the_sequence_of_its_rows(kind: str) -> None:
    layer, x = MAKE[kind](), torch.randn(2, HEIGHT, WIDTH, DIM)
    mask = torch.rand(2, HEIGHT, WIDTH) < 0.7
    tokens, valid = x.flatten(1, 2), mask.flatten(1)
    assert torch.equal(layer(x, mask=mask), layer(tokens, mask=valid).view(x.shape))
    weights = layer.attention_map(x, mask=mask)
    assert torch.equal(weights, layer.attention_map(tokens, mask=valid))
    found = layer.values_and_output(x, mask=mask)
    torch.testing.assert_close(weights @ found.values, found.output)


@pytest.mark.parametrize("kind", MAKE)
def test_images_of_another_size_or_after_text_raise(kind: str) -> None:
    layer, x = MAKE[kind](), torch.randn(2, HEIGHT, WIDTH, DIM)
    with pytest.raises(ValueError, match=r"x must be \(b, 4, 6, d\) without text .*got shape \(2, 6, 4, 16\)"):
        layer(x.transpose(1, 2))
    with pytest.raises(ValueError, match=r"mask must be \(b, height, width\) = \(2, 4, 6\), got shape \(2, 24\)"):
        layer(x, mask=torch.ones(2, 24, dtype=torch.bool))
    layout = TextImageLayout(1, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="without text"):
        type(layer)(DIM, **{**SIZES, "layout": layout})(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AxialAttention(DIM, axis="wrapped_row", **SIZES), "axis must be 'row' or 'column' with causal=False"),
        (
            lambda: ConvAttention(DIM, window="causal", **SIZES),
            "window must be 'centred' with causal=False",
        ),
        (
            lambda: ConvAttention(DIM, window="centred", **{**SIZES, "causal": True}),
            "window must not be 'centred' with causal=True",
        ),
    ],
)
def test_windows_and_axes_that_do_not_fit_causal_raise(call: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_variants_of_dall_e_wrap_over_the_ends_of_rows() -> None:
    layout = TextImageLayout(0, 4, 4)
    rows, wrapped_rows = (AxialAttention(DIM, layout=layout, axis=axis) for axis in ("row", "wrapped_row"))
    windows, wrapped = (ConvAttention(DIM, layout=layout, kernel_size=3, window=w) for w in ("causal", "wrapped"))
    x = torch.randn(1, 4, 4, DIM)
    seen = {layer: layer.attention_map(x)[0, 0] > 0 for layer in (rows, wrapped_rows, windows, wrapped)}
    for query in range(16):
        assert seen[wrapped_rows][query].nonzero()[:, 0].tolist() == list(range(max(query - 4, 0), query + 1))
        back = [query - distance for distance in (5, 4, 3, 1, 0) if query >= distance]
        assert seen[wrapped][query].nonzero()[:, 0].tolist() == back
    assert int((seen[rows] != seen[wrapped_rows]).sum()) == 30
    assert int((seen[windows] != seen[wrapped]).sum()) == 9


def test_an_encoder_of_images_takes_these_layers_and_a_class_token() -> None:
    for pooling, text in (("mean", 0), ("class", 1)):
        options = {"layout": TextImageLayout(text, HEIGHT, WIDTH)}
        attention = [("axial_row", options), ("axial_col", options), ("conv", {**options, "kernel_size": 3})]
        sizes: dict[str, Any] = {"patch_dim": 5, "dim": DIM, "depth": 3, "heads": 2, "dim_head": 8, "num_classes": 3}
        model = Encoder(attention=attention, pooling=pooling, **sizes)
        x = torch.randn(2, HEIGHT * WIDTH, 5, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x)[0].sum(), x)
        assert bool((gradient[0] != 0).all())  # every patch is seen
        assert not gradient[1].any()
