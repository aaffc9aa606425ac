"""A limit on every single step: how far it may take the model on a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.examples import Batch, Example, collate
from tokenpaths.drift.attention import read_attention
from tokenpaths.drift.measures import kl
from tokenpaths.engine.readings import Reading, Run, read_one
from tokenpaths.trailmap.adapter import Adapter


@dataclass(frozen=True)
class TrustRegion:
    """The mean of `measure` between the model before and after an optimizer step is at most `most`, on `probe`.

    A step from parameters p to p' that goes further is shortened: p + a (p' - p), with a halved each time, or cut more
    where the measure is far above the bound. The bound is exact on the probe. A step that no shortening brings within
    it is not taken. The optimizer's state is left as it is. Each step costs a forward of the probe, and each cut one
    more. It is a `training.loop.StepLimit`.

    Args:
        probe: the examples to measure on, all in one batch: a few texts of the kinds that must stay.
        most: the bound, in units of the measure (nats for `kl`).
        measure: of two readings, such as those of `tokenpaths.drift.measures`: `kl`, `displacement`, or your own.
        attention: in place of `measure`, a measure of two attention maps, such as `attention_js` (needs eager
            attention).
        cuts: how often a step is shortened before it is given up.

    Raises:
        ValueError: no probe, `most` that is not a finite number above 0, or `cuts` below 1.
    """

    probe: Sequence[Example] = field(repr=False)
    most: float = 0.01
    measure: Callable[[Reading, Reading], Tensor] = kl
    attention: Callable[[Tensor, Tensor], Tensor] | None = None
    cuts: int = 10

    def __post_init__(self) -> None:
        if not self.probe:
            raise ValueError("TrustRegion needs a probe: examples to measure each step on")
        if not (math.isfinite(self.most) and self.most > 0):
            raise ValueError(f"TrustRegion: most={self.most} must be a finite number above 0")
        if self.cuts < 1:
            raise ValueError(f"TrustRegion: cuts={self.cuts} must be at least 1")

    def begin(self, model: nn.Module, trails: Adapter, parameters: Sequence[nn.Parameter]) -> Probe:
        """Come into force in a run, before its first step.

        Args:
            model: the model that is trained.
            trails: the adapter that is trained, at work in the model.
            parameters: what the optimizer steps.
        """
        return Probe(self, model, trails, parameters)


class Probe:
    """A trust region in force in a run: it knows what the model made of the probe after the last step."""

    def __init__(
        self, region: TrustRegion, model: nn.Module, trails: Adapter, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.region = region
        self.run = Run(model, lambda: evaluating(trails), trails.blocks)  # without the trails' dropout
        self.parameters = parameters
        self.batch: Batch = collate(region.probe)
        self.seen = self._look()
        self.before = self._parameters()

    @torch.no_grad()
    def hold(self) -> tuple[float, float]:
        """Shorten the step taken since the last call; returns the share of it that was kept, and its measure."""
        wanted = self._parameters()
        share = 1.0
        for _ in range(self.region.cuts + 1):
            seen = self._look()
            value = self._measure(seen)
            if value <= self.region.most:
                break
            # most measures are quadratic in a small step, so this is a safe guess; never less than a halving
            share *= min(0.5, max(0.9 * math.sqrt(self.region.most / value), 0.05))
            self._set([p + share * (q - p) for p, q in zip(self.before, wanted, strict=True)])
        else:
            share, value, seen = 0.0, 0.0, self.seen
            self._set(self.before)
        self.seen, self.before = seen, self._parameters()
        return share, value

    def _look(self) -> list[Any]:
        """What is measured on: readings, or attention maps."""
        if self.region.attention is None:
            return read_one(self.run, self.batch)
        maps: list[Tensor] = []
        read_attention(self.run, self.run, self.batch, lambda layer, row, p, q: maps.append(p))
        return maps

    def _measure(self, seen: Sequence[Any]) -> float:
        measure: Callable[[Any, Any], Tensor] = self.region.attention or self.region.measure
        values = [measure(x, y).double() for x, y in zip(self.seen, seen, strict=True)]
        return float(torch.cat([value[~value.isnan()].flatten() for value in values]).mean())

    def _parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
