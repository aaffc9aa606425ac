"""What an arm keeps of what the model could do: tasks, each against a margin.

Of a text task two figures: nats a token (the sum over scored tokens / their number) against arm a, and KL(reference ||
arm) in nats a token. Of a choice task, accuracy against arm a. Each is stated as a **loss**, which is kept if its whole
interval is at most its margin (non-inferiority). The intervals hold together: that of each of m figures has confidence
1 - alpha / m (Bonferroni).

All arms are read on the same tokens: a text without a prompt is split into prompt and answer at several places, for
trails and for LoRA alike. A figure of fewer items or moved tokens than `stats.verdicts` asks for says "cannot tell".

Where every number of a text task is exactly what it was, as behind shut gates, an interval has no spread to be made of.
It is then [0, 0], which is kept, and the note says what share of such texts may still change: 1 - (alpha / m)^(1 / n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokenpaths.data.items import Task
from tokenpaths.engine.batches import shown
from tokenpaths.engine.readings import Run
from tokenpaths.lab.ab.arms import Arm
from tokenpaths.lab.forgetting.margins import MARGINS as MARGINS
from tokenpaths.lab.forgetting.margins import Margins as Margins
from tokenpaths.lab.forgetting.measuring import TextSums, read_choices, read_texts, share_of_choices
from tokenpaths.lab.forgetting.report import ACCURACY, KL, NATS, moved_text
from tokenpaths.stats.intervals import UNKNOWN, Interval, Values
from tokenpaths.stats.paired import Outcomes, effect
from tokenpaths.stats.verdicts import may_still, too_little


@dataclass(frozen=True)
class Retained:
    """One figure of one task.

    Args:
        task: the name of the task.
        measure: the name of the measure, with its unit.
        before: the measure of arm a; 0 for KL.
        after: the measure of this arm.
        loss: what this arm lost, in the unit of the measure.
        interval: of the loss.
        confidence: of the interval.
        margin: the loss that is allowed.
        items: the number of items.
        note: what a reader needs beside the figures.
        moved: the share of the scored predictions that the arm moves, or arm a if that is less and no reference. NaN
            where it is not known, as in files of earlier versions.
    """

    task: str
    measure: str
    before: float
    after: float
    loss: float
    interval: Interval
    confidence: float
    margin: float
    items: int
    note: str = ""
    moved: float = math.nan

    @property
    def says(self) -> Literal["kept", "lost", "cannot tell"]:
        """On which side of the margin the whole interval lies; "cannot tell" of too few items or tokens moved."""
        low, high = self.interval
        if self.too_little:
            return "cannot tell"
        if high <= self.margin:
            return "kept"
        return "lost" if low > self.margin else "cannot tell"

    @property
    def too_little(self) -> str:
        """Why nothing may be said of so little, in words; "" if it may."""
        return too_little(self.items, self.moved)

    @property
    def tells(self) -> int | None:
        """About how many items tell, if the loss is the one found: the interval narrows as 1 / sqrt(items)."""
        low, high = self.interval
        room = self.margin - self.loss
        half = high - self.loss if room > 0 else self.loss - low
        return math.ceil(self.items * (half / room) ** 2) if room and math.isfinite(half) else None


def retained(
    a: Arm,
    others: Sequence[Arm],
    reference: Arm,
    tasks: Sequence[Task],
    tokenizer: Any,
    *,
    margins: Margins,
    alpha: float,
    splits: int,
    max_batch_tokens: int,
    seed: int,
    progress: bool = False,
) -> dict[str, tuple[Retained, ...]]:
    """What each arm but `a` keeps of every task, by the name of the arm.

    Args:
        a: the arm that nats and accuracy are compared with.
        others: the arms to judge.
        reference: the arm that KL is measured to, of one seed.
        tasks: what should be kept.
        tokenizer: of the models.
        margins: how much may be lost.
        alpha: of all intervals together.
        splits: the number of places at which a text without a prompt is split.
        max_batch_tokens: the most tokens in one forward.
        seed: of the sign flips and the splits.
        progress: show a bar over the arms.

    Raises:
        ValueError: as `read_texts` and `read_choices` of `lab.forgetting.measuring`.
    """
    if not tasks:
        return {arm.name: () for arm in others}
    (frozen,) = reference.runs
    reading = _Reading(frozen, tasks, tokenizer, splits, max_batch_tokens, seed)
    found = {arm.name: reading.figures(arm) for arm in shown([a, *others], "retention", progress)}
    of_a = found[a.name]
    confidence = 1 - alpha / (len(others) * len(of_a))
    return {
        arm.name: tuple(
            _retained(*pair, margins, confidence, seed, a is reference)
            for pair in zip(of_a, found[arm.name], strict=True)
        )
        for arm in others
    }


@dataclass(frozen=True, eq=False)
class _Figure:
    """A measure of an arm in one task: a number for each seed and item, and the share of predictions that it moves."""

    task: str
    measure: str
    values: Outcomes
    moved: float


@dataclass(frozen=True, eq=False)
class _Reading:
    """How every arm is read; the arguments are those of `retained`."""

    reference: Run
    tasks: Sequence[Task]
    tokenizer: Any
    splits: int
    max_batch_tokens: int
    seed: int

    def figures(self, arm: Arm) -> list[_Figure]:
        """All measures of an arm, task by task."""
        read = [self._read(run) for run in arm.runs]
        found: list[_Figure] = []
        for task, *of_seeds in zip(self.tasks, *read, strict=True):
            texts = [one for one in of_seeds if isinstance(one, TextSums)]
            if not texts:
                choices = [one for one in of_seeds if not isinstance(one, TextSums)]
                moved = min(share for _, share in choices)
                found.append(_Figure(task.name, ACCURACY, np.stack([right for right, _ in choices]), moved))
                continue
            nats, far = (_means([getattr(one, name) for one in texts], texts[0].count) for name in ("after", "far"))
            moved = min(one.moved for one in texts)
            found += [_Figure(task.name, NATS, nats, moved), _Figure(task.name, KL, far, moved)]
        return found

    def _read(self, run: Run) -> list[TextSums | tuple[Values, float]]:
        """Every task, read in one run, whose trails are laid in once."""
        with run.ready():
            return [self._task(run, task) for task in self.tasks]

    def _task(self, run: Run, task: Task) -> TextSums | tuple[Values, float]:
        if task.kind == "text":
            return read_texts(self.reference, run, task, self.tokenizer, self.max_batch_tokens, self.splits, self.seed)
        right = read_choices(run, task, self.tokenizer, self.max_batch_tokens)
        return right, share_of_choices(self.reference, run, task, self.tokenizer, self.max_batch_tokens)


def _means(sums: Sequence[Values], count: Values) -> Outcomes:
    """(x - R w) / mean(w) + R of each seed and item, w being `count`: their mean is R = sum(x) / sum(w)."""
    x = np.stack(sums)
    ratio = x.sum() / (len(x) * count.sum())
    return (x - ratio * count) / count.mean() + ratio


def _retained(a: _Figure, arm: _Figure, margins: Margins, confidence: float, seed: int, to_reference: bool) -> Retained:
    """The loss of an arm in one figure."""
    before, after = a.values, arm.values
    if arm.measure == KL:  # a distance, which is no loss against arm a
        before = np.zeros((1, after.shape[1]))
    worse = (after, before) if arm.measure == ACCURACY else (before, after)
    found = effect(*worse, confidence=confidence, seed=seed, counts=arm.measure == ACCURACY)
    moved = arm.moved if to_reference or arm.measure == KL else min(arm.moved, a.moved)
    interval, note = found.interval, moved_text(moved)
    if interval == UNKNOWN and not (found.wins or found.losses):
        interval = (0.0, 0.0)
        note += f"; no text changed; up to {may_still(found.items, confidence):.1%} of such may"
    return Retained(
        task=arm.task,
        measure=arm.measure,
        before=float(before.mean()),
        after=float(after.mean()),
        loss=found.value,
        interval=interval,
        confidence=confidence,
        margin={NATS: margins.nats, KL: margins.kl, ACCURACY: margins.accuracy}[arm.measure],
        items=found.items,
        note=note,
        moved=moved,
    )
