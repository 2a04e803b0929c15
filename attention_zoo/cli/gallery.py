"""Draw who sees whom in every block: measured receptive fields and attention maps, as PNGs and one HTML page."""

from __future__ import annotations

import argparse
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attention_zoo._checks import check_positive
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._gallery.fields import LAYOUT, Field, receptive_field, sentence_map
from attention_zoo.cli._gallery.page import Entry, write_page
from attention_zoo.cli._gallery.pictures import draw_field, draw_map, draw_overview, field_as_text, new_figure
from attention_zoo.cli._targets import find_block, make_block, read_arguments
from attention_zoo.training import read_text

SENTENCE = "for name, value in items: print(name)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw and where."""
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help="names, or module:Class (all of the zoo)")
    parser.add_argument("--out", type=Path, default=Path("gallery"), help="folder of the pictures (gallery)")
    parser.add_argument("--dim", type=int, default=64, help="features (64)")
    parser.add_argument("--steps", type=int, default=200, help="of training before a map is drawn; 0: fresh (200)")
    parser.add_argument("--sentence", default=SENTENCE, help=f"what the map is drawn on ({SENTENCE!r})")
    parser.add_argument("--arguments", metavar="JSON", help="of the constructors beside dim")
    parser.add_argument("--ascii", action="store_true", help="print receptive fields as characters, write nothing")


def run(args: argparse.Namespace) -> int:
    """Measure and draw one block after the other."""
    check_positive(dim=args.dim)
    if args.steps < 0:
        raise ValueError(f"steps must be at least 0, got {args.steps}")
    sentence = args.sentence.encode()
    if len(sentence) < 8:
        raise ValueError(f"sentence must have at least 8 bytes, got {args.sentence!r}")
    arguments = read_arguments(args.arguments)
    fields: dict[str, Field] = {}
    entries: list[Entry] = []
    text = b"" if args.ascii else read_text().training
    if not args.ascii:
        new_figure(1, 1)  # says at once what is missing
        args.out.mkdir(parents=True, exist_ok=True)
    for name in args.blocks or BLOCKS:
        make = find_block(name)
        given = {**_sizes(make, args.dim), **arguments}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            field = fields[name] = receptive_field(make_block(make, name, args.dim, given).eval(), args.dim)
        if args.ascii:
            print(f"{name}\n{field_as_text(field)}\n")
            continue
        file = re.sub(r"\W+", "_", name)
        pictures = [(args.out / f"{file}_field.png", "receptive field: gradients of outputs to inputs")]
        draw_field(field, name).savefig(pictures[0][0], dpi=100)
        found = sentence_map(partial(make, **arguments), sentence, dim=args.dim, steps=args.steps, text=text)
        if found is not None:
            weights, steps = found
            how = f"after {steps} steps of training" if steps else "fresh"
            caption = f"attention map on {args.sentence!r}, {how}"
            pictures.append((args.out / f"{file}_map.png", caption))
            draw_map(weights, sentence, f"{name}: {caption}").savefig(pictures[1][0], dpi=100)
        entries.append(Entry(name, make, pictures))
        print(f"{name}: {', '.join(str(path) for path, _ in pictures)}", flush=True)
    if not args.ascii:
        draw_overview(fields, args.out / "overview.png")
        write_page(entries, args.out / "index.html")
        print(f"All of it is in {args.out / 'index.html'}.")
    return 0


def _sizes(make: Any, dim: int) -> dict[str, Any]:
    """Few heads, and an image, where a block of the zoo takes them."""
    takes = inspect.signature(make).parameters
    sizes: dict[str, Any] = {"layout": LAYOUT} if "layout" in takes else {}
    if "block_size" in takes:
        sizes |= {"block_size": 8, "local_blocks": 2, "random_blocks": 2}
    return sizes | ({"heads": 4, "dim_head": dim // 4} if "dim_head" in takes else {})
