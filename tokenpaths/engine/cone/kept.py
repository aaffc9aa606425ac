"""Where tensors are kept: in memory, or in safetensors files with checksums, inside a budget of bytes.

What has no room is not kept, and what is kept stays: an epoch reads its examples in turn, and to drop the oldest for
the newest would then drop each just before it is wanted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import torch
from torch import Tensor

from tokenpaths import files
from tokenpaths.files import TensorFile, TrailFileError

_FILE_BYTES = 64 << 20
_HEADER = 256  # bytes that a safetensors file spends on the name and shape of a tensor, at most
_NOTE = 1024  # and on its note
_ADVICE = "delete it, what it held is made anew"


class Kept(Protocol):
    """A dictionary of groups of tensors that may refuse to take more."""

    used: int

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors put under a key, or None."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep tensors, if there is room for all of them; says whether there was."""
        ...

    def fits(self, size: int, count: int = 1) -> bool:
        """Whether there is room for `count` more tensors of `size` bytes in all."""
        ...

    def flush(self) -> None:
        """Bring to disk what is to be there."""
        ...


class InMemory:
    """Tensors in the memory of this process."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._groups: dict[str, Mapping[str, Tensor]] = {}

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        return self._groups.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        if key not in self._groups:
            if not self.fits(size_of(tensors)):
                return False
            self._groups[key] = _own(tensors)
            self.used += size_of(tensors)
        return True

    def fits(self, size: int, count: int = 1) -> bool:
        return self.used + size <= self.budget

    def flush(self) -> None: ...


class InFolder:
    """Tensors in safetensors files of a folder: they outlive the process, and others may read them at the same time.

    Each is read when it is asked for, and its checksum is checked each time. Where nothing can be written any more, as
    on a disk that is full, no more is kept, with a warning.

    Raises:
        NotADirectoryError: the folder is a file.
        TrailFileError: a file in the folder is not whole and sound, or of an earlier version without checksums.
    """

    def __init__(self, folder: str | os.PathLike[str], budget: int) -> None:
        self.folder = Path(folder)
        self.budget = budget
        self.used = 0
        self._written: dict[str, tuple[TensorFile, list[str]]] = {}
        self._waiting: dict[str, Mapping[str, Tensor]] = {}
        self._waiting_bytes = 0
        self._closed = False
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file, but a cone is kept in a folder: name one")
        files.sweep(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        if key in self._written:
            file, names = self._written[key]
            try:
                return {name: file.tensor(f"{key}:{name}") for name in names}
            except FileNotFoundError:  # somebody has cleared the folder
                del self._written[key]
        return self._waiting.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        if key not in self._written and key not in self._waiting:
            if not self.fits(size_of(tensors), len(tensors)):
                return False
            size = size_of(tensors) + _HEADER * len(tensors)
            self._waiting[key] = _own(tensors)
            self._waiting_bytes += size
            if self._waiting_bytes >= _FILE_BYTES:
                self.flush()
        return True

    def fits(self, size: int, count: int = 1) -> bool:
        size += _HEADER * count + _NOTE
        return not self._closed and self.used + self._waiting_bytes + size <= self.budget

    def flush(self) -> None:
        if self._waiting and not self._closed:
            path = self.folder / f"{uuid4().hex}.safetensors"
            groups = {f"{k}:{name}": t for k, group in self._waiting.items() for name, t in group.items()}
            try:
                files.write(path, groups, {})
            except OSError as error:
                self._closed = True  # what waits stays in memory, and no more is taken
                warnings.warn(
                    f"{self.folder} cannot be written ({error}): no more is kept there, and the rest is computed each "
                    "time",
                    stacklevel=2,
                )
                return
            self._waiting, self._waiting_bytes = {}, 0
            self._open(path)

    def _open(self, path: Path) -> None:
        file = TensorFile(path, _ADVICE)
        if file.checksum is None:
            raise TrailFileError(f"{path} is of an earlier version and has no checksums: {_ADVICE}")
        names: dict[str, list[str]] = {}
        for full in file.shapes:
            key, _, name = full.partition(":")
            names.setdefault(key, []).append(name)
        for key, parts in names.items():
            self._written.setdefault(key, (file, parts))
        self.used += file.size


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of a group of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.inference_mode(False)  # what a reading has computed must serve a later training step
@torch.no_grad()
def _own(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
