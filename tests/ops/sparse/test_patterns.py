"""Convolution-like, axial and block-sparse attention: what is seen, and that every way to compute it agrees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_zoo import (
    TextImageLayout,
    axial_attention,
    axial_mask,
    block_sparse_attention,
    block_sparse_mask,
    conv_attention,
    conv_mask,
    reference,
)
from attention_zoo.ops import choose_blocks
from attention_zoo.ops.sparse import tiles
from tests.formulas import attend_one_by_one, relative_error

LAYOUT = TextImageLayout(text_len=5, height=6, width=7)
NO_TEXT = TextImageLayout(text_len=0, height=4, width=35)
TALL_TEXT = TextImageLayout(text_len=70, height=3, width=40)  # more than one tile of text, rows wider than a strip
Seen = Callable[[int, int], bool]


def near(layout: TextImageLayout, rule: Callable[[int, int], bool]) -> Seen:
    """Whether query i sees key j by the definition; `rule` is given how far j stands above and left of i."""

    def sees(i: int, j: int) -> bool:
        if j > i:
            return False
        if j < layout.text_len:
            return True
        (row, column), (key_row, key_column) = (divmod(t - layout.text_len, layout.width) for t in (i, j))
        return rule(row - key_row, column - key_column)

    return sees


def on_grid(kernel: int, dilation: int, low: int) -> Callable[[int, int], bool]:
    steps = [dilation * step for step in range(low, low + kernel)]
    return lambda down, right: down in steps and right in steps


def table(sees: Seen, n: int) -> Tensor:
    return torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])


def blocks_for(layout: TextImageLayout, causal: bool) -> Tensor:
    return choose_blocks(-(-layout.length // 8), local_blocks=2, global_blocks=1, random_blocks=1, causal=causal)


def in_blocks(blocks: Tensor, causal: bool) -> Seen:
    return lambda i, j: bool(blocks[i // 8, j // 8]) and (j <= i or not causal)


def patterns(layout: TextImageLayout) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Seen]]:
    """By name: the op, its mask, and the definition."""
    found: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Seen]] = {}
    windows: list[dict[str, Any]] = [
        {"kernel_size": 5},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 1},
        {"kernel_size": 5, "window": "causal"},
        {"kernel_size": 3, "dilation": 2, "window": "causal"},
    ]
    for kw in windows:
        kernel, dilation = kw["kernel_size"], kw.get("dilation", 1)
        rule = on_grid(kernel, dilation, -(kernel // 2) if "window" in kw else 0)
        options = {"layout": layout, **kw}
        found[f"conv {kw}"] = (partial(conv_attention, **options), partial(conv_mask, **options), near(layout, rule))
    for axis, rule in (("row", lambda down, right: down == 0), ("column", lambda down, right: right == 0)):
        options = {"layout": layout, "axis": axis}
        found[axis] = (partial(axial_attention, **options), partial(axial_mask, **options), near(layout, rule))
    for causal in (True, False):
        options = {"blocks": blocks_for(layout, causal), "block_size": 8, "causal": causal}
        found[f"blocks, {causal=}"] = (
            partial(block_sparse_attention, **options),
            partial(block_sparse_mask, **options),
            in_blocks(options["blocks"], causal),
        )
    return found


NAMES = list(patterns(LAYOUT))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [LAYOUT, TextImageLayout(0, 3, 4)], ids=["text", "no text"])
def test_masks_show_what_the_definition_says(layout: TextImageLayout, name: str) -> None:
    _, mask, sees = patterns(layout)[name]
    n = layout.length
    want = table(sees, n)
    assert torch.equal(mask(stop=n), want)
    assert torch.equal(mask(start=n - 3, stop=n - 1), want[n - 3 : n - 1, : n - 1])


def padding(n: int) -> Tensor:
    mask = torch.rand(2, n) < 0.6
    mask[0, : n // 2] = False  # a row that is padded on the left sees nothing at first
    return mask


def inputs(n: int, dtype: torch.dtype = torch.float32, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, n, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def with_gradients(op: Callable[..., Tensor], qkv: list[Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    out = op(*qkv, **options)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def assert_agree(op: Callable[..., Tensor], n: int, dtype: torch.dtype, limit: float) -> None:
    for mask in (None, padding(n)):
        qkv, weight = inputs(n, dtype), torch.randn(2, 3, n, 8, dtype=dtype)
        want = with_gradients(op, qkv, weight, mask=mask, impl="reference")
        size = max(float(part.detach().norm()) for part in want)
        for got, part in zip(with_gradients(op, qkv, weight, mask=mask, impl="tiled"), want, strict=True):
            assert got.dtype == dtype
            assert float((got - part).detach().float().norm()) <= limit * max(float(part.detach().norm()), 1e-2 * size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layout", "lengths"),
    [(LAYOUT, (1, 4, 5, 6, 12, 13, 30, 47)), (NO_TEXT, (1, 34, 36, 140)), (TALL_TEXT, (64, 70, 71, 111, 190))],
    ids=["text", "no text", "much text"],
)
def test_tiles_equal_the_reference_in_outputs_and_gradients(
    layout: TextImageLayout, lengths: tuple[int, ...], name: str
) -> None:
    for n in lengths:
        assert_agree(patterns(layout)[name][0], n, torch.float32, 1e-5)
    assert_agree(patterns(layout)[name][0], lengths[-2], torch.bfloat16, 3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_without_torch_s_kernel_equal_the_reference_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_has_flash", lambda q: False)
    for n in (4, 13, 47):
        assert_agree(patterns(LAYOUT)[name][0], n, torch.float32, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_way_equals_attention_one_query_at_a_time(name: str) -> None:
    op, _, sees = patterns(LAYOUT)[name]
    for n in (3, 5, 6, 19, 47):
        q, k, v = (t.detach().double() for t in inputs(n, b=1))
        mask = padding(n)[1:]
        seen = table(sees, n) & mask
        want = attend_one_by_one(q, k, v, seen.expand(1, 3, n, n), None, 8**-0.5)
        for impl in ("auto", "dense", "tiled", "reference"):
            assert relative_error(op(q, k, v, mask=mask, impl=impl), want) < 1e-6
        if "False" not in name:  # a bidirectional query's keys need not have come yet
            last = want[:, :, -1:]
            for impl in ("auto", "gather"):
                assert relative_error(op(q[:, :, -1:], k, v, mask=mask, impl=impl), last) < 1e-6
        assert relative_error(op(q[:, :, 2:], k, v, mask=mask), want[:, :, 2:]) < 1e-6


def test_random_blocks_come_from_the_seed_and_global_and_local_ones_from_the_definition() -> None:
    options = {"local_blocks": 4, "global_blocks": 2, "random_blocks": 3}
    blocks = choose_blocks(20, causal=False, **options)
    assert torch.equal(blocks, choose_blocks(20, causal=False, **options))
    assert not torch.equal(blocks, choose_blocks(20, causal=False, seed=1, **options))
    assert torch.equal(choose_blocks(20, **options), blocks.tril())
    assert bool(blocks[:, :2].all())
    for row in range(20):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        assert bool(blocks[row, list(group)].all())
        others = [column for column in range(20) if column >= 2 and column not in group and blocks[row, column]]
        assert len(others) <= 3
    assert int(choose_blocks(20, local_blocks=1, random_blocks=0).sum()) == 20


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k, v = (torch.zeros(1, 3, 300, 8) for _ in range(3))
    layout = TextImageLayout(258, 6, 7)
    torch.manual_seed(0)
    out = conv_attention(q, k, v + 1, layout=layout, dropout=0.5)
    assert 0.9 < float(out[:, :, 200:].mean()) < 1.1
    assert float(out[:, :, 200:].std()) > 0.01


def test_a_second_derivative_of_tiles_raises_and_names_the_way_out() -> None:
    q, k, v = inputs(47)
    out = conv_attention(q, k, v, layout=LAYOUT, impl="tiled")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*attention_zoo\.reference"):
        first.sum().backward()
    with reference():
        out = conv_attention(q, k, v, layout=LAYOUT, impl="tiled")
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        first.sum().backward()


def test_one_trace_serves_every_length() -> None:
    layout, count = TextImageLayout(5, 40, 9), 0

    def count_graphs(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(partial(conv_attention, layout=layout), fullgraph=True, backend=count_graphs, dynamic=True)
    for n in (270, 301, 333, 365):
        q, k, v = (t.detach() for t in inputs(n))
        torch.testing.assert_close(compiled(q, k, v), conv_attention(q, k, v, layout=layout))
    torch.compiler.reset()
    assert count == 1


def bad() -> dict[str, tuple[Callable[[Tensor], object], str]]:
    layout = LAYOUT
    blocks = torch.ones(3, 3, dtype=torch.bool)

    def conv(x: Tensor, k: Tensor | None = None, **options: Any) -> Tensor:
        return conv_attention(x, x if k is None else k, x if k is None else k, **{"layout": layout, **options})

    def sparse(x: Tensor, blocks: Tensor) -> Tensor:
        return block_sparse_attention(x, x, x, blocks=blocks, block_size=8)

    return {
        "even kernel": (lambda x: conv(x, kernel_size=4), "kernel_size must be odd, got"),
        "no kernel": (
            lambda x: conv_mask(layout, kernel_size=-1),
            "kernel_size must be at least 1, got kernel",
        ),
        "dilation": (lambda x: conv_mask(layout, dilation=0), "dilation must be at least 1, got dilation=0"),
        "window": (lambda x: conv_mask(layout, window="full"), "window must be one of .*got window='full'"),
        "axis": (lambda x: axial_attention(x, x, x, layout=layout, axis="col"), "axis must be one of .*got axis='col'"),
        "length": (lambda x: conv(x, layout=TextImageLayout(2, 3, 3)), "k must hold at most the 11 tok"),
        "stop": (lambda x: axial_mask(layout, stop=99), "stop must hold at most the 47 tokens"),
        "queries": (lambda x: conv(x, x[:, :, 1:]), "q must be the last of the tok"),
        "mask": (lambda x: conv(x, mask=torch.ones(2, 3).bool()), r"mask must be .*\(2, 3\)"),
        "mask dtype": (lambda x: conv(x, mask=torch.ones(2, 47)), "mask must be a boolean"),
        "impl": (lambda x: conv(x, impl="gather"), "impl must fit the queries.*'gather'"),
        "unknown impl": (lambda x: conv(x, impl="fast"), "impl must be one of"),
        "heads": (lambda x: conv(x, x[:, :1]), "same number of heads, got 3 and 1"),
        "text length": (lambda x: TextImageLayout(-1, 3, 3), "text_len must be at least 0, got text_len=-1"),
        "width": (lambda x: TextImageLayout(1, 3, 2.5), "width must be an int, got width=2.5"),
        "blocks": (lambda x: sparse(x, blocks), "k must hold at most 24 tokens"),
        "blocks dtype": (lambda x: sparse(x, blocks.int()), "blocks must be a b"),
        "blocks shape": (lambda x: sparse(x, blocks[:2]), "blocks must be squ"),
        "local": (lambda x: choose_blocks(9, local_blocks=0), "local_blocks must be at least 1, got local_blocks=0"),
    }


@pytest.mark.parametrize("name", bad())
def test_what_does_not_fit_is_refused_with_its_name_and_value(name: str) -> None:
    call, message = bad()[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(2, 3, 47, 8))
