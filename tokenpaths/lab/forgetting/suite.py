"""What a model lost for its trails: the same tasks, before and after, item by item.

    suite = [wikitext2(folder), trec(folder, 100), blimp(folder, 200), Task.load("mine.jsonl")]
    found = forgetting(model, trails, suite, tokenizer)
    print(found)                                   # one table, and what its verdicts are by
    found["trec", "accuracy"].interval             # of the change
    found["trec", "accuracy"].verdict              # "worse", "better", "same" or "cannot tell"
    found.plot()                                   # one picture

Arms are compared on the same tokens: a text without a prompt is split into prompt and answer at several places, for
trails and for LoRA alike, and what follows is scored. The verdicts of all tasks together err with probability 0.05.

A text task has three measures. Nats a token are -1/n sum_t log p(t | all before it). Bits a byte are the same sum over
ln 2 x bytes of UTF-8, which models of different tokenizers share. KL(frozen || steered) is in nats a token; on texts
that the frozen model itself wrote it is the distance from its own distribution. A choice task has its accuracy: the
share of items whose right option has the largest summed log-likelihood, where k equals count 1/k each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.items import Choice, Task
from tokenpaths.data.splitting import SPLITS
from tokenpaths.engine.batches import shown
from tokenpaths.engine.readings import Run, runs
from tokenpaths.lab.forgetting.harness import Harness, share_moved
from tokenpaths.lab.forgetting.margins import MARGINS, Margins
from tokenpaths.lab.forgetting.measuring import TextSums, read_choices, read_texts, share_of_choices
from tokenpaths.lab.forgetting.report import ACCURACY, BITS, KL, NATS, Better, Forgetting, Loss
from tokenpaths.stats.intervals import Interval, mean_interval
from tokenpaths.stats.paired import effect
from tokenpaths.stats.verdicts import noticeable, step_down
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import tidy

Items = Float[np.ndarray, " items"]


@tidy
def forgetting(
    model: nn.Module,
    trails: Adapter,
    suite: Sequence[Task | Harness],
    tokenizer: Any,
    *,
    trained: Task | None = None,
    forms: Sequence[Task] = (),
    splits: int = SPLITS,
    margins: Margins = MARGINS,
    max_batch_tokens: int = 1500,
    seed: int = 0,
    progress: bool = False,
) -> Forgetting:
    """Measure every task of a suite on the frozen model and on the steered one, and what changed.

    Texts are tokenised as at generation, special tokens included. Options of one prompt share its cache where the
    model's cache allows. The model is left as it was, whether or not the trails are attached. Trails that you attached
    are measured at the strength that you chose.

    Args:
        model: a causal language model.
        trails: what steers it: a `TrailMap`, or another adapter.
        suite: tasks, and tasks of lm-evaluation-harness as `Harness`.
        tokenizer: the model's tokenizer.
        trained: what was taught, in the form in which it was taught: items of choice that were held out. It is told
            beside what was lost.
        forms: the same task in other forms.
        splits: the number of places at which a text without a prompt is split into prompt and answer; each is one more
            forward of the text. With 0 it is prompt throughout, and `Last(1) | Answer()` moves its last token only.
        margins: the change that counts as none, in nats a token and in the share of right choices.
        max_batch_tokens: the most tokens in one forward, padding included.
        seed: draws the places of the splits.
        progress: show a bar.

    Raises:
        ValueError: an empty suite, a task of text among those that were taught, two tasks of one name, a text that the
            model's window does not hold, or a model that gives a number that is not finite.
        ImportError: the suite has a `Harness`, and lm-evaluation-harness is not installed.
    """
    learned = [*([] if trained is None else [trained]), *forms]
    if wrong := [task.name for task in learned if task.kind == "text"]:
        raise ValueError(f"{wrong[0]!r} is a task of text: what was learned is told by the right choices of a task")
    if not suite:
        raise ValueError("the suite is empty: give it tasks, such as Task.load(path) or wikitext2(folder)")
    suite = [*suite, *learned]
    names = [task.name for task in suite if isinstance(task, Task)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two tasks go by the name {twice[0]!r}: the report could not tell them apart")
    frozen, steered = runs(model, trails, tokenizer=tokenizer)
    found: list[_Paired] = []
    with steered.ready():
        for task in shown(suite, "forgetting", progress):
            if isinstance(task, Harness):
                found += _harness(frozen, steered, task, tokenizer, margins)
            elif task.kind == "text":
                sums = read_texts(frozen, steered, task, tokenizer, max_batch_tokens, splits, seed)
                found += _texts(task, sums, margins)
            else:
                scores = [read_choices(run, task, tokenizer, max_batch_tokens) for run in (frozen, steered)]
                moved = share_of_choices(frozen, steered, task, tokenizer, max_batch_tokens)
                made = _Paired(task.name, ACCURACY, *scores, better="higher", moved=moved, margin=margins.accuracy)
                found.append(replace(made, guess=_guess(task)))
    return Forgetting(tuple(_losses(found)), trained.name if trained else "", tuple(form.name for form in forms))


@dataclass(frozen=True, eq=False)
class _Paired:
    """A measure sum(values) / sum(weights) of both runs, item by item; without weights, the mean over items."""

    task: str
    measure: str
    before: Items
    after: Items
    weights: Items | None = None
    better: Better = ""
    guess: float = math.nan
    moved: float = math.nan
    margin: float = math.nan

    def interval(self, confidence: float = 0.95) -> Interval:
        """Of the change: Tango's of right or wrong, which has bounds where no item changed, else that of the mean."""
        if self.weights is None and all(np.isin(part, (0, 1)).all() for part in (self.before, self.after)):
            return effect(self.before, self.after, confidence=confidence).interval
        return mean_interval(self.after - self.before, self.weights, confidence)

    def loss(self, confidence: float | None) -> Loss:
        """The figures, judged by the interval of this confidence."""
        total = len(self.before) if self.weights is None else self.weights.sum()
        x, y, change = (float(part.sum() / total) for part in (self.before, self.after, self.after - self.before))
        interval, items = self.interval(), len(self.before)
        made = Loss(self.task, self.measure, x, y, change, interval, items, self.better, self.guess, self.moved)
        if confidence is None:
            return made
        w = np.ones(items) if self.weights is None else self.weights
        by_item = (self.after - self.before - change * w) / w.mean() + change
        hides = noticeable(by_item, confidence)
        return replace(made, adjusted=self.interval(confidence), margin=self.margin, noticeable=hides)


