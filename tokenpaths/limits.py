"""Limits on what a trail can do: in which directions, on which states, and how strongly.

`confine` is called before training, and says in which directions a trail may move a state. `guard` and
`strength_within` are called after it: on which states the trails shall act, and how strongly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.attach import attach, is_attached
from tokenpaths.cone.prefix import head_sees_one
from tokenpaths.data import Batch, Example, collate
from tokenpaths.drift import Drift, drift
from tokenpaths.drift.readings import evaluating
from tokenpaths.sites import Place, Site, locate
from tokenpaths.tokens import All, Context, Rule, token_pieces
from tokenpaths.trailmap import TrailMap
from tokenpaths.trails import Confined, Guarded, Trail
from tokenpaths.trails.wrappers import at_unit_scale
from tokenpaths.watcher import Hook

_HELD = 4  # one text in so many is held out, to place the gate's threshold


@dataclass(frozen=True)
class Guard:
    """How a gate fits, on texts that it was not fitted on: its mean opening, and the share of tokens it opens on."""

    task: float
    other: float
    other_share: float


def guard(
    model: nn.Module,
    trails: TrailMap,
    task: Sequence[Example],
    other: Sequence[Example],
    *,
    tokens: Rule = All(),
    shut: float = 0.9999,
    most: int = 4096,
    tokenizer: Any = None,
    batch_size: int = 8,
) -> tuple[TrailMap, dict[Site, Guard]]:
    """Put a gate before each trained trail, which opens on states like those it was trained on, and on no others.

        trails = TrailMap({site: DiReFT(dim, rank=4) for site in sites(model, tokens=Last(1) | Answer())})
        for step in steps(model, trails, [Imitate(examples)], steps=200): ...
        trails, fits = guard(model, trails, examples, plain(tokenizer, texts))

    The trails come back as `Guarded`, at the same layers and streams but at `tokens`: where the prompt ends need no
    longer be known, since the gate finds the states by itself; and text on which it stays shut is left to the bit as
    the frozen model has it. At each site, let mu1 be the mean of the states (at unit scale, as `Guarded` reads them)
    that enter the trail at the tokens its rule chooses in `task`, moved as they are by the trails below; mu0 that of
    the other states of `task` that `tokens` chooses, and of the frozen model's in `other`; and S their pooled
    covariance within both classes, shrunk by 1 % towards its diagonal. Fisher's discriminant w = S^-1 (mu1 - mu0)
    scores a state. On held-out texts, one in four, let `high` be the quantile `shut` of the other states' scores and
    `low` the 2 % quantile of the task's: the gate begins to open half way from `high` to `low`, and is wide open at
    three quarters. Where the classes overlap it begins at `high`.

    The more kinds of text `other` holds, the better: what a gate takes for the task are prompts that look like it.

    Args:
        model: the model that the trails were trained in.
        trails: trained trails. They share their parameters with those that are returned.
        task: examples such as they were trained on.
        other: examples of anything else, such as `plain(tokenizer, texts)`.
        tokens: the token rule of the guarded trails. Where the task's own tokens cannot be told apart by their states,
            as in a chain of names that its prompt holds too, keep the rule that the trails were trained at.
        shut: the share of the other states on which a gate must be shut.
        most: so many tokens, about, are read of `task`, and of `other`, evenly spaced. Their states at all sites are
            kept in memory meanwhile.
        tokenizer: for `Match` rules.
        batch_size: of the forwards.

    Raises:
        ValueError: too few texts, or a rule that chooses no token of `task`, or every one.
    """
    if not 0 < shut <= 1:
        raise ValueError(f"shut={shut} must be above 0 and at most 1")
    for name, examples in (("task", task), ("other", other)):
        if len(examples) < 2 * _HELD:
            raise ValueError(f"{name} has {len(examples)} examples; a gate needs at least {2 * _HELD}")
    own = _sample(model, trails, task, 1.0, tokens, most, tokenizer, batch_size)
    rest = _sample(model, trails, other, 0.0, All(), most, tokenizer, batch_size)
    gates: dict[Trail, Guarded] = {}
    found: dict[Trail, Guard] = {}
    for trail, at in _by_trail(trails).items():
        ours = [own[site] for site in at]
        yes = _Sample.joined([sample.where(sample.chosen) for sample in ours])
        no = _Sample.joined([*(s.where(~s.chosen & s.reached) for s in ours), *(rest[site] for site in at)])
        if not len(yes.states):
            raise ValueError(f"{at[0]}: {at[0].tokens} chooses no token in the {len(task)} examples of task")
        gates[trail], found[trail], overlap = _fit(trail, yes, no, shut)
        if overlap:
            warnings.warn(
                f"{at[0]}: states of the task overlap with others, so its gate is shut on some of the task's",
                stacklevel=2,
            )
    sites = {site: Site(site.layer, tokens, site.stream, site.head) for site in trails}
    made = TrailMap([(sites[site], gates[trail]) for site, trail in trails.items()], blocks=trails.blocks)
    return made, {sites[site]: found[trail] for site, trail in trails.items()}


def _fit(trail: Trail, yes: _Sample, no: _Sample, shut: float) -> tuple[Guarded, Guard, bool]:
    """A gate for a trail, how it does on the states that are held out, and whether the classes overlap there."""
    w = _discriminant(yes.states[~yes.held].double(), no.states[~no.held].double())
    task, other = yes.states[yes.held].double() @ w, no.states[no.held].double() @ w
    high, low = other.quantile(shut), task.quantile(0.02)
    overlap = bool(low <= high)
    if overlap:
        start, wide = high, torch.maximum(task.median(), high + 1e-3 * high.abs().clamp_min(1e-6))
    else:
        start, wide = high + 0.5 * (low - high), high + 0.75 * (low - high)
    guarded = Guarded(trail, yes.states.shape[1])
    guarded.w.copy_(w / (wide - start))
    guarded.b.copy_(-start / (wide - start))
    like = next(trail.parameters(), guarded.w)
    guarded.to(like.device, like.dtype)
    opened, closed = (((x - start) / (wide - start)).clamp(0, 1) for x in (task, other))
    return guarded, Guard(float(opened.mean()), float(closed.mean()), float((closed > 0).double().mean())), overlap


def confine(
    model: nn.Module,
    trails: TrailMap,
    general: Sequence[Example],
    task: Sequence[Example] | None = None,
    *,
    beta: float = 0.9,
    tokenizer: Any = None,
    batch_size: int = 8,
) -> dict[Site, float]:
    """Give each `Confined` trail the directions that general text uses least.

    With C = E[h h^T] over the frozen model's states of `general` at a site, U holds the eigenvectors of C's smallest
    eigenvalues: the null space that is left of it. With `task`, U holds those of the largest eigenvalues of
    (1 - beta) C_task - beta C, each C divided by its trace: SC-LoRA's contrastive directions (arXiv 2505.23724), which
    here stay where they are. States of massive norm (10 times the median) are left out.

    Returns:
        For each site the share of the general states' squared length that lies in the span of U.

    Raises:
        ValueError: no confined trail, beta outside [0, 1], or a rule that chooses no token.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be from 0 to 1")
    confined: dict[Confined, list[Site]] = {}
    for site, trail in trails.items():
        for part in trail.modules():
            if isinstance(part, Confined):
                confined.setdefault(part, []).append(site)
    if not confined:
        raise ValueError(f"none of the {len(trails)} trails is Confined: wrap them, Confined(trail, dim, directions)")
    moments = _second_moments(model, trails, general, tokenizer, batch_size)
    tasks = None if task is None else _second_moments(model, trails, task, tokenizer, batch_size)
    found: dict[Site, float] = {}
    for trail, at in confined.items():
        c = _unit_trace(sum((moments[site] for site in at), torch.zeros(())))
        aim = -c
        if tasks is not None:
            aim = (1 - beta) * _unit_trace(sum((tasks[site] for site in at), torch.zeros(()))) - beta * c
        vectors = torch.linalg.eigh(aim).eigenvectors[:, -trail.directions :]  # in order of rising eigenvalue
        trail.U.copy_(vectors.mT)
        found |= dict.fromkeys(at, float((vectors.mT @ c @ vectors).trace()))
    return {site: found[site] for site in trails if site in found}


