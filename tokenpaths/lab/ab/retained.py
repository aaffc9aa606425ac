"""What an arm keeps of what the model could do: tasks, each against a margin.

Of a text task two figures: nats a token (the sum over scored tokens / their number) against arm a, and KL(reference ||
arm) in nats a token. Of a choice task, accuracy against arm a. Each is stated as a **loss**, which is kept if its whole
interval is at most its margin (non-inferiority). The intervals hold together: that of each of m figures has confidence
1 - alpha / m (Bonferroni).

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
from tokenpaths.lab.forgetting.measuring import TextSums, read_choices, read_texts
from tokenpaths.lab.forgetting.report import ACCURACY, KL, NATS, moved_text
from tokenpaths.stats.intervals import UNKNOWN, Interval, Values
from tokenpaths.stats.paired import Outcomes, effect


@dataclass(frozen=True)
class Margins:
    """How much an arm may lose.

    Args:
        nats: nats a token of texts, against arm a.
        accuracy: the share of right choices, against arm a.
        kl: nats a token of KL to the reference.

    Raises:
        ValueError: a margin of 0 or less, which no sample could show to be kept.
    """

    nats: float = 0.05
    accuracy: float = 0.05
    kl: float = 0.1

    def __post_init__(self) -> None:
        for name, margin in vars(self).items():
            if not 0 < margin < math.inf:
                raise ValueError(f"the margin of {name} is {margin}, but must be above 0: no sample shows no loss")


MARGINS = Margins()


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

    @property
    def says(self) -> Literal["kept", "lost", "cannot tell"]:
        """On which side of the margin the whole interval lies."""
        low, high = self.interval
        if high <= self.margin:
            return "kept"
        return "lost" if low > self.margin else "cannot tell"

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
        max_batch_tokens: the most tokens in one forward.
        seed: of the sign flips.
        progress: show a bar over the arms.

    Raises:
        ValueError: as `read_texts` and `read_choices` of `lab.forgetting.measuring`.
    """
    if not tasks:
        return {arm.name: () for arm in others}
    (frozen,) = reference.runs
    found = {
        arm.name: _figures(arm, frozen, tasks, tokenizer, max_batch_tokens)
        for arm in shown([a, *others], "retention", progress)
    }
    of_a = found[a.name]
    confidence = 1 - alpha / (len(others) * len(of_a))
    return {
        arm.name: tuple(_retained(*pair, margins, confidence, seed) for pair in zip(of_a, found[arm.name], strict=True))
        for arm in others
    }


@dataclass(frozen=True, eq=False)
class _Figure:
    """A measure of an arm in one task: a number for each seed and item."""

    task: str
    measure: str
    values: Outcomes
    note: str = ""


def _figures(arm: Arm, reference: Run, tasks: Sequence[Task], tokenizer: Any, max_batch_tokens: int) -> list[_Figure]:
    """All measures of an arm, task by task."""
    read = [_read(run, reference, tasks, tokenizer, max_batch_tokens) for run in arm.runs]
    found: list[_Figure] = []
    for task, *of_seeds in zip(tasks, *read, strict=True):
        texts = [one for one in of_seeds if isinstance(one, TextSums)]
        if not texts:
            found.append(_Figure(task.name, ACCURACY, np.stack(of_seeds)))
            continue
        nats, far = (_means([getattr(one, name) for one in texts], texts[0].count) for name in ("after", "far"))
        moved = sum(one.moved for one in texts) / len(texts)
        found += [_Figure(task.name, NATS, nats), _Figure(task.name, KL, far, moved_text(moved))]
    return found


def _read(
    run: Run, reference: Run, tasks: Sequence[Task], tokenizer: Any, max_batch_tokens: int
) -> list[TextSums | Values]:
    """Every task, read in one run, whose trails are laid in once."""
    with run.ready():
        return [
            read_texts(reference, run, task, tokenizer, max_batch_tokens)
            if task.kind == "text"
            else read_choices(run, task, tokenizer, max_batch_tokens)
            for task in tasks
        ]


def _means(sums: Sequence[Values], count: Values) -> Outcomes:
    """(x - R w) / mean(w) + R of each seed and item, w being `count`: their mean is R = sum(x) / sum(w)."""
    x = np.stack(sums)
    ratio = x.sum() / (len(x) * count.sum())
    return (x - ratio * count) / count.mean() + ratio


def _retained(a: _Figure, arm: _Figure, margins: Margins, confidence: float, seed: int) -> Retained:
    """The loss of an arm in one figure."""
    before, after = a.values, arm.values
    if arm.measure == KL:  # a distance, which is no loss against arm a
        before = np.zeros((1, after.shape[1]))
    worse = (after, before) if arm.measure == ACCURACY else (before, after)
    found = effect(*worse, confidence=confidence, seed=seed, counts=arm.measure == ACCURACY)
    interval, note = found.interval, arm.note
    if interval == UNKNOWN and not (found.wins or found.losses):
        interval, few = (0.0, 0.0), 1 - (1 - confidence) ** (1 / found.items)
        note += f"{'; ' if note else ''}no text changed; up to {few:.1%} of such may"
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
    )
