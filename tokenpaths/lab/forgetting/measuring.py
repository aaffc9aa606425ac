"""Reading the items of a task: the likelihoods of texts in two runs, and the right choices of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.encoding import encode, encode_texts
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.items import Choice, Task, Text
from tokenpaths.drift.measures import kl, moved, nll
from tokenpaths.engine.batches import batches
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.readings import Reading, Run, read, read_one
from tokenpaths.site.host import window


@dataclass(frozen=True, eq=False)
class TextSums:
    """What two runs make of each text of a task, summed over its n scored tokens; [items] each.

    Args:
        before: -sum_t log p(t | all before it) of the first run, in nats.
        after: the same of the second run.
        far: sum_t KL(first || second) over the predictions of scored tokens, in nats.
        count: n.
        size: the bytes of UTF-8 of the scored tokens.
        moved: the share of the tokens of all texts whose state after the last block differs between the runs.
    """

    before: Float[np.ndarray, " items"]
    after: Float[np.ndarray, " items"]
    far: Float[np.ndarray, " items"]
    count: Float[np.ndarray, " items"]
    size: Float[np.ndarray, " items"]
    moved: float


def read_texts(before: Run, after: Run, task: Task, tokenizer: Any, max_batch_tokens: int) -> TextSums:
    """Read a task of texts in two runs, side by side, since KL needs both.

    The text behind a prompt is scored, or of a text without one all tokens but the first. A run that is compared with
    itself is run once.

    Raises:
        ValueError: a text has nothing to predict, or is longer than the model's window; names task and item. A run
            gives states or logits that are not finite.
    """
    items = [item for item in task.items if isinstance(item, Text)]
    examples = [_example(item, task.name, number, tokenizer) for number, item in enumerate(items)]
    _check_window(before.model, examples, task)
    sums = np.zeros((len(items), 5))
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        batch = collate([examples[i] for i in rows])
        pairs = read(before, after, batch) if after is not before else [(one, one) for one in read_one(after, batch)]
        for i in rows:
            sums[i] = _sums(*pairs.pop(0))  # so that the log-probabilities of one text live at a time
    *columns, moved = sums.T
    size = np.array([_bytes(*pair, tokenizer) for pair in zip(items, examples, strict=True)], dtype=np.float64)
    return TextSums(*columns, size=size, moved=float(moved.sum() / sum(map(len, examples))))


def read_choices(run: Run, task: Task, tokenizer: Any, max_batch_tokens: int) -> Float[np.ndarray, " items"]:
    """Of each choice of a task 1 if the right option has the largest summed log-likelihood, 1/k if k have it, else 0.

    Options of one prompt share its cache where the model's cache allows.

    Raises:
        ValueError: sentences without a prompt begin with different tokens, or an item is longer than the model's
            window; names task and item. The model gives a likelihood that is not finite.
    """
    items = [item for item in task.items if isinstance(item, Choice)]
    try:
        encoded = encode_choices(items, tokenizer)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error
    _check_window(run.model, [option for options in encoded for option in options], task)
    with run.reading() as model:
        return right(log_likelihoods(model, encoded, max_batch_tokens), items)


def _sums(before: Reading, after: Reading) -> tuple[float, ...]:
    """Of one text: nats before and after and KL over the tokens that predict one, their number, and tokens moved."""
    predicts = before.answer.roll(-1)  # the first token never is of an answer
    if not bool(before.answer.any()):
        predicts[:-1] = True

    def total(values: Tensor) -> float:
        return float(values[predicts].double().sum())

    changed = float(moved(before, after).sum())
    return total(nll(before)), total(nll(after)), total(kl(before, after)), float(predicts.sum()), changed


def _example(item: Text, task: str, number: int, tokenizer: Any) -> Example:
    try:
        if item.prompt:
            return encode([(item.prompt, item.text)], tokenizer, eos=False)[0]
        example = encode_texts([item.text], tokenizer)[0]
        if len(example) < 2:
            raise ValueError("it has one token: there is nothing in it to predict")
        return example
    except ValueError as error:
        raise ValueError(f"task {task!r}, item {number}: {error}") from error


def _bytes(item: Text, example: Example, tokenizer: Any) -> int:
    """The bytes of the tokens that are scored: all of the text, but for a first token that nothing stands before."""
    size = len(item.text.encode())
    if item.prompt or example.ids[0] in tokenizer.all_special_ids:
        return size
    return max(1, size - len(tokenizer.decode(example.ids[:1]).encode()))


def _check_window(model: nn.Module, examples: Sequence[Example], task: Task) -> None:
    most, longest = window(model), max(map(len, examples))
    if most is not None and longest > most:
        raise ValueError(
            f"task {task.name!r} has an item of {longest} tokens, and the model's window holds {most}: cut it"
        )
