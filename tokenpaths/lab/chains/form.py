r"""Is it the way or the form?  What a trained trail has learned of its chains.

    report = way_or_form(
        model, trails, tokenizer,
        train=[Question(" 3 + 4 + 5 =", answer=" 12", chain=" 7 12"), ...],
        held_out=..., forms={"renamed": ..., "longer": ...},
    )
    print(report)

A trail that learned the way answers held-out questions as it answers those of training. It keeps its accuracy when only
the surface changes. It writes no more of training's chains than the right chains have. And shuffling the steps of a
chain makes the chain less likely to it than to the frozen model. A trail that learned the form fails all four. Each
sign has a threshold and an interval, and says something only if the whole interval lies on one side; the intervals of
all signs hold together (Holm). The verdict counts the signs, and asks that held-out items and every form be answered
better than by the frozen model. What depends on the order of a chain's words alone, such as a template, is form too:
choose a `separator` that keeps it whole.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.contamination import grams
from tokenpaths.data.encoding import encode
from tokenpaths.data.examples import Example
from tokenpaths.data.items import Question
from tokenpaths.drift.edit import kl_behind
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import nats
from tokenpaths.engine.reach import share_reached
from tokenpaths.engine.readings import Run, runs
from tokenpaths.files import patterns
from tokenpaths.lab.chains.perturb import check_separator
from tokenpaths.lab.chains.report import HELD_OUT, TRAIN, Score, Sign, WayOrForm
from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval, newcombe, ratio_interval, wilson
from tokenpaths.stats.verdicts import noticeable, step_down
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import tidy

GAP = 0.1
"""Accuracy in training less that on held-out items: below it the way, above it the form."""
KEPT = 0.8
"""Share of the held-out accuracy that is kept in another form: above it the way, below it the form."""
COPIED = 0.1
"""Share of n-grams found in training's chains, beyond that of the right chains: below it the way, above it the form."""
HURT = 0.1
"""Nats a token that shuffled steps cost beyond what they cost the frozen model: above it the way, below it the form."""


def last_word(text: str) -> str | None:
    """The last word of the first line that has one, without punctuation at its end; None if there is none."""
    lines = text.strip().splitlines()
    words = lines[0].split() if lines else []
    return words[-1].rstrip(".,;:!?") if words else None


@tidy
def way_or_form(
    model: nn.Module,
    trails: Adapter,
    tokenizer: Any,
    *,
    train: Sequence[Question],
    held_out: Sequence[Question],
    forms: Mapping[str, Sequence[Question]] | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
    read_answer: Callable[[str], Any] = last_word,
    stop_strings: str | None = None,
    separator: str = r"\s+",
    words: int = 3,
    batch_size: int = 32,
    max_batch_tokens: int = 1500,
    seed: int = 0,
) -> WayOrForm:
    """Measure what a trail has learned of the chains that it was trained on.

    Four kinds of signs, each against its threshold in this module:

        gap      accuracy on training items - accuracy on held-out items
        kept     accuracy on items of another form / accuracy on held-out items
        copied   mean over held-out items of the share of n-grams of the written chain that are in training's chains,
                 less that share of the right chain
        hurt     the rise of -log p of the right chain when its steps are shuffled, steered less frozen, in nats a token

    Args:
        model: a causal language model. It is left as it was, trails attached or not.
        trails: the trained trails.
        tokenizer: the model's tokenizer.
        train: questions with chains that the trail was trained on, as many as are to be answered.
        held_out: questions like them that share no shortcut with training.
        forms: the same skill in another surface, by name: a paraphrased template, renamed entities, reordered facts,
            longer instances.
        others: prompts that ask for something else, by kind: other requests about the same texts, other text. How far
            the trail moves what comes behind them is its locality.
        read_answer: reads the answer from what was written, and from an item's `answer`. Equal ones are right.
        stop_strings: a string that ends a chain. Without it, an end-of-text token does.
        separator: a regular expression, without groups, for what stands between two steps of a chain.
        words: the length of the n-grams that are looked for in training's chains.
        batch_size: the number of questions in a batch of generation.
        max_batch_tokens: the most tokens in one forward where likelihoods are read.
        seed: seeds the shuffling.

    Raises:
        ValueError: no items in a set or of a kind, a form named as another set, or an item without chain or readable
            answer.
    """
    if taken := sorted({TRAIN, HELD_OUT} & set(forms or {})):
        raise ValueError(f"a form cannot be named {taken[0]!r}, as a set of items is")
    sets = {TRAIN: train, HELD_OUT: held_out, **(forms or {})}
    for name, items in sets.items():
        _check(name, items, read_answer)
    check_separator(separator)
    if words < 1:
        raise ValueError(f"words={words} must be at least 1: it is the length of n-grams")
    frozen, steered = runs(model, trails, tokenizer=tokenizer)
    scores: list[Score] = []
    right: dict[str, Float[np.ndarray, " items"]] = {}
    written: dict[str, list[str]] = {}
    with steered.ready():
        for name, items in sets.items():
            before, after = (_write(run, items, tokenizer, stop_strings, batch_size) for run in (frozen, steered))
            right[name], written[name] = _right(after, items, read_answer), after
            scores.append(_score(name, _right(before, items, read_answer), right[name]))
        hurt = _hurt(frozen, steered, held_out, tokenizer, separator, max_batch_tokens, seed)
        chains = encode([item for items in sets.values() for item in items], tokenizer, eos=False)
        moved = share_reached(frozen, steered, chains, max_batch_tokens)
        elsewhere = kl_behind(frozen, steered, others or {}, tokenizer, max_batch_tokens)
    measures = [
        _gap(right[TRAIN], right[HELD_OUT]),
        *(_kept(name, right[name], right[HELD_OUT]) for name in forms or {}),
        _copied(written[HELD_OUT], train, held_out, words),
        hurt,
    ]
    return WayOrForm(tuple(scores), tuple(_judged(measures)), tuple(written[HELD_OUT]), moved, elsewhere)


