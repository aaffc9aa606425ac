"""Where states should be: targets in memory, or in a safetensors file from which they are read as they are needed.

A file holds, for n examples and each of its sites,

    keys          [n]                 a hash of the token ids of each example
    lengths       [n]                 its number of tokens
    counts        [n x sites]         how many of them were captured at each site
    positions s   [sum of counts]     which ones, for site s, one example after another
    values s      [...]               their targets: count x width numbers an example for states, count x heads x tokens
                                      for attention rows

and a JSON note: the kind, the sites, the widths (or numbers of heads), and the model that they were captured from. Each
number is checked against the file's checksums before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.files import TensorFile, TrailFileError
from tokenpaths.files.tensors import Put
from tokenpaths.site import Site
from tokenpaths.site.fingerprint import describe
from tokenpaths.site.identity import exact_key
from tokenpaths.trailmap import notes

Kind: TypeAlias = Literal["states", "attention"]
Stored: TypeAlias = Callable[[str, int, int], Tensor]  # entries start to stop of the tensor of a name


class Targets:
    """What was captured: for each example and site, the positions of tokens, and where their states should be.

    They come from `capture_states` and `capture_attention`, which write the file that `load` opens. `kind` is "states"
    or "attention", `sites` are the places, `base` is the name, the fingerprint and the exact key of the frozen model,
    `checksum` is of all the numbers.
    """

    def __init__(self, note: dict[str, Any], stored: Stored, checksum: str) -> None:
        self.checksum = checksum
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
        told = f"<targets: {self.kind} at {len(self.sites)} sites of {len(self)} examples, {self.base['name']}>"
        return files.printable(told)

    def of(self, ids: tuple[int, ...], site: int) -> tuple[Int[Tensor, " n"], Float[Tensor, "n ..."]]:
        """The positions of captured tokens in an example, and their targets, at `sites[site]`.

        The targets are states [n, dim], or attention rows [n, heads, tokens].
        """
        number = self._number[_key(ids)]
        first, start = int(self._first[number, site]), int(self._start[number, site])
        count, size = int(self._counts[number, site]), int(self._sizes[number, site])
        shape = (count, self.widths[site], *((len(ids),) if self.kind == "attention" else ()))
        positions = self._stored(f"positions {site}", first, first + count)
        return positions, self._stored(f"values {site}", start, start + size).view(shape)

    def count(self, ids: tuple[int, ...]) -> int:
        """The number of captured tokens of an example, over all sites."""
        return int(self._counts[self._number[_key(ids)]].sum())

    def check(self, model: nn.Module) -> None:
        """Warn if the targets were captured from other weights than the model's."""
        here = describe(model)
        other = here["fingerprint"] != self.base["fingerprint"]
        if other or ("key" in self.base and self.base["key"] != exact_key(model)):  # files of 0.1 have none
            warnings.warn(
                files.printable(
                    f"the targets were captured from {self.base['name']} (weights {self.base['fingerprint']}), but the "
                    f"model is {here['name']} (weights {here['fingerprint']}): capture them again from this one"
                ),
                stacklevel=2,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Targets:
        """Open a file that was captured. Values are read from it, and checked, when they are asked for.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            TrailFileError: it is not a whole and sound file of targets, or of an earlier version without checksums. So
                does `of`, where numbers were changed.
        """
        name = os.fspath(path)
        try:
            file = TensorFile(path, "capture the targets again")
            if file.checksum is None:
                raise ValueError("it is of an earlier version, and has no checksums")
            loaded = cls(file.note["waypoints"], file.entries, file.checksum)
            if file.shapes != loaded._shapes():
                raise ValueError("its tensors are not those that its note calls for")
        except OSError:
            raise
        except Exception as error:  # a damaged file may fail in any way
            raise TrailFileError(f"{name} is no whole file of targets ({error}): capture them again") from error
        return loaded

    def _shapes(self) -> dict[str, list[int]]:
        """The names and shapes of the tensors that the file must have."""
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

    Args:
        path: the file; None for memory.
        kind: what the targets are.
        sites: where they are.
        base: the model that they were captured from.
        ids: the token ids of each example.
        positions: of the captured tokens, by example and site.
        values: the number of an example, and its targets at each site, with the examples in any order.
    """
    counts = torch.tensor([[len(part) for part in row] for row in positions])
    index = {
        "keys": torch.tensor([_key(one) for one in ids]),
        "lengths": torch.tensor([len(one) for one in ids]),
        "counts": counts.flatten(),
        **{f"positions {site}": torch.cat([row[site] for row in positions]) for site in range(len(sites))},
    }
    rest = iter(values)
    first = next(rest)  # it tells widths and dtypes
    widths = [part.shape[1] for part in first[1]]
    sizes = _sizes(kind, widths, counts, index["lengths"])
    starts = _starts(sizes)
    places = [notes.site_to_note(site) for site in sites]
    note = {"kind": kind, "sites": places, "widths": widths, "examples": len(ids), "base": base}
    entries = {name: (len(tensor), tensor.dtype) for name, tensor in index.items()}
    entries |= {f"values {s}": (int(sizes[:, s].sum()), part.dtype) for s, part in enumerate(first[1])}

    def fill(put: Put) -> None:
        for name, tensor in index.items():
            put(name, 0, tensor)
        for number, parts in itertools.chain([first], rest):
            for site, part in enumerate(parts):
                put(f"values {site}", int(starts[number, site]), part.flatten().cpu())

    if path is None:
        tensors = {name: torch.empty(count, dtype=dtype) for name, (count, dtype) in entries.items()}
        fill(lambda name, start, part: tensors[name][start : start + len(part)].copy_(part))
        digest = hashlib.sha256(repr(note).encode())
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.view(torch.uint8).numpy().data)
        return Targets(note, lambda name, start, stop: tensors[name][start:stop], digest.hexdigest())
    shaped = {name: ((count,), dtype) for name, (count, dtype) in entries.items()}
    with files.filling(path, shaped, {"waypoints": note}) as put:
        fill(put)
    return Targets.load(path)


def _sizes(
    kind: Kind,
    widths: Sequence[int],
    counts: Int[Tensor, "examples sites"],
    lengths: Int[Tensor, " examples"],
) -> Int[Tensor, "examples sites"]:
    """The number of entries of the targets of each example and site."""
    sizes = counts * torch.tensor(widths)
    return sizes * lengths[:, None] if kind == "attention" else sizes


def _starts(sizes: Int[Tensor, "examples sites"]) -> Int[Tensor, "examples sites"]:
    """Where the entries of each begin, when they are stored one after another."""
    return sizes.cumsum(0) - sizes


def _key(ids: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:7], "big")
