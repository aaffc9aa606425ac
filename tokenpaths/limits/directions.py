"""Confine trails to directions that general text uses least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.drift.measures import massive
from tokenpaths.limits.states import entering
from tokenpaths.site import Site
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.wrappers import Confined
from tokenpaths.undo import tidy


@tidy
def confine(
    model: nn.Module,
    trails: TrailMap,
    general: Sequence[Example],
    task: Sequence[Example] | None = None,
    tokenizer: Any = None,
    *,
    beta: float = 0.9,
    batch_size: int = 8,
) -> dict[Site, float]:
    """Give each `Confined` trail the directions that general text uses least.

    Let C = E[h h^T] over the frozen model's states of `general` at a site. U gets the eigenvectors of C's smallest
    eigenvalues, an approximate null space. With `task`, U gets those of the largest eigenvalues of

        (1 - beta) C_task - beta C,    each C divided by its trace,

    which are SC-LoRA's contrastive directions (arXiv:2505.23724); here they are not trained. Massive activations are
    left out. The trails are changed in place.

    Args:
        model: the model that the trails will be trained in.
        trails: a map in which at least one trail is, or has within it, a `Confined`.
        general: examples of text that shall stay as it is.
        task: examples of the task, for contrastive directions.
        tokenizer: for `Match` rules.
        beta: the weight of the general text against the task, 0 to 1.
        batch_size: examples in one forward.

    Returns:
        For each site the share of the general states' squared length that lies in the span of U.

    Raises:
        ValueError: no confined trail, no examples, beta outside [0, 1], a rule that chooses no token, or trails that
            are attached already.
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


def _second_moments(
    model: nn.Module, trails: TrailMap, examples: Sequence[Example], tokenizer: Any, batch_size: int
) -> dict[Site, Float[Tensor, "dim dim"]]:
    """The sum of h h^T over the tokens that each site's rule chooses."""
    if not examples:
        raise ValueError("there are no examples to read states of")
    found: dict[Site, Tensor] = {}
    for _, _, states in entering(model, trails, examples, 0.0, tokenizer, batch_size):
        for site, (state, mask) in states.items():
            x = _ordinary(state[mask].double().cpu())
            found[site] = found.get(site, torch.zeros(())) + x.mT @ x
    for site, moment in found.items():
        if not float(moment.trace()) > 0:
            raise ValueError(f"{site}: {site.tokens} chooses no token in the {len(examples)} examples")
    return found


def _ordinary(states: Float[Tensor, "n dim"]) -> Float[Tensor, "m dim"]:
    """Without massive activations, which would make up most of any moment (Sun et al. 2024, arXiv:2402.17762)."""
    return states[~massive(states.norm(dim=-1))] if len(states) else states


def _unit_trace(moment: Tensor) -> Tensor:
    return moment / moment.trace()
