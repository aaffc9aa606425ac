"""A gate before an adapter: one decision a request, read off the frozen model's states of its prompt.

    z      = the states that are read, each divided by its root mean square, one after another
    opens  = all(W z + b > 0)

`fit_gate` of `limits` makes one. `attach` asks it, before anything is moved (`attachment/deciding.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.checking import as_whole, quoted
from tokenpaths.files import TrailFileError

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, order=True)
class Reading:
    """What a gate reads of a prompt: the states after a block, of its last token or the mean of all but the first.

    The state of the first token is far larger than all others in most models.
    """

    layer: int
    pooling: Pooling

    def of(
        self, states: Float[Tensor, "batch seq dim"], prompt: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch dim"]:
        """The state that is read of each row, in float32."""
        if self.pooling == "last":
            at = (prompt * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1)
            return states[torch.arange(len(states), device=states.device), at].float()
        first = prompt & (prompt.cumsum(1) == 1)
        rest = prompt & ~first
        read = torch.where(rest.any(1, keepdim=True), rest, prompt)
        total = torch.where(read.unsqueeze(-1), states, 0).sum(1, dtype=torch.float32)
        return total / read.sum(1, keepdim=True)


class Gate(nn.Module):
    """Opens an adapter for a request, or leaves the request to the frozen model.

    Args:
        readings: what is read.
        dim: the width of the states.
        scores: how many scores there are, all of which must be above 0.
    """

    weight: Float[Tensor, "scores features"]
    bias: Float[Tensor, " scores"]

    def __init__(self, readings: Sequence[Reading], dim: int, scores: int = 1) -> None:
        super().__init__()
        self.readings = tuple(readings)
        self.dim = dim
        self.register_buffer("weight", torch.zeros(scores, dim * len(self.readings)))
        self.register_buffer("bias", torch.zeros(scores))

    def __repr__(self) -> str:
        read = ", ".join(f"{one.pooling}@{one.layer}" for one in self.readings)
        return f"Gate({read}; {len(self.bias)} scores)"

    def scores(self, read: Mapping[Reading, Float[Tensor, "batch dim"]]) -> Float[Tensor, "batch scores"]:
        """The scores of requests, of which all must be above 0."""
        states = [read[one].to(self.weight.device, torch.float32) for one in self.readings]
        unit = [state * state.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for state in states]
        return torch.cat(unit, -1) @ self.weight.mT + self.bias

    def opens(self, read: Mapping[Reading, Float[Tensor, "batch dim"]]) -> Bool[Tensor, " batch"]:
        """Whether each request is one that the adapter is for."""
        return (self.scores(read) > 0).all(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Moved with the trails to a device, but never cast: decisions near the threshold would change."""
        kept = self.weight, self.bias
        super()._apply(fn, recurse)
        for name, before in zip(("weight", "bias"), kept, strict=True):
            setattr(self, name, before.to(getattr(self, name).device))
        return self

    def note(self) -> dict[str, Any]:
        """What a file tells of it, beside its numbers."""
        return {
            "readings": [[one.layer, one.pooling] for one in self.readings],
            "dim": self.dim,
            "scores": len(self.bias),
        }

    @classmethod
    def from_note(cls, note: Any) -> Gate:
        """A gate of this note, with numbers of zero. Raises `TrailFileError`."""
        try:
            readings = [Reading(as_whole("layer", layer, 0), _pooling(pooling)) for layer, pooling in note["readings"]]
            dim, scores = as_whole("dim", note["dim"]), as_whole("scores", note["scores"])
            if not 0 < len(readings) <= 64 or max(dim, 1024 * scores) > 1 << 20 or len(note) > 3:
                raise ValueError("it asks for more than a gate has")
            return cls(readings, dim, scores)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TrailFileError(f"the note of its gate is {quoted(note)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. With trails it is saved in theirs, as `trails.gate`.

        Raises `OSError` where it cannot be written.
        """
        files.write(path, self.state_dict(), {"gate": self.note()})

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


def _pooling(value: Any) -> Pooling:
    if value not in get_args(Pooling):
        raise ValueError(f"{quoted(value)} is no pooling: {', '.join(get_args(Pooling))}")
    return value
