"""The learning rate of a run that was given none, and a word where a run diverges.

A rate does not carry over between models: one number moves the states of one model by a hundredth of their length, and
those of another by all of it. What carries over is that share of their length. So the first step is tried at two or
three rates before it is taken, and the run has the rate that moves the states by `FAR`. It depends neither on the unit
of the states, nor on the kind of adapter, nor on the scale of the loss (docs/training.md has the measurement).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenpaths.data.examples import Batch
from tokenpaths.undo import Undo

FALLBACK = 1e-3
"""The rate of a run whose first step moves nothing, whatever the rate."""
FAR = 0.3
"""How far the first step at the full rate moves states, in units of their length."""
RULED = 8
"""The examples on which it is measured. The states of all their tokens in all blocks are held meanwhile."""
_NEAR = 1.1  # a rate is taken that moves them by FAR times or over this
_TRIES = 10
_FURTHER = 16.0  # the most that one try is times or over the one before
_ROUNDING = 0.02  # states of bfloat16 may differ by so much without a reason
DIVERGES = 2.0
"""A run diverges where its loss is over this many times that of its start on the same examples, and 1 more than it."""

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Found:
    """How a rate was found.

    Args:
        lr: the rate of the run; None if no rate that was tried moves a state.
        tried: each rate that was tried, and how far it moves the states.
    """

    lr: float | None
    tried: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:.2g}: {far:.2g}" for rate, far in self.tried) or "none, as there is no gradient"
        if self.lr is None:
            return f"Learning rate {FALLBACK:g}: the first step moves nothing to go by (tried: {tried})"
        return (
            f"Learning rate {self.lr:.3g}: the first step at this rate moves the states by "
            f"{dict(self.tried)[self.lr]:.2g} of their length, in the block in which they go furthest "
            f"(wanted: {FAR:g}; tried: {tried})"
        )


class Ruler:
    """How far a batch's states go: |h' - h| / |h|, the mean over the tokens that moved, in the block with the most.

    A goal may run the model more than once, frozen among others: each of its forwards is compared with itself.

    Args:
        look: runs the batch, and shows the states of each block to a function.
        batch: what is run.
        total: the sum of a tensor over all processes.
    """

    def __init__(self, look: Callable[[See], None], batch: Batch, total: Callable[[Tensor], Tensor]) -> None:
        self.look, self.total = look, total
        self.real = batch.attention_mask.bool()
        self.before: dict[tuple[str, int], Tensor] = {}
        self._run(self.before.__setitem__)

    def __call__(self) -> float:
        """How far the states have gone from where they were when the ruler was made."""
        sums = {place: torch.zeros(2, device=self.real.device) for place in self.before}

        def see(place: tuple[str, int], states: Tensor) -> None:
            before = self.before.get(place)
            if before is None or before.shape != states.shape:
                return
            length = before.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            share = (states.float() - before.float()).norm(dim=-1) / length
            if share.shape == self.real.shape:
                share = share[self.real.to(share.device)]
            sums[place] = torch.stack([share.sum(), (share != 0).sum()]).to(self.real.device)

        self._run(see)
        if not sums:  # a goal of the parameters alone
            return 0.0
        far, tokens = self.total(torch.stack(list(sums.values()))).unbind(-1)
        most = float((far / tokens.clamp_min(1)).max())
        return most if math.isfinite(most) else math.inf

    def _run(self, see: Callable[[tuple[str, int], Tensor], None]) -> None:
        """Show the states of each block in each forward, by the block and the number of the forward."""
        forwards: Counter[str] = Counter()

        def count(place: str, states: Tensor) -> None:
            forwards[place] += 1
            see((place, forwards[place]), states)

        self.look(count)


def find_rate(parameters: Sequence[nn.Parameter], far: Callable[[], float]) -> Found:
    """The rate at which the first step goes as far as `FAR`, to a tenth. The parameters are as before afterwards.

    The first step of Adam from parameters p with gradient g goes to p - lr g / (|g| + 1e-8), entry by entry. Where
    states cannot be moved so far, as by trails that are capped, it is the rate from which on more hardly goes further.

    Args:
        parameters: with the gradients of the first step.
        far: how far the states have gone, with the parameters as they are then.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    ways = [None if p.grad is None or not p.grad.any() else p.grad / (p.grad.abs() + 1e-8) for p in parameters]
    if all(way is None for way in ways):
        return Found(None, ())

    @torch.no_grad()
    def gone(rate: float) -> float:
        for parameter, origin, way in zip(parameters, start, ways, strict=True):
            parameter.copy_(origin if way is None else origin - rate * way)
        return far()

    @torch.no_grad()
    def back() -> None:
        for parameter, origin in zip(parameters, start, strict=True):
            parameter.copy_(origin)

    with Undo() as undo:
        undo.add(back)
        return _find(gone)


