"""A training run on disk, to continue as if it had never stopped: safetensors and JSON, nothing pickled.

    folder/step-00000200/trails.safetensors      the trails, for TrailMap.from_pretrained (of PEFT: a folder, `adapter`)
                         optimizer.safetensors   its state, as "number of the parameter.name of the entry"
                         run.json                the step, the goals' weights, the settings, the entries of the
                                                 optimizer's state that are not tensors, and a checksum of each file

Each checkpoint is written whole or not at all. What does not hold its checksums is not continued: the newest checkpoint
before it is, with a warning. The run is then the same, since it takes the later steps again.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.files import TrailFileError
from tokenpaths.trailmap.adapter import Adapter

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OPTIMIZER, _RUN = "optimizer.safetensors", "run.json"
_RUN_KEYS = {"step", "weights", "rates", "optimizer", "settings", "files"}
_BESIDE = 1 << 16  # bytes of a checkpoint beside the trails and the optimizer's state


class Checkpoints:
    """The checkpoints of one run, in its folder.

    Args:
        folder: where they are, a folder for each.
        settings: what the run is made of, as JSON. A checkpoint of other settings is not continued.
        every: the number of steps between two of them. One is written at the end too, and only that if it is None.
        resume: continue from the newest checkpoint that is whole.

    Raises:
        FileNotFoundError: there is nothing to resume from.
        ValueError: there is a checkpoint that would be overwritten, or one that other settings have made.
        TrailFileError: there are checkpoints, and none is whole and sound.
        OSError: the folder cannot be written, or is full.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int | None, resume: bool) -> None:
        self.folder, self.every = folder, every
        self.settings: dict[str, Any] = json.loads(json.dumps(settings), parse_constant=str)  # a limit may be infinite
        files.sweep(folder)
        there = _steps_in(folder)
        if there and not resume:
            raise ValueError(
                f"{there[0]} is of an earlier run: pass resume=True to continue it, or choose another folder"
            )
        if resume and not there:
            raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")
        self.newest, self._run = _newest(there) if there else (None, dict[str, Any]())
        if self.newest is not None and (different := differences(self._run["settings"], self.settings)):
            raise ValueError(f"{self.newest} is of another run, and resuming would not continue it: {different}")
        self._check_room(_BESIDE)

    @torch.no_grad()
    def restore(self, trails: Adapter, optimizer: Optimizer, weights: list[float], rates: list[float]) -> int:
        """Give the trails, the optimizer, the goals' weights and the rates the state of the newest checkpoint.

        Returns the number of steps that were taken before it; 0 if there is none.

        Raises:
            TrailFileError: the checkpoint is of another adapter or optimizer.
            OSError: the folder has no room for a checkpoint of this run.
        """
        self._check_room(_BESIDE + 3 * sum(p.numel() * p.element_size() for p in trails.parameters()))
        if self.newest is None:
            return 0
        trails.restore(self.newest / trails.saved_as)
        tensors, _ = files.read(self.newest / _OPTIMIZER)
        state: dict[int, dict[str, Any]] = {}
        try:
            for key, value in {**tensors, **self._run["optimizer"]}.items():
                place, name = key.split(".", 1)
                state.setdefault(int(place), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            weights[:] = [float(weight) for weight in self._run["weights"]]
            rates[:] = [float(rate) for rate in self._run["rates"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrailFileError(f"{self.newest} does not fit this optimizer ({error})") from error
        return int(self._run["step"])

    def _check_room(self, size: int) -> None:
        """Raise `OSError` unless so many bytes can be written, where there is more of the run to come."""
        if self._run.get("step", 0) != self.settings.get("steps"):
            files.check_room(self.folder, size)

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
            files.write(beside / _OPTIMIZER, tensors, {})
            files.write_json(beside / _RUN, {**run, "files": files.digests(beside)}, indent=1)


def _steps_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first. A folder of another name, or an empty one, is none."""
    named = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name) and path.is_dir()]
    return sorted((path for path in named if any(path.iterdir())), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest(there: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, with what its `run.json` says. A warning names those that are not."""
    faults: list[str] = []
    for path in there:
        try:
            run = _run_in(path)
        except (TrailFileError, OSError) as error:
            faults.append(f"{path.name} cannot be continued: {error}")
            continue
        if faults:
            told = f"the run goes on from {path.name}, and takes the later steps again"
            warnings.warn(f"{'; '.join(faults)}; {told}", stacklevel=4)
        return path, run
    raise TrailFileError(f"no checkpoint in {there[0].parent} is whole: {'; '.join(faults)}")


def _run_in(path: Path) -> dict[str, Any]:
    """What the `run.json` of a checkpoint says, once all files of it have been checked. Raises `TrailFileError`."""
    run = files.read_json(path / _RUN)
    if "files" not in run and set(run) <= _RUN_KEYS:
        raise TrailFileError(
            f"{path} is of an earlier version, and has no checksums: go on with that version, or load its trails and "
            "begin a new run"
        )
    kinds = {"step": int, "weights": list, "rates": list, "optimizer": dict, "settings": dict, "files": dict}
    if set(run) != _RUN_KEYS or not all(isinstance(run[key], kind) for key, kind in kinds.items()):
        raise TrailFileError(f"{path / _RUN} is not as a run writes it: its keys are {', '.join(sorted(run)):.200}")
    if run["step"] != _number(path) or _OPTIMIZER not in run["files"]:
        raise TrailFileError(f"{path / _RUN} is of another step or lacks a file: it says {run['step']}")
    files.check_folder(path, run["files"])
    return run


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, by name, with both values; empty if none does."""
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{name} was {then.get(name)!r:.300}, is {now.get(name)!r:.300}" for name in different)
