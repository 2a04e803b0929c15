"""Decoding of modules in training mode: a copy in eval mode that shares their tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import generate, generate_stream
from attention_zoo.generation.eval_copy import eval_copy

VOCABULARY = 7
PROMPT = torch.zeros(2, 1, dtype=torch.int64)


class Model(nn.Module):
    """Next tokens by one linear layer, after a dropout of everything and after the functions in `references`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(VOCABULARY, VOCABULARY)
        self.dropout = nn.Dropout(1.0)
        self.register_buffer("shift", torch.zeros(VOCABULARY))
        self.references: Any = {"before": ()}

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(x)

    def step(self, tokens: Tensor, state: None = None, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
        x = self.dropout(nn.functional.one_hot(tokens, VOCABULARY).float())
        for function in self.references["before"]:
            x = function(x)
        return self.linear(x) + self.shift, state


class View(nn.Module):
    """Refers to a model without registering it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.models = (model,)

    def forward(self, x: Tensor) -> Tensor:
        return self.models[0].features(x)


def in_a_list(model: Model) -> Any:
    later: list[nn.Module] = []

    def function(x: Tensor) -> Tensor:
        return later[0](x)

    later.append(model.dropout)
    return function


REFERENCES: dict[str, Callable[[Model], Any]] = {
    "module": lambda model: model.dropout,
    "bound method": lambda model: model.features,
    "closure": lambda model: lambda x: model.features(x),
    "closure of a list": in_a_list,
    "partial": lambda model: partial(Model.features, model),
    "compiled function": lambda model: torch.compile(model.features, backend="eager"),
    "unregistered module": View,
}


def greedy(model: nn.Module, count: int = 5) -> Tensor:
    return generate(model, PROMPT, count, temperature=0)


@pytest.mark.parametrize("container", [list, tuple, set])
@pytest.mark.parametrize("kind", REFERENCES)
def test_references_to_modules_refer_to_their_copies(kind: str, container: type) -> None:
    torch.compiler.reset()
    model = Model()
    model.references = {"before": container([REFERENCES[kind](model)])}
    want = greedy(model.eval())
    assert len(want.unique()) > 1
    assert torch.equal(greedy(model.train()), want)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("how", ["a part", "in place", "the model"])
def test_compiled_modules_decode_in_eval_mode(how: str) -> None:
    torch.compiler.reset()
    model: Any = Model()
    want = greedy(model.eval())
    if how == "a part":
        model.dropout = torch.compile(model.dropout, backend="eager")
    elif how == "in place":
        model.dropout.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    assert torch.equal(greedy(model.train()), want)
    assert not model.train().dropout(torch.ones(3)).any()  # compiled for training afterwards


def test_hooks_of_modules_run_while_decoding() -> None:
    model, seen = Model().train(), []
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    model.linear.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    greedy(model, 3)
    assert seen == [False] * 6


def test_a_stream_follows_changes_of_the_parameters_and_buffers() -> None:
    model = Model().train()
    stream = generate_stream(model, PROMPT, 5, temperature=0)
    next(stream)
    with torch.no_grad():
        model.shift[3] = 1e3
    assert next(stream).tolist() == [3, 3]
    model.load_state_dict({**model.state_dict(), "shift": 1e3 * torch.eye(VOCABULARY)[5]})
    assert next(stream).tolist() == [5, 5]
    model.register_buffer("shift", 1e3 * torch.eye(VOCABULARY)[2])
    assert next(stream).tolist() == [2, 2]


def test_a_stream_does_not_change_the_mode_of_a_model_that_another_thread_trains() -> None:
    model, modes, started, stop = Model(), [], threading.Event(), threading.Event()
    want = greedy(model.eval(), 200)

    def train() -> None:
        while not stop.is_set():
            modes.append(all(module.training for module in model.modules()))
            started.set()

    model.train()
    thread = threading.Thread(target=train)
    thread.start()
    try:
        started.wait()
        got = greedy(model, 200)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(got, want)
    assert all(modes)


def test_a_model_in_eval_mode_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.generation.decoding.eval_copy", lambda model: pytest.fail("copied"))
    greedy(Model().eval())


def test_a_copy_shares_tensors_and_keeps_modes_of_the_original() -> None:
    model = Model()
    model.dropout.eval()
    copy = eval_copy(model)
    assert not any(module.training for module in copy.modules())
    assert model.training
    assert not model.dropout.training
    assert copy.linear.weight is model.linear.weight
    assert copy.shift is model.shift
    copy.new = 1
    assert not hasattr(model, "new")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_in_training_mode_raises() -> None:
    model = Model().train()
    model.linear = torch.jit.script(model.linear)
    with pytest.raises(TypeError, match=r"model must be in eval mode, call model\.eval\(\): TorchScript"):
        greedy(model)
    model.linear.eval()
    greedy(model)
