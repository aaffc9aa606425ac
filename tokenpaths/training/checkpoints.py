"""A training run on disk, to continue as if it had never stopped: safetensors and JSON, nothing pickled.

    folder/step-00000200/trails.safetensors      the trails, for TrailMap.from_pretrained (of PEFT: a folder, `adapter`)
                         optimizer.safetensors   its state, as "number of the parameter.name of the entry"
                         run.json                the step, the goals' weights, the settings, and the optimizer's entries
                                                that are no tensors

Each checkpoint is written whole beside its place and then renamed, so that one that is there is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.trailmap.adapter import Adapter

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OPTIMIZER, _RUN = "optimizer.safetensors", "run.json"


class Checkpoints:
    """The checkpoints of one run, in its folder.

    Args:
        folder: of the run.
        settings: what the run is made of. A checkpoint of other settings is not continued.
        every: write one every so many steps; at the end unless given.
        resume: continue from the newest checkpoint.

    Raises:
        FileNotFoundError: there is nothing to resume from.
        ValueError: there is a checkpoint that would be overwritten, or that other settings have made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int | None, resume: bool) -> None:
        self.folder, self.settings, self.every = folder, settings, every
        self.found = _newest(folder, settings, resume)

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is written after so many steps."""
        return last or (self.every is not None and step % self.every == 0)

    def restore(self, trails: Adapter, optimizer: Optimizer, weights: list[float]) -> int:
        """Give trails, optimizer and the goals' weights the state that they had. Returns the step; 0 at a beginning."""
        return 0 if self.found is None else read(self.found, trails, optimizer, weights)

    def write(
        self, step: int, trails: Adapter, model: nn.Module, optimizer: Optimizer, weights: Sequence[float]
    ) -> None:
        """Save the run after `step` steps. Raises `TypeError` for an optimizer state of more than tensors and numbers."""
        write(self.folder, step, trails, model, optimizer, weights, self.settings)


def _newest(folder: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    """The newest checkpoint in a folder, None where a run is to begin there."""
    done = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    newest = max(done, default=None, key=lambda path: path.name)
    if newest is None:
        if resume:
            raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")
        return None
    if not resume:
        raise ValueError(f"{newest} is of an earlier run: pass resume=True to continue it, or choose another folder")
    then = json.loads((newest / _RUN).read_text())["settings"]
    now = json.loads(json.dumps(settings))
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        named = "; ".join(f"{name} was {then.get(name)!r:.300}, is {now.get(name)!r:.300}" for name in different)
        raise ValueError(f"{newest} is of another run, and resuming would not continue it: {named}")
    return newest


def write(
    folder: Path,
    step: int,
    trails: Adapter,
    model: nn.Module,
    optimizer: Optimizer,
    weights: Sequence[float],
    settings: Mapping[str, Any],
) -> None:
    """Save a run after `step` steps. Raises `TypeError` for an optimizer state of more than tensors and numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for place, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{place}.{name}"] = value.detach().cpu().contiguous()
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers[f"{place}.{name}"] = value
            else:
                kind = f"{name!r} is a {type(value).__name__}"
                raise TypeError(f"the state of {type(optimizer).__name__} cannot be saved without pickle: its {kind}")
    with files.whole(folder / f"step-{step:08d}") as beside:
        trails.save(beside / trails.saved_as, model)
        safetensors.torch.save_file(tensors, beside / _OPTIMIZER)
        run = {"step": step, "weights": list(weights), "optimizer": numbers, "settings": settings}
        (beside / _RUN).write_text(json.dumps(run, indent=1))


@torch.no_grad()
def read(checkpoint: Path, trails: Adapter, optimizer: Optimizer, weights: list[float]) -> int:
    """Give trails, optimizer and the goals' weights the state they had; returns the step."""
    trails.restore(checkpoint / trails.saved_as)
    run = json.loads((checkpoint / _RUN).read_text())
    weights[:] = run["weights"]
    state: dict[int, dict[str, Any]] = {}
    entries = {**safetensors.torch.load_file(checkpoint / _OPTIMIZER), **run["optimizer"]}
    for key, value in entries.items():
        place, name = key.split(".", 1)
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(run["step"])
