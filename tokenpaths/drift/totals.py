"""What a meter has added up so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tokenpaths.drift.report import RunName
from tokenpaths.drift.sample import Sample
from tokenpaths.drift.tally import Calibration, Tally


@dataclass(eq=False)
class Totals:
    """Numbers and names only, of a size that no text adds to: it can be sent to another process, and added up there.

        dist.all_gather_object(everyone, meter.totals)  # torch.distributed; each process has read other texts
        for others in everyone[1:]:
            everyone[0].merge(others)

    `names` are those of the meter's functions. `counts` are of texts and of tokens: all, moved, massive.
    """

    names: tuple[str, ...]
    seed: int
    keep_massive: bool
    sample: Sample
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    tallies: dict[tuple[str, RunName], Tally] = field(default_factory=dict[tuple[str, RunName], Tally])
    before: Calibration = field(default_factory=Calibration.empty)
    after: Calibration = field(default_factory=Calibration.empty)
    counts: Counter[str] = field(default_factory=Counter[str])

    def merge(self, other: Totals) -> None:
        """Add totals of other texts. Raises `ValueError` if they are of other functions, settings or layers."""
        mine, theirs = ((t.names, t.seed, t.keep_massive, len(t.sample.keys)) for t in (self, other))
        if mine != theirs:
            raise ValueError(
                "meters add up that have the same functions, seed, keep_massive and sample; these have "
                f"{mine} and {theirs}"
            )
        if self.layers and other.layers and self.layers != other.layers:
            raise ValueError(f"meters of models with other layers do not add up: {self.layers} and {other.layers}")
        self.layers |= other.layers
        for key, tally in other.tallies.items():
            self.tallies.setdefault(key, Tally.empty(len(tally.count))).merge(tally)
        self.sample.merge(other.sample)
        self.before.merge(other.before)
        self.after.merge(other.after)
        self.counts += other.counts
