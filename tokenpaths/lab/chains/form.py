"""Is it the way or the form?  What a trained trail has learned of its chains.

    report = way_or_form(
        model, trails, tokenizer,
        train=[Worked(" 3 + 4 + 5 =", " 7 12", " 12"), ...], held_out=..., forms={"renamed": ..., "longer": ...},
    )
    print(report)

A trail that learned the way answers held-out questions as it answers those of training, keeps its accuracy when only
the surface changes, writes no more of training's chains than is right, and minds it more than the frozen model when the
steps of a chain are shuffled. One that learned the form fails at the first three, and does not mind the fourth. Each
sign has a threshold and a 95 % interval: it speaks only if the whole interval lies on one side. The verdict counts the
signs, and nothing else. What hangs on the order of a chain's words alone (a template, say) is form too: let `separator`
keep it whole.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.encoding import encode
from tokenpaths.data.examples import Example
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import nats
from tokenpaths.engine.readings import Run, evaluating, runs
from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval, newcombe, ratio_interval, wilson
from tokenpaths.trailmap.adapter import Adapter

GAP = 0.1
"""Accuracy in training less that on held-out items: below it the way, above it the form."""
KEPT = 0.8
"""Share of the held-out accuracy that is kept in another form: above it the way, below it the form."""
COPIED = 0.1
"""Share of n-grams found in training's chains, beyond that of the right chains: below it the way, above it the form."""
HURT = 0.1
"""Nats a token that shuffled steps cost beyond what they cost the frozen model: above it the way, below it the form."""
TRAIN, HELD_OUT = "training", "held-out"

Says: TypeAlias = Literal["way", "form", "open"]


@dataclass(frozen=True)
class Worked:
    """A question, what a model is to write for it (its chain, up to and with the answer), and the answer."""

    prompt: str
    chain: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Accuracy on a set of items, frozen and steered; Wilson's interval of the steered one, and that of the gain."""

    name: str
    frozen: float
    steered: float
    interval: Interval
    gain: Interval
    items: int

    @property
    def learned(self) -> bool:
        """Whether the trail is better than the frozen model: the whole interval of the gain is above 0."""
        return self.gain[0] > 0


@dataclass(frozen=True)
class Sign:
    """One measure against its threshold; `way_is` tells on which side the way lies.

    `frozen` is the frozen model's figure where it has one, else NaN. A measure that has no items is NaN, and open.
    """

    name: str
    value: float
    interval: Interval
    threshold: float
    way_is: Literal["above", "below"]
    items: int
    frozen: float = math.nan

    @property
    def says(self) -> Says:
        low, high = self.interval
        if low > self.threshold:
            return "way" if self.way_is == "above" else "form"
        if high < self.threshold:
            return "way" if self.way_is == "below" else "form"
        return "open"


@dataclass(frozen=True)
class WayOrForm:
    """The report: accuracy by set, the signs, and what the frozen and the steered model wrote for held-out items."""

    scores: tuple[Score, ...]
    signs: tuple[Sign, ...]
    written: tuple[str, ...]

    @property
    def verdict(self) -> Literal["the way", "the form", "part way, part form", "open", "nothing"]:
        """By the rules, in this order.

        "nothing": neither on training nor on held-out items is the trail better than the frozen model. "the form": it
        is so on training items only, or signs say form and none says way. "the way": signs say way and none says form.
        "part way, part form": some say way and some form. "open": no sign speaks; more items are needed.
        """
        learned = {score.name: score.learned for score in self.scores}
        said = {sign.says for sign in self.signs}
        if not (learned[TRAIN] or learned[HELD_OUT]):
            return "nothing"
        if not learned[HELD_OUT] or ("form" in said and "way" not in said):
            return "the form"
        if "form" in said:
            return "part way, part form"
        return "the way" if "way" in said else "open"

    def __getitem__(self, name: str) -> Score | Sign:
        for found in (*self.scores, *self.signs):
            if found.name == name:
                return found
        raise KeyError(f"no {name!r}; there are {[found.name for found in (*self.scores, *self.signs)]}")

    def __str__(self) -> str:
        counts = [f"{sum(sign.says == says for sign in self.signs)} {says}" for says in ("way", "form", "open")]
        rows = [["accuracy", "frozen", "steered [95 % interval]", "items", ""]]
        for score in self.scores:
            learned = "learned" if score.learned else "no better than frozen"
            figures = [f"{score.frozen:.3f}", _figure(score.steered, score.interval), str(score.items), learned]
            rows.append([score.name, *figures])
        rows.append(["sign", "frozen", "value [95 % interval]", "items", "the way is"])
        for sign in self.signs:
            frozen = "" if math.isnan(sign.frozen) else f"{sign.frozen:.3f}"
            rule = f"{sign.way_is} {sign.threshold}: {sign.says}"
            rows.append([sign.name, frozen, _figure(sign.value, sign.interval), str(sign.items), rule])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{_VERDICTS[self.verdict]} Signs: {', '.join(counts)}.", *lines])


