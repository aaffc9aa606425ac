"""What an arm keeps of what the model could do: the tasks of `tokenpaths.retention`, against a margin.

Of a text task, nats a token (the sum over scored tokens / their number) against arm a, and KL(reference || arm) in nats
a token; of a choice task, accuracy against arm a. Each is stated as a **loss**, and is at most its margin with the
confidence of its interval (non-inferiority). The intervals hold together: that of each of m figures has confidence
1 - alpha / m (Bonferroni).

Where every number of a text task is exactly what it was, as behind shut gates, there is no spread to make an interval
of: it is [0, 0], which is kept, and the note says what share of such texts may still change (1 - (alpha / m)^(1 / n)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from tokenpaths.data.encoding import encode, encode_texts
from tokenpaths.data.examples import Example
from tokenpaths.data.items import Choice, Task, Text
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.readings import Run, evaluating
from tokenpaths.lab.ab.arms import Arm
from tokenpaths.lab.forgetting.suite import ACCURACY, KL, LEAST_MOVED, NATS, text_sums
from tokenpaths.site.host import window
from tokenpaths.stats.intervals import UNKNOWN, Interval
from tokenpaths.stats.paired import Effect, Outcomes, effect


@dataclass(frozen=True)
class Margins:
    """How much an arm may lose: nats a token of texts, share of right choices, nats a token of KL to the reference."""

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
    """One figure of one task: arm a's (0 for KL), this arm's, and the loss with its interval and its margin."""

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
    """Measure every task for every arm; by the name of the arm, of all arms but `a`."""
    figures = len(others) * sum(2 if task.kind == "text" else 1 for task in tasks)
    confidence = 1 - alpha / max(1, figures)
    found: dict[str, list[Retained]] = {arm.name: [] for arm in others}

    def add(
        arm: Arm, task: Task, measure: str, loss: Effect, before: float, after: float, margin: float, note: str = ""
    ) -> None:
        interval = loss.interval
        if interval == UNKNOWN and not (loss.wins or loss.losses):
            interval, few = (0.0, 0.0), 1 - (1 - confidence) ** (1 / loss.items)
            note += f"{'; ' if note else ''}no text changed; up to {few:.1%} of such may"
        figure = (loss.value, interval, confidence, margin, loss.items, note)
        found[arm.name].append(Retained(task.name, measure, before, after, *figure))

    for task in tqdm(tasks, desc="retention", disable=not progress):
        if task.kind == "text":
            nats, far, moved = _texts([a, *others], reference, task, tokenizer, max_batch_tokens)
            none = np.zeros(len(task.items))
            for arm in others:
                loss = effect(nats[a.name], nats[arm.name], confidence=confidence, seed=seed, counts=False)
                means = float(nats[a.name].mean()), float(nats[arm.name].mean())
                add(arm, task, NATS, loss, *means, margins.nats)
                distance = effect(none, far[arm.name], confidence=confidence, seed=seed, counts=False)
                few = ": too few to say much" if moved[arm.name] < LEAST_MOVED else ""
                note = f"{moved[arm.name]:.1%} of tokens moved{few}"
                add(arm, task, KL, distance, 0.0, distance.value, margins.kl, note)
        else:
            scores = _choices([a, *others], task, tokenizer, max_batch_tokens)
            for arm in others:
                loss = effect(scores[arm.name], scores[a.name], confidence=confidence, seed=seed)
                means = float(scores[a.name].mean()), float(scores[arm.name].mean())
                add(arm, task, ACCURACY, loss, *means, margins.accuracy)
    return {name: tuple(figures) for name, figures in found.items()}


def _texts(
    arms: Sequence[Arm], reference: Arm, task: Task, tokenizer: Any, max_batch_tokens: int
) -> tuple[dict[str, Outcomes], dict[str, Outcomes], dict[str, float]]:
    """Nats and KL of each text, [seeds, items], whose means are those of all tokens; and the share of moved tokens."""
    (frozen,) = reference.runs
    examples = list(_examples(task, tokenizer, frozen))
    nats: dict[str, Outcomes] = {}
    far: dict[str, Outcomes] = {}
    moved: dict[str, float] = {}
    for arm in arms:
        sums = np.stack([text_sums(frozen, run, examples, max_batch_tokens) for run in arm.runs])  # [seeds, items, 5]
        _, after, distance, count, changed = np.moveaxis(sums, 2, 0)
        nats[arm.name] = _shares(after, count[0])
        far[arm.name] = _shares(distance, count[0])
        moved[arm.name] = float(changed.mean(0).sum() / sum(map(len, examples)))
    return nats, far, moved


def _shares(sums: Outcomes, count: Float[np.ndarray, " items"]) -> Outcomes:
    """Numbers whose mean over items is sum(sums) / sum(count), and varies as that does: (x - R w) / mean(w) + R."""
    ratio = sums.sum() / (len(sums) * count.sum())
    return (sums - ratio * count) / count.mean() + ratio


def _choices(arms: Sequence[Arm], task: Task, tokenizer: Any, max_batch_tokens: int) -> dict[str, Outcomes]:
    items = [item for item in task.items if isinstance(item, Choice)]
    try:
        encoded = encode_choices(items, tokenizer)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error
    scores: dict[str, Outcomes] = {}
    for arm in arms:
        rows: list[Any] = []
        for run in arm.runs:
            with run.inside(), evaluating(run.model):
                rows.append(right(log_likelihoods(run.model, encoded, max_batch_tokens), items))
        scores[arm.name] = np.stack(rows)
    return scores


def _examples(task: Task, tokenizer: Any, run: Run) -> Iterator[Example]:
    most = window(run.model)
    for number, item in enumerate(item for item in task.items if isinstance(item, Text)):
        if item.prompt:
            example = encode([(item.prompt, item.text)], tokenizer, eos=False)[0]
        else:
            example = encode_texts([item.text], tokenizer)[0]
        if len(example) < 2 or (most is not None and len(example) > most):
            raise ValueError(
                f"task {task.name!r}, item {number}: it has {len(example)} tokens, but must have 2 at least and no "
                f"more than the model's window of {most}"
            )
        yield example
