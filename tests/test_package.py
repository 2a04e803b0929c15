"""The package as a whole: what it exports, what importing it costs, and which room may import which."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import attention_zoo

PACKAGE = Path(attention_zoo.__file__).parent
ROOT = PACKAGE.parent

# What a room may import beside itself. A room stands above those that import it.
ALLOWED = {
    "_checks": set(),
    "_files": set(),
    "ops": {"_checks"},
    "layers": {"_checks", "ops"},
    "attention": {"_checks", "ops", "layers"},
    "saving": {"_checks", "_files"},
    "models": {"_checks", "ops", "layers", "attention", "saving"},
    "generation": {"_checks", "ops", "layers", "models"},
    "training": {"_checks", "_files", "ops", "layers", "attention", "models"},
    "testing": {"_checks", "ops", "layers", "attention", "models"},
    "interop": {"_checks", "_files", "ops", "layers", "attention", "models", "saving"},
    "__main__": {"cli"},
}
ALLOWED["cli"] = {"", *ALLOWED} - {"__main__"}
# Everyday packages that a file may import at its top; the others cost time, or belong to an extra.
LIGHT = {"torch", "safetensors", "attention_zoo"}


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)


def files() -> Iterator[tuple[str, Path]]:
    """Every source file with its dotted name inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """The modules that a file imports, relative imports not counted (there must be none)."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
    return found


def inside(modules: set[str]) -> set[str]:
    """Those of this package, without its name."""
    return {name.partition(".")[2] for name in modules if name.split(".")[0] == "attention_zoo"}


def test_every_exported_name_exists() -> None:
    names: dict[str, object] = {}
    exec("from attention_zoo import *", names)
    assert set(attention_zoo.__all__) <= set(names)
    assert len(attention_zoo.__all__) == len(set(attention_zoo.__all__))


@pytest.mark.parametrize("room", ["ops", "layers", "attention", "models", "generation", "training", "testing", "cli"])
def test_every_room_exports_what_it_says(room: str) -> None:
    names: dict[str, object] = {}
    exec(f"from attention_zoo.{room} import *", names)
    module = importlib.import_module(f"attention_zoo.{room}")
    assert module.__doc__
    assert set(getattr(module, "__all__", [])) <= set(names)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("attention-zoo") == attention_zoo.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files("attention_zoo").joinpath("py.typed").is_file()


def test_a_wheel_holds_every_file_and_the_mark_that_it_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = f"""
import os, shutil, sys
for name in ("attention_zoo", "pyproject.toml", "README.md", "LICENSE"):
    source, target = os.path.join({str(ROOT)!r}, name), os.path.join({str(tmp_path)!r}, name)
    if os.path.isdir(source):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    elif os.path.exists(source):
        shutil.copy(source, target)
os.chdir({str(tmp_path)!r})
from setuptools import build_meta
print(build_meta.build_wheel("dist"))
"""
    wheel = python(code).stdout.strip().splitlines()[-1]
    with zipfile.ZipFile(tmp_path / "dist" / wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("attention_zoo/")}
    assert held == {f"attention_zoo/{path.relative_to(PACKAGE)}" for _, path in files()} | {"attention_zoo/py.typed"}


def test_importing_the_package_adds_little_to_importing_torch() -> None:
    code = """
import time, torch
start = time.perf_counter()
import attention_zoo
print(time.perf_counter() - start)
"""
    # the best of a few runs: a busy machine only ever adds
    seconds = min(float(python(code).stdout) for _ in range(3))
    assert seconds <= 0.3


def test_importing_the_package_loads_no_package_that_takes_long() -> None:
    code = "import torch, sys; old = set(sys.modules); import attention_zoo; print(*(set(sys.modules) - old))"
    loaded = {name.split(".")[0] for name in python(code).stdout.split()}
    assert not loaded & {"einx", "einops", "rotary_embedding_torch", "tqdm", "matplotlib", "numba", "sympy", "pytest"}


def test_the_package_prints_and_warns_nothing_when_imported() -> None:
    run = python("import torch, warnings; warnings.simplefilter('error'); import attention_zoo")
    assert (run.stdout, run.stderr) == ("", "")


def test_the_package_stands_in_no_room_but_the_known_ones() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(ALLOWED) - {"__main__", "_checks", "_files"}


@pytest.mark.parametrize(("name", "path"), [pytest.param(*file, id=file[0] or "__init__") for file in files()])
def test_a_room_imports_only_rooms_above_it(name: str, path: Path) -> None:
    room = name.split(".")[0]
    if not room:
        return  # the shop window
    for module in inside(imports(path)):
        other = module.split(".")[0]
        assert other == room or other in ALLOWED[room] or module in ALLOWED[room], f"{name} imports {module}"


def test_a_block_imports_the_contract_and_no_sibling() -> None:
    for name, path in files():
        if name.startswith("attention.") and name not in ("attention.base", "attention.capabilities"):
            siblings = {module for module in inside(imports(path)) if module.split(".")[0] == "attention"}
            assert siblings <= {"attention.base"}, f"{name} imports {siblings}"


@pytest.mark.parametrize(("name", "path"), [pytest.param(*file, id=file[0] or "__init__") for file in files()])
def test_a_file_imports_only_light_packages_at_its_top(name: str, path: Path) -> None:
    outside = {module.split(".")[0] for module in imports(path, top_level=True)}
    assert outside <= LIGHT | set(sys.stdlib_module_names), f"{name} imports {outside}"


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    assert not {path.stem for _, path in files()} & {"utils", "util", "helpers", "common", "misc"}


def test_importing_does_not_touch_torchs_settings() -> None:
    code = """
import torch
settings = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed())
old = settings()
import attention_zoo
assert settings() == old
"""
    python(code)
