"""Files that are written whole or not at all: text, and tensors with a JSON note. Nothing in them is ever executed."""

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
    """A file that is not a whole, sound trail file for the classes given."""


@contextmanager
def whole(path: str | os.PathLike[str]) -> Generator[Path]:
    """Gives a place to write a file or a folder at. Afterwards it stands at `path`, whole; after an error, nothing does.

    What stood there before is replaced, and stays if the writing fails. Folders above are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as staging:
        beside, earlier = Path(staging, target.name), Path(staging, ".earlier")
        yield beside
        if beside.is_file():
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        elif target.exists():  # a folder does not replace another by itself
            target.rename(earlier)
        try:
            os.replace(beside, target)
        except BaseException:
            if earlier.exists():
                earlier.rename(target)
            raise


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors with a JSON note to one safetensors file, whole or not at all."""
    metadata = {"tokenpaths": json.dumps({"version": VERSION, **note}, sort_keys=True, allow_nan=False)}
    # copied one by one: safetensors refuses views of one storage, as torch.nn.utils.vector_to_parameters leaves behind
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(copies, metadata)
    with whole(path) as beside:
        beside.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Characters that UTF-8 does not have become question marks."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a file. Raises `FileNotFoundError` and `TrailFileError`."""
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
        note = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TrailFileError(f"{path}: its note is not JSON ({error}): copy or download it again") from None
    version = note.pop("version", None) if isinstance(note, dict) else None
    if not isinstance(version, int) or version != VERSION:
        found = f"version {version}" if isinstance(version, int) else "no known version"
        raise TrailFileError(f"{path}: its note is of {found}, this tokenpaths reads version {VERSION}")
    return tensors, cast("dict[str, Any]", note)


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
