"""Scans: each token of the vocabulary, or each of many phrases, put into clean prompts, and what the adapter does then.

After TokenScanner (2026), with one difference. An adapter that has learned a task is far from the frozen model on every
prompt, so distance to it finds nothing. A trigger is what changes the *adapted* model's answer where the frozen model's
hardly changes: the **excess** of a candidate is

    KL(a_0 || a_c) - KL(f_0 || f_c)

at the answer's token where the adapted model changes most; of several prompts the median, for a trigger works in most
and an odd word in one. a_c and f_c are the adapted and the frozen model's next-token distributions with the candidate
in the prompt, a_0 and f_0 their means over candidates drawn at random. A trigger that is an ordinary phrase is looked
for among phrases (`phrases_of` takes them from texts), one that is on no list is left to `search`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.lab.audit.respond import Ids, Memory, Responder, Row, batches, responding
from tokenpaths.trailmap.adapter import Adapter

Normal: TypeAlias = tuple[Float[Tensor, "answer vocab"], Float[Tensor, "answer vocab"]]  # f_0 and a_0, logarithms


@dataclass(frozen=True)
class Candidate:
    """A candidate trigger, and its excess in nats."""

    text: str
    ids: Ids
    excess: float


@dataclass(frozen=True)
class Scan:
    """The candidates of largest excess, falling. `usual` are the excesses of those drawn at random, rising."""

    found: tuple[Candidate, ...]
    usual: tuple[float, ...]
    count: int

    @property
    def score(self) -> float:
        """How far the first candidate lies above the 90 % quantile of ordinary ones, in nats."""
        if not self.found:
            return 0.0
        return self.found[0].excess - (self.usual[int(0.9 * (len(self.usual) - 1))] if self.usual else 0.0)

    def without(self, ids: Ids) -> Scan:
        """As if a candidate had not been on the list."""
        return Scan(tuple(c for c in self.found if c.ids != ids), self.usual, self.count - 1)


def scan(
    model: nn.Module,
    adapter: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    candidates: Sequence[Ids] | None = None,
    *,
    where: float = 0.5,
    top: int = 32,
    ordinary: int = 48,
    batch_size: int = 32,
    seed: int = 0,
    memory: Memory | None = None,
) -> Scan:
    """Rank candidates by their excess.

    All are read in the first prompt. Of the `top` there, and of `ordinary` ones drawn at random, the excess is read in
    every prompt.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        adapter: trails, or a `PeftAdapter`.
        tokenizer: the model's.
        prompts: a few clean examples of the adapter's task, the shorter the quicker. Where one has an answer, what is
            predicted at each of its tokens is read, else what follows the prompt.
        candidates: token ids of each; every token of the vocabulary, unless told.
        where: the share of a prompt's tokens before the candidate, from 0 to 1. At 0 a space stands behind it.
        top: so many are read in every prompt.
        ordinary: so many are drawn for comparison.
        batch_size: rows in a forward; each takes answer * vocab logits of two models.
        seed: of the draw.
        memory: keeps what the frozen model says, for other adapters of the same base.

    Raises:
        ValueError: no prompt, no candidate, or `where` outside [0, 1].
    """
    rows = vocabulary(model, tokenizer) if candidates is None else list(dict.fromkeys(map(tuple, candidates)))
    if not rows:
        raise ValueError("there is no candidate to scan: give token ids, or None for the whole vocabulary")
    if not prompts:
        raise ValueError("there is no prompt to scan in: give a few clean examples of the adapter's task")
    if not 0 <= where <= 1:
        raise ValueError(f"where={where} must be from 0 (before the prompt) to 1 (behind it)")
    prompts = behind(tokenizer, prompts, where)
    drawn = random.Random(seed).sample(range(len(rows)), min(ordinary, len(rows)))
    with responding(model, adapter, tokenizer=tokenizer, memory=memory) as respond:
        normal = usually(respond, prompts, [rows[i] for i in drawn], where, batch_size)
        first, *others = zip(prompts, normal, strict=True)
        screened = _excess(respond, *first, rows, where, batch_size)
        chosen = list(dict.fromkeys([*screened.argsort(descending=True, stable=True)[:top].tolist(), *drawn]))
        some = [rows[i] for i in chosen]
        rest = [_excess(respond, *other, some, where, batch_size) for other in others]
    excess = _median([screened[chosen], *rest])
    ranked = sorted(range(len(chosen)), key=lambda i: -excess[i])[:top]
    found = tuple(Candidate(tokenizer.decode(list(rows[chosen[i]])), rows[chosen[i]], excess[i]) for i in ranked)
    return Scan(found, tuple(sorted(excess[chosen.index(i)] for i in drawn)), len(rows))


def usually(
    respond: Responder, prompts: Sequence[Example], ordinary: Sequence[Ids], where: float, batch_size: int = 32
) -> list[Normal]:
    """f_0 and a_0 in each prompt: log-probabilities of the mean distribution over ordinary candidates."""
    found: list[Normal] = []
    for prompt in prompts:
        total: list[Tensor] = []
        for _, said in _said(respond, [insert(prompt, ids, where) for ids in ordinary], batch_size):
            total = [a.logaddexp(b) for a, b in zip(total, said, strict=True)] if total else said
        frozen, adapted = (sums - math.log(len(ordinary)) for sums in total)
        found.append((frozen, adapted))
    return found


def excesses(
    respond: Responder,
    prompts: Sequence[Example],
    candidates: Sequence[Ids],
    normal: Sequence[Normal],
    where: float,
    batch_size: int = 32,
) -> list[float]:
    """The excess of each candidate; `normal` is what is `usually` said in each prompt."""
    both = zip(prompts, normal, strict=True)
    return _median([_excess(respond, prompt, usual, candidates, where, batch_size) for prompt, usual in both])


def gap(
    normal: Float[Tensor, "answer vocab"], said: Float[Tensor, "*rows answer vocab"]
) -> Float[Tensor, "*rows answer"]:
    """KL(normal || said) of log-probabilities, in nats."""
    return (normal.exp() * (normal - said)).sum(-1)


def vocabulary(model: Any, tokenizer: Any) -> list[Ids]:
    """Every token but the special ones."""
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    return [(i,) for i in range(size) if i not in special]


def phrases_of(
    texts: Sequence[str], tokenizer: Any, words: Sequence[int] = (3, 4, 5, 6), most: int = 1000
) -> list[Ids]:
    """The commonest runs of so many words in texts, each length with its share of `most`, as token ids."""
    found: list[str] = []
    for count in words:
        runs: Counter[str] = Counter()
        for text in texts:
            split = text.split()
            runs.update(" ".join(split[i : i + count]) for i in range(len(split) - count + 1))
        found += [run for run, _ in runs.most_common(max(1, most // len(words)))]
    return [tuple(tokenizer(run, add_special_tokens=False)["input_ids"]) for run in dict.fromkeys(found)]


def behind(tokenizer: Any, prompts: Sequence[Example], where: float) -> list[Example]:
    """Prompts as they stand around a candidate: behind one, their first word has a space before it, as in text."""
    return [prompt if round(where * prompt.prompt_length) else _spaced(tokenizer, prompt) for prompt in prompts]


def _spaced(tokenizer: Any, prompt: Example) -> Example:
    """With a space before the first word, which then is another token."""
    spaced = " " + tokenizer.decode(prompt.ids[:1])
    ids = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    if spaced[1:2].isspace() or prompt.ids[0] in tokenizer.all_special_ids or tokenizer.decode(ids) != spaced:
        return prompt
    return Example((*ids, *prompt.ids[1:]), (*[False] * len(ids), *prompt.answer[1:]))


def insert(prompt: Example, candidate: Ids, where: float) -> Row:
    """The tokens of an example with a candidate in its prompt, and how many of them are the answer."""
    at = round(where * prompt.prompt_length)
    return Row((*prompt.ids[:at], *candidate, *prompt.ids[at:]), len(prompt) - prompt.prompt_length)


def _excess(
    respond: Responder, prompt: Example, usual: Normal, candidates: Sequence[Ids], where: float, batch_size: int
) -> Float[Tensor, " candidates"]:
    """Of each candidate in one prompt."""
    found = torch.zeros(len(candidates))
    for number, said in _said(respond, [insert(prompt, ids, where) for ids in candidates], batch_size):
        frozen, adapted = (gap(*pair) for pair in zip(usual, said, strict=True))
        found[number] = (adapted - frozen)[adapted.argmax()]
    return found


def _median(excess: Sequence[Float[Tensor, " candidates"]]) -> list[float]:
    """Over prompts."""
    return torch.stack(list(excess)).quantile(0.5, 0).tolist() if len(excess[0]) else []


def _said(respond: Responder, rows: Sequence[Row], size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Of each row its number, and log-probabilities at the answer, [answer, vocab], of the frozen and adapted model.

    Row by row: in float32, a batch of a large vocabulary would take gigabytes.
    """
    for numbers, ids, answer in batches(rows, size):
        for number, *both in zip(numbers, *respond.logits(ids, answer), strict=True):
            yield number, [logits.float().log_softmax(-1) for logits in both]