@dataclass(frozen=True, eq=False)
class _Sample:
    """States at one site, at unit scale: which of them its rule chooses, which the new one, which are held out."""

    states: Float[Tensor, "n dim"]
    chosen: Bool[Tensor, " n"]
    reached: Bool[Tensor, " n"]
    held: Bool[Tensor, " n"]

    def where(self, mask: Bool[Tensor, " n"]) -> _Sample:
        return _Sample(self.states[mask], self.chosen[mask], self.reached[mask], self.held[mask])

    @staticmethod
    def joined(samples: Sequence[_Sample]) -> _Sample:
        parts = zip(*((s.states, s.chosen, s.reached, s.held) for s in samples), strict=True)
        return _Sample(*(torch.cat(part) for part in parts))


def _by_trail(trails: TrailMap) -> dict[Trail, list[Site]]:
    """Each trail, and the sites where it lies."""
    found: dict[Trail, list[Site]] = {}
    for site, trail in trails.items():
        found.setdefault(trail, []).append(site)
    return found


def _sample(
    model: nn.Module,
    trails: TrailMap,
    examples: Sequence[Example],
    strength: float,
    tokens: Rule,
    most: int,
    tokenizer: Any,
    batch_size: int,
) -> dict[Site, _Sample]:
    """What enters each trail, at a strength: the states of evenly spaced examples, about `most` of them."""
    chosen = examples[:: max(1, round(sum(map(len, examples)) / most))]
    parts: dict[Site, list[_Sample]] = {site: [] for site in trails}
    seen = 0
    for batch, context, states in _states(model, trails, chosen, strength, tokenizer, batch_size):
        held = torch.arange(seen, seen + len(batch)).unsqueeze(1).expand_as(batch.input_ids) % _HELD == 0
        real, reached = context.real, tokens.mask(context)
        for site, (state, mask) in states.items():
            unit = at_unit_scale(state[real].float()).cpu()
            parts[site].append(_Sample(unit, mask[real], reached[real], held[real]))
        seen += len(batch)
    return {site: _Sample.joined(found) for site, found in parts.items()}


