"""Where tensors are kept: in memory, or in memory-mapped safetensors files, inside a budget of bytes.

What has no room is not kept, and what is kept stays: an epoch reads its examples in turn, and to drop the oldest for
the newest would then drop each just before it is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import safetensors
import torch
from torch import Tensor

from tokenpaths import files
from tokenpaths.files import TrailFileError

_FILE_BYTES = 64 << 20
_HEADER = 256  # bytes that a safetensors file spends on the name and shape of a tensor, at most


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

    Raises `TrailFileError` for a file in the folder that is not whole.
    """

    def __init__(self, folder: str | os.PathLike[str], budget: int) -> None:
        self.folder = Path(folder)
        self.budget = budget
        self.used = 0
        self._written: dict[str, tuple[Any, list[str]]] = {}
        self._waiting: dict[str, Mapping[str, Tensor]] = {}
        self._waiting_bytes = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        if key in self._written:
            file, names = self._written[key]
            return {name: file.get_tensor(f"{key}:{name}") for name in names}
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
        return self.used + self._waiting_bytes + size + _HEADER * count <= self.budget

    def flush(self) -> None:
        if self._waiting:
            path = self.folder / f"{uuid4().hex}.safetensors"
            files.write(path, {f"{k}:{name}": t for k, group in self._waiting.items() for name, t in group.items()}, {})
            self._waiting, self._waiting_bytes = {}, 0
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file: Any = safetensors.safe_open(path, framework="pt")  # memory-mapped: tensors are read when asked for
        except Exception as error:  # the parser's own errors are of several unrelated classes
            raise TrailFileError(
                f"{path} is not a whole safetensors file ({error}): delete it, what it held is made anew"
            ) from None
        names: dict[str, list[str]] = {}
        for full in file.keys():  # noqa: SIM118
            key, _, name = full.partition(":")
            names.setdefault(key, []).append(name)
        for key, parts in names.items():
            self._written.setdefault(key, (file, parts))
        self.used += path.stat().st_size


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of a group of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.inference_mode(False)  # what a reading has computed must serve a later training step
@torch.no_grad()
def _own(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
