"""The package as a whole: its exports, the cost of importing it, and which part may import which."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import attention_zoo

PACKAGE = Path(attention_zoo.__file__).parent
ROOT = PACKAGE.parent

# What each package or root file may import besides itself: ops <- layers <- attention <- models, and their users.
ALLOWED = {
    "_arguments": set(),
    "_checks": set(),
    "_files": set(),
    "ops": {"_checks"},
    "layers": {"_arguments", "_checks", "ops"},
    "attention": {"_arguments", "_checks", "ops", "layers"},
    "saving": {"_arguments", "_checks", "_files", "ops", "layers"},
    "models": {"_arguments", "_checks", "ops", "layers", "attention", "saving", "generation"},
    "generation": {"_checks", "ops", "layers"},
    "training": {"_checks", "_files", "ops", "layers", "attention", "models", "saving"},
    "testing": {"_checks", "ops", "layers", "attention", "models", "generation"},
    "interop": {"_checks", "_files", "ops", "layers", "attention", "models", "saving"},
    "__main__": {"cli"},
}
ALLOWED["cli"] = {"", *ALLOWED} - {"__main__"}
# Packages that a file may import at its top; the others take long to import, or belong to an extra.
LIGHT = {"torch", "safetensors", "einops", "attention_zoo"}
# Parts of torch that take long to import.
HEAVY_TORCH = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.onnx",
)
# What reference implementations may import from this package: files that fast implementations use too, and definitions.
SHARED_FILES = {"attention_zoo.ops.masks", "attention_zoo.ops.precision"}
DEFINITIONS = {"Bias", "DistanceBias", "HeadMLP", "HeadMix", "Pattern", "TextImageLayout"}


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)


def files() -> Iterator[tuple[str, Path]]:
    """Every source file with its dotted name inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of every import below a node; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere but for type annotations."""
    tree = ast.parse(path.read_text())  # not `parsed`, whose tree is not to be changed
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return {module for module, _ in imported(tree)}


@cache
def top_level_imports(path: Path) -> set[str]:
    """The modules that a file imports when it is imported."""
    return {
        module
        for node in parsed(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module, _ in imported(node)
    }


def inside(modules: set[str]) -> set[str]:
    """The modules of this package, without its name."""
    return {name.partition(".")[2] for name in modules if name.split(".")[0] == "attention_zoo"}


every_file = pytest.mark.parametrize(
    ("name", "path"), [pytest.param(*file, id=file[0] or "__init__") for file in files()]
)


def test_every_exported_name_exists() -> None:
    names: dict[str, object] = {}
    exec("from attention_zoo import *", names)
    assert set(attention_zoo.__all__) <= set(names)
    assert len(attention_zoo.__all__) == len(set(attention_zoo.__all__))


@pytest.mark.parametrize("part", sorted(part for part in ALLOWED if not part.startswith("_")))
def test_a_package_exports_the_names_in_all(part: str) -> None:
    names: dict[str, object] = {}
    exec(f"from attention_zoo.{part} import *", names)
    module = importlib.import_module(f"attention_zoo.{part}")
    assert module.__doc__
    assert set(getattr(module, "__all__", [])) <= set(names)


def test_the_version_equals_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("attention-zoo") == attention_zoo.__version__


def test_the_package_has_a_py_typed_file() -> None:
    assert importlib.resources.files("attention_zoo").joinpath("py.typed").is_file()


def test_a_wheel_contains_every_file_and_py_typed(tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, Any]:
    """What `import attention_zoo` after `import torch` loads, changes, prints and warns about."""
    code = """
