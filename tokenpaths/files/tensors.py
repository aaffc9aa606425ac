"""Tensors with a JSON note, in one safetensors file that is sealed block by block.

The metadata of the file is one JSON note. In it stands `"sha256"`: the checksum of the header (with its own 64 digits
as zeros), and behind it that of each block of 256 KiB of the numbers. So a large file can be read in parts, and each
part is checked before it is used, each time anew. Nothing is mapped into memory: a file that is cut off meanwhile gives
an error, and does not end the process.

Version 1 had no checksums. Such files are read, unchecked.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import safetensors
import torch
from torch import Tensor

from tokenpaths.files.documents import KEY, strict_json
from tokenpaths.files.sealing import DIGITS, TrailFileError, digest, opened, seal_holds, sealed
from tokenpaths.files.writing import whole

VERSION = 2
BLOCK = 1 << 18
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Put: TypeAlias = Callable[[str, int, Tensor], object]
"""Puts entries into the tensor of a name, from a start on."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors with a JSON note to one safetensors file with checksums, whole or not at all.

    Args:
        path: the file.
        tensors: the tensors by name, on any device.
        note: what JSON can hold, by name.

    Raises `ValueError` for a number in the note that is not finite, `TypeError` for what JSON does not have, and
    `OSError` where it cannot be written.
    """
    with filling(path, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, note) as put:
        for name, tensor in tensors.items():
            put(name, 0, tensor.detach().cpu().flatten())


@contextmanager
def filling(
    path: str | os.PathLike[str], entries: Mapping[str, tuple[Sequence[int], torch.dtype]], note: Mapping[str, Any]
) -> Generator[Put]:
    """Write a file whose tensors come in parts, in any order: inside, `put(name, start, values)`.

    Args:
        path: the file.
        entries: the shape and dtype of each tensor.
        note: what JSON can hold, by name.

    Raises as `write`.
    """
    layout: dict[str, Any] = {}
    end = 0
    for name in sorted(entries, key=lambda name: (-entries[name][1].itemsize, name)):  # so that each is aligned
        shape, dtype = entries[name]
        if dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} is {dtype}, which a file cannot hold: {', '.join(map(str, _NAMES))}")
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        layout[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    mark = secrets.token_hex(DIGITS // 2)  # nowhere else in the header
    checksums = mark + "0" * DIGITS * -(-end // BLOCK)
    told = json.dumps({"version": VERSION, **note, KEY: checksums}, sort_keys=True, allow_nan=False)
    header = json.dumps({"__metadata__": {"tokenpaths": told}, **layout}).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    with whole(path) as beside, beside.open("x+b") as file:
        file.truncate(len(header) + end)
        yield partial(_put, file, {name: len(header) + entry["data_offsets"][0] for name, entry in layout.items()})
        file.seek(len(header))
        blocks = b"".join(digest(block).encode() for block in iter(lambda: file.read(BLOCK), b""))
        at = header.index(mark.encode()) + DIGITS
        header = sealed(header[:at] + blocks + header[at + len(blocks) :], mark)
        file.seek(0)
        file.write(header)


def _put(file: BinaryIO, begins: Mapping[str, int], name: str, start: int, values: Tensor) -> None:
    file.seek(begins[name] + start * values.dtype.itemsize)
    file.write(values.contiguous().view(torch.uint8).numpy().tobytes())


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a file that `write` wrote.

    Raises `FileNotFoundError`, `IsADirectoryError`, and `TrailFileError` for a file that is cut off, changed, or of
    another version.
    """
    file = TensorFile(path)
    return file.tensors(), file.note


