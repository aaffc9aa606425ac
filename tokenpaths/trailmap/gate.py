"""A gate before an adapter: one decision a request, read off the frozen model's states.

    z      = the states of the last token of prompt + probe, for each probe and layer, each over its root mean square
    opens  = w . z + b > 0

A probe is a few tokens, such as "Task:", that are put behind every prompt for this reading alone. Prompts end in
anything, and the state of their last token tells of that more than of what is asked; behind one probe they all end
alike, and the model is about to name what is asked. (Jiang et al. 2023, arXiv 2307.16645, read sentence embeddings so.)

`fit_gate` of `limits` makes a gate. `attach` asks it, before anything is moved (`attachment/deciding.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.checking import as_whole, quoted
from tokenpaths.files import TrailFileError

FILE_NAME = "gate.safetensors"
"""Its name in the folder of an adapter that is saved in one."""
_MOST = 1 << 24  # of a number in a note: a damaged one may ask for any size


class Gate(nn.Module):
    """Opens an adapter for a request, or leaves the request to the frozen model.

    Args:
        layers: behind which blocks the states are read, from the lowest.
        probes: the token ids of each probe. Each is read by itself behind the prompt.
        dim: the width of the states.
    """

    weight: Float[Tensor, " features"]
    bias: Float[Tensor, ""]

    def __init__(self, layers: Sequence[int], probes: Sequence[Sequence[int]], dim: int) -> None:
        super().__init__()
        self.layers = tuple(as_whole("Gate: layer", layer, 0) for layer in layers)
        self.probes = tuple(tuple(as_whole("Gate: token of a probe", t, 0) for t in probe) for probe in probes)
        self.dim = as_whole("Gate: dim", dim)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"Gate: it reads at least one layer, from the lowest, not layers={self.layers}")
        if not self.probes or not all(self.probes) or len(set(self.probes)) < len(self.probes):
            raise ValueError(f"Gate: it reads behind at least one probe, each of some tokens, not probes={self.probes}")
        self.register_buffer("weight", torch.zeros(len(self.probes) * len(self.layers) * self.dim))
        self.register_buffer("bias", torch.zeros(()))

    def __repr__(self) -> str:
        return f"Gate(layers={self.layers}, probes={self.probes}, dim={self.dim})"

    @staticmethod
    def features(states: Sequence[Float[Tensor, "batch dim"]]) -> Float[Tensor, "batch features"]:
        """What is scored of the states behind each probe at each layer: z, in float32, probe after probe."""
        wide = [state.float() for state in states]
        return torch.cat([s * s.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for s in wide], -1)

    def scores(self, states: Sequence[Float[Tensor, "batch dim"]]) -> Float[Tensor, " batch"]:
        """The score of each request, from its states behind each probe at each layer."""
        return self.features(states).to(self.weight.device) @ self.weight + self.bias

    def opens(self, states: Sequence[Float[Tensor, "batch dim"]]) -> Bool[Tensor, " batch"]:
        """Whether each request is one that the adapter is for."""
        return self.scores(states) > 0

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Moved with the trails to a device, but never cast: decisions near the threshold would change."""
        kept = self.weight, self.bias
        super()._apply(fn, recurse)
        for name, before in zip(("weight", "bias"), kept, strict=True):
            setattr(self, name, before.to(getattr(self, name).device))
        return self

    def note(self) -> dict[str, Any]:
        """What a file tells of it, beside its numbers."""
        return {"layers": list(self.layers), "probes": [list(probe) for probe in self.probes], "dim": self.dim}

    @classmethod
    def from_note(cls, note: Any) -> Gate:
        """A gate of this note, with numbers of zero. Raises `TrailFileError`."""
        try:
            if set(note) != {"layers", "probes", "dim"}:
                raise ValueError("it has other entries than a gate's")
            size = as_whole("dim", note["dim"]) * len(note["layers"]) * len(note["probes"])
            if max(size, *note["layers"], *map(max, note["probes"]), *map(len, note["probes"])) > _MOST:
                raise ValueError("it asks for more than a gate has")
            return cls(note["layers"], note["probes"], note["dim"])
        except (TypeError, ValueError, KeyError) as error:
            raise TrailFileError(f"the note of its gate is {quoted(note)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. With trails it is saved in theirs, as `trails.gate`.

        Raises `OSError` where it cannot be written.
        """
        files.write(path, self.state_dict(), {"gate": self.note()})

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> Gate | None:
        """The gate that lies in an adapter's folder; None if there is none. Raises `TrailFileError`."""
        path = Path(folder, FILE_NAME)
        return cls.load(path) if path.exists() else None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gate:
        """Read a file that `save` wrote.

        Raises `FileNotFoundError`, `IsADirectoryError`, and `TrailFileError` for what is no whole and sound file of a
        gate.
        """
        tensors, note = files.read(path)
        try:
            gate = cls.from_note(note.get("gate"))
            gate.fill(tensors)
        except TrailFileError as error:
            raise TrailFileError(f"{os.fspath(path)}: {error}") from None
        return gate

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over numbers. Raises `TrailFileError` for others than a gate's."""
        due = self.state_dict()
        for name in {**due, **tensors}:
            told = tensors.get(name)
            fits = told is not None and name in due and (told.shape, told.dtype) == (due[name].shape, due[name].dtype)
            if told is None or not fits or not bool(told.isfinite().all()):
                raise TrailFileError(f"the gate's tensor {name!r} is missing, of another shape, or not finite")
        self.load_state_dict(dict(tensors))
