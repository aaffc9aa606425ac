"""Constant trails as a control vector of llama.cpp, and back.

to_gguf(trails, "vector.gguf", model)        # llama-cli -m model.gguf --control-vector vector.gguf
trails = from_gguf("vector.gguf", model)

In a control vector the tensor `direction.N` is added to what block N, counted from 0, gives to the residual stream, at
every token. llama.cpp has no row for block 0.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.files import TrailFileError, whole
from tokenpaths.interop.affine import affine
from tokenpaths.site import Host, Site
from tokenpaths.tokens import All
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.steering import Additive

ARCHITECTURE = "controlvector"


@torch.no_grad()
def to_gguf(trails: TrailMap, path: str | os.PathLike[str], model: nn.Module, *, strength: float = 1.0) -> None:
    """Write a control vector: `direction.N` = f v, in float32.

    Compare it on a model file in float32. A quantised one computes in eight bits, and is further from the model than
    from its own steered self.

    Args:
        trails: constant ones (`Additive`, `BiasReFT`, and what `Scaled` and `Chain` make of them), at stream block and
            `All()`, at block 1 or above.
        path: the file, which is replaced if it is there.
        model: the model that they are for: its name and number of layers stand in the file.
        strength: f.

    Raises:
        ImportError: the package gguf is not installed.
        TypeError: `trails` is no `TrailMap`.
        ValueError: what a control vector is not, with the site. Nothing is written then.
    """
    writer_of = _gguf().GGUFWriter
    if not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a TrailMap is expected, not {type(trails).__name__}")
    if trails.gate is not None:
        raise ValueError("a control vector has no gate: set trails.gate = None first")
    host = Host.of(model, trails.blocks)
    vectors: dict[int, Tensor] = {}
    for site, trail in trails.items():
        found = host.locate(site)[0]
        vector = strength * _constant(found, trail)
        vectors[found.layer] = vectors[found.layer] + vector if found.layer in vectors else vector
    config: Any = getattr(host.inner, "config", None)
    with whole(path) as beside:
        writer = writer_of(beside, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(getattr(config, "model_type", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _constant(site: Site, trail: Trail) -> Tensor:
    if site.stream != "block" or not isinstance(site.tokens, All):
        raise ValueError(f"{site}: a control vector acts at stream 'block' and on all tokens")
    if site.layer == 0:
        raise ValueError(f"{site}: llama.cpp has no control vector for block 0: use merge, or lay it at block 1")
    told = affine(trail)
    vector = None if told is None else told.constant
    if vector is None:
        raise ValueError(f"{site}: {type(trail).__name__} depends on what it reads, and a control vector does not")
    return vector


def from_gguf(path: str | os.PathLike[str], model: nn.Module, *, blocks: str | None = None) -> TrailMap:
    """The directions of a control vector, of llama.cpp or repeng, as `Additive` at their blocks and `All()`.

    The strength that it is used with is that of `attach`. repeng's `normalize=True` has no like here.

    Raises:
        ImportError: the package gguf is not installed.
        FileNotFoundError: there is no such file.
        TrailFileError: it is damaged, is no control vector, or is of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    host = Host.of(model, blocks)
    trails: dict[Site, Trail] = {}
    for name, vector in _tensors(path).items():
        told = re.fullmatch(r"direction\.(\d{1,6})", name)
        if told is None:
            raise TrailFileError(f"{path}: {name:.80} is not the direction of a block: this is no control vector")
        layer = int(told[1])
        dim = host.locate(Site())[1].width
        if not layer < len(host.blocks) or vector.shape != (dim,) or not bool(vector.isfinite().all()):
            raise TrailFileError(
                f"{path}: {name} has shape {list(vector.shape)}, or numbers that are not finite; the model has "
                f"{len(host.blocks)} blocks of width {dim}"
            )
        trail = trails[Site(layer)] = Additive(dim)
        with torch.no_grad():
            trail.v.copy_(vector)
    if not trails:
        raise TrailFileError(f"{path} holds no directions")
    return TrailMap(trails, blocks=blocks)


def _tensors(path: Path) -> dict[str, Tensor]:
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        found = {part.name: part for part in reader.tensors}
        if odd := [name for name, part in found.items() if part.tensor_type != gguf.GGMLQuantizationType.F32]:
            raise TrailFileError(f"{path}: {odd[0]:.80} is not in float32, as a control vector's directions are")
        return {name: torch.from_numpy(part.data.copy()) for name, part in found.items()}
    except TrailFileError:
        raise
    except Exception as error:  # the reader's own errors are of many unrelated classes
        raise TrailFileError(f"{path} is no whole GGUF file ({type(error).__name__}: {error!s:.200})") from None


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("control vectors are read and written by the package gguf: pip install gguf") from None
    return gguf
