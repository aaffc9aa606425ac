"""Reading the items of a task: the likelihoods of texts in two runs, and the right choices of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenpaths.data.encoding import encode, encode_texts
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.items import Choice, Task, Text
from tokenpaths.data.splitting import SPLITS, split
from tokenpaths.drift.measures import kl, moved, nll
from tokenpaths.engine.batches import batches
from tokenpaths.engine.likelihood import Options, encode_choices, log_likelihoods, right
from tokenpaths.engine.reach import predictors, reached, share_reached
from tokenpaths.engine.readings import Reading, Run, read, read_one
from tokenpaths.site.host import window
from tokenpaths.tokens import token_pieces


@dataclass(frozen=True, eq=False)
class TextSums:
    """What two runs make of each text of a task, summed over its n scored tokens; [items] each.

    Of a text that was split, the sums are over all its splits, and a token counts once in each that scores it.

    Args:
        before: -sum_t log p(t | all before it) of the first run, in nats.
        after: the same of the second run.
        far: sum_t KL(first || second) over the predictions of scored tokens, in nats.
        count: n.
        size: the bytes of UTF-8 of the scored tokens.
        moved: the share of the scored predictions of all texts that the second run moves: those that it can change, as
            `engine.reach` tells, or whose state after the last block does differ.
    """

    before: Float[np.ndarray, " items"]
    after: Float[np.ndarray, " items"]
    far: Float[np.ndarray, " items"]
    count: Float[np.ndarray, " items"]
    size: Float[np.ndarray, " items"]
    moved: float


def read_texts(
    before: Run, after: Run, task: Task, tokenizer: Any, max_batch_tokens: int, splits: int = SPLITS, seed: int = 0
) -> TextSums:
    """Read a task of texts in two runs, side by side, since KL needs both.

    What follows a prompt is scored. A text without one is split into prompt and answer at `splits` places, the same for
    all runs (`data.splitting`); with `splits` 0 it is prompt throughout, and all tokens but the first are scored. A run
    that is compared with itself is run once.

    Raises:
        ValueError: a text has nothing to predict, or is longer than the model's window; names task and item. A run
            gives states or logits that are not finite. `splits` is below 0.
    """
    if splits < 0:
        raise ValueError(f"splits={splits} is the number of places at which a text is split: 0 or more")
    items = [item for item in task.items if isinstance(item, Text)]
    whole = [_example(item, task.name, number, tokenizer) for number, item in enumerate(items)]
    _check_window(before.model, whole, task)
    parts = [
        (i, part)
        for i, (item, example) in enumerate(zip(items, whole, strict=True))
        for part in ([example] if item.prompt or not splits else split(example, splits, seed))
    ]
    sums = np.zeros((len(items), 6))
    for rows in batches([len(part) for _, part in parts], max_batch_tokens):
        batch = collate([parts[row][1] for row in rows])
        scored, can = predictors(batch), reached(before, after, batch)
        pairs = read(before, after, batch) if after is not before else [(one, one) for one in read_one(after, batch)]
        for place, row in enumerate(rows):
            i, part = parts[row]
            pair = pairs.pop(0)  # so that the log-probabilities of one text live at a time
            ends = scored[place, : len(part)], can[place, : len(part)]
            sums[i] += (*_sums(*pair, *ends), _bytes(items[i], part, tokenizer))
    *columns, count, changed, size = sums.T
    return TextSums(*columns, count=count, size=size, moved=float(changed.sum() / count.sum()))


def read_choices(run: Run, task: Task, tokenizer: Any, max_batch_tokens: int) -> Float[np.ndarray, " items"]:
    """Of each choice of a task 1 if the right option has the largest summed log-likelihood, 1/k if k have it, else 0.

    Options of one prompt share its cache where the model's cache allows.

    Raises:
        ValueError: sentences without a prompt begin with different tokens, or an item is longer than the model's
            window; names task and item. The model gives a likelihood that is not finite.
    """
    items, encoded = _choices(task, tokenizer)
    _check_window(run.model, [option for options in encoded for option in options], task)
    with run.reading() as model:
        return right(log_likelihoods(model, encoded, max_batch_tokens), items)


def share_of_choices(before: Run, after: Run, task: Task, tokenizer: Any, max_batch_tokens: int) -> float:
    """The share of the scored predictions of a task of choices that the second run can move; without a forward."""
    options = [option for options in _choices(task, tokenizer)[1] for option in options]
    return share_reached(before, after, options, max_batch_tokens)


def _choices(task: Task, tokenizer: Any) -> tuple[list[Choice], list[Options]]:
    items = [item for item in task.items if isinstance(item, Choice)]
    try:
        return items, encode_choices(items, tokenizer)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error


def _sums(
    before: Reading, after: Reading, scored: Bool[Tensor, " n"], can: Bool[Tensor, " n"]
) -> tuple[float, float, float, float, float]:
    """Of one text: nats before and after and KL over the predictions that are scored, their number, and those moved."""
    scored, can = scored.to(before.logits.device), can.to(before.logits.device)

    def total(values: Tensor) -> float:
        return float(values[scored].double().sum())

    changed = float(((moved(before, after) | can) & scored).sum())
    return total(nll(before)), total(nll(after)), total(kl(before, after)), float(scored.sum()), changed


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
    """The bytes of the tokens that are scored: all of the text, but for those of its own that stand before them."""
    size = len(item.text.encode())
    if item.prompt:
        return size
    first = example.prompt_length if any(example.answer) else 1
    pieces = token_pieces(tokenizer)(example.ids[:first])
    special = set(tokenizer.all_special_ids)
    told = (piece for token, piece in zip(example.ids, pieces, strict=False) if token not in special)
    return max(1, size - sum(len(piece.encode()) for piece in told))


def _check_window(model: nn.Module, examples: Sequence[Example], task: Task) -> None:
    most, longest = window(model), max(map(len, examples))
    if most is not None and longest > most:
        raise ValueError(
            f"task {task.name!r} has an item of {longest} tokens, and the model's window holds {most}: cut it"
        )
