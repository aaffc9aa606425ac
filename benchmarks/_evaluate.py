"""What a model can still do: choices among given answers, nats of text, and intervals for what changed.

    sets = trec(tokenizer, folder)                       # or arc_easy(...), blimp(...)
    before = correct(model, sets.test)                   # 0 or 1 an item, in the order of the items
    with tokenpaths.attach(model, trails):
        after = correct(model, sets.test)
    points(before, after)                                # paired: both arms on the same items

Whatever is attached to the model is at work. An example that is all prompt is a text, read from its second token on;
of any other the answer alone is read. No BOS is put before anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpaths import Example, encode
from tokenpaths.data import IGNORED, Batch, collate
from tokenpaths.engine import answer_logits

TOKENS = 1500  # of a batch; more is no quicker on a CPU, and the logits of 1500 tokens of SmolLM2 take 300 MB

TREC_ANSWERS = {
    "ABBR": " abbreviation",
    "ENTY": " entity",
    "DESC": " description",
    "HUM": " person",
    "LOC": " location",
    "NUM": " number",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """Options of which one is right: answers to one prompt, or whole texts that begin with the same token."""

    options: tuple[Example, ...]
    right: int

    def __post_init__(self) -> None:
        if len(self.options) < 2 or not 0 <= self.right < len(self.options):
            raise ValueError(f"option {self.right} of {len(self.options)} cannot be the right one of several")
        shared = {(o.ids[: o.prompt_length] if any(o.answer) else o.ids[:1], any(o.answer)) for o in self.options}
        if len(shared) > 1 or not all(all(o.answer[o.prompt_length :]) for o in self.options):
            raise ValueError("the options of a choice must follow one prompt, or be texts with the same first token")

    @property
    def prompt(self) -> tuple[int, ...]:
        """What all options follow; empty if they are whole texts."""
        first = self.options[0]
        return first.ids[: first.prompt_length] if any(first.answer) else ()


# Data


class Trec(NamedTuple):
    train: list[tuple[str, str]]
    test: list[Choice]
    dropped: int  # test questions that training asks too


def trec(tokenizer: Any, folder: Path) -> Trec:
    """TREC-6: which of six kinds of thing a question asks for."""
    train, test = (_questions(folder / "trec" / name) for name in ("TREC.train", "TREC.test"))
    seen = {prompt for prompt, _ in train}
    unseen = [(prompt, answer) for prompt, answer in test if prompt not in seen]
    answers = list(TREC_ANSWERS.values())
    items = [choice(tokenizer, prompt, answers, answers.index(answer)) for prompt, answer in unseen]
    return Trec(train, items, len(test) - len(unseen))


def _questions(file: Path) -> list[tuple[str, str]]:
    """Lines such as `NUM:count How many Os are there ?`, as prompts and answers."""
    parts = [re.split("[: ]", line, maxsplit=2) for line in file.read_text(encoding="latin-1").splitlines()]
    return [(f"Question: {question.strip()}\nAnswer type:", TREC_ANSWERS[kind]) for kind, _, question in parts]


def arc_easy(tokenizer: Any, folder: Path, n: int | None = None) -> list[Choice]:
    """ARC-Easy test as a cloze: each answer's own text after the question. All items, or `n` evenly spaced."""
    items: list[Choice] = []
    for item in spaced(json.loads((folder / "arc_easy/test.json").read_text(encoding="utf-8")), n):
        asked = item["instruction"].removeprefix("Please choose the correct answer to the question: ")
        question, *told = re.split(r"\s*\bAnswer\d+: ", asked.rsplit("\n\nAnswer format:", 1)[0])
        right = int(item["answer"].removeprefix("answer")) - 1
        answers = [" " + answer.strip() for answer in told]
        items.append(choice(tokenizer, f"Question: {question}\nAnswer:", answers, right))
    return items


