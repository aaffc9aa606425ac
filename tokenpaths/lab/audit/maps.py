"""What the parts of an adapter read and write: each part as an affine map, in singular vectors.

A trail is any function of a state, so it is linearised; a LoRA is linear. Both become

    d(h) = write diag(size) read^T h + bias,    write^T write = read^T read = I,    size falling

The columns of `read` are the directions that the part reads, and those of `write` the directions that it writes. No
matrix of the size of a weight is made: ranks are small, and factors are decomposed by QR and the SVD of a small core.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.lab.audit.respond import Row, responding
from tokenpaths.site import Host, Site, find_blocks
from tokenpaths.stats.sampling import some
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.undo import tidy

_SPARE = 8  # probes beyond the rank that is kept
_ROUNDING = 1e-12  # of the largest singular value: what rounding leaves of a zero
_READERS = frozenset("q_proj k_proj v_proj gate_proj up_proj query_key_value c_attn fc1 c_fc qkv_proj".split())
_WRITERS = frozenset("o_proj down_proj dense dense_4h_to_h c_proj out_proj fc2".split())
_REFERENCES = 32  # the number of states at which a trail is linearised


@dataclass(frozen=True, eq=False)
class AffineMap:
    """The affine map nearest to a part, in float64: see the head of the module.

    Args:
        write: the directions that it writes, orthonormal columns.
        size: the singular values, the largest first.
        read: the directions that it reads, orthonormal columns.
        bias: what it adds to every state.
        bend: how far the part is from affine: the root mean square of d((x + y) / 2) - (d(x) + d(y)) / 2 over pairs of
            reference states, divided by that of d. It is 0 (rounding: 1e-7) for an affine part, and for a part that is
            zero at every reference state.
    """

    write: Float[Tensor, "out k"]
    size: Float[Tensor, " k"]
    read: Float[Tensor, "in_ k"]
    bias: Float[Tensor, " out"]
    bend: float = 0.0

    @property
    def affine(self) -> bool:
        """Whether the part itself is affine, up to rounding."""
        return self.bend <= 1e-3

    def __call__(self, h: Float[Tensor, "*tokens in_"]) -> Float[Tensor, "*tokens out"]:
        return self.code(h) @ self.write.T.to(h) + self.bias.to(h)

    def code(self, h: Float[Tensor, "*tokens in_"]) -> Float[Tensor, "*tokens k"]:
        """diag(size) read^T h: the linear part in k numbers, one along each write direction. Its length is the same."""
        return (h @ self.read.to(h)) * self.size.to(h)


@dataclass(frozen=True, eq=False)
class Part:
    """One place where an adapter adds something: a trail, or the LoRA of one module.

    Args:
        name: what it is called in reports.
        layer: its block, from 0.
        kind: which parts are alike: a stream, or the name of a projection.
        map: the affine map nearest to it.
        module: the module whose input is the states that the part reads.
        reads: whether these are states of the residual stream, whose directions point to tokens.
        writes: whether what it adds goes to the residual stream.
        base: the weight that a LoRA is added to, as [out, in]; None for a trail, and where it is quantised.
    """

    name: str
    layer: int
    kind: str
    map: AffineMap
    module: nn.Module
    reads: bool
    writes: bool
    base: Tensor | None = None


def parts(model: nn.Module, trails: Adapter, prompts: Sequence[Example] = (), tokenizer: Any = None) -> list[Part]:
    """The parts of an adapter, in order of depth: its trails, or the LoRA layers of a PEFT model.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: clean examples. Trails are linearised at the states that they read there, and without prompts at states
            of unit scale; the map of an affine trail is the same.
        tokenizer: the model's tokenizer, for the rule `Match`.

    Raises:
        ValueError: the adapter has neither trails nor LoRA factors, so nothing can be said of it without running it.
    """
    if isinstance(trails, TrailMap):
        found = list(_trails(model, trails, _read_by(model, trails, prompts, tokenizer)))
    else:
        found = list(_lora(model, trails))
    if not found:
        raise ValueError(
            f"{trails} holds neither trails nor LoRA factors, so its directions cannot be read; scan(...) and "
            "on_texts(...) only run it, and take any adapter"
        )
    return sorted(found, key=lambda part: part.layer)


@tidy
@torch.enable_grad()
def linearise(
    trail: Trail, dim: int, *, states: Float[Tensor, "n dim"] | None = None, rank: int = 64, seed: int = 0
) -> AffineMap:
    """The affine map nearest to a trail: its mean Jacobian J at reference states h_i, and what is left of its mean.

        J = mean_i d trail(h_i) / dh,    bias = mean_i trail(h_i) - J mean_i h_i

    J is only multiplied with vectors, by automatic differentiation. Its range is found from random probes (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061). That is exact to rounding where the rank of J is at most `rank`; of a
    map of higher rank the largest directions are approximated. All is computed on a copy of the trail, in float64.

    Args:
        trail: any trail that is made of differentiable torch functions.
        dim: the width of its states.
        states: where to linearise it; by default random states of unit scale. The rows of the trail's own tensors are
            added at their median length, with either sign, because a gate opens on a vector that it holds.
        rank: the most directions to keep.
        seed: the seed of probes and random states.

    Raises:
        ValueError: the trail gives NaN or infinity at a reference state.
    """
    random = torch.Generator().manual_seed(seed)
    own = copy.deepcopy(trail).cpu().double().eval().requires_grad_(False)
    if states is None:
        states = torch.randn(_REFERENCES, dim, generator=random, dtype=torch.float64)
    h = _with_rows(own, states.detach().cpu().double())
    with torch.no_grad():
        start = own(h)
    if not bool(start.isfinite().all()):
        raise ValueError(f"{trail} gives NaN or infinity at reference states: it cannot be linearised")

    def moved(t: Tensor) -> Tensor:
        """The mean displacement of the reference states, all shifted by t: one row for each row of t."""
        return own(h + t.unsqueeze(1)).mean(1) + 0 * t  # still a function of t where the trail is a constant

    def pull(rows: Tensor, graph: bool = False) -> Tensor:
        """J^T of each row."""
        t = torch.zeros_like(rows, requires_grad=True)
        return torch.autograd.grad(moved(t), t, rows, create_graph=graph)[0]

    def push(rows: Tensor) -> Tensor:
        """J of each row: the derivative of J^T u in u, which asks less of a trail than forward-mode differentiation."""
        u = torch.zeros_like(rows, requires_grad=True)
        return torch.autograd.grad(pull(u, graph=True), u, rows)[0]

    probes = torch.randn(min(dim, rank + _SPARE), dim, generator=random, dtype=torch.float64)
    across = torch.linalg.qr(push(probes).T).Q
    for _ in range(2):  # power iterations, for maps that have more rank than there are probes
        across = torch.linalg.qr(push(torch.linalg.qr(pull(across.T).T).Q.T).T).Q
    write, size, read = torch.linalg.svd(pull(across.T), full_matrices=False)
    kept = _kept(size, rank)
    centre = h.mean(0, keepdim=True)
    bias = start.mean(0) - push(centre)[0]
    return AffineMap((across @ write)[:, :kept], size[:kept], read[:kept].T, bias, _bend(own, h, start, random))


def of_factors(a: Float[Tensor, "r in_"], b: Float[Tensor, "out r"], *, scale: float = 1.0) -> AffineMap:
    """The map of a LoRA, scale * b a, from b = Qb Rb, a^T = Qa Ra, and the SVD of the r x r core Rb Ra^T."""
    a, b = a.detach().cpu().double(), scale * b.detach().cpu().double()
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, size, v = torch.linalg.svd(rb @ ra.T)
    kept = _kept(size, len(size))
    return AffineMap((qb @ u)[:, :kept], size[:kept], (qa @ v.T)[:, :kept], b.new_zeros(len(b)))


def _kept(size: Tensor, rank: int) -> int:
    floor = _ROUNDING * float(size.max()) if len(size) else 0.0
    return min(rank, int((size > floor).sum()))


def _with_rows(trail: Trail, states: Float[Tensor, "n dim"]) -> Float[Tensor, "m dim"]:
    dim = states.shape[1]
    tensors = [tensor.detach().double() for tensor in trail.state_dict().values() if tensor.shape[-1:] == (dim,)]
    rows = torch.cat([tensor.reshape(-1, dim) for tensor in tensors])[:64] if tensors else states[:0]
    rows = rows[rows.norm(dim=-1) > 0]
    rows = rows * (states.norm(dim=-1).quantile(0.5) / rows.norm(dim=-1, keepdim=True))
    return torch.cat([states, rows, -rows])


def _read_by(
    model: nn.Module, trails: TrailMap, prompts: Sequence[Example], tokenizer: Any
) -> dict[Trail, Float[Tensor, "n dim"]]:
    """At most 32 of the states that each trail reads in clean prompts, drawn at random as the prompts are."""
    modules = {trail: trail for _, trail in trails.items()}
    drawn = [prompts[i] for i in some(len(prompts), _REFERENCES)]
    rows = [Row(prompt.ids, len(prompt) - prompt.prompt_length) for prompt in drawn]
    with responding(model, trails, tokenizer) as respond:
        read = respond.inputs(modules, rows)
    joined = {trail: torch.cat(states) for trail, states in read.items() if states}
    return {trail: states[some(len(states), _REFERENCES)] for trail, states in joined.items()}


def _bend(trail: Trail, h: Tensor, moved: Tensor, random: torch.Generator) -> float:
    other = torch.randperm(len(h), generator=random)
    with torch.no_grad():
        gap = trail((h + h[other]) / 2) - (moved + moved[other]) / 2
    length = float(moved.square().mean().sqrt())
    return float(gap.square().mean().sqrt()) / length if length > 0 else 0.0


def _trails(model: nn.Module, trails: TrailMap, states: Mapping[Trail, Tensor]) -> Iterator[Part]:
    host = Host.of(model, trails.blocks)
    first: dict[Trail, Site] = {}
    for site, trail in trails.items():
        first.setdefault(trail, site)  # a tied trail is read once, where it first lies
    for trail, site in first.items():
        found, place = host.locate(site)
        whole = found.head is None
        head = "" if whole else f" head {found.head}"
        yield Part(
            name=f"{found.stream} {found.layer}{head}, {found.tokens}",
            layer=found.layer,
            kind=found.stream,
            map=linearise(trail, place.width, states=states.get(trail)),
            module=trail,
            reads=whole,
            writes=whole,
        )


def _lora(model: nn.Module, trails: Adapter) -> Iterator[Part]:
    blocks = list(find_blocks(model, trails.blocks))
    inside = {id(module): layer for layer, block in enumerate(blocks) for module in block.modules()}
    for name, module in model.named_modules():
        factors = lora_factors(module)
        if factors is None or id(module) not in inside:
            continue
        a, b = factors
        base = base_weight(module, b.shape[0], a.shape[1])
        kind = name.split(".")[-1]
        yield Part(
            name=re.sub(r"^(base_model\.model\.)", "", name),
            layer=inside[id(module)],
            kind=kind,
            map=of_factors(a, b),
            module=module,
            reads=kind in _READERS,
            writes=kind in _WRITERS,
            base=base,
        )


def lora_factors(module: Any) -> tuple[Tensor, Tensor] | None:
    """A [r, in] and B [out, r] of the active adapters of a PEFT LoRA layer, B with their scaling; None elsewhere."""
    held = getattr(module, "lora_A", None)
    names = [] if held is None else [name for name in module.active_adapters if name in held]
    if not names:
        return None
    pairs = [(module.lora_A[n].weight, module.scaling[n] * module.lora_B[n].weight) for n in names]
    if any(a.dim() != 2 for a, _ in pairs):  # a convolution
        return None
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


def base_weight(module: Any, rows: int, columns: int) -> Tensor | None:
    """The weight below a LoRA layer as [out, in]; None where it is quantised."""
    weight = getattr(getattr(module, "base_layer", None), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if getattr(module, "fan_in_fan_out", False):
        weight = weight.T
    return weight.detach() if weight.shape == (rows, columns) else None
