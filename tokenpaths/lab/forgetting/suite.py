"""What a model lost for its trails: the same tasks, before and after, item by item.

    suite = [wikitext2(folder), trec(folder, 100), blimp(folder, 200), Task.load("mine.jsonl")]
    found = forgetting(model, trails, suite, tokenizer)
    print(found)                                   # one table
    found["trec", "accuracy"].interval             # of the change
    found.plot()                                   # one picture

A text task has three measures. Nats a token are -1/n sum_t log p(t | all before it). Bits a byte are the same sum over
ln 2 x bytes of UTF-8, which models of different tokenizers share. KL(frozen || steered) is in nats a token; on texts
that the frozen model itself wrote it is the distance from its own distribution. A choice task has its accuracy: the
share of items whose right option has the largest summed log-likelihood, where k equals count 1/k each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.items import Choice, Task
from tokenpaths.engine.batches import shown
from tokenpaths.engine.readings import Run, runs
from tokenpaths.lab.forgetting.harness import Harness
from tokenpaths.lab.forgetting.measuring import read_choices, read_texts
from tokenpaths.lab.forgetting.report import ACCURACY, BITS, KL, NATS, Better, Forgetting, Loss
from tokenpaths.stats.intervals import mean_interval
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
    max_batch_tokens: int = 1500,
    progress: bool = False,
) -> Forgetting:
    """Measure every task of a suite on the frozen model and on the steered one, and what changed.

    Texts are tokenised as at generation, special tokens included. A text without a prompt is all prompt to token rules:
    `Last(1)` moves its last token only, and the report says how few were moved. Options of one prompt share its cache
    where the model's cache allows. The model is left as it was, whether or not the trails are attached. Trails that you
    attached are measured at the strength that you chose.

    Args:
        model: a causal language model.
        trails: what steers it: a `TrailMap`, or another adapter.
        suite: tasks, and tasks of lm-evaluation-harness as `Harness`.
        tokenizer: the model's tokenizer.
        max_batch_tokens: the most tokens in one forward, padding included.
        progress: show a bar.

    Raises:
        ValueError: an empty suite, two tasks of one name, a text that the model's window does not hold, or a model that
            gives a number that is not finite.
        ImportError: the suite has a `Harness`, and lm-evaluation-harness is not installed.
    """
    if not suite:
        raise ValueError("the suite is empty: give it tasks, such as Task.load(path) or wikitext2(folder)")
    names = [task.name for task in suite if isinstance(task, Task)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two tasks go by the name {twice[0]!r}: the report could not tell them apart")
    frozen, steered = runs(model, trails, tokenizer=tokenizer)
    losses: list[Loss] = []
    with steered.ready():
        for task in shown(suite, "forgetting", progress):
            if isinstance(task, Harness):
                losses += _harness(frozen, steered, task, tokenizer)
            elif task.kind == "text":
                losses += _texts(frozen, steered, task, tokenizer, max_batch_tokens)
            else:
                scores = [read_choices(run, task, tokenizer, max_batch_tokens) for run in (frozen, steered)]
                losses.append(_loss(task.name, ACCURACY, *scores, better="higher", guess=_guess(task)))
    return Forgetting(tuple(losses))


def _texts(frozen: Run, steered: Run, task: Task, tokenizer: Any, max_batch_tokens: int) -> Iterator[Loss]:
    found = read_texts(frozen, steered, task, tokenizer, max_batch_tokens)
    for measure, weights in ((NATS, found.count), (BITS, math.log(2) * found.size)):
        yield _loss(task.name, measure, found.before, found.after, weights, better="lower", moved=found.moved)
    yield _loss(task.name, KL, np.zeros(len(task.items)), found.far, found.count, moved=found.moved)


def _harness(frozen: Run, steered: Run, task: Harness, tokenizer: Any) -> Iterator[Loss]:
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
        yield _loss(*key, x.values, y.values, better="higher" if x.higher_is_better else "lower")


def _loss(
    task: str,
    measure: str,
    before: Items,
    after: Items,
    weights: Items | None = None,
    better: Better = "",
    **rest: float,
) -> Loss:
    """A measure sum(values) / sum(weights) in both runs; without weights, the mean over items."""
    total = len(before) if weights is None else weights.sum()
    x, y, change = (float(part.sum() / total) for part in (before, after, after - before))
    interval = mean_interval(after - before, weights)
    return Loss(task, measure, x, y, change, interval, len(before), better, **rest)


def _guess(task: Task) -> float:
    """What someone scores who does not read: the commonest right option if all have the same options, else a draw."""
    items = [item for item in task.items if isinstance(item, Choice)]
    if len({item.options for item in items}) == 1:
        return max(Counter(item.right for item in items).values()) / len(items)
    return sum(1 / len(item.options) for item in items) / len(items)