_VERDICTS = {
    "the way": "It learned the way.",
    "the form": "It learned the form.",
    "part way, part form": "It learned part of the way and part of the form.",
    "open": "Whether it learned the way or the form is open: give more items.",
    "nothing": "It learned nothing that shows on these items.",
}


def last_word(text: str) -> str | None:
    """The last word of the first line that has one, without punctuation at its end; None if there is none."""
    lines = text.strip().splitlines()
    words = lines[0].split() if lines else []
    return words[-1].rstrip(".,;:!?") if words else None


def way_or_form(
    model: nn.Module,
    trails: Adapter,
    tokenizer: Any,
    *,
    train: Sequence[Worked],
    held_out: Sequence[Worked],
    forms: Mapping[str, Sequence[Worked]] | None = None,
    read_answer: Callable[[str], Any] = last_word,
    stop_strings: str | None = None,
    separator: str = r"\s+",
    words: int = 3,
    batch_size: int = 32,
    max_batch_tokens: int = 1500,
    seed: int = 0,
) -> WayOrForm:
    """Measure what a trail has learned of the chains that it was trained on.

    Args:
        model: a causal language model; left as it was, trails attached or not.
        trails: the trained trails.
        tokenizer: its tokenizer.
        train: items that the trail was trained on, as many as you care to have answered.
        held_out: items like them that share no shortcut with training.
        forms: the same skill in another surface, by name: a paraphrased template, renamed entities, reordered facts,
            longer instances.
        read_answer: reads the answer from what was written, and from an item's `answer`; equal ones are right.
        stop_strings: a string that ends a chain; what comes after it is cut. Without it, an end-of-text token does.
        separator: a regular expression, without groups, for what stands between two steps of a chain.
        words: length of the n-grams that are looked for in training's chains.
        batch_size: of generation.
        max_batch_tokens: the most tokens in one forward where likelihoods are read.
        seed: of the shuffling.

    Raises:
        ValueError: no items in a set, a form named as another set, or an item without chain or readable answer.
    """
    sets = {TRAIN: train, HELD_OUT: held_out}
    if taken := sorted(set(forms or {}) & set(sets)):
        raise ValueError(f"a form cannot be named {taken[0]!r}, as a set of items is")
    sets |= forms or {}
    for name, items in sets.items():
        _check(name, items, read_answer)
    check_separator(separator)
    if words < 1:
        raise ValueError(f"words={words} must be at least 1: it is the length of n-grams")
    before, after = runs(model, trails, tokenizer=tokenizer)
    right: dict[str, Float[np.ndarray, " items"]] = {}
    scores: list[Score] = []
    written: list[str] = []
    for name, items in sets.items():
        texts = [_write(run, tokenizer, items, stop_strings, batch_size) for run in (before, after)]
        frozen, right[name] = (_right(told, items, read_answer) for told in texts)
        rates = float(frozen.mean()), float(right[name].mean())
        gain = mean_interval(right[name] - frozen)
        scores.append(Score(name, *rates, wilson(right[name]), gain, len(items)))
        if name == HELD_OUT:
            written = texts[1]
    here = right[HELD_OUT]
    signs = [
        _gap(right[TRAIN], here),
        *(_kept(name, right[name], here) for name in forms or {}),
        _copied(written, train, held_out, words),
        _hurt(before, after, tokenizer, held_out, separator, max_batch_tokens, seed),
    ]
    return WayOrForm(tuple(scores), tuple(signs), tuple(written))


def _gap(there: Float[np.ndarray, " m"], here: Float[np.ndarray, " n"]) -> Sign:
    value = float(there.mean() - here.mean())
    return Sign("training less held-out", value, newcombe(there, here), GAP, "below", len(here))


