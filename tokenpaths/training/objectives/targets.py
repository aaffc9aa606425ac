"""Where states should be: targets kept in memory, or in a safetensors file from which they are read as they are needed.

A file holds, for n examples and each of its sites,

    keys          [n]                 a hash of the token ids of each example
    lengths       [n]                 its number of tokens
    counts        [n x sites]         how many of them were captured at each site
    positions s   [sum of counts]     which ones, for site s, one example after another
    values s      [...]               their targets: count x width numbers an example for states, count x heads x tokens
                                      for attention rows

and a JSON note: the kind, the sites, the widths (or numbers of heads), and the model that they were captured from.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.files import TrailFileError
from tokenpaths.site import Site
from tokenpaths.site.fingerprint import describe
from tokenpaths.trailmap import notes

Kind: TypeAlias = Literal["states", "attention"]
Stored: TypeAlias = Callable[[str, int, int], Tensor]  # entries start to stop of the tensor of a name


class Targets:
    """What was captured: for each example and site, the positions of tokens and where their states should be.

    `sites`, `kind` ("states" or "attention") and `base` (name and fingerprint of the frozen model) say what they are.
    """

    def __init__(self, note: dict[str, Any], stored: Stored) -> None:
        self.kind: Kind = note["kind"]
        self.sites = tuple(notes.site_from_note(site) for site in note["sites"])
        self.widths: tuple[int, ...] = tuple(note["widths"])
        self.base: dict[str, str] = note["base"]
        n = int(note["examples"])
        self._stored = stored
        self._number = {key: number for number, key in enumerate(stored("keys", 0, n).tolist())}
        self._counts = stored("counts", 0, n * len(self.sites)).view(n, -1)
        self._sizes = _sizes(self.kind, self.widths, self._counts, stored("lengths", 0, n))
        self._first, self._start = _starts(self._counts), _starts(self._sizes)

    def __contains__(self, ids: object) -> bool:
        return isinstance(ids, tuple) and _key(cast("tuple[int, ...]", ids)) in self._number

    def __len__(self) -> int:
        return len(self._number)

    def __repr__(self) -> str:
        return f"<targets: {self.kind} at {len(self.sites)} sites of {len(self)} examples, {self.base['name']}>"

    def of(self, ids: tuple[int, ...], site: int) -> tuple[Int[Tensor, " n"], Float[Tensor, "n ..."]]:
        """Positions, counted in the tokens of an example, and targets, for the site of a number.

        The targets are states [n, dim], or attention rows [n, heads, tokens].
        """
        number = self._number[_key(ids)]
        first, start = int(self._first[number, site]), int(self._start[number, site])
        count, size = int(self._counts[number, site]), int(self._sizes[number, site])
        shape = (count, self.widths[site], *((len(ids),) if self.kind == "attention" else ()))
        positions = self._stored(f"positions {site}", first, first + count)
        return positions, self._stored(f"values {site}", start, start + size).view(shape)

    def count(self, ids: tuple[int, ...]) -> int:
        """How many tokens of an example were captured, of all sites together."""
        return int(self._counts[self._number[_key(ids)]].sum())

    def check(self, model: nn.Module) -> None:
        """Warn if the targets were captured from other weights than the model's."""
        here = describe(model)
        if here["fingerprint"] != self.base["fingerprint"]:
            warnings.warn(
                f"the targets were captured from {self.base['name']} (weights {self.base['fingerprint']}), but the "
                f"model is {here['name']} (weights {here['fingerprint']}): capture them again from this one",
                stacklevel=2,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Targets:
        """Open a file that was captured. Values are read from it, memory-mapped, when they are asked for.

        Raises:
            FileNotFoundError: there is no such file.
            TrailFileError: it is not a whole and sound file of targets.
        """
        from safetensors import safe_open

        name = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{name} does not exist")
        try:
            file: Any = safe_open(name, framework="pt")
            note = json.loads(file.metadata()["tokenpaths"])
            if note["version"] != files.VERSION:
                raise ValueError(f"its note is of version {note['version']}")
            loaded = cls(note["waypoints"], lambda tensor, start, stop: file.get_slice(tensor)[start:stop])
            if {key: file.get_slice(key).get_shape() for key in list(file.keys())} != loaded._shapes():
                raise ValueError("its tensors are not those that its note calls for")
        except Exception as error:  # a damaged file may fail in any way
            raise TrailFileError(f"{name} is no whole file of targets ({error}): capture them again") from error
        return loaded

    def _shapes(self) -> dict[str, list[int]]:
        """The tensors that there must be."""
        n = len(self)
        shapes = {"keys": [n], "lengths": [n], "counts": [n * len(self.sites)]}
        for site in range(len(self.sites)):
            shapes[f"positions {site}"] = [int(self._counts[:, site].sum())]
            shapes[f"values {site}"] = [int(self._sizes[:, site].sum())]
        return shapes


def store(
    path: str | os.PathLike[str] | None,
    kind: Kind,
    sites: Sequence[Site],
    base: dict[str, str],
    ids: Sequence[tuple[int, ...]],
    positions: Sequence[Sequence[Tensor]],
    values: Iterable[tuple[int, list[Tensor]]],
) -> Targets:
    """Keep targets as they come, in memory or in a file that is written whole or not at all.

    `positions` are by example and site; `values` come in any order of examples: the number of one, and its targets at
    each site.
    """
    counts = torch.tensor([[len(part) for part in row] for row in positions])
    index = {
        "keys": torch.tensor([_key(one) for one in ids]),
        "lengths": torch.tensor([len(one) for one in ids]),
        "counts": counts.flatten(),
        **{f"positions {site}": torch.cat([row[site] for row in positions]) for site in range(len(sites))},
    }
    kept: _Memory | _File | None = None
    starts = torch.empty(0)
    try:
        for number, parts in values:
            if kept is None:  # the widths and dtypes of what there is to keep are known now
                widths = [part.shape[1] for part in parts]
                sizes = _sizes(kind, widths, counts, index["lengths"])
                starts = _starts(sizes)
                totals = {f"values {s}": (int(sizes[:, s].sum()), part.dtype) for s, part in enumerate(parts)}
                places = [notes.site_to_note(site) for site in sites]
                note = {"kind": kind, "sites": places, "widths": widths, "examples": len(ids), "base": base}
                kept = _Memory(note, index, totals) if path is None else _File(Path(path), note, index, totals)
            for site, part in enumerate(parts):
                kept.put(f"values {site}", int(starts[number, site]), part.flatten().cpu())
        assert kept is not None
        return kept.finish()
    except BaseException as error:
        if isinstance(kept, _File):
            kept.discard(error)
        raise


class _Memory:
    """Targets kept in memory."""

    def __init__(
        self, note: dict[str, Any], index: dict[str, Tensor], totals: dict[str, tuple[int, torch.dtype]]
    ) -> None:
        self.note = note
        self.tensors = {**index, **{name: torch.empty(n, dtype=dtype) for name, (n, dtype) in totals.items()}}

    def put(self, name: str, start: int, values: Tensor) -> None:
        self.tensors[name][start : start + len(values)] = values

    def finish(self) -> Targets:
        tensors = self.tensors
        return Targets(self.note, lambda name, start, stop: tensors[name][start:stop])


class _File:
    """Targets written to a safetensors file in the order they come: its header says where each belongs."""

    def __init__(
        self, path: Path, note: dict[str, Any], index: dict[str, Tensor], totals: dict[str, tuple[int, torch.dtype]]
    ) -> None:
        metadata = {"tokenpaths": json.dumps({"version": files.VERSION, "waypoints": note})}
        header: dict[str, Any] = {"__metadata__": metadata}
        entries = {**{name: (len(tensor), tensor.dtype) for name, tensor in index.items()}, **totals}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in sorted(entries, key=lambda name: -entries[name][1].itemsize):  # so that each is aligned
            count, dtype = entries[name]
            self.offsets[name], start, end = end, end, end + count * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": [count], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.body = 8 + len(text)
        self.path = path
        self.writing = ExitStack()
        self.file = self.writing.enter_context(files.whole(path)).open("xb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.body + end)
        for name, tensor in index.items():
            self.put(name, 0, tensor)

    def put(self, name: str, start: int, values: Tensor) -> None:
        self.file.seek(self.body + self.offsets[name] + start * values.dtype.itemsize)
        self.file.write(values.contiguous().view(torch.uint8).numpy().tobytes())

    def finish(self) -> Targets:
        self.file.close()
        self.writing.close()
        return Targets.load(self.path)

    def discard(self, error: BaseException) -> None:
        self.file.close()
        self.writing.__exit__(type(error), error, error.__traceback__)


_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def _sizes(
    kind: Kind,
    widths: Sequence[int],
    counts: Int[Tensor, "examples sites"],
    lengths: Int[Tensor, " examples"],
) -> Int[Tensor, "examples sites"]:
    """How many numbers the targets of each example and site are."""
    sizes = counts * torch.tensor(widths)
    return sizes * lengths[:, None] if kind == "attention" else sizes


def _starts(sizes: Int[Tensor, "examples sites"]) -> Int[Tensor, "examples sites"]:
    """Where each begins when they are stored one after another."""
    return sizes.cumsum(0) - sizes


def _key(ids: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:7], "big")
