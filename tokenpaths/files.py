"""Files and folders that are written whole or not at all: text, and tensors with a JSON note. None is ever executed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor

VERSION = 1


class TrailFileError(ValueError):
    """A file that is not whole and sound, or holds what was not asked for."""


@contextmanager
def whole(path: str | os.PathLike[str], *, replace: bool = True) -> Generator[Path]:
    """Write a file or a folder, whole or not at all.

    Inside `with whole("run/report.json") as beside:`, write to `beside`, a path of the same name in another folder.
    On leaving, it is moved to `path`. After an error or an interruption, what stood at `path` before is still there.

    Args:
        path: where the file or folder belongs. The folders above it are made.
        replace: whether a folder takes the place of what stands at `path`; if not, a folder that holds something there
            stays, and `OSError` is raised. A file always replaces a file.

    Raises:
        ValueError: `path` does not end in a name, as ".." does not.
        OSError: nothing was written, or it cannot be moved: a file does not replace a folder.
    """
    target = Path(path)
    if target.name in ("", ".."):
        raise ValueError(f"{os.fspath(path)!r} does not end in the name of a file or a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as staging:
        beside, earlier = Path(staging, "new", target.name), Path(staging, "earlier")
        beside.parent.mkdir()
        yield beside
        if beside.is_file():
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            if replace and beside.is_dir() and target.exists():  # a folder cannot be renamed over another
                target.rename(earlier)
            os.replace(beside, target)
        except BaseException:
            if earlier.exists() and not target.exists():
                earlier.rename(target)
            raise


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors with a JSON note to one safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: the tensors by name, on any device.
        note: what JSON can hold, by name.

    Raises `ValueError` for a number in the note that is not finite, and `TypeError` for what JSON does not have.
    """
    metadata = {"tokenpaths": json.dumps({"version": VERSION, **note}, sort_keys=True, allow_nan=False)}
    # copied one by one: safetensors refuses views of one storage, which torch.nn.utils.vector_to_parameters leaves
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(copies, metadata)
    with whole(path) as beside:
        beside.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Characters that UTF-8 does not have become question marks."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a file that `write` wrote.

    Raises `FileNotFoundError`, and `TrailFileError` for a file that is cut off, changed, or of another version.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception as error:  # the parser's own errors are of several unrelated classes
        raise TrailFileError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    text = (header.get("__metadata__") or {}).get("tokenpaths")
    if text is None:
        raise TrailFileError(f"{path} is a safetensors file, but not of tokenpaths: it has no 'tokenpaths' note")
    try:
        note = strict_json(text)
    except ValueError as error:
        raise TrailFileError(f"{path}: its note is not JSON ({error}): copy or download it again") from None
    version = note.pop("version", None) if isinstance(note, dict) else None
    if not isinstance(version, int) or version != VERSION:
        found = f"version {version}" if isinstance(version, int) else "no known version"
        raise TrailFileError(f"{path}: its note is of {found}, this tokenpaths reads version {VERSION}")
    return tensors, cast("dict[str, Any]", note)


def strict_json(text: str) -> Any:
    """What a JSON text says, if its numbers are finite and no key stands twice in one object.

    Raises `ValueError` otherwise, also for a text that is not JSON or is nested too deep.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