def _kept(name: str, there: Float[np.ndarray, " m"], here: Float[np.ndarray, " n"]) -> Sign:
    """Nothing can be kept where nothing was right: then it is open."""
    some = bool(here.any())
    value = float(there.mean() / here.mean()) if some else math.nan
    return Sign(f"kept when {name}", value, ratio_interval(there, here) if some else UNKNOWN, KEPT, "above", len(there))


def _copied(written: Sequence[str], train: Sequence[Worked], held_out: Sequence[Worked], n: int) -> Sign:
    """Mean over items of the share of written n-grams that training's chains have, less that of the right chain's."""
    known = {gram for item in train for gram in _grams(item.chain, n)}

    def share(text: str) -> float:
        grams = _grams(text, n)
        return sum(gram in known for gram in grams) / len(grams) if grams else math.nan

    excess = np.array([share(text) - share(item.chain) for text, item in zip(written, held_out, strict=True)])
    excess = excess[~np.isnan(excess)]
    value = float(excess.mean()) if len(excess) else math.nan
    return Sign(f"{n}-grams of training's chains", value, mean_interval(excess), COPIED, "below", len(excess))


def _hurt(
    before: Run, after: Run, tokenizer: Any, items: Sequence[Worked], separator: str, max_batch_tokens: int, seed: int
) -> Sign:
    """Nats a token of the shuffled chain less those of the ordered one, over held-out items with two steps or more.

    A language model minds disorder by itself, so what the trail has learned is what it adds, item by item.
    """
    pairs: list[tuple[str, str]] = []
    for number, item in enumerate(items):
        other = shuffled(item.chain, separator, random.Random(f"{seed} {number}"))
        if other is not None:
            pairs += [(item.prompt, item.chain), (item.prompt, other)]
    name = "shuffled steps cost, beyond frozen"
    if not pairs:
        return Sign(name, math.nan, UNKNOWN, HURT, "above", 0)
    examples = encode(pairs, tokenizer, eos=False)
    costs: list[Float[np.ndarray, " items"]] = []
    weights = np.array([sum(example.answer) for example in examples[::2]], dtype=np.float64)
    for run in (before, after):
        with run.inside(), evaluating(run.model):
            sums, _ = nats(run.model, examples, max_batch_tokens)
        costs.append(sums[1::2] - sums[::2])
    frozen, added = costs[0], costs[1] - costs[0]
    value, interval = float(added.sum() / weights.sum()), mean_interval(added, weights)
    return Sign(name, value, interval, HURT, "above", len(weights), float(frozen.sum() / weights.sum()))


def shuffled(chain: str, separator: str, rng: random.Random) -> str | None:
    """A chain with its steps in another order, and what stands between and behind them in place.

    None if it has fewer than two different steps.
    """
    body = chain.rstrip(" .!?\n")
    gaps = re.findall(separator, body)
    steps = re.split(separator, body)
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


def check_separator(separator: str) -> None:
    """Raises `ValueError` for a pattern that no chain can be split at and put together again."""
    if re.compile(separator).groups or re.fullmatch(separator, ""):
        raise ValueError(f"separator {separator!r} must have no groups and must not match nothing: use (?:...)")


def _write(run: Run, tokenizer: Any, items: Sequence[Worked], stop_strings: str | None, batch_size: int) -> list[str]:
    """With room for the longest chain of the items."""
    examples = encode([(item.prompt, item.chain) for item in items], tokenizer, eos=False)
    room = max(len(example) - example.prompt_length for example in examples) + 1
    prompts = [Example(e.ids[: e.prompt_length], (False,) * e.prompt_length) for e in examples]
    with run.reading() as model:
        written = generate(
            model, prompts, tokenizer, max_new_tokens=room, stop_strings=stop_strings, batch_size=batch_size
        )
    return [one.text for one in written]


def _right(
    texts: Sequence[str], items: Sequence[Worked], read_answer: Callable[[str], Any]
) -> Float[np.ndarray, " items"]:
    pairs = zip(texts, items, strict=True)
    return np.array([float(read_answer(text) == read_answer(item.answer)) for text, item in pairs])


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    told = text.split()
    return [tuple(told[i : i + n]) for i in range(len(told) - n + 1)]


def _check(name: str, items: Sequence[Worked], read_answer: Callable[[str], Any]) -> None:
    if not items:
        raise ValueError(f"the {name} items are none: give a list of Worked(prompt, chain, answer)")
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


def _figure(value: float, interval: Interval) -> str:
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
