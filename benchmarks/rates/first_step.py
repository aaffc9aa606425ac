"""What the first step of a run does at many rates, before it is taken: what each way to choose a rate reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokenpaths as tp
from tokenpaths.engine.forwards import answers
from tokenpaths.engine.states import block_places, recording
from tokenpaths.site import Host

RATES = [1e-3 * 2.0**octave for octave in range(-4, 5)]


def first_step(model: Any, trails: tp.TrailMap, goal: tp.Imitate, batch: Any) -> list[dict[str, float]]:
    """For each rate, after one step of Adam without warm-up, on the examples of the step:

    the loss, the mean KL(before || after) of the answers, and how far the moved states have gone, in units of their
    length before: the mean over moved tokens, in the block in which it is largest, and in the first one that is moved.
    """
    parameters = list(trails.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    host = Host.of(model, None)
    with tp.attach(model, trails):
        goal.loss(model, trails, batch).backward()
        ways = [0 if p.grad is None else p.grad / (p.grad.abs() + 1e-8) for p in parameters]
        before = _look(model, host, batch)
        told: list[dict[str, float]] = [{"rate": 0.0, "loss": _loss(before)}]
        for rate in RATES:
            _set(parameters, [origin - rate * way for origin, way in zip(start, ways, strict=True)])
            after = _look(model, host, batch)
            told.append({"rate": rate, "loss": _loss(after), "nats": _nats(before, after), **_gone(before, after)})
    _set(parameters, start)
    for parameter in parameters:
        parameter.grad = None
    return told


@torch.no_grad()
def _set(parameters: list[Any], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def _look(model: Any, host: Host, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with recording(block_places(host)) as states:
        logits, targets = answers(model, batch)
        return logits[:].float().log_softmax(-1), targets, {place: h.float() for place, h in states.items()}


def _loss(seen: Any) -> float:
    return -float(seen[0].gather(1, seen[1][:, None]).mean())


def _nats(before: Any, after: Any) -> float:
    return float((before[0].exp() * (before[0] - after[0])).sum(-1).mean())


def _gone(before: Any, after: Any) -> dict[str, float]:
    shares = [(after[2][k] - h).norm(dim=-1) / h.norm(dim=-1) for k, h in before[2].items()]
    moved = [float(share[share > 0].mean()) for share in shares if bool((share > 0).any())]
    return {"gone": max(moved, default=0.0), "gone_first": next(iter(moved), 0.0)}