def _losses(found: Sequence[_Paired]) -> Iterator[Loss]:
    """The figures with their verdicts. Bits are nats in another unit, so both are judged as one test."""
    tests = [one for one in found if one.better and one.measure != BITS]
    confidences = step_down([one.interval for one in tests], [0.0] * len(tests))
    of_task = {one.task: confidence for one, confidence in zip(tests, confidences, strict=True) if one.measure == NATS}
    known = dict(zip(map(id, tests), confidences, strict=True))
    for one in found:
        yield one.loss(of_task[one.task] if one.measure == BITS else known.get(id(one)))


def _texts(task: Task, sums: TextSums, margins: Margins) -> Iterator[_Paired]:
    bits = math.log(2) * sums.size
    scale = float(sums.count.sum() / bits.sum())
    for measure, weights, margin in ((NATS, sums.count, margins.nats), (BITS, bits, margins.nats * scale)):
        yield _Paired(
            task.name, measure, sums.before, sums.after, weights, "lower", moved=sums.moved, margin=margin
        )  # fmt: skip
    yield _Paired(task.name, KL, np.zeros(len(task.items)), sums.far, sums.count, moved=sums.moved)


def _harness(
    frozen: Run, steered: Run, task: Harness, tokenizer: Any, margins: Margins
) -> Iterator[_Paired]:  # fmt: skip
    with frozen.reading() as model:
        before = task.samples(model, tokenizer)
    with steered.reading() as model:
        after = task.samples(model, tokenizer)
    for key, x in before.items():
        y = after[key]
        if x.ids != y.ids:
            raise ValueError(f"lm-evaluation-harness gave other items of {key[0]!r} in its second run: nothing to pair")
        if not (np.isfinite(x.values).all() and np.isfinite(y.values).all()):
            raise ValueError(f"lm-evaluation-harness gave {key[1]} of {key[0]!r} that is not finite: leave it out")
        shares = all(((part >= 0) & (part <= 1)).all() for part in (x.values, y.values))
        yield _Paired(
            *key,
            x.values,
            y.values,
            better="higher" if x.higher_is_better else "lower",
            moved=share_moved(frozen, steered, x.written),
            margin=margins.accuracy if shares else math.nan,
        )


def _guess(task: Task) -> float:
    """What someone scores who does not read: the commonest right option if all have the same options, else a draw."""
    items = [item for item in task.items if isinstance(item, Choice)]
    if len({item.options for item in items}) == 1:
        return max(Counter(item.right for item in items).values()) / len(items)
    return sum(1 / len(item.options) for item in items) / len(items)
