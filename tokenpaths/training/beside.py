"""What learns beside the trails: a new head, named by its user, saved in a file of its own and loaded again.

with trainable(model, trails, also=model.score):
    Trainer(model, ...).train()
load_also("runs/a/checkpoint-500", model)                               # into the head of a model loaded anew
trails = TrailMap.from_pretrained("runs/a/checkpoint-500", model=model)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.files import TrailFileError
from tokenpaths.trailmap.trailmap import TrailMap

FILE_NAME = "also.safetensors"
Also: TypeAlias = "nn.Module | nn.Parameter | Sequence[nn.Module | nn.Parameter] | None"


class Beside:
    """The parameters that learn beside the trails, by their names in the model, and the buffers of their modules.

    Raises:
        TypeError: `also` is no module, parameter or list of these.
        ValueError: a part of it is not of the model, has no parameters, cannot learn, or is a trail.
    """

    def __init__(self, model: nn.Module, trails: TrailMap, also: Also) -> None:
        parts = list(also) if isinstance(also, Sequence) else [] if also is None else [also]
        names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
        own = {id(parameter) for parameter in trails.parameters()}
        self.parameters: list[nn.Parameter] = []
        self.tensors: dict[str, Tensor] = {}
        for part in parts:
            if not isinstance(part, (nn.Module, nn.Parameter)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"also= takes a module or a parameter of the model, or a list of these, not {type(part).__name__}"
                )
            named = {"": part} if isinstance(part, nn.Parameter) else dict(part.state_dict(keep_vars=True))
            learning = [tensor for tensor in named.values() if isinstance(tensor, nn.Parameter)]
            what = f"also={type(part).__name__}"
            if not learning:
                raise ValueError(f"{what} has no parameters, so nothing of it is trained")
            if any(id(parameter) in own for parameter in learning):
                raise ValueError(f"{what} holds parameters of the trails, which are trained as they are")
            if any(id(tensor) not in names for tensor in named.values()):
                raise ValueError(
                    f"{what} is no part of this {type(model).__name__}: name one, such as also=model.score"
                )
            if odd := [p for p in learning if not p.is_floating_point()]:
                raise ValueError(f"{what} has weights of {odd[0].dtype} (quantised?), which cannot learn")
            self.parameters += learning
            self.tensors |= {names[id(tensor)]: tensor for tensor in named.values()}

    def strangers(self, model: nn.Module, trails: TrailMap) -> list[str]:
        """The names of parameters that ask for a gradient, though nobody has named them."""
        known = {id(p) for p in (*trails.parameters(), *self.parameters)}
        return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]

    def save(self, folder: Path) -> None:
        """Write what learns beside the trails, if anything. Raises `ValueError` for a number that is not finite."""
        if not self.tensors:
            return
        for name, tensor in self.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"not saved: {name} holds NaN or infinity")
        files.write(folder / FILE_NAME, self.tensors, {"also": sorted(self.tensors)})


@torch.no_grad()
def load_also(folder: str | os.PathLike[str], model: nn.Module) -> list[str]:
    """Copy what was trained beside trails, as `trainable(model, trails, also=...)` saved it, into a model.

    Load it before the trails: their file knows the model that they were trained in, this part included.

    Args:
        folder: a checkpoint, or what `save_pretrained` wrote.
        model: a model of the same classes. Nothing is changed if it does not fit.

    Returns the names of what was loaded.

    Raises:
        FileNotFoundError: nothing was saved there beside trails.
        TrailFileError: the file is not whole and sound.
        ValueError: the model lacks one of the tensors, or has it in another shape.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: nothing was trained beside the trails there (also=...)")
    tensors, note = files.read(path)
    if note.get("also") != sorted(tensors):
        raise TrailFileError(f"{path} is not a file of what trainable(..., also=...) trains")
    mine = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise TrailFileError(f"{path}: {name} holds NaN or infinity")
        if name not in mine or mine[name].shape != tensor.shape:
            have = f"has it of shape {list(mine[name].shape)}" if name in mine else "does not have it"
            raise ValueError(f"{path} holds {name} of shape {list(tensor.shape)}; this {type(model).__name__} {have}")
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)
    return sorted(tensors)