import json, sys, warnings, torch
warnings.simplefilter("error")
get = (torch.get_default_dtype, torch.get_num_threads, torch.is_grad_enabled, torch.initial_seed)
modules, before = set(sys.modules), [str(setting()) for setting in get]
import attention_zoo
after = [str(setting()) for setting in get]
print(json.dumps({"modules": sorted(set(sys.modules) - modules), "before": before, "after": after}))
"""
    run = python(code)
    *printed, report = run.stdout.splitlines()
    return {**json.loads(report), "printed": printed, "stderr": run.stderr}


def test_importing_the_package_loads_only_light_packages(fresh_import: dict[str, Any]) -> None:
    packages = {name.split(".")[0] for name in fresh_import["modules"]}
    assert packages <= LIGHT | {"numpy"} | set(sys.stdlib_module_names)
    assert not [name for name in fresh_import["modules"] if name.startswith(HEAVY_TORCH)]


def test_importing_the_package_prints_and_warns_nothing(fresh_import: dict[str, Any]) -> None:
    assert (fresh_import["printed"], fresh_import["stderr"]) == ([], "")


def test_importing_the_package_does_not_change_the_settings_of_torch(fresh_import: dict[str, Any]) -> None:
    assert fresh_import["after"] == fresh_import["before"]


def test_every_part_of_the_package_has_a_place_in_the_import_order() -> None:
    parts = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert parts == set(ALLOWED) - {"__main__", "_arguments", "_checks", "_files"}


@every_file
def test_a_file_imports_only_parts_that_come_before_its_own(name: str, path: Path) -> None:
    part = name.split(".")[0]
    if not part:
        return  # the public API
    for module in inside(imports(path)):
        other = module.split(".")[0]
        assert other == part or other in ALLOWED[part], f"{name} imports {module}"


def test_an_attention_layer_imports_no_other_attention_layer() -> None:
    for name, path in files():
        if name.startswith("attention.") and name not in ("attention.base", "attention.capabilities"):
            siblings = {module for module in inside(imports(path)) if module.split(".")[0] == "attention"}
            assert siblings <= {"attention.base"}, f"{name} imports {siblings}"


@every_file
def test_a_file_imports_only_light_packages_at_its_top(name: str, path: Path) -> None:
    outside = {module.split(".")[0] for module in top_level_imports(path)}
    assert outside <= LIGHT | set(sys.stdlib_module_names), f"{name} imports {outside}"


@every_file
def test_only_references_import_einx(name: str, path: Path) -> None:
    if not name.endswith(".reference"):
        assert "einx" not in imports(path), f"{name} imports einx"


def test_a_reference_imports_no_fast_implementation() -> None:
    for name, path in files():
        if name.endswith(".reference"):
            for module, what in imported(ast.parse(path.read_text())):
                ours = module.split(".")[0] == "attention_zoo"
                shared = module in SHARED_FILES or what in DEFINITIONS or module.endswith(".reference")
                assert not ours or shared, f"{name} imports {what} from {module}"


def test_every_operation_has_a_reference() -> None:
    operations = {path.parent for path in (PACKAGE / "ops").glob("*/__init__.py")}
    assert {path.parent for path in (PACKAGE / "ops").glob("*/reference.py")} == operations


def test_a_reference_is_imported_only_by_its_operation_when_it_runs() -> None:
    references = {f"attention_zoo.{name}" for name, _ in files() if name.endswith(".reference")}
    for name, path in files():
        for node in ast.parse(path.read_text()).body:
            modules = {part for module, what in imported(node) for part in (module, f"{module}.{what}")}
            found = modules & references
            if found and f"attention_zoo.{name}" not in references:
                assert found == {f"attention_zoo.{name}.reference"}, f"{name} imports {found}"
                assert isinstance(node, ast.FunctionDef), f"{name} imports {found} at its top"


@every_file
def test_only_one_file_registers_custom_operators(name: str, path: Path) -> None:
    if name != "ops.custom_op":
        tree = parsed(path)
        registering = {"custom_op", "triton_op", "register_fake", "register_autograd"}
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & registering
        used |= {what for module, what in imported(tree) if module.startswith("torch.library") and what in registering}
        assert not used, f"{name} uses {used}"


def test_ops_exports_every_public_operation() -> None:
    ops = importlib.import_module("attention_zoo.ops")
    for path in sorted((PACKAGE / "ops").glob("*/__init__.py")):
        name = path.parent.name
        operation = importlib.import_module(f"attention_zoo.ops.{name}")  # ops.gate_loop is a function
        for public, value in vars(operation).items():
            own = inspect.isfunction(value) and value.__module__ == operation.__name__ and not public.startswith("_")
            if own and "impl" in inspect.signature(value).parameters:
                assert public in ops.__all__, f"attention_zoo.ops does not export {public} of {name}"
                assert getattr(ops, public) is value


def test_no_file_has_a_catch_all_name() -> None:
    assert not {path.stem for _, path in files()} & {"utils", "util", "helpers", "common", "misc"}
