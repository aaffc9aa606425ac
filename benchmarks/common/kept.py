"""What was measured, kept in a file a run until all runs are a table.

A benchmark that was stopped goes on where it stopped, and several processes may share the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenpaths.files import write_text


def keep(file: Path, make: Callable[[], Any]) -> None:
    """Write what `make` returns to a file that is not there, unless another process is at it."""
    with claim(file) as mine:
        if mine:
            write_json(file, make())


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What stands in a file, which is made first where it is not there."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


def read(files: Iterable[Path]) -> list[Any]:
    """What stands in those of the files that are there."""
    return [json.loads(file.read_text()) for file in files if file.exists()]


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether this process is to make a file: it is not there, and no other process that lives is making it."""
    mine = None if file.exists() else _claimed(file.with_suffix(".claim"))
    try:
        yield mine is not None
    finally:
        if mine:
            mine.unlink()


def _claimed(told: Path) -> Path | None:
    """The file that tells others which process is at work; None where another one lives that it tells of."""
    told.parent.mkdir(parents=True, exist_ok=True)
    try:
        with told.open("x") as made:
            made.write(str(os.getpid()))
    except FileExistsError:
        if Path("/proc", told.read_text() or "self").exists():
            return None
        told.unlink(missing_ok=True)
        return _claimed(told)
    return told


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all. Several processes may do so at once."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