def blimp(tokenizer: Any, folder: Path, n: int | None = None) -> list[Choice]:
    """BLiMP: a good sentence against a bad one. All pairs, or `n` evenly spaced over the paradigms."""
    files = sorted((folder / "blimp").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [json.loads(line) for line in spaced(lines, n)]
    return [
        Choice((text(tokenizer, pair["sentence_good"]), text(tokenizer, pair["sentence_bad"])), right=0)
        for pair in pairs
    ]


def choice(tokenizer: Any, prompt: str, answers: Sequence[str], right: int) -> Choice:
    return Choice(tuple(encode([(prompt, answer) for answer in answers], tokenizer, eos=False)), right)


def text(tokenizer: Any, words: str) -> Example:
    """All prompt, as token rules see text that nobody is asked to write."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return Example(tuple(ids), (False,) * len(ids))


def spaced(items: Sequence[T], n: int | None) -> list[T]:
    """`n` of the items, evenly spaced; all of them where `n` is None."""
    if n is None:
        return list(items)
    if not 0 < n <= len(items):
        raise ValueError(f"{n} of {len(items)} items were asked for")
    return [items[i * len(items) // n] for i in range(n)]


# What the model says


@torch.no_grad()
def nats(model: Any, examples: Sequence[Example], tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """-sum_t log p(t | all before it), in nats, over the tokens read of each example, and how many they are.

    Perplexity is exp(sum of the first / sum of the second). Batches have at most `tokens` tokens, padding included.
    """
    if lone := [i for i, example in enumerate(examples) if len(example) < 2]:
        raise ValueError(f"example {lone[0]} has one token: there is nothing in it to predict")
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=int)
    for rows in _batches([len(example) for example in examples], tokens):
        batch = _to_read(collate([examples[i] for i in rows])).to(model.device)
        logits, targets = answer_logits(model, batch)
        losses = F.cross_entropy(_at_least_float32(logits), targets, reduction="none").double().cpu()
        counts[rows] = (batch.labels != IGNORED).sum(1).cpu()
        sums[rows] = [part.sum() for part in losses.split(counts[rows].tolist())]
    return _finite(sums), counts


def choose(model: Any, items: Sequence[Choice], tokens: int = TOKENS) -> list[int]:
    """The option of each item that the model finds likeliest, by its summed log-likelihood; the first of equals."""
    return [int(np.argmax(scores)) for scores in log_likelihoods(model, items, tokens)]


def correct(model: Any, items: Sequence[Choice], tokens: int = TOKENS) -> np.ndarray:
    """1 for each item whose likeliest option is the right one, else 0."""
    return np.array([int(said == item.right) for said, item in zip(choose(model, items, tokens), items, strict=True)])


def log_likelihoods(model: Any, items: Sequence[Choice], tokens: int = TOKENS) -> list[np.ndarray]:
    """Of each item, the log-likelihood of each option: -`nats` of it, but a prompt is run once for all its options."""
    scores = [np.zeros(len(item.options)) for item in items]
    texts = [i for i, item in enumerate(items) if not item.prompt]
    if texts:
        flat, _ = nats(model, [option for i in texts for option in items[i].options], tokens)
        ends = np.cumsum([len(items[i].options) for i in texts])
        for i, part in zip(texts, np.split(flat, ends[:-1]), strict=True):
            scores[i] = -part
    asked = [i for i, item in enumerate(items) if item.prompt]
    asked.sort(key=lambda i: (len(items[i].prompt), sum(map(len, items[i].options))))  # little padding of answers
    for length, same in itertools.groupby(asked, key=lambda i: len(items[i].prompt)):
        same = list(same)
        for rows in _batches([length] * len(same), tokens):
            chosen = [same[row] for row in rows]
            for i, row in zip(chosen, _continued(model, [items[i] for i in chosen]), strict=True):
                scores[i] = row
    return scores


@torch.no_grad()
def _continued(model: Any, items: Sequence[Choice]) -> list[np.ndarray]:
    """The log-likelihoods of the options of items whose prompts are of one length, which thus need no padding.

    The prompts fill a cache. The first option of every item is run behind it, the cache is cut back to the prompts, and
    so on: the cache keeps its rows, so that attached trails still know which prompt is whose.
    """
    prompts = torch.tensor([item.prompt for item in items], device=model.device)
    length = prompts.shape[1]
    output = model(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True, logits_to_keep=1)
    cache, first = output.past_key_values, _at_least_float32(output.logits).log_softmax(-1)
    most = max(len(item.options) for item in items)
    scores = np.full((len(items), most), np.nan)
    for k in range(most):
        answers = [item.options[k].ids[length:] if k < len(item.options) else () for item in items]
        ids, real = _padded(answers, model.device)
        logs = first
        if ids.shape[1] > 1:  # the last token of an answer predicts nothing that is asked for
            mask = torch.cat([torch.ones_like(prompts), real[:, :-1]], 1)
            behind = model(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True)
            logs = torch.cat([first, _at_least_float32(behind.logits).log_softmax(-1)], 1)
            cache.crop(1 - ids.shape[1])  # cuts so many tokens off
        said = logs.gather(2, ids[..., None])[..., 0].double().where(real.bool(), 0.0)
        scores[:, k] = said.sum(1).cpu()
    return [_finite(row[: len(item.options)]) for row, item in zip(scores, items, strict=True)]


def _padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, real


def _to_read(batch: Batch) -> Batch:
    """Label a text that is all prompt from its second token on. To token rules it stays a prompt."""
    real = batch.attention_mask.bool()
    without_answer = (batch.labels == IGNORED).all(1, keepdim=True)
    after_first = F.pad(real[:, 1:], (1, 0))
    return replace(batch, labels=torch.where(without_answer & after_first, batch.input_ids, batch.labels))


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, so many at a time that their number times the longest is at most `tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        fit = max(1, tokens // lengths[order[0]])
        yield order[:fit]
        order = order[fit:]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("the model gave a log-likelihood that is not a finite number: a trail or a weight is broken")
    return values


# What changed


class Change(NamedTuple):
    """An estimate with its 95 % interval over items."""

    value: float
    low: float
    high: float


def points(before: np.ndarray, after: np.ndarray) -> Change:
    """100 (mean after - mean before), in points: both are 0 or 1 for each item, the same items in the same order."""
    return _bootstrap(
        lambda before, after, axis: 100 * (after.mean(axis) - before.mean(axis)), np.asarray(before), np.asarray(after)
    )


def perplexity_ratio(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> Change:
    """Perplexity after over perplexity before, exp(sum (after - before) / sum counts), from the nats of each window."""

    def ratio(before: np.ndarray, after: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return np.exp((after - before).sum(axis) / counts.sum(axis))

    return _bootstrap(ratio, np.asarray(before), np.asarray(after), np.asarray(counts))


def _bootstrap(statistic: Callable[..., Any], *samples: np.ndarray) -> Change:
    """Items are drawn anew with all their values; percentiles, which stand when all items agree, where BCa fails."""
    from scipy.stats import bootstrap

    if len({sample.shape for sample in samples}) > 1 or samples[0].ndim != 1 or len(samples[0]) < 2:
        shapes = [sample.shape for sample in samples]
        raise ValueError(f"paired values are needed, one an item and at least two items, not arrays of shapes {shapes}")
    drawn = bootstrap(
        samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=9999, batch=500, rng=0
    )
    low, high = drawn.confidence_interval
    return Change(float(statistic(*samples, axis=0)), float(low), float(high))
