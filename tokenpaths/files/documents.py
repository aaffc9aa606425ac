"""JSON and text: written whole with a checksum, read strictly and within bounds."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, cast

from tokenpaths.files.sealing import DIGITS, TrailFileError, content_of, seal_holds, sealed
from tokenpaths.files.writing import whole

MOST = 256 << 20
"""The largest text that is read or written, in bytes."""
KEY = "sha256"
"""Where the checksum of a JSON file stands: last in its first object. A file without one is read unchecked."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Characters that UTF-8 does not have become question marks."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_json(
    path: str | os.PathLike[str], value: Mapping[str, Any], lines: Iterable[Any] = (), *, indent: int | None = None
) -> None:
    """Write a JSON object with its checksum, whole or not at all.

    Args:
        path: the file.
        value: the object.
        lines: what follows it, a line each, in a file of JSON lines.
        indent: spaces of each level of the object; None for one line.

    Raises `ValueError` for a number that is not finite or a text that is too large, and `TypeError` for what JSON does
    not have.
    """
    mark = secrets.token_hex(DIGITS // 2)  # nowhere else in the text
    parts = [json.dumps({**value, KEY: mark}, indent=indent, ensure_ascii=False, allow_nan=False)]
    parts += [json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines]
    # what UTF-8 does not have is written as JSON writes it, \ud800
    content = "".join(f"{part}\n" for part in parts).encode("utf-8", "backslashreplace")
    if len(content) > MOST:
        raise ValueError(f"{os.fspath(path)} would have {len(content):,} bytes, and {MOST:,} is the most that is read")
    text = sealed(content, mark).decode()
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises `FileNotFoundError`, `IsADirectoryError`, and `TrailFileError` for what is no file, is larger than 256 MiB or
    is not in that encoding.
    """
    return _decoded(path, content_of(path, MOST), encoding)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file, its checksum checked and taken away. A file may have none: people write JSON too.

    Raises as `read_text`, and `TrailFileError` for what is no JSON object or was changed since it was written.
    """
    content = content_of(path, MOST)
    try:
        value = strict_json(_decoded(path, content))
    except TrailFileError:
        raise
    except ValueError as error:
        raise TrailFileError(f"{os.fspath(path)} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TrailFileError(f"{os.fspath(path)} does not hold a JSON object")
    _check(path, content, cast("dict[str, Any]", value))
    return {key: part for key, part in cast("dict[str, Any]", value).items() if key != KEY}


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file of JSON lines, the checksum in the first of them checked. Raises as `read_json`.

    Lines are not parsed here, and end at a line break only, not at the other characters that `str.splitlines` knows.
    """
    content = content_of(path, MOST)
    lines = _decoded(path, content).removesuffix("\n").split("\n")
    try:
        first = strict_json(lines[0])
    except ValueError:  # the reader of the lines will say so
        return lines
    if isinstance(first, dict):
        _check(path, content, cast("dict[str, Any]", first))
    return lines


def strict_json(text: str) -> Any:
    """What a JSON text says, if its numbers are finite and no key stands twice in one object.

    Raises `ValueError` otherwise, also for a text that is not JSON or is nested too deep.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _decoded(path: str | os.PathLike[str], content: bytes, encoding: str = "utf-8") -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise TrailFileError(f"{os.fspath(path)} is not a text in {encoding} ({error})") from None


def _check(path: str | os.PathLike[str], content: bytes, value: Mapping[str, Any]) -> None:
    if KEY in value and not seal_holds(content, value[KEY]):
        raise TrailFileError(
            f"{os.fspath(path)} was changed since it was written (its checksum differs): copy it again, or take out "
            f"{KEY!r} if you changed it yourself"
        )


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
