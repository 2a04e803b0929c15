"""Train a language model with Hugging Face Accelerate.

    python examples/train_with_accelerate.py                                      # one process, about a minute
    torchrun --nproc-per-node 2 examples/train_with_accelerate.py --cpu           # two processes, data parallel

The model is an ordinary nn.Module that returns logits, and needs no adapter.

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from attention_zoo import LanguageModel, training
from attention_zoo.ops import next_token_loss


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", default="gate_loop,full", help="attention layers, cycled over the depth (%(default)s)")
    add("--dim", type=int, default=128, help="number of features (%(default)s)")
    add("--depth", type=int, default=4, help="number of layers (%(default)s)")
    add("--seq-len", type=int, default=256, help="bytes per sequence (%(default)s)")
    add("--batch", type=int, default=8, help="sequences per training step and process (%(default)s)")
    add("--steps", type=int, default=400, help="training steps (%(default)s)")
    add("--data", help="text file, or folder of text files (Python's standard library)")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--out", type=Path, default=Path("runs/with_accelerate"), help="output folder (%(default)s)")
    return training.parse_options(parser)


def main() -> None:
    """Train, and print bits per byte of validation text before and after."""
    options = parse_options()
    accelerator = Accelerator(cpu=options.cpu)
    set_seed(0)
    length = options.seq_len + 1
    attention = [name if "gate_loop" in name else (name, {"dim_head": 32}) for name in options.attention.split(",")]
    try:
        text = training.read_text(options.data)
        train_set = TensorDataset(training.windows(training.as_tokens(text.training), length))
        validation_set = TensorDataset(training.windows(training.as_tokens(text.validation), length, at_most=256))
        if len(train_set) < options.batch:
            raise ValueError(f"--data must hold {options.batch} training sequences, got {len(train_set)}")
        model = LanguageModel(num_tokens=256, dim=options.dim, depth=options.depth, attention=attention)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    model, optimizer, schedule, batches, validation_batches = accelerator.prepare(
        model,
        optimizer,
        schedule,
        DataLoader(train_set, batch_size=options.batch, shuffle=True, drop_last=True),
        DataLoader(validation_set, batch_size=options.batch),
    )

    @torch.no_grad()
    def bits_per_byte() -> float:
        model.eval()
        losses = []
        for (tokens,) in validation_batches:
            loss = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
            losses.append(accelerator.gather_for_metrics(loss.mean(1)))  # of all processes, without duplicates
        model.train()
        return float(torch.cat(losses).mean()) / math.log(2)

    accelerator.print(f"before: {bits_per_byte():.3f} bits per byte of validation text")
    progress = training.Progress(options.steps, quiet=not accelerator.is_main_process)
    while progress.done < options.steps:
        for (tokens,) in batches:
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(f"{loss.item() / math.log(2):.3f} bits per byte")
            if progress.done == options.steps:
                break
    accelerator.print(f"after: {bits_per_byte():.3f} bits per byte of validation text")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save(options.out)
        print(f"The model is in {options.out}: LanguageModel.load({str(options.out)!r})")


if __name__ == "__main__":
    main()
