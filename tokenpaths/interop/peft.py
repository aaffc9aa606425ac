"""Trails written as a LoRA, which PEFT loads, merges and serves: huggingface/peft 0.19 and later.

to_peft(trails, "adapter", model)
peft_model = PeftModel.from_pretrained(model, "adapter")    # does what the model does with the trails attached
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.files import whole
from tokenpaths.interop.affine import affine
from tokenpaths.interop.foreign import new_folder
from tokenpaths.interop.merging import scale_of_table
from tokenpaths.interop.projections import Table, projections
from tokenpaths.site import Host
from tokenpaths.trailmap.trailmap import TrailMap


@torch.no_grad()
def to_peft(trails: TrailMap, folder: str | os.PathLike[str], model: nn.Module, *, strength: float = 1.0) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`: a LoRA that does what the trails do.

    A displacement B (M y + k) of what a linear map A x + c gives becomes lora_A = M A, lora_B = f B, lora_alpha = r and
    the bias f B (M c + k). Maps of lower rank are filled up with zeros. Where a bias is needed, `lora_bias` is set:
    PEFT runs it, and merges it into maps that have a bias of their own; vLLM and llama.cpp have no such biases.

    Args:
        trails: affine ones at `All()`, at streams attention and mlp, at one head, or at the embedding; constants at a
            block too.
        folder: a new folder, or an empty one.
        model: the model that the trails are for. It is not changed.
        strength: f.

    Raises:
        FileExistsError: the folder holds files.
        TypeError: `trails` is no `TrailMap`.
        ValueError: what no LoRA carries, with the site and the reason. Nothing is written then.
    """
    folder = new_folder(folder)
    host = Host.of(model, getattr(trails, "blocks", None))
    linear, table = projections(host, trails, strength)
    rank = max([1, *(sum(down.shape[0] for down in one.down) for one in linear)])
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    if table is not None:
        name, (A, B) = _of_table(host, table, strength)
        rank = max(rank, len(A))
        tensors |= {f"{name}.lora_embedding_A": _padded(A, rank, 0), f"{name}.lora_embedding_B": _padded(B, rank, 1)}
        targets.append(name)
    biased = any(bool(one.more.any()) for one in linear)
    if biased and table is not None:
        raise ValueError(
            "PEFT's lora_bias is not for embeddings: write the trails at the embedding to an adapter of their own"
        )
    for one in linear:
        if one.full:
            raise ValueError(
                f"{one.name}: RED changes every dimension by itself, which is of full rank: use merge instead"
            )
        up = torch.cat(one.up, 1) if one.up else one.A.new_zeros(len(one.A), 0)
        down = torch.cat(one.down) if one.down else one.A.new_zeros(0, one.A.shape[1])
        tensors |= {
            f"{one.name}.lora_A.weight": _padded(down, rank, 0),
            f"{one.name}.lora_B.weight": _padded(up, rank, 1),
        }
        if biased:
            tensors[f"{one.name}.lora_B.bias"] = one.more
        targets.append(one.name)
    _write(folder, host, tensors, targets, rank, biased)


def _of_table(host: Host, table: Table, strength: float) -> tuple[str, tuple[Tensor, Tensor]]:
    """lora_embedding_A = M E^T + k 1^T (r x V) and lora_embedding_B = f B (d x r)."""
    inner: Any = host.inner
    module = inner.get_input_embeddings()
    if abs(scale_of_table(host, module.weight) - 1) > 1e-3:
        raise ValueError(
            f"stream 'embedding': {type(inner).__name__} scales its table, and PEFT's LoRA would not: use merge"
        )
    name = next(name for name, found in host.model.named_modules() if found is module)
    E = module.weight.double()
    below: list[Tensor] = []
    above: list[Tensor] = []
    for trail, ids in table.trails:
        told = affine(trail)
        if told is None or told.full:
            raise ValueError(f"stream 'embedding': {type(trail).__name__} is of no low rank there: use merge instead")
        chosen = (
            torch.ones(len(E), dtype=E.dtype) if ids is None else torch.isin(torch.arange(len(E)), torch.tensor(ids))
        )
        below.append((told.M @ E.mT + told.k[:, None]) * chosen)
        above.append(strength * told.B)
    return name, (torch.cat(below), torch.cat(above, 1))


def _padded(part: Tensor, rank: int, side: int) -> Tensor:
    """With zeros up to one rank for all, so that alpha / r is 1 everywhere."""
    missing = list(part.shape)
    missing[side] = rank - part.shape[side]
    return torch.cat([part, part.new_zeros(missing)], side)


def _write(folder: Path, host: Host, tensors: dict[str, Tensor], targets: list[str], rank: int, biased: bool) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    name = getattr(getattr(host.inner, "config", None), "_name_or_path", "") or None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        lora_bias=biased,
        target_modules="|".join(map(re.escape, targets)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=None if name is None or Path(name).exists() else name,  # no path of this machine
        inference_mode=True,
    )
    with whole(folder) as beside:
        beside.mkdir(exist_ok=True)
        config.save_pretrained(str(beside))
        told = {f"base_model.model.{key}": part.float().contiguous().cpu() for key, part in tensors.items()}
        save_file(told, beside / "adapter_model.safetensors", metadata={"format": "pt"})