class TensorFile:
    """A file that `write` or `filling` wrote, opened: its header is checked now, its numbers whenever they are read.

    `note` is its note, `shapes` has the shape of each tensor by name, and `checksum` is that of the whole file, or None
    for one of version 1, which has none.

    Args:
        path: the file.
        advice: what errors say that one should do about a damaged file.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        TrailFileError: it is no whole and sound file of this kind.
    """

    def __init__(self, path: str | os.PathLike[str], advice: str = "copy or download it again") -> None:
        self.path, self.advice = Path(path), advice
        with opened(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            header = length + file.read(min(int.from_bytes(length, "little"), self.size))
        try:
            with safetensors.safe_open(self.path, framework="pt"):  # the library checks the form, lengths and offsets
                self._layout = cast("dict[str, dict[str, Any]]", json.loads(header[8:]))
        except Exception as error:  # the parser's own errors are of several unrelated classes
            raise self._broken(f"is not a whole safetensors file ({error})") from None
        self._begin = len(header)
        self.note = self._note()
        checksums = self.note.pop(KEY, None)
        if self._version == VERSION or checksums is not None:
            first = checksums[:DIGITS] if isinstance(checksums, str) else None
            wanted = DIGITS * (1 + -(-(self.size - self._begin) // BLOCK))
            if not seal_holds(header, first) or len(checksums) != wanted:
                raise self._broken("was changed since it was written (the checksum of its header differs)")
        self.checksum = None if checksums is None else str(checksums[:DIGITS])
        self._blocks = None if checksums is None else str(checksums[DIGITS:])
        if odd := [entry["dtype"] for entry in self._layout.values() if entry["dtype"] not in _DTYPES]:
            raise TrailFileError(f"{self.path} holds numbers of the kind {odd[0]!r:.20}, which no trail has")
        self.shapes = {name: list(entry["shape"]) for name, entry in self._layout.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name. Raises `TrailFileError` for numbers that were changed or cut off."""
        try:
            content = self._read(0, self.size - self._begin)
        except MemoryError:
            raise TrailFileError(f"{self.path} does not fit into memory: it has {self.size:,} bytes") from None
        return {name: _tensor(content[slice(*entry["data_offsets"])], entry) for name, entry in self._layout.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises as `tensors`."""
        entry = self._layout[name]
        return _tensor(self._read(*entry["data_offsets"]), entry)

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of a tensor, in one row. Raises as `tensors`."""
        entry = self._layout[name]
        begin, size = entry["data_offsets"][0], _DTYPES[entry["dtype"]].itemsize
        if not 0 <= start <= stop <= torch.Size(entry["shape"]).numel():
            raise TrailFileError(f"{self.path} has no entries {start} to {stop} of {name!r:.80}")
        return _tensor(self._read(begin + start * size, begin + stop * size), {**entry, "shape": [stop - start]})

    def _note(self) -> dict[str, Any]:
        """The note, without the version, which is kept. Raises `TrailFileError`."""
        metadata = self._layout.pop("__metadata__", None) or {}
        text = metadata.pop("tokenpaths", None)
        if text is None:
            raise TrailFileError(
                f"{self.path} is a safetensors file, but not of tokenpaths: it has no 'tokenpaths' note"
            )
        try:
            note = strict_json(text)
        except ValueError as error:
            told = f"{self.path}: its note is not JSON ({error}): {self.advice}"
            raise TrailFileError(told) from None
        version = cast("Any", note.pop("version", None)) if isinstance(note, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION or isinstance(version, bool):
            found = f"version {version}" if isinstance(version, int) else "no known version"
            raise TrailFileError(
                f"{self.path}: its note is of {found}, this tokenpaths reads versions 1 to {VERSION}: a newer one may "
                "read it"
            )
        self._version: int = version
        return cast("dict[str, Any]", note)

    def _read(self, start: int, stop: int) -> bytearray:
        """Bytes of the numbers, counted from the first. The blocks that they lie in are checked."""
        first = start // BLOCK * BLOCK if self._blocks is not None else start
        last = min(-(-stop // BLOCK) * BLOCK, self.size - self._begin) if self._blocks is not None else stop
        with opened(self.path) as file:
            file.seek(self._begin + first)
            content = bytearray(file.read(last - first))
        if len(content) < last - first:
            raise self._broken("was cut off since it was opened")
        if self._blocks is not None:
            view = memoryview(content)
            for place in range(0, len(content), BLOCK):
                at = (first + place) // BLOCK * DIGITS
                if digest(view[place : place + BLOCK]) != self._blocks[at : at + DIGITS]:
                    raise self._broken("was changed since it was written (the checksum of its numbers differs)")
        return content[start - first : stop - first]

    def _broken(self, told: str) -> TrailFileError:
        return TrailFileError(f"{self.path} {told}: {self.advice}")


def _tensor(content: bytearray, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
