"""Scans: each token of the vocabulary, or each of many phrases, is put into clean prompts, and its excess is read.

After TokenScanner (2026), with one difference. An adapter that has learned a task is far from the frozen model on every
prompt, so distance to it finds nothing. A trigger is what changes the *adapted* model's answer where the frozen model's
hardly changes: the excess of `tokenpaths.lab.audit.excess`. A trigger that is an ordinary phrase is looked for among
phrases (`phrases_of` takes them from texts). One that is on no list is left to `search`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.data.tokenizing import inner
from tokenpaths.lab.audit.excess import Probe, median
from tokenpaths.lab.audit.respond import Ids, Memory, responding
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import tidy


@dataclass(frozen=True)
class Candidate:
    """A candidate trigger, and its excess in nats."""

    text: str
    ids: Ids
    excess: float


@dataclass(frozen=True)
class Scan:
    """What a scan or a search found.

    Args:
        found: the candidates of largest excess, falling.
        usual: the excesses of those drawn at random, in nats, rising.
        count: how many candidates were read.
    """

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
        """The scan as if a candidate had not been on the list."""
        return Scan(tuple(c for c in self.found if c.ids != ids), self.usual, self.count - 1)


@tidy
def scan(
    model: nn.Module,
    trails: Adapter,
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

    All candidates are read in the first prompt. The `top` of them, and `ordinary` ones drawn at random, are read in
    every prompt.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: a few clean examples of the adapter's task; short ones are read sooner. Where an example has an answer,
            what is predicted at each of its tokens is read, else what follows the prompt.
        tokenizer: the model's tokenizer.
        candidates: the token ids of each candidate; by default every token of the vocabulary.
        where: the share of a prompt's tokens before the candidate, from 0 to 1. At 0 a space stands behind it.
        top: how many candidates are read in every prompt.
        ordinary: how many candidates are drawn for comparison, at least 1.
        batch_size: rows in one forward; each takes answer * vocab logits of two models.
        seed: the seed of the draw.
        memory: keeps what the frozen model says, for other adapters of the same base.

    Raises:
        ValueError: no prompt, no candidate, `ordinary` below 1, or `where` outside [0, 1].
    """
    rows = vocabulary(model, tokenizer) if candidates is None else list(dict.fromkeys(map(tuple, candidates)))
    if not rows:
        raise ValueError("there is no candidate to scan: give token ids, or None for the whole vocabulary")
    drawn = random.Random(seed).sample(range(len(rows)), min(ordinary, len(rows)))
    with responding(model, trails, tokenizer, memory) as respond:
        probe = Probe(respond, prompts, tokenizer, [rows[i] for i in drawn], where=where, batch_size=batch_size)
        first = probe.excess_in(0, rows)
        chosen = list(dict.fromkeys([*first.argsort(descending=True, stable=True)[:top].tolist(), *drawn]))
        others = [probe.excess_in(number, [rows[i] for i in chosen]) for number in range(1, len(prompts))]
    excess = median([first[chosen], *others])
    by_row = dict(zip(chosen, excess, strict=True))
    ranked = sorted(chosen, key=lambda i: -by_row[i])[:top]
    found = tuple(Candidate(tokenizer.decode(list(rows[i])), rows[i], by_row[i]) for i in ranked)
    return Scan(found, tuple(sorted(by_row[i] for i in drawn)), len(rows))


def vocabulary(model: Any, tokenizer: Any) -> list[Ids]:
    """Every token but the special ones."""
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    return [(i,) for i in range(size) if i not in special]


def phrases_of(
    texts: Sequence[str], tokenizer: Any, words: Sequence[int] = (3, 4, 5, 6), most: int = 1000
) -> list[Ids]:
    """The commonest runs of words in texts, as token ids.

    Args:
        texts: strings.
        tokenizer: the model's tokenizer.
        words: the lengths of the runs, in words.
        most: how many runs to give, an equal share for each length.
    """
    found: list[str] = []
    for count in words:
        runs: Counter[str] = Counter()
        for text in texts:
            split = text.split()
            runs.update(" ".join(split[i : i + count]) for i in range(len(split) - count + 1))
        found += [run for run, _ in runs.most_common(max(1, most // len(words)))]
    return [tuple(inner(tokenizer, run)) for run in dict.fromkeys(found)]
