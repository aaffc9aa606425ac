"""The rules of the house: which room may import which, how large its parts are, and what stands at the front door."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenpaths as tp

PACKAGE = Path(__file__).parent.parent / "tokenpaths"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (  # from the ground up: a room imports from the floors below its own
    "undo",
    "files scope",
    "checking matching randomness",
    "tokens trails",
    "data stats report demo",
    "site",
    "trailmap",
    "attachment testing",
    "engine",
    "drift training",
    "limits lab interop",
)
LAB = ("forgetting", "chains", "reasoning", "ab", "audit", "peers")
"""The rooms of the laboratory, in the order in which they may import each other."""
LATE = ("transformers", "accelerate", "peft", "matplotlib", "datasets", "pyreft", "pyvene", "trl", "scipy")
MOST_NAMES, MOST_LINES, MOST_BODY, MOST_METHODS = 45, 400, 60, 12


def imports(source: str) -> Iterator[str]:
    """What a module imports of tokenpaths, at its top or inside a function, as names below the package."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "tokenpaths":
            names = [f"tokenpaths.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix("tokenpaths.") for name in names if name.startswith("tokenpaths."))


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms.split())


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_downward_only(path: Path) -> None:
    room, _, inner = module_of(path).partition(".")
    if not room:
        return
    for imported in imports(path.read_text()):
        other, _, rest = imported.partition(".")
        if other != room:
            assert floor_of(other) < floor_of(room), f"{room} imports {other}, which does not lie below it"
        elif room == "lab" and inner and rest:
            here, there = inner.split(".")[0], rest.split(".")[0]
            assert LAB.index(there) <= LAB.index(here), f"lab.{here} imports lab.{there}, which lies above it"


def test_the_import_reader_sees_every_form() -> None:
    source = "import tokenpaths.a\nfrom tokenpaths import b\ndef f():\n from tokenpaths.c.d import e"
    assert {found.split(".")[0] for found in imports(source)} == {"a", "b", "c"}


def test_no_file_imports_itself_by_a_way_around() -> None:
    modules = {module_of(path): path for path in FILES}
    arrows = {
        module: {found for found in imports(path.read_text()) if found in modules and found != module}
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                visit(other, (*way, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_functions_and_classes_are_small(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MOST_LINES, f"{source.count(chr(10))} lines: is it still one idea?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.body[-1].end_lineno is not None
            lines = node.body[-1].end_lineno - body[0].lineno + 1
            assert lines <= MOST_BODY, f"{node.name} has a body of {lines} lines"
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_"]
            kinds = [{getattr(d, "id", getattr(d, "attr", "")) for d in method.decorator_list} for method in methods]
            public = sum("property" not in kind and "overload" not in kind for kind in kinds)
            assert public <= MOST_METHODS, f"{node.name} has {public} public methods"


def modules() -> Iterator[str]:
    for found in pkgutil.walk_packages(tp.__path__, "tokenpaths."):
        yield found.name


@pytest.mark.parametrize("module", list(modules()))
def test_no_module_is_hidden_by_a_function_of_its_name(module: str) -> None:
    parent, _, last = module.rpartition(".")
    loaded = importlib.import_module(module)
    assert getattr(importlib.import_module(parent), last) is loaded


def test_the_front_door_shows_few_names_and_the_rooms() -> None:
    rooms = {part.name.split(".")[0] for part in pkgutil.iter_modules(tp.__path__)}
    shown = dir(tp)
    assert set(shown) >= rooms and len(shown) == len(set(shown))
    assert len(set(shown) - rooms) <= MOST_NAMES
    for each in set(shown) - rooms:
        assert not isinstance(getattr(tp, each), types.ModuleType), each


def test_a_misspelt_name_is_refused_with_a_near_one() -> None:
    with pytest.raises(AttributeError, match="^tokenpaths has no 'LoReft'; did you mean 'LoReFT'\\?$"):
        _ = tp.LoReft
    with pytest.raises(AttributeError, match="^tokenpaths has no 'xyzzy'$"):
        _ = tp.xyzzy


def test_import_brings_in_nothing_heavy() -> None:
    program = f"import sys, tokenpaths; print([name for name in {LATE} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
