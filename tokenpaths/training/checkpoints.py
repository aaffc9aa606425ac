"""A training run on disk, to continue as if it had never stopped: safetensors and JSON, nothing pickled.

    folder/step-00000200/trails.safetensors      the trails, for TrailMap.from_pretrained (of PEFT: a folder, `adapter`)
                         optimizer.safetensors   its state, as "number of the parameter.name of the entry"
                         run.json                the step, the goals' weights, the settings, and the entries of the
                                                 optimizer's state that are not tensors

Each checkpoint is written whole or not at all.
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
        folder: where they are, a folder for each.
        settings: what the run is made of, as JSON. A checkpoint of other settings is not continued.
        every: the number of steps between two of them. One is written at the end too, and only that if it is None.
        resume: continue from the newest checkpoint.

    Raises:
        FileNotFoundError: there is nothing to resume from.
        ValueError: there is a checkpoint that would be overwritten, or one that other settings have made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int | None, resume: bool) -> None:
        self.folder, self.settings, self.every = folder, settings, every
        done = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        self.newest = max(done, default=None, key=lambda path: path.name)
        if self.newest is not None and not resume:
            raise ValueError(
                f"{self.newest} is of an earlier run: pass resume=True to continue it, or choose another folder"
            )
        if self.newest is None and resume:
            raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")
        if self.newest is not None:
            then = json.loads((self.newest / _RUN).read_text())["settings"]
            if different := differences(then, json.loads(json.dumps(settings))):
                raise ValueError(f"{self.newest} is of another run, and resuming would not continue it: {different}")

    @torch.no_grad()
    def restore(self, trails: Adapter, optimizer: Optimizer, weights: list[float], rates: list[float]) -> int:
        """Give the trails, the optimizer, the goals' weights and the rates the state of the newest checkpoint.

        Returns the number of steps that were taken before it; 0 if there is none.
        """
        if self.newest is None:
            return 0
        trails.restore(self.newest / trails.saved_as)
        run = json.loads((self.newest / _RUN).read_text())
        weights[:], rates[:] = run["weights"], run["rates"]
        state: dict[int, dict[str, Any]] = {}
        entries = {**safetensors.torch.load_file(self.newest / _OPTIMIZER), **run["optimizer"]}
        for key, value in entries.items():
            place, name = key.split(".", 1)
            state.setdefault(int(place), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(run["step"])

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is written after step `step`, counted from 1."""
        return last or (self.every is not None and step % self.every == 0)

    def write(
        self,
        step: int,
        trails: Adapter,
        model: nn.Module,
        optimizer: Optimizer,
        weights: Sequence[float],
        rates: Sequence[float],
    ) -> None:
        """Save the run as it is after step `step`.

        Raises:
            TypeError: the optimizer's state holds more than tensors and plain values.
        """
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for place, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{place}.{name}"] = value.detach().cpu().contiguous()
                elif value is None or isinstance(value, (bool, int, float, str)):
                    plain[f"{place}.{name}"] = value
                else:
                    kind = f"its {name!r} is a {type(value).__name__}"
                    raise TypeError(f"the state of {type(optimizer).__name__} cannot be saved without pickle: {kind}")
        run: dict[str, Any] = {"step": step, "weights": list(weights), "rates": list(rates), "optimizer": plain}
        run["settings"] = self.settings
        with files.whole(self.folder / f"step-{step:08d}") as beside:
            trails.save(beside / trails.saved_as, model)
            safetensors.torch.save_file(tensors, beside / _OPTIMIZER)
            (beside / _RUN).write_text(json.dumps(run, indent=1))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, by name, with both values; empty if none does."""
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{name} was {then.get(name)!r:.300}, is {now.get(name)!r:.300}" for name in different)
