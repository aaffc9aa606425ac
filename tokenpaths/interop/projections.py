"""The linear maps of a model that trails can be written into, and the reasons why others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.handle import attached
from tokenpaths.interop.affine import Affine, affine
from tokenpaths.site import Host, Place, Site
from tokenpaths.site.host import two_sided
from tokenpaths.tokens import All, Tokens
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail


@dataclass(eq=False)
class Projection:
    """A linear map y = A x + c with what trails add to it, in float64: A + up @ down, c + more.

    Args:
        name: its name in the model.
        module: an `nn.Linear`, or a `Conv1D` of transformers, whose weight is transposed.
    """

    name: str
    module: nn.Module
    up: list[Tensor] = field(default_factory=list[Tensor])  # out x r
    down: list[Tensor] = field(default_factory=list[Tensor])  # r x in
    full: bool = False

    def __post_init__(self) -> None:
        self.A = self.weight.detach().double()
        bias: Tensor | None = getattr(self.module, "bias", None)
        self.had_bias = bias is not None
        self.c = torch.zeros(len(self.A), dtype=torch.float64) if bias is None else bias.detach().double()
        self.more = torch.zeros_like(self.c)

    @property
    def transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        weight: Tensor = self.module.weight  # pyright: ignore[reportAssignmentType]
        return weight.mT if self.transposed else weight

    @property
    def delta(self) -> Float[Tensor, "out in"]:
        return sum((up @ down for up, down in zip(self.up, self.down, strict=True)), torch.zeros_like(self.A))

    def into(self, part: slice, told: Affine) -> None:
        """A trail at a part of what enters: A' = A + A E^T B M E, c' = c + A E^T B k. It comes before `out`."""
        below = torch.zeros(len(told.k), self.A.shape[1], dtype=torch.float64, device=self.A.device)
        below[:, part] = told.M
        reached = self.A[:, part] @ told.B
        self.up.append(reached)
        self.down.append(below)
        self.more = self.more + reached @ told.k
        self.full |= told.full

    def out(self, told: Affine) -> None:
        """A trail at what leaves: A' = A + B M A, c' = c + B (M c + k)."""
        self.up = [up + told.B @ (told.M @ up) for up in self.up]
        self.up.append(told.B)
        self.down.append(told.M @ self.A)
        self.more = self.more + told.B @ (told.M @ (self.c + self.more) + told.k)
        self.full |= told.full


@dataclass(frozen=True)
class Table:
    """Trails at the embedding: each with the ids that it moves, or None for all."""

    trails: Sequence[tuple[Trail, Sequence[int] | None]]


def projections(host: Host, trails: TrailMap, strength: float) -> tuple[list[Projection], Table | None]:
    """What a map writes into the linear maps and into the table of a model. Nothing is changed.

    Raises `ValueError` with the site for what no weights carry.
    """
    _check(host, trails)
    found: dict[nn.Module, Projection] = {}
    names = {module: name for name, module in host.model.named_modules()}
    heads: list[tuple[Projection, slice, Affine]] = []
    outs: dict[Projection, list[Affine]] = {}
    table: list[tuple[Trail, Sequence[int] | None]] = []
    for site, trail, place in _located(host, trails):
        if site.stream == "embedding":
            table.append((trail, _ids(site)))
            continue
        told = _affine(site, trail).times(strength)
        if site.stream == "block":
            if told.constant is None:
                raise ValueError(
                    f"{site}: {type(trail).__name__} changes the residual stream by what it reads there, and that "
                    "passes every weight by: only constant trails can be merged at a block. Lay it at stream "
                    "'attention' or 'mlp'"
                )
            place = host.locate(Site(site.layer, stream="mlp"))[1]
        projection = found.get(place.module)
        if projection is None:
            _check_linear(site, place.module, names, host)
            projection = found[place.module] = Projection(names[place.module], place.module)
        if place.columns is not None:
            heads.append((projection, place.columns, told))
        else:
            outs.setdefault(projection, []).append(told)
    for projection, part, told in heads:
        projection.into(part, told)
    for projection, some in outs.items():
        projection.out(_summed(some))
    return list(found.values()), Table(table) if table else None


def _check(host: Host, trails: TrailMap) -> None:
    if not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a TrailMap is expected, not {type(trails).__name__}")
    if trails.gate is not None:
        raise ValueError(
            "a gate decides for each request, and weights are the same for all: set trails.gate = None first"
        )
    if two_sided(host.inner):
        raise ValueError(
            f"{type(host.inner).__name__} has an encoder and a decoder: models with one stack are written to"
        )
    if attached(host.model):
        raise ValueError(
            "trails are attached to the model, and would move what they are written into: detach(model) first"
        )


def _located(host: Host, trails: TrailMap) -> Iterator[tuple[Site, Trail, Place]]:
    for site, trail in trails.items():
        found, place = host.locate(site)
        by_id = site.stream == "embedding" and isinstance(site.tokens, Tokens)
        if not isinstance(site.tokens, All) and not by_id:
            raise ValueError(
                f"{site}: weights act on every token, and this rule chooses some: only All() can be merged, and "
                "Tokens(...) at stream 'embedding'"
            )
        yield found, trail, place


def _ids(site: Site) -> Sequence[int] | None:
    return tuple(site.tokens.ids) if isinstance(site.tokens, Tokens) else None


def _affine(site: Site, trail: Trail) -> Affine:
    told = affine(trail)
    if told is None:
        raise ValueError(
            f"{site}: {type(trail).__name__} is not affine in what it reads, so no linear map does the same: keep it "
            "attached"
        )
    return told


def _check_linear(site: Site, module: nn.Module, names: dict[nn.Module, str], host: Host) -> None:
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(
            f"{site}: {names[module]} is a {kind}, whose weights cannot be written to as a linear map's: merge PEFT's "
            "own adapters first, or load the model unquantised"
        )
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    if not weight.is_floating_point() or weight.is_meta:
        raise ValueError(f"{site}: the weight of {names[module]} is {weight.dtype} on {weight.device}")
    places = [name for name, other in host.model.named_modules(remove_duplicate=False) if other is module]
    if len(places) > 1:
        raise ValueError(f"{site}: {places[0]} and {places[1]} are one module, which would be changed twice")


def _summed(some: Sequence[Affine]) -> Affine:
    """Trails at one place read the same state, and their displacements are added."""
    B, M, k = torch.cat([a.B for a in some], 1), torch.cat([a.M for a in some]), torch.cat([a.k for a in some])
    return Affine(B, M, k, any(a.full for a in some))