def _find(gone: Callable[[float], float]) -> Found:
    """Look for the rate that goes as far as `FAR`, between the nearest ones known to be too low and too high."""
    tried: dict[float, float] = {}
    rate = FALLBACK
    for _ in range(_TRIES):
        tried[rate] = gone(rate)
        if FAR / _NEAR <= tried[rate] <= FAR * _NEAR:
            break
        low = max((r for r, far in tried.items() if far < FAR), default=None)
        high = min((r for r, far in tried.items() if far > FAR), default=None)
        if low is not None and high is None and _bounded(tried, low):
            rate = sorted(tried)[-2]
            break
        rate = _between(low, high, tried)
    if not 0 < tried.get(rate, 0.0) < math.inf:
        known = [r for r, far in tried.items() if 0 < far < math.inf]
        rate = min(known, key=lambda r: abs(math.log(tried[r] / FAR)), default=math.nan)
    return Found(None if math.isnan(rate) else rate, tuple(sorted(tried.items())))


def _between(low: float | None, high: float | None, tried: dict[float, float]) -> float:
    """Where the line through two rates, in logarithms, has `FAR`; its slope is taken to be 1 where one is known."""
    if low is None or high is None:
        known = low or high
        assert known is not None
        times = FAR / tried[known] if tried[known] else math.inf
        return known * min(max(times, 1 / _FURTHER), _FURTHER)
    least, most = tried[low], tried[high]
    share = 0.5
    if least > 0 and math.isfinite(most):
        share = min(max(math.log(FAR / least) / math.log(most / least), 0.1), 0.9)
    return low * (high / low) ** share


def _bounded(tried: dict[float, float], last: float) -> bool:
    """Whether the highest rate goes hardly further than the one before, and by more than rounding."""
    lower = [rate for rate in tried if rate < last]
    if not lower or tried[max(lower)] < _ROUNDING:
        return False
    return tried[last] / tried[max(lower)] < (last / max(lower)) ** 0.25


class Alarm:
    """Says so, once, where a run diverges: where the start would do far better on the examples of a step.

    Args:
        parameters: what is trained, as it is at the start.
        weights: of the goals, at the start.
        advice: tells what to do.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weights: Sequence[float], advice: Callable[[], str]) -> None:
        self.parameters, self.weights, self.advice = parameters, weights, advice
        self.start = [parameter.detach().clone() for parameter in parameters]
        self.known: float | None = None  # the highest loss of the start that is known
        self.quiet = False

    def hear(self, step: int, parts: Sequence[float], again: Callable[[], Sequence[float]]) -> None:
        """Before a step is taken: its loss of each goal. `again` tells these with the parameters as they are then."""
        loss = self._total(parts)
        if self.known is None:
            self.known = loss
        if self.quiet or not _far_above(loss, self.known):
            return
        before = self._total(self._at_the_start(again))
        self.known = max(self.known, before)
        if _far_above(loss, before):
            self.quiet = True
            warnings.warn(
                f"step {step}: the loss of its examples is {loss:.3g}, and with the trails as they were when the run "
                f"began it is {before:.3g}. The run diverges {self.advice()}",
                stacklevel=5,
            )

    def _total(self, parts: Sequence[float]) -> float:
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    @torch.no_grad()
    def _at_the_start(self, again: Callable[[], Sequence[float]]) -> Sequence[float]:
        now = [parameter.detach().clone() for parameter in self.parameters]
        try:
            for parameter, origin in zip(self.parameters, self.start, strict=True):
                parameter.copy_(origin)
            return again()
        finally:
            for parameter, here in zip(self.parameters, now, strict=True):
                parameter.copy_(here)


def _far_above(loss: float, other: float) -> bool:
    return 0 < DIVERGES * other < loss and loss > other + 1
