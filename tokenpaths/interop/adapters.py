"""ReFT modules of the library adapters (adapter-hub/adapters 1.2.0), carried in.

trails = from_adapters("my_adapter", model, "LoReFT")

    x + s (W x + b - P x) P      subtract_projection: LoReFT (P orthonormal), NoReFT
    x + s (W x + b) P            DiReFT
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenpaths.checking import quoted
from tokenpaths.files import TrailFileError, read_json
from tokenpaths.interop.foreign import tensors_in
from tokenpaths.interop.reft import filled, rotation
from tokenpaths.site import Host, Site
from tokenpaths.tokens import Either, First, Last, Rule
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.reft import DiReFT, LoReFT, NoReFT

KINDS: dict[str, type[Trail]] = {"LoReFT": LoReFT, "NoReFT": NoReFT, "DiReFT": DiReFT}
FILES = ("adapter.safetensors", "pytorch_adapter.bin")


@torch.no_grad()
def from_adapters(
    folder: str | os.PathLike[str],
    model: nn.Module,
    kind: str,
    *,
    blocks: str | None = None,
) -> TrailMap:
    """Trails that do on a prompt what a ReFT adapter of that library does, to the rounding of float32.

    adapters counts positions in each forward, and among real tokens: its prefix becomes `First(n)`, and its suffix
    `Last(n)` of the prompt. In training its suffix was the end of the answer, and while it decodes every token is both;
    so an adapter with a suffix is warned of.

    Args:
        folder: with `adapter_config.json`, and `adapter.safetensors` or `pytorch_adapter.bin`.
        model: the base model. adapters changes some architectures by itself, Llama among them: an adapter that was
            trained there need not do the same on the plain model. Measure it.
        kind: what was trained: "LoReFT", "NoReFT" or "DiReFT". The folder does not tell NoReFT from DiReFT.
        blocks: the name of the block list of a model that has several.

    Raises:
        FileNotFoundError: there is no such file.
        TrailFileError: a file is damaged, holds anything but tensors, does not fit the model, or asks for a
            nonlinearity. Nothing is executed.
        ValueError: `kind` is none of the three, or is not what the file holds.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"kind={quoted(kind)} is none of {', '.join(KINDS)}")
    config = cast("dict[str, Any]", read_json(folder / "adapter_config.json").get("config"))
    if not isinstance(config, dict) or config.get("architecture") != "reft":  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TrailFileError(f"{folder}/adapter_config.json is not that of a ReFT adapter")
    if config.get("non_linearity") not in (None, "linear"):
        raise TrailFileError(f"{folder} has the nonlinearity {config['non_linearity']!r:.40}, which no trail has")
    if bool(config.get("orthogonality")) != (kind == "LoReFT"):
        raise ValueError(
            f"{folder} was trained with orthogonality={config.get('orthogonality')!r:.20}: it is no {kind}"
        )
    rules = _rules(folder, config)
    path = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
    host = Host.of(model, blocks)
    pairs: list[tuple[Site, Trail]] = []
    for (layer, unit), tensors in sorted(_units(path).items()):
        if layer >= len(host.blocks) or unit >= len(rules):
            raise TrailFileError(
                f"{path} has unit {unit} of layer {layer}, which the model or the configuration has not"
            )
        if rules[unit] is not None:
            site = Site(layer, rules[unit])
            told = f"{path}: unit {unit} of layer {layer}"
            pairs.append((site, _trail(told, KINDS[kind], tensors, host.locate(site)[1].width)))
    if not pairs:
        raise TrailFileError(f"{path} holds no ReFT units")
    return TrailMap(pairs, blocks=blocks)


def _rules(folder: Path, config: dict[str, Any]) -> list[Any]:
    """The rule of each unit; None for one that moves nothing."""
    counts = [config.get("prefix_positions", 0), config.get("suffix_positions", 0)]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts) or not any(counts):
        raise TrailFileError(f"{folder} has the positions {counts!r:.80}, at which nothing lies")
    first, last = counts
    if last:
        warnings.warn(
            f"{folder} has suffix_positions={last}: taken for the last tokens of the prompt, where adapters took the "
            "last ones of each forward, in training those of the answer",
            stacklevel=3,
        )
    both: list[Rule | None] = [First(first) if first else None, Last(last) if last else None]
    if not config.get("tied_weights"):
        return both
    there = [rule for rule in both if rule is not None]
    return [Either(*there) if len(there) > 1 else there[0]]


def _units(path: Path) -> dict[tuple[int, int], dict[str, Tensor]]:
    """The tensors of each unit, by layer and number."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in tensors_in(path).items():
        told = re.fullmatch(r"[\w.]*?\.(\d+)\.reft_layer\.refts\.(.+)\.units\.(\d)\.(.+)", name)
        if told is None:
            raise TrailFileError(f"{path}: {name:.120} is of no ReFT unit")
        found.setdefault((int(told[1]), int(told[3])), {})[told[4]] = tensor.float()
    return found


def _trail(told: str, cls: type[Trail], tensors: dict[str, Tensor], dim: int) -> Trail:
    free = tensors.pop("projection.weight", None)
    P = rotation(told, tensors, "projection", wide=True) if free is None else free
    W, b = tensors.pop("learned_source.weight", None), tensors.pop("learned_source.bias", None)
    if P is None or W is None or b is None or tensors:
        raise TrailFileError(f"{told} has not the tensors of a ReFT unit")
    rank = len(b)
    if not 1 <= rank <= dim or P.shape != (rank, dim) or W.shape != (rank, dim) or b.shape != (rank,):
        raise TrailFileError(f"{told} has shapes {list(P.shape)} and {list(W.shape)}: the model has width {dim}")
    return filled(told, cls, P, W, b)
