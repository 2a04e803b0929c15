"""The documentation: its code runs, its links and names exist, its tables are those that the package computes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from attention_zoo import BLOCKS, capabilities
from attention_zoo.attention.capabilities import LAYOUT
from attention_zoo.testing import CHECKS, MODEL_CHECKS
from tests.docs.pages import DOCS, ROOT, Code, code_blocks, generator, pages

TITLES = {f"{code.page}:{code.line}": code for code in code_blocks()}


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Blocks that a test registers are removed after it."""
    before = dict(BLOCKS)
    yield
    BLOCKS.clear()
    BLOCKS.update(before)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=title, marks=pytest.mark.slow if code.slow else ()) for title, code in TITLES.items()],
)
def test_code_of_the_documentation_runs(code: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and saving look classes up by module
    exec(compile(code.text, f"{code.page}:{code.line}", "exec"), vars(module))


def test_every_block_of_python_code_is_executed() -> None:
    for page, text in pages().items():
        assert text.count("```py") == sum(code.page == page for code in TITLES.values()), (
            f"{page} has other code blocks"
        )


def test_links_to_files_exist() -> None:
    for page, text in pages().items():
        folder = ROOT if page == "README.md" else (DOCS / page).parent
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            target = (folder / link).resolve()
            generated = target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in pages()
            picture = target.is_relative_to(DOCS / "blocks") and target.stem in BLOCKS and target.suffix == ".png"
            assert target.exists() or generated or picture, f"{page} links to {link}"


def test_every_public_name_is_in_the_api_reference() -> None:
    reference = generator().reference_pages()
    all_pages = "\n".join(pages().values())
    for module in generator().public_modules():
        page = reference[f"{module.__name__}.md"]
        for name in module.__all__:
            path = generator().path_of(getattr(module, name), f"{module.__name__}.{name}")
            described = f"::: {path}\n" in f"{page}\n" or f"`{name}`" in page
            assert described, f"{module.__name__}.{name} is missing"
            assert name == "__version__" or re.search(rf"::: {re.escape(path)}$|`{name}`\]", all_pages, re.MULTILINE)


def test_the_tables_of_checks_are_those_of_the_package() -> None:
    for checks in (CHECKS, MODEL_CHECKS):
        assert generator().checks_table(checks) in pages()["verified.md"]


def test_every_block_has_facts() -> None:
    assert generator().FACTS.keys() == BLOCKS.keys()
    assert all(facts.keys() == {"equation", "where", "state", "use", "avoid"} for facts in generator().FACTS.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_size_of_the_state_is_that_of_the_formula(name: str) -> None:
    found, sizes = capabilities()[name], {"heads": 2, "dim_head": 8, "dim": 16, "streams": 1, "kv_heads": 2, "m": 5}
    sizes["dim_inner"] = 16
    options: dict[str, Any] = {"heads": 2} if name != "simple_gate_loop" else {}
    if name not in ("simple_gate_loop", "gate_loop"):
        options["dim_head"] = 8
    if found.image:
        options["layout"] = LAYOUT
    if name == "window":
        sizes |= {"window": 5, "sinks": 2}
        options |= {"window": 5, "sinks": 2}
    block: Any = BLOCKS[name](16, **options).eval()
    context = {"context": torch.zeros(1, 5, 16)} if found.context else {}
    with torch.no_grad():
        _, state = block.step(torch.zeros(1, 12, 16), **context)
    elements = sum(
        leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    assert elements == eval(generator().FACTS[name]["state"], {"n": 12, "min": min, **sizes})


def test_the_readme_has_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_describes_every_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    html = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    anchors = {name for text in html.values() for name in re.findall(r'id="attention_zoo[\w.]*\.(\w+)"', text)}
    for module in generator().public_modules():
        assert set(module.__all__) - {"__version__"} <= anchors, f"names of {module.__name__} are missing"
    outside = {
        link
        for text in html.values()
        for link in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(http[^"]+)', text)
    }
    assert not outside, "the site must not load files from other servers"
    assert all("<math" in html[f"blocks/{name}.html"] for name in BLOCKS)
