"""What a model lost for its trails: the same tasks, before and after, item by item.

    suite = [wikitext2(folder), trec(folder, 100), blimp(folder, 200), Task.read("mine.jsonl")]
    found = forgetting(model, trails, suite, tokenizer)
    print(found)                                   # one table
    found["trec", "accuracy"].interval             # of the change
    tokenpaths.plots.losses(found)                 # one picture

Of a text task, three measures: nats a token, -1/n sum_t log p(t | all before it); bits a byte, the same sum over
ln 2 x bytes of UTF-8, which models of different tokenizers share; and KL(frozen || steered) in nats a token, on texts
that the frozen model itself wrote the distance from its own distribution. Of a choice task the accuracy: the share of
items whose right option has the largest summed log-likelihood (k equals count 1/k each).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokenpaths.data.encoding import encode, encode_texts
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.items import Choice, Task, Text
from tokenpaths.drift.measures import kl, nll
from tokenpaths.drift.report import finite
from tokenpaths.engine.batches import batches
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.readings import Reading, Run, evaluating, read, runs
from tokenpaths.files import write_text
from tokenpaths.lab.forgetting.harness import Harness, Samples
from tokenpaths.site.host import window
from tokenpaths.stats.intervals import Interval, mean_interval
from tokenpaths.trailmap.adapter import Adapter

Better: TypeAlias = Literal["higher", "lower", ""]
NATS, BITS, KL, ACCURACY = "nats a token", "bits a byte", "KL to frozen", "accuracy"
LEAST_MOVED = 0.01
"""Below this share of moved tokens a text task says little, and its table says so."""


@dataclass(frozen=True)
class Loss:
    """One measure of one task: frozen, steered, and the change with its 95 % interval over items, in pairs.

    `better` says which way is better ("" for a distance from the frozen model). `guess` is what an accuracy must beat:
    that of always naming the commonest right option where all items have the same options, else of drawing one; NaN for
    other measures. `moved` is the share of tokens of texts that differ after the last block; NaN for other measures.
    """

    task: str
    measure: str
    before: float
    after: float
    change: float
    interval: Interval
    items: int
    better: Better
    guess: float = math.nan
    moved: float = math.nan

    @property
    def verdict(self) -> Literal["worse", "better", "same", "unclear", ""]:
        """On which side of 0 the whole interval lies; "same" if it is 0 itself."""
        low, high = self.interval
        if not self.better:
            return ""
        if low == high == 0:
            return "same"
        if low > 0 or high < 0:
            return "better" if (low > 0) == (self.better == "higher") else "worse"
        return "unclear"

    @property
    def note(self) -> str:
        """What a reader needs beside the figures."""
        if self.measure == NATS:
            ratio = _exp(self.change)
            return f"perplexity {_exp(self.before):.4g} -> {_exp(self.after):.4g} ({ratio:.4g}x)"
        if self.measure == KL:
            few = ": too few to say much" if self.moved < LEAST_MOVED else ""
            return f"{self.moved:.1%} of tokens moved{few}"
        return "" if math.isnan(self.guess) else f"guessing {self.guess:.3f}"


@dataclass(frozen=True)
class Forgetting:
    """What `forgetting` found: `found["trec", "accuracy"]` is a `Loss`, `print(found)` a table of all."""

    losses: tuple[Loss, ...]

    def __getitem__(self, key: tuple[str, str]) -> Loss:
        for loss in self.losses:
            if (loss.task, loss.measure) == key:
                return loss
        raise KeyError(f"{key} was not measured; there are {[(loss.task, loss.measure) for loss in self.losses]}")

    def to_markdown(self) -> str:
        header, *rows = self._cells()
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def records(self) -> list[dict[str, Any]]:
        """A flat list, one record for each task and measure."""
        return [{**asdict(loss), "verdict": loss.verdict} for loss in self.losses]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all. Infinity and NaN become null."""
        losses = [finite(asdict(loss)) for loss in self.losses]
        write_text(path, json.dumps({"losses": losses}, indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Forgetting:
        """Read what `to_json` wrote. Raises `ValueError` for any other file."""
        try:
            return cls(tuple(_loss(**loss) for loss in json.loads(Path(path).read_text(encoding="utf-8"))["losses"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a forgetting report as to_json writes it: {error}") from error

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)

    def _cells(self) -> list[list[str]]:
        rows = [["task", "measure", "frozen", "steered", "change [95 % interval]", "", "items", ""]]
        for loss in self.losses:
            low, high = loss.interval
            change = f"{loss.change:+.4f} [{low:+.4f}, {high:+.4f}]"
            figures = [f"{loss.before:.4f}", f"{loss.after:.4f}", change, loss.verdict, str(loss.items), loss.note]
            rows.append([loss.task, loss.measure, *figures])
        return rows


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

    Text is tokenised as at generation, special tokens included. A text without a prompt is all prompt to token rules:
    `Last(1)` moves its last token only, and the report says how few were moved. Options of one prompt share its cache
    where the model's cache allows. Forwards take at most `max_batch_tokens` tokens at a time. The model is left as it was,
    trails attached or not; while attached by you, they are measured at the strength that you chose.

    Raises:
        ValueError: an empty suite, two tasks of one name, a text that the model's window does not hold, or a model that
            gives a number that is not finite.
        ImportError: the suite has a `Harness`, and lm-evaluation-harness is not installed.
    """
    if not suite:
        raise ValueError("the suite is empty: give it tasks, such as Task.read(path) or wikitext2(folder)")
    names = [task.name for task in suite if isinstance(task, Task)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two tasks go by the name {twice[0]!r}: the report could not tell them apart")
    both = runs(model, trails, tokenizer=tokenizer)
    losses: list[Loss] = []
    for task in tqdm(suite, desc="forgetting", disable=not progress):
        if isinstance(task, Harness):
            losses += _harness(both, task, tokenizer)
        elif task.kind == "text":
            losses += _texts(both, task, tokenizer, max_batch_tokens)
        else:
            losses.append(_choices(both, task, tokenizer, max_batch_tokens))
    return Forgetting(tuple(losses))


def _texts(both: tuple[Run, Run], task: Task, tokenizer: Any, max_batch_tokens: int) -> list[Loss]:
    """Sums over the scored tokens of each text, and from them the three measures."""
    items = [item for item in task.items if isinstance(item, Text)]
    examples = [_example(tokenizer, item, task.name, number) for number, item in enumerate(items)]
    _check_window(both[0].model, examples, task.name)
    before, after, far, count, moved = text_sums(*both, examples, max_batch_tokens).T
    share = float(moved.sum() / sum(map(len, examples)))
    size = np.array([_bytes(tokenizer, *pair) for pair in zip(items, examples, strict=True)], dtype=np.float64)

    def loss(measure: str, before: Any, after: Any, weights: Any, better: Better) -> Loss:
        x, y, change = (float(part.sum() / weights.sum()) for part in (before, after, after - before))
        interval = mean_interval(after - before, weights)
        return Loss(task.name, measure, x, y, change, interval, len(items), better, moved=share)

    bits = math.log(2) * size
    return [
        loss(NATS, before, after, count, "lower"),
        loss(BITS, before, after, bits, "lower"),
        loss(KL, np.zeros(len(items)), far, count, ""),
    ]


def text_sums(
    before: Run, after: Run, examples: Sequence[Example], max_batch_tokens: int
) -> Float[np.ndarray, "items 5"]:
    """Of each text: nats before and after and KL over the tokens that predict one, their number, and tokens moved."""
    sums = np.zeros((len(examples), 5))
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        pairs = read(before, after, collate([examples[i] for i in rows]))
        for i in rows:
            sums[i] = _sums(*pairs.pop(0))  # so that the log-probabilities of one text live at a time
    return sums


def _sums(before: Reading, after: Reading) -> tuple[float, ...]:
    """Of one text: nats before and after and KL over the tokens that predict one, their number, and tokens moved."""
    predicts = before.answer.roll(-1)  # the first token never is of an answer
    if not bool(before.answer.any()):
        predicts[:-1] = True

    def total(values: Tensor) -> float:
        return float(values[predicts].double().sum())

    last = [name for name in before.states if name.startswith("block")][-1]
    moved = (before.states[last] != after.states[last]).any(-1)
    return total(nll(before)), total(nll(after)), total(kl(before, after)), float(predicts.sum()), float(moved.sum())


def _choices(both: tuple[Run, Run], task: Task, tokenizer: Any, max_batch_tokens: int) -> Loss:
    items = [item for item in task.items if isinstance(item, Choice)]
    try:
        encoded = encode_choices(items, tokenizer)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error
    _check_window(both[0].model, [option for options in encoded for option in options], task.name)
    scores: list[Any] = []
    for run in both:
        with run.inside(), evaluating(run.model):
            scores.append(right(log_likelihoods(run.model, encoded, max_batch_tokens), items))
    return _paired(task.name, ACCURACY, *scores, guess=_guess(items))


def _guess(items: Sequence[Choice]) -> float:
    """What someone scores who does not read: the commonest right option if all have the same options, else a draw."""
    if len({item.options for item in items}) == 1:
        return max(Counter(item.right for item in items).values()) / len(items)
    return sum(1 / len(item.options) for item in items) / len(items)


def _harness(both: tuple[Run, Run], task: Harness, tokenizer: Any) -> Iterator[Loss]:
    found: list[Mapping[tuple[str, str], Samples]] = []
    for run in both:
        with run.inside(), evaluating(run.model):
            found.append(task.samples(run.model, tokenizer))
    for key, before in found[0].items():
        after = found[1][key]
        if before.ids != after.ids:
            raise ValueError(f"lm-evaluation-harness gave other items of {key[0]!r} in its second run: nothing to pair")
        yield _paired(*key, before.values, after.values, better="higher" if before.higher_is_better else "lower")


def _paired(
    task: str, measure: str, before: Any, after: Any, better: Better = "higher", guess: float = math.nan
) -> Loss:
    x, y, change = (float(part.mean()) for part in (before, after, after - before))
    return Loss(task, measure, x, y, change, mean_interval(after - before), len(before), better, guess)


def _example(tokenizer: Any, item: Text, task: str, number: int) -> Example:
    try:
        if item.prompt:
            return encode([(item.prompt, item.text)], tokenizer, eos=False)[0]
        example = encode_texts([item.text], tokenizer)[0]
        if len(example) < 2:
            raise ValueError("it has one token: there is nothing in it to predict")
        return example
    except ValueError as error:
        raise ValueError(f"task {task!r}, item {number}: {error}") from error


def _bytes(tokenizer: Any, item: Text, example: Example) -> int:
    """The bytes of the tokens that are scored: all of the text, but for a first token that nothing stands before."""
    size = len(item.text.encode())
    if item.prompt or example.ids[0] in tokenizer.all_special_ids:
        return size
    return max(1, size - len(tokenizer.decode(example.ids[:1]).encode()))


def _check_window(model: nn.Module, examples: Sequence[Example], task: str) -> None:
    most, longest = window(model), max(map(len, examples))
    if most is not None and longest > most:
        raise ValueError(f"task {task!r} has an item of {longest} tokens, and the model's window holds {most}: cut it")


def _loss(interval: list[float | None], items: int, task: str, measure: str, better: Better, **rest: Any) -> Loss:
    low, high = interval
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    numbers = {key: math.nan if value is None else float(value) for key, value in rest.items()}
    return Loss(task=task, measure=measure, interval=bounds, items=items, better=better, **numbers)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # math.exp would raise
