"""What all files have in common: how they are opened, their checksums, and the error that names a bad one.

A file is **sealed** by the SHA-256 of its own bytes, which stands inside it. It is taken with sixty-four zeros in its
place. So a change of any byte is noticed, of the checksum as of all else. It guards against damage and not against
people: whoever writes a file can write its checksum too.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

DIGITS = 64
"""The length of a checksum, in hexadecimal digits."""
_PIECE = 1 << 20
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class TrailFileError(ValueError):
    """A file that is not whole and sound, or holds what was not asked for."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""The same text with control characters written out, as `\x1b`: it cannot steer a terminal or forge a line of it.

    Line breaks and tabs stay. What turns the direction of text about, and what UTF-8 does not have, is written out too.
    """
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
        TrailFileError: it is a pipe, a device or a socket, which could be waited on for ever.
    """
    name = os.fspath(path)
    try:
        kind = os.stat(name).st_mode
    except ValueError as error:  # a zero byte
        raise FileNotFoundError(f"{name!r} is no path ({error})") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{name} is a folder: name a file in it")
    if not stat.S_ISREG(kind):
        raise TrailFileError(f"{name} is a pipe, a device or a socket: copy what comes from it to a file")
    return open(name, "rb")


def content_of(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file. Raises as `opened`, and `TrailFileError` for more bytes than `most`."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise TrailFileError(f"{os.fspath(path)} is larger than the {most:,} bytes that such a file may have")
    return content


def digest(content: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sealed(content: bytes, mark: str) -> bytes:
    """Put the checksum of a text where `mark` stands, which has `DIGITS` digits and stands there once."""
    at = content.index(mark.encode())
    return _with(content, at, digest(_with(content, at, "0" * DIGITS)))


def seal_holds(content: bytes, told: object) -> bool:
    """Whether a text has the checksum that it tells, and tells it once."""
    if not isinstance(told, str) or len(told) != DIGITS or not told.isascii() or content.count(told.encode()) != 1:
        return False
    return digest(_with(content, content.index(told.encode()), "0" * DIGITS)) == told


def _with(content: bytes, at: int, digits: str) -> bytes:
    return content[:at] + digits.encode() + content[at + len(digits) :]


def digests(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The checksum of each file below a folder, by its path from there."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _of_file(path) for path in found}


def check_folder(folder: str | os.PathLike[str], told: Mapping[str, object]) -> None:
    """Raise `TrailFileError` unless each file that `digests` told of is there and unchanged."""
    for name, expected in told.items():
        path = Path(folder, name)
        if not path.is_file():
            raise TrailFileError(f"{path} is missing: copy the folder again")
        if _of_file(path) != expected:
            raise TrailFileError(f"{path} was changed since it was written (its checksum differs): copy it again")


def _of_file(path: Path) -> str:
    found = hashlib.sha256()
    with opened(path) as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
