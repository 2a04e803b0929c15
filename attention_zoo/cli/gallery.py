"""Draw receptive fields and attention maps of the layers as PNG files and one HTML page.

Receptive fields are measured: gradients of the outputs with respect to the inputs, over random inputs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attention_zoo._checks import check_at_least, check_positive
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._gallery.fields import LAYOUT, Field, model_maps, receptive_field, small_sizes, trained_map
from attention_zoo.cli._gallery.page import Entry, write_page
from attention_zoo.cli._gallery.pictures import draw_field, draw_image_map, draw_map, draw_overview, field_as_text
from attention_zoo.cli._targets import Make, accepted, find_block, make_block, read_arguments
from attention_zoo.testing.subject import seeded
from attention_zoo.training import read_text

SENTENCE = "for name, value in items: print(name)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("blocks", nargs="*", metavar="BLOCK", help="layer names, or module:Class (default: all layers)")
    add("--out", type=Path, default=Path("gallery"), help="output folder (default: gallery)")
    add("--dim", type=int, default=64, help="number of features (default: 64)")
    add("--steps", type=int, default=200, help="training steps before an attention map is drawn (default: 200)")
    add("--sentence", default=SENTENCE, help=f"input of the attention map (default: {SENTENCE!r})")
    add("--arguments", metavar="JSON", help="constructor arguments other than dim")
    add("--model", type=Path, metavar="FOLDER", help="draw the attention maps of a saved model of bytes, with --text")
    add("--text", type=Path, metavar="FILE", help="input of --model, of which the first bytes are used")
    add("--ascii", action="store_true", help="print receptive fields as text instead of writing files")


def run(args: argparse.Namespace) -> int:
    """Measure and draw one layer after the other."""
    check_positive(dim=args.dim)
    check_at_least(0, steps=args.steps)
    if (args.model is None) != (args.text is None):
        raise ValueError(f"--model and --text must be given together, got {args.model} and {args.text}")
    if args.model is not None:
        return _draw_model(args)
    sentence = args.sentence.encode()
    if len(sentence) < 8:
        raise ValueError(f"sentence must have at least 8 bytes, got {args.sentence!r}")
    arguments = read_arguments(args.arguments)
    makes = {name: find_block(name) for name in args.blocks or BLOCKS}
    if args.ascii:
        for name, make in makes.items():
            print(f"{name}\n{field_as_text(_measure(name, make, args.dim, arguments))}\n")
        return 0
    new_figure(1, 1)  # raises early if matplotlib is missing
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text().training
    fields, entries = {}, []
    for name, make in makes.items():
        field = fields[name] = _measure(name, make, args.dim, arguments)
        stem = re.sub(r"\W+", "_", name)
        pictures = [(args.out / f"{stem}_field.png", "receptive field: gradients of outputs with respect to inputs")]
        draw_field(field, name, pictures[0][0])
        found = trained_map(partial(make, **arguments), sentence, dim=args.dim, steps=args.steps, text=text)
        if found is not None:
            trained = f"after {found.steps} steps of training" if found.steps else "untrained: random weights"
            over = f"on {args.sentence!r}" if found.image is None else "over an image, mean of the heads"
            pictures.append((args.out / f"{stem}_map.png", f"attention map {over}, {trained}"))
            caption, file = f"{name}: {pictures[1][1]}", pictures[1][0]
            if found.layout is None or found.image is None:
                draw_map(found.weights, sentence, caption, file)
            else:
                draw_image_map(found, found.layout, found.image, caption, file)
        entries.append(Entry(name, make, pictures))
        print(f"{name}: {', '.join(str(path) for path, _ in pictures)}", flush=True)
    draw_overview(fields, args.out / "overview.png")
    write_page(entries, args.out / "index.html")
    print(f"All of it is in {args.out / 'index.html'}.")
    return 0


def _draw_model(args: argparse.Namespace) -> int:
    """Draw the attention maps of every layer of a saved model."""
    if args.blocks:
        raise ValueError(f"blocks must be omitted with --model, got {' '.join(args.blocks)}")
    new_figure(1, 1)  # raises early if matplotlib is missing
    used, maps = model_maps(args.model, args.text.read_bytes())
    args.out.mkdir(parents=True, exist_ok=True)
    for layer, weights in enumerate(maps):
        path = args.out / f"layer_{layer}_map.png"
        draw_map(weights, used, f"{args.model}, layer {layer}: attention map of {args.text}", path)
        print(path, flush=True)
    return 0


def _measure(name: str, make: Make, dim: int, arguments: Mapping[str, Any]) -> Field:
    """The receptive field of a layer with few heads and small blocks."""
    blocks = accepted(make, block_size=8, local_blocks=2, random_blocks=2)
    with seeded(0):
        block = make_block(make, name, dim, {**small_sizes(make, dim, LAYOUT), **blocks, **arguments})
        return receptive_field(block.eval(), dim)