def _second_moments(
    model: nn.Module, trails: TrailMap, examples: Sequence[Example], tokenizer: Any, batch_size: int
) -> dict[Site, Float[Tensor, "dim dim"]]:
    """The sum of h h^T over the tokens that each site's rule chooses."""
    if not examples:
        raise ValueError("there are no examples to read states of")
    found: dict[Site, Tensor] = {}
    for _, _, states in _states(model, trails, examples, 0.0, tokenizer, batch_size):
        for site, (state, mask) in states.items():
            x = _ordinary(state[mask].double().cpu())
            found[site] = found.get(site, torch.zeros(())) + x.mT @ x
    for site, moment in found.items():
        if not float(moment.trace()) > 0:
            raise ValueError(f"{site}: {site.tokens} chooses no token in the {len(examples)} examples")
    return found


def _states(
    model: nn.Module, trails: TrailMap, examples: Sequence[Example], strength: float, tokenizer: Any, batch_size: int
) -> Generator[tuple[Batch, Context, dict[Site, tuple[Tensor, Tensor]]]]:
    """Batch by batch: its tokens, the states that enter the trails at a strength, and which each rule chooses."""
    pieces = None if tokenizer is None else token_pieces(tokenizer)
    spans = sorted({name for example in examples for name in example.spans})
    device = next(model.parameters()).device
    caught: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in trails:  # hooked before the trails are attached: the states that enter them
            stack.callback(_catch(site, locate(model, site, trails.blocks)[1], caught).remove)
        stack.enter_context(head_sees_one(model))  # all logits would be a third of the forward of a small model
        stack.enter_context(_attached(model, trails, strength, tokenizer))
        for module in (model, trails):
            stack.enter_context(evaluating(module))
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], spans=spans)
            caught.clear()
            with torch.no_grad():
                model(
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device),
                    prompt_mask=batch.prompt_mask.to(device),
                    spans={name: mask.to(device) for name, mask in batch.spans.items()},
                    use_cache=False,
                )
            context = Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids, batch.spans, pieces)
            yield batch, context, {site: (h, site.tokens.mask(context)) for site, h in caught.items()}