@dataclass(frozen=True)
class _Measured:
    """A sign whose intervals are still to be made."""

    sign: Sign
    interval: Callable[[float], Interval]


def _judged(measures: Sequence[_Measured]) -> Iterator[Sign]:
    """The signs with their 95 % intervals, and with those by which they speak together."""
    confidences = step_down([one.interval for one in measures], [one.sign.threshold for one in measures])
    for one, confidence in zip(measures, confidences, strict=True):
        yield replace(one.sign, interval=one.interval(0.95), adjusted=one.interval(confidence))


def _unknown(confidence: float) -> Interval:
    return UNKNOWN


def _score(name: str, before: Float[np.ndarray, " items"], after: Float[np.ndarray, " items"]) -> Score:
    gain, least = mean_interval(after - before), noticeable(after - before)
    return Score(name, float(before.mean()), float(after.mean()), wilson(after), gain, len(after), least)


def _gap(there: Float[np.ndarray, " m"], here: Float[np.ndarray, " n"]) -> _Measured:
    value, items = float(there.mean() - here.mean()), min(len(there), len(here))
    sign = Sign("training less held-out", value, UNKNOWN, GAP, "below", items)
    return _Measured(sign, functools.partial(newcombe, there, here))


def _kept(name: str, there: Float[np.ndarray, " m"], here: Float[np.ndarray, " n"]) -> _Measured:
    """Where nothing was right nothing can be kept: the sign is open."""
    some, items = bool(here.any()), min(len(there), len(here))
    value = float(there.mean() / here.mean()) if some else math.nan
    sign = Sign(f"kept when {name}", value, UNKNOWN, KEPT, "above", items)
    return _Measured(sign, functools.partial(ratio_interval, there, here) if some else _unknown)


def _copied(written: Sequence[str], train: Sequence[Question], held_out: Sequence[Question], n: int) -> _Measured:
    """Words are what stands between white space: signs such as + are steps of a chain too."""
    known = {gram for item in train for gram in grams(item.chain.split(), n)}

    def share(text: str) -> float:
        found = grams(text.split(), n)
        return sum(gram in known for gram in found) / len(found) if found else math.nan

    excess = np.array([share(text) - share(item.chain) for text, item in zip(written, held_out, strict=True)])
    excess = excess[~np.isnan(excess)]
    value = float(excess.mean()) if len(excess) else math.nan
    sign = Sign(f"{n}-grams of training's chains", value, UNKNOWN, COPIED, "below", len(excess))
    return _Measured(sign, functools.partial(mean_interval, excess, None))


