"""Files of other libraries, read without executing any: tensors out of PyTorch's zip files, safetensors and NumPy's.

And the folders that are written for them.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tokenpaths.checking import kind
from tokenpaths.files import TrailFileError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".npy")


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder to write to. Raises `FileExistsError` where it holds files."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files: write to a new folder")
    return folder


def tensors_in(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; a single tensor has the name "".

    Read are `.safetensors`, `.npy`, and what `torch.save` writes of a tensor or a dict of tensors. Numbered entries
    get their number as a name.

    Raises:
        FileNotFoundError: there is no such file.
        TrailFileError: it is of another kind, is damaged, or holds anything but tensors. Nothing of it is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise TrailFileError(f"{path} is none of {', '.join(SUFFIXES)}: save its tensors to one of these")
    try:
        found = _READERS.get(path.suffix, _of_torch)(path)
    except TrailFileError:
        raise
    except Exception as error:  # the readers' own errors are of many unrelated classes
        told = str(error).strip().partition("\n")[0]
        raise TrailFileError(
            f"{path} is no whole file of tensors alone ({type(error).__name__}: {told:.200}). Nothing of it was "
            "executed: ask for a file that holds tensors and nothing else, such as safetensors"
        ) from None
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrailFileError(f"{path}: {name or 'its tensor'} holds NaN or infinity")
    return found


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _of_numpy(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = (
            np.lib.format.read_array_header_1_0(file)
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0(file)
        )
        told = int(np.prod(shape, dtype=object)) * dtype.itemsize  # of Python's integers, which do not overflow
        if dtype.hasobject or told != path.stat().st_size - file.tell():
            raise TrailFileError(f"{path} is not as long as its header tells, or holds objects")
    return {"": torch.from_numpy(np.load(path, allow_pickle=False).copy())}


def _of_torch(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise TrailFileError(
            f"{path} is no zip file, as torch.save has written since version 1.6: load it where it comes from, and "
            "save it anew"
        )
    with zipfile.ZipFile(path) as whole:
        parts = whole.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise TrailFileError(f"{path} is compressed, which torch.save does not do")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise TrailFileError(f"{path} tells of more bytes than it has")
    value: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(value, Tensor):
        return {"": value.detach()}
    if not isinstance(value, Mapping):
        raise TrailFileError(f"{path} holds {kind(value)}, not a tensor or a dict of tensors")
    found: dict[str, Tensor] = {}
    for name, tensor in cast("Mapping[object, object]", value).items():
        if not isinstance(tensor, Tensor) or not isinstance(name, (str, int)):
            raise TrailFileError(f"{path}: {name!r:.80} is {kind(tensor)}, not a tensor")
        if not tensor.is_contiguous() and tensor.numel() > tensor.untyped_storage().nbytes() // tensor.element_size():
            raise TrailFileError(f"{path}: {name!r:.80} shows the same numbers many times over")
        found[str(name)] = tensor.detach()
    return found


_READERS = {".safetensors": _of_safetensors, ".npy": _of_numpy}