def _catch(site: Site, place: Place, caught: dict[Site, Tensor]) -> RemovableHandle:
    """Keep the states at a place, in their batch, at each forward."""

    def keep(h: Tensor) -> None:
        caught[site] = h if place.columns is None else h[..., place.columns]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    if place.side == "output":
        return place.module.register_forward_hook(Hook(after))
    return place.module.register_forward_pre_hook(Hook(before), with_kwargs=True)


def _discriminant(yes: Float[Tensor, "m dim"], no: Float[Tensor, "n dim"]) -> Float[Tensor, " dim"]:
    """Fisher's S^-1 (mu1 - mu0), on dimensions scaled to unit variance so that shrinking treats them alike."""
    gap = yes.mean(0) - no.mean(0)
    within = torch.cat([yes - yes.mean(0), no - no.mean(0)])
    scale = within.std(0).clamp_min(1e-12)
    within = within / scale
    s = within.mT @ within / len(within)
    s = 0.99 * s + 0.01 * torch.eye(len(s), dtype=s.dtype)
    return torch.linalg.solve(s, gap / scale) / scale


def _ordinary(states: Float[Tensor, "n dim"]) -> Float[Tensor, "m dim"]:
    """Without states of massive norm, which would make up most of any moment (Sun et al. 2024, arXiv 2402.17762)."""
    norms = states.norm(dim=-1)
    return states if not len(states) else states[norms <= 10 * norms.median()]


def _unit_trace(moment: Tensor) -> Tensor:
    return moment / moment.trace()


@dataclass(frozen=True)
class AtStrength:
    """Trails at one strength: what they can do, and what they cost."""

    strength: float
    score: float
    drift: Drift


def strength_curve(
    model: nn.Module,
    trails: TrailMap,
    score: Callable[[], float],
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    at: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[AtStrength]:
    """Task against drift, over strengths: `score()` is called with the trails attached at each.

    Raises `ValueError` for trails that are attached already.
    """
    found: list[AtStrength] = []
    for strength in at:
        with _attached(model, trails, strength, tokenizer):
            found.append(AtStrength(strength, score(), drift(model, trails, texts, tokenizer)))
    return found


def strength_within(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    budget: float,
    halvings: int = 6,
) -> float:
    """The largest strength in [0, 1] found at which the mean KL(frozen || steered) on `texts` is at most `budget` nats.

    1 if that is within the budget, else by halving the interval `halvings` times, which takes it that drift rises with
    strength; that the answer is within the budget is measured in any case. To keep it, attach with this strength, or
    wrap each trail as `Scaled(trail, strength)`.

    Raises `ValueError` for a budget below 0 and for trails that are attached already.
    """
    if not budget >= 0:
        raise ValueError(f"budget={budget} must be at least 0 nats a token")
    low, high = 0.0, 2.0  # so that the first to be tried is 1
    for _ in range(halvings + 1):
        middle = (low + high) / 2
        with _attached(model, trails, middle, tokenizer):
            mean = drift(model, trails, texts, tokenizer)["kl"].mean
        low, high = (middle, high) if mean <= budget else (low, middle)
        if low == 1.0:
            break
    return low


@contextmanager
def _attached(model: nn.Module, trails: TrailMap, strength: float, tokenizer: Any) -> Generator[None]:
    if is_attached(model, trails):
        raise ValueError("the trails are attached already, at a strength of their own: remove them first")
    with attach(model, trails, strength=strength, tokenizer=tokenizer):
        yield