def _hurt(
    frozen: Run,
    steered: Run,
    items: Sequence[Question],
    tokenizer: Any,
    separator: str,
    max_batch_tokens: int,
    seed: int,
) -> _Measured:
    """Over held-out items of two steps or more. Any language model finds disorder unlikely: the rest is learned."""
    name = "shuffled steps cost, beyond frozen"
    pairs: list[Question] = []
    for number, item in enumerate(items):
        other = shuffled(item.chain, separator, random.Random(f"{seed} {number}"))
        if other is not None:
            pairs += [item, replace(item, chain=other)]
    if not pairs:
        return _Measured(Sign(name, math.nan, UNKNOWN, HURT, "above", 0), _unknown)
    examples = encode(pairs, tokenizer, eos=False)
    tokens = np.array([sum(example.answer) for example in examples[::2]], dtype=np.float64)

    def cost(run: Run) -> Float[np.ndarray, " items"]:
        with run.reading() as model:
            sums, _ = nats(model, examples, max_batch_tokens)
        return sums[1::2] - sums[::2]

    before = cost(frozen)
    added = cost(steered) - before
    value, of_frozen = (float(part.sum() / tokens.sum()) for part in (added, before))
    sign = Sign(name, value, UNKNOWN, HURT, "above", len(tokens), of_frozen)
    return _Measured(sign, functools.partial(mean_interval, added, tokens))


def shuffled(chain: str, separator: str, rng: random.Random) -> str | None:
    """A chain with its steps in another order, and what stands between and behind them in place.

    None if it has fewer than two different steps.
    """
    body = chain.rstrip(" .!?\n")
    found = patterns.finditer(separator, body)
    gaps = [gap.group() for gap in found]
    starts, ends = [0, *(gap.end() for gap in found)], [*(gap.start() for gap in found), len(body)]
    steps = [body[start:end] for start, end in zip(starts, ends, strict=True)]
    places = [i for i, step in enumerate(steps) if step]  # a chain that begins with a space has an empty first step
    told = [steps[i] for i in places]
    if len(set(told)) < 2:
        return None
    drawn = told
    while drawn == told:
        drawn = rng.sample(told, len(told))
    for place, step in zip(places, drawn, strict=True):
        steps[place] = step
    return "".join(step + gap for step, gap in zip(steps, [*gaps, ""], strict=True)) + chain[len(body) :]


def _write(run: Run, items: Sequence[Question], tokenizer: Any, stop_strings: str | None, batch_size: int) -> list[str]:
    """What a run writes for each question, as many tokens as the longest right chain has and one more."""
    examples = encode(items, tokenizer, eos=False)
    room = max(len(example) - example.prompt_length for example in examples) + 1
    prompts = [Example.of(example.ids[: example.prompt_length]) for example in examples]
    with run.reading() as model:
        written = generate(
            model, prompts, tokenizer, max_new_tokens=room, stop_strings=stop_strings, batch_size=batch_size
        )
    return [one.text for one in written]


def _right(
    texts: Sequence[str], items: Sequence[Question], read_answer: Callable[[str], Any]
) -> Float[np.ndarray, " items"]:
    pairs = zip(texts, items, strict=True)
    return np.array([float(read_answer(text) == read_answer(item.answer)) for text, item in pairs])


def _check(name: str, items: Sequence[Question], read_answer: Callable[[str], Any]) -> None:
    if not items:
        raise ValueError(f"the {name} items are none: give a list of Question(prompt, answer, chain)")
    for number, item in enumerate(items):
        if not (item.prompt and item.chain):
            raise ValueError(f"{name} item {number} has an empty prompt or chain: {item!r:.80}")
        if read_answer(item.answer) is None:
            raise ValueError(f"{name} item {number}: read_answer finds no answer in {item.answer!r:.40}")
        if read_answer(item.chain) != read_answer(item.answer):
            raise ValueError(
                f"{name} item {number}: read_answer finds {read_answer(item.chain)!r} in its chain {item.chain!r:.60} "
                f"and {read_answer(item.answer)!r} in its answer; even the right chain would count as wrong"
            )
