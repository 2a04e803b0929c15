"""Train a byte-level language model with any of the attention layers, and generate text with it.

    python examples/train_language_model.py                                # Python's own sources, about five minutes
    python examples/train_language_model.py --attention full,cosine_sim    # layers, cycled over the depth
    python examples/train_language_model.py --data my_texts --out runs/mine
    python examples/train_language_model.py --packed    # whole files packed into rows, not random parts of all text
    python examples/train_language_model.py --resume --out runs/mine       # continue after Ctrl-C, with the same result
    torchrun --nproc-per-node 2 examples/train_language_model.py --strategy ddp    # or fsdp, with the same losses

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
import codecs
import inspect
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from attention_zoo import BLOCKS, LanguageModel, generate_stream, training

CHECKPOINT = "checkpoint.pt"
SHARDS = "checkpoint"  # folder of the checkpoint of several processes
# Options that may differ in a resumed run.
FREE = ("resume", "overwrite", "threads", "device", "strategy", "out", "card")
BUFFER = 2**15  # sequences that are shuffled together: 1,024 would come from about sixteen files
EVALUATIONS = 6  # during training, the last one after the last step
SAMPLE, SHORT_SAMPLE = 600, 100  # bytes of text generated after training and during it, prompt included
Checkpoint = training.Checkpoint | training.ShardedCheckpoint


def parse_options() -> tuple[argparse.Namespace, Checkpoint | None]:
    """Parse the command line. Returns the options and the checkpoint to resume, whose options are the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--attention",
        default="full",
        help=f"attention layers, cycled over the depth: {', '.join(BLOCKS)} (%(default)s)",
    )
    add("--dim", type=int, default=128, help="number of features (%(default)s)")
    add("--depth", type=int, default=4, help="number of layers (%(default)s)")
    add("--heads", type=int, default=4, help="number of heads, of dim / heads features each (%(default)s)")
    add("--seq-len", type=int, default=256, help="bytes per sequence (%(default)s)")
    add("--batch", type=int, default=8, help="sequences per training step (%(default)s)")
    add("--packed", action="store_true", help="pack whole files into sequences, which then never cross a file's end")
    add("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    add("--steps", type=int, default=2600, help="training steps (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--data", help="text file, or folder of text files (Python's standard library)")
    add("--prompt", default="def ", help="prompt of the generated text (%(default)r)")
    add(
        "--strategy",
        default="single",
        choices=training.STRATEGIES,
        help="parallelism of torchrun's processes (%(default)s)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (%(default)s)")
    add("--out", type=Path, default=Path("runs/language_model"), help="output folder (%(default)s)")
    add("--card", action="store_true", help="also write a model card for the Hugging Face hub (needs the extra `hub`)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, with its options")
    add("--overwrite", action="store_true", help="replace the run in --out")
    options, checkpoint = training.parse_options(parser), None
    try:
        if options.resume:
            checkpoint = read_newest(options.out)
            saved = checkpoint.extra["options"]
            parser.set_defaults(**saved)
            options = training.parse_options(parser)
            for name in saved:
                if getattr(options, name) != saved[name]:
                    raise ValueError(f"--{name} must be omitted or {saved[name]!r}, as in the run to resume")
        elif not options.overwrite and holds_run(options.out):
            raise ValueError(f"{options.out} holds a run: continue it with --resume, or replace it with --overwrite")
        if options.dim % options.heads:
            raise ValueError(f"--heads must divide --dim, got {options.heads} and {options.dim}")
        if options.card and find_spec("huggingface_hub") is None:
            raise ValueError("--card needs huggingface_hub: pip install attention-zoo[hub]")
        if not options.prompt:
            raise ValueError("--prompt must not be empty")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return options, checkpoint


def holds_run(folder: Path) -> bool:
    """Whether a folder has a checkpoint or a model."""
    return any((folder / name).exists() for name in (CHECKPOINT, f"{SHARDS}/run.pt", "model.safetensors"))


def read_newest(folder: Path) -> Checkpoint:
    """The most recent checkpoint, of one process or of several; their number need not be the current one."""
    one, several = folder / CHECKPOINT, folder / SHARDS / "run.pt"
    if several.exists() and not (one.exists() and one.stat().st_mtime > several.stat().st_mtime):
        return training.read_sharded(folder / SHARDS)
    return training.read_checkpoint(one)


class Run:
    """Model, optimizer and everything else that changes during training."""

    def __init__(self, options: argparse.Namespace, checkpoint: Checkpoint | None, world: training.World) -> None:
        torch.manual_seed(options.seed)
        self.options, self.world = options, world
        self.model = LanguageModel(
            num_tokens=256,
            dim=options.dim,
            depth=options.depth,
            attention=[self.block(name) for name in options.attention.split(",")],
            max_seq_len=options.seq_len,
        ).to(world.device)
        self.loss = training.DataParallelLoss(self.model, world, strategy=options.strategy)
        weights = list(self.model.parameters())
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},  # norms and biases
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step = 0
        self.curves: dict[str, list[Any]] = {"training": [], "validation": []}  # (step, bits per byte)
        if checkpoint is not None:
            checkpoint.restore(**self.parts())
            self.step, self.curves = checkpoint.step, checkpoint.extra["curves"]

    def block(self, name: str) -> Any:
        """An attention layer with the given number of heads, if their size can be chosen."""
        parameters = inspect.signature(BLOCKS[name]).parameters if name in BLOCKS else ()
        heads = {"heads": self.options.heads, "dim_head": self.options.dim // self.options.heads}
        return (name, heads) if "dim_head" in parameters else name

    def rate(self, step: int) -> float:
        """Learning rate relative to --lr: linear warm-up, then cosine decay to 5 %."""
        warmup = max(1, self.options.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / (self.options.steps - warmup)))

    def batches(self, files: training.TextFiles) -> Iterator[dict[str, Tensor]]:
        """Arguments of the loss for each of the remaining steps, the same in every process."""
        batch, length = self.options.batch, self.options.seq_len + 1
        if not self.options.packed:
            text = training.as_tokens(join(files.training))
            while True:
                yield {"tokens": training.random_batch(text, batch, length, generator=self.generator)}
        generator = torch.Generator().manual_seed(self.options.seed)  # the stream starts anew when training resumes
        documents = training.read_documents(files.training, epochs=None, generator=generator)
        packed = training.packed_batches(documents, length=length, batch=batch, buffer=BUFFER, generator=generator)
        yield from (part._asdict() for part in islice(packed, self.step, None))

    def learn(self, batch: dict[str, Tensor]) -> float:
        """Take one step on a batch, sharded over the processes. Returns the loss in nats."""
        loss = self.loss(**{name: tensor.to(self.world.device) for name, tensor in batch.items()})
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.curves["training"].append((self.step, loss.item() / math.log(2)))
        return loss.item()

    @torch.no_grad()
    def evaluate(self, text: Tensor) -> float:
        """Bits per byte of validation text, over sequences spread evenly over it."""
        self.model.eval()
        windows = training.windows(text, self.options.seq_len + 1, at_most=256)
        batches = windows.tensor_split(max(1, len(windows) // self.options.batch))
        losses = [self.loss(tokens.to(self.world.device)) * len(tokens) for tokens in batches]
        self.model.train()
        return float(sum(losses)) / sum(map(len, batches)) / math.log(2)

    def parts(self) -> dict[str, Any]:
        """The objects whose state a checkpoint holds."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "generator": self.generator,
        }

    def save(self) -> None:
        """Write a checkpoint."""
        options = {name: value for name, value in vars(self.options).items() if name not in FREE}
        extra = {"options": options, "curves": self.curves}
        alone = self.options.strategy == "single"
        save, name = (training.save_checkpoint, CHECKPOINT) if alone else (training.save_sharded, SHARDS)
        save(self.options.out / name, **self.parts(), step=self.step, extra=extra)


def train(run: Run, files: training.TextFiles, validation_text: Tensor) -> bool:
    """Train for the remaining steps, or until Ctrl-C. Returns whether training is complete."""
    options = run.options
    batches = run.batches(files)
    if run.step == options.steps:  # a complete run that is resumed: a checkpoint of this strategy
        run.save()
    progress = training.Progress(options.steps, start=run.step, quiet=not run.world.first)
    with training.StopRequest() as stop, progress:
        while run.step < options.steps:
            if run.world.any(stop.made):
                run.save()
                return False
            loss = run.learn(next(batches))
            speed = progress.rate * options.batch * options.seq_len
            progress.update(f"loss {loss:.3f}, {loss / math.log(2):.2f} bits/byte, {speed:,.0f} tokens/s")
            if run.step * EVALUATIONS // options.steps > (run.step - 1) * EVALUATIONS // options.steps:
                bits = run.evaluate(validation_text)
                run.curves["validation"].append((run.step, bits))
                run.save()
                progress.write(f"step {run.step}: {bits:.3f} bits per byte of validation text")
                model = whole_model(run)
                if model is not None and run.step < options.steps:
                    text_so_far = "".join(sample(model, options.prompt, options.seed, SHORT_SAMPLE))
                    progress.write(f"  sample: {text_so_far!r}")
    return True


def whole_model(run: Run) -> LanguageModel | None:
    """A copy of the model, unsharded, on the first process, and None on the others. Every process must call this."""
    weights = training.gather_weights(run.model)
    if not run.world.first:
        return None
    with torch.random.fork_rng():  # a resumed run draws the same numbers
        model = LanguageModel(**run.model.arguments).to(run.world.device)
    model.load_state_dict(weights)
    return model.eval()


def sample(model: LanguageModel, prompt: str, seed: int, length: int) -> Iterator[str]:
    """Generate text of `length` bytes, token by token, the prompt first."""
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may consist of several bytes
    text = torch.tensor([list(prompt.encode())], device=device)
    yield prompt
    while text.shape[1] < length:
        # half of the model's positions for context, half for new text
        context = text[:, -max(1, model.max_seq_len // 2) :]
        most = min(model.max_seq_len - context.shape[1] + 1, length - text.shape[1])
        for token in generate_stream(model, context, most, temperature=0.8, generator=generator):
            text = torch.cat((text, token[:, None]), dim=1)
            yield decoder.decode(bytes([int(token)]))


def plot(run: Run, baselines: dict[str, float], path: Path) -> None:
    """Plot bits per byte against steps."""
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    steps, bits = torch.tensor(run.curves["training"]).T
    axes.plot(steps, bits, color="tab:blue", alpha=0.2)
    width = max(1, len(steps) // 50)
    smooth = bits.unfold(0, width, 1).mean(-1)
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    axes.plot(*torch.tensor(run.curves["validation"]).T, "o-", color="tab:orange", label="validation")
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(value, color="gray", linestyle=style, label=f"{name}: {value:.2f}")
    axes.set(xlabel="steps", ylabel="bits per byte", ylim=(0, None), title=f"attention: {run.options.attention}")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    """Train a model, save it and print a sample."""
    sys.stdout.reconfigure(errors="replace")  # a sample may contain characters that the terminal does not support
    options, checkpoint = parse_options()
    with training.join_world(options.device) as world:
        if not world.first:  # only the first process prints
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            files = training.find_text_files(options.data, progress=world.first)
            validation = join(files.validation)
            run = Run(options, checkpoint, world)
            before = run.evaluate(training.as_tokens(validation))  # also checks that text and layers fit
        except (ValueError, TypeError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        baselines = baseline_bits(validation)
        describe(run, files, {"model": before, **baselines})
        if checkpoint is not None:
            print(f"resuming at step {run.step}")
        try:
            if not train(run, files, training.as_tokens(validation)):
                print(
                    f"Stopped after step {run.step}. Continue with: python {sys.argv[0]} --resume --out {options.out}"
                )
                return
            model = whole_model(run)
            if model is not None:
                finish(run, model, files, baselines)
        except OSError as error:  # e.g. a full disk
            sys.exit(f"error: {error}. The previous checkpoint is intact.")


def join(parts: Sequence[training.FilePart]) -> bytes:
    """The contents of files, joined by newlines."""
    return b"\n".join(part.read() for part in parts)


def describe(run: Run, files: training.TextFiles, bits: dict[str, float]) -> None:
    """Print sizes of data and model, and bits per byte before training and of the baselines."""
    print(f"text: {files.source}")
    print(f"  training: {len(files.training)} files, {files.training_bytes:,} bytes")
    print(f"  validation: {len(files.validation)} files, {files.validation_bytes:,} bytes")
    where = f"{run.world.size} x {run.world.device.type}" if run.world.size > 1 else run.world.device
    print(f"model: {sum(weight.numel() for weight in run.model.parameters()):,} parameters on {where}")
    print("bits per byte of validation text: " + ", ".join(f"{name} {value:.3f}" for name, value in bits.items()))


def baseline_bits(data: bytes) -> dict[str, float]:
    """Bits per byte of validation text of baselines without a model."""
    return {"byte frequencies": training.unigram_entropy(data), "gzip": training.gzip_bits_per_byte(data)}


def finish(run: Run, model: LanguageModel, files: training.TextFiles, baselines: dict[str, float]) -> None:
    """Save the unsharded model, plot its losses and print a sample."""
    out = run.options.out
    if run.options.card:
        score = f"{run.curves['validation'][-1][1]:.3f} bits per byte of validation text"
        others = ", ".join(f"{name} need {value:.3f}" for name, value in baselines.items())
        data = f"{files.training_bytes:,} bytes of {files.source}"
        program = "python" if run.world.size == 1 else f"torchrun --nproc-per-node {run.world.size}"
        (out / "README.md").unlink(missing_ok=True)  # of an earlier run
        model.save_pretrained(out, data=data, score=f"{score}; {others}", command=f"{program} {' '.join(sys.argv)}")
    else:
        model.save(out)
    plot(run, baselines, out / "loss.png")
    print(f"The model, its checkpoint and loss.png are in {out}. A sample:\n")
    with suppress(KeyboardInterrupt):
        for piece in sample(model, run.options.prompt, run.options.seed, SAMPLE):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
