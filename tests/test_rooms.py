"""The rooms of the package: what may import what, and how little `import tokenpaths` brings in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tokenpaths"
ROOMS = (
    "tokens figure trails data mixing sites adapter saving trailmap watcher attach cone drift limits objectives "
    "samples training retention peers reasoning audit ab plots testing demo"
).split()
LATE = ("transformers", "accelerate", "peft", "matplotlib", "datasets", "pyreft", "pyvene", "trl", "scipy")


def imports(source: str) -> Iterator[str]:
    """The rooms of tokenpaths that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "tokenpaths":
            names = [f"tokenpaths.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("tokenpaths."))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ROOMS, f"{room} has no place in the order of rooms"
    for imported in imports(path.read_text()):
        assert ROOMS.index(imported) <= ROOMS.index(room), f"{room} imports {imported}, which lies above it"


def test_the_import_reader_sees_every_form() -> None:
    source = "import tokenpaths.a\nfrom tokenpaths import b\ndef f():\n from tokenpaths.c.d import e"
    assert set(imports(source)) == {"a", "b", "c"}


def test_import_brings_in_nothing_heavy() -> None:
    program = f"import sys, tokenpaths; print([name for name in {LATE} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
