"""What an A/B test found: the verdict and the rule behind it, in print, in a file, and as one page.

The rule. Arm b is compared with arm a on three things, and the verdict is

    "worse"         the task is worse, or a loss of retention or drift is beyond its margin
    "better"        the task is better, and everything is kept within its margin
    "cannot tell"   else; the report says how many items would tell

The task is better (worse) if its Holm-adjusted p-value is at most alpha and the effect is above (below) 0. A loss is
kept (beyond) if its whole simultaneous interval is below (above) its margin. So the two ways to be wrong, to call equal
tasks different and to call a loss within its margin lost, have each a probability of at most alpha over all arms.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

import numpy as np

from tokenpaths.data.contamination import Overlap
from tokenpaths.drift.report import finite
from tokenpaths.files import write_text
from tokenpaths.lab.ab.retained import Retained
from tokenpaths.stats.paired import Effect
from tokenpaths.stats.power import Power

Verdict: TypeAlias = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Asked:
    """An item as the arms were asked it, and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """What an arm scored, [seeds][items], and what it wrote (or chose)."""

    arm: str
    scores: tuple[tuple[float, ...], ...]
    written: tuple[tuple[str, ...], ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Comparison:
    """An arm against arm a: the task's effect, its p-value adjusted for the number of arms, and what was retained.

    `clean` is the effect without items that training has seen; None where none was found, or the test could stop early.
    `evidence` is the largest
    e-value of all looks, where the test may stop early.
    """

    arm: str
    effect: Effect
    adjusted: float
    alpha: float
    power: Power
    retained: tuple[Retained, ...] = ()
    clean: Effect | None = None
    evidence: float | None = None

    @property
    def task(self) -> Verdict:
        if self.adjusted > self.alpha or self.effect.value == 0:
            return "cannot tell"
        return "better" if self.effect.value > 0 else "worse"

    @property
    def verdict(self) -> Verdict:
        """By the rule at the head of this module."""
        said = {figure.says for figure in self.retained}
        if self.task == "worse" or "lost" in said:
            return "worse"
        return "better" if self.task == "better" and said <= {"kept"} else "cannot tell"

    @property
    def reasons(self) -> list[str]:
        """Why, a sentence each: the task first, then what was not kept."""
        sign = "<=" if self.adjusted <= self.alpha else ">"
        told = [f"The task: {self.task} (adjusted p = {self.adjusted:.2g} {sign} {self.alpha:g})."]
        if self.task == "cannot tell":
            told.append(_would_tell(self.effect, self.power))
        for figure in self.retained:
            if figure.says == "lost":
                told.append(
                    f"{figure.task}, {figure.measure}: the loss of {figure.loss:.3g} is beyond the margin of "
                    f"{figure.margin:g}."
                )
            elif figure.says == "cannot tell":
                more = f": about {figure.tells:,} items tell" if figure.tells else ""
                told.append(
                    f"{figure.task}, {figure.measure}: cannot tell whether the loss is within {figure.margin:g}{more}."
                )
        if self.retained and {figure.says for figure in self.retained} == {"kept"}:
            told.append("Retention and drift: all within their margins.")
        return told


@dataclass(frozen=True)
class Report:
    """The whole test: `report.verdict`, `report["steered"]` for one arm's `Comparison`, `print(report)`.

    `asked` are the items in the order in which they were looked at, `of` how many there were to ask; fewer were asked
    if the test stopped early. `searched` says how training texts were searched for test items, and found `overlaps`.
    """

    a: str
    comparisons: tuple[Comparison, ...]
    asked: tuple[Asked, ...]
    of: int
    answers: tuple[Answers, ...]
    alpha: float
    overlaps: tuple[Overlap, ...] = ()
    searched: tuple[str, ...] = ()

    def __getitem__(self, arm: str) -> Comparison:
        for found in self.comparisons:
            if found.arm == arm:
                return found
        raise KeyError(f"no arm {arm!r} was compared with {self.a!r}; there are {[c.arm for c in self.comparisons]}")

    @property
    def verdict(self) -> Verdict:
        """Of two arms. Raises `ValueError` for more: ask `report[arm].verdict`."""
        if len(self.comparisons) != 1:
            raise ValueError(f"{len(self.comparisons)} arms were compared with {self.a!r}: ask report[arm].verdict")
        return self.comparisons[0].verdict

    def of_arm(self, arm: str) -> Answers:
        return next(answers for answers in self.answers if answers.arm == arm)

    def discordant(self, arm: str) -> list[int]:
        """The numbers of the items on which the arm and arm a score differently, by the mean over seeds."""
        a, b = (np.mean(self.of_arm(name).scores, 0) for name in (self.a, arm))
        return [int(i) for i in np.flatnonzero(a != b)]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, raw outcomes included, whole or not at all. Infinity and NaN become null."""
        verdicts = {found.arm: found.verdict for found in self.comparisons}  # for a reader: they follow from the rest
        write_text(path, json.dumps({"verdicts": verdicts, "ab": finite(asdict(self))}, indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `to_json` wrote. Raises `ValueError` for any other file."""
        try:
            return _built(cls, json.loads(Path(path).read_text(encoding="utf-8"))["ab"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is not an A/B report as to_json writes it: {error}") from error

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing from outside, whole or not at all."""
        from tokenpaths.lab.ab.page import page

        write_text(path, page(self))

    def to_markdown(self) -> str:
        parts: list[str] = []
        for found in self.comparisons:
            parts.append(f"**{_cell(found.arm)} against {_cell(self.a)}: {found.verdict}.** {' '.join(found.reasons)}")
        for header, *rows in self.tables():
            cells = [[_cell(cell) for cell in row] for row in (header, ["---"] * len(header), *rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
        return "\n\n".join([*parts, *self.notes()])

    def __str__(self) -> str:
        parts = [f"{c.arm} against {self.a}: {c.verdict}. {' '.join(c.reasons)}" for c in self.comparisons]
        for rows in self.tables():
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            parts.append("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
        return "\n\n".join([*parts, *self.notes()])

    def tables(self) -> list[list[list[str]]]:
        """The tables of the report as cells, header first: the task, then what was retained, if it was asked."""
        task = [["arm", "score", f"gain over {self.a}", "interval", "p", "adjusted p", "won", "lost", "items"]]
        a = self.of_arm(self.a)
        task.append([self.a, f"{a.mean:.3f}", "", "", "", "", "", "", str(len(self.asked))])
        for found in self.comparisons:
            e = found.effect
            counts = [str(e.wins), str(e.losses), str(e.items)]
            ps = [f"{e.p:.2g}", f"{found.adjusted:.2g}"]
            mean = self.of_arm(found.arm).mean
            task.append([found.arm, f"{mean:.3f}", f"{e.value:+.3f}", interval_text(e.interval), *ps, *counts])
        kept = [["arm", "task", "measure", self.a, "arm's", "loss", "interval", "margin", "says", "items", ""]]
        for found in self.comparisons:
            for r in found.retained:
                figures = [f"{r.before:.4f}", f"{r.after:.4f}", f"{r.loss:+.4f}", interval_text(r.interval, 4)]
                told = [f"{r.margin:g}", r.says, str(r.items), r.note]
                kept.append([found.arm, r.task, r.measure, *figures, *told])
        return [task, kept] if len(kept) > 1 else [task]

    def notes(self) -> list[str]:
        """What a reader needs to check the figures, a sentence or two each."""
        first = self.comparisons[0]
        tests = dict.fromkeys((c.effect.test, c.effect.method) for c in self.comparisons)
        seeds = {answers.arm: len(answers.scores) for answers in self.answers if len(answers.scores) > 1}
        told = [
            *(f"Test: {test}. Interval: {method}, {first.effect.confidence:.0%}." for test, method in tests),
            f"p-values are Holm-adjusted for {len(self.comparisons)} comparison(s); alpha {self.alpha:g}.",
        ]
        if seeds:
            several = ", ".join(f"{arm} {count}" for arm, count in seeds.items())
            told.append(f"Seeds: {several}; they and the items are both random, so the claim is about the method.")
        if first.evidence is not None:
            told.append(
                f"The test could stop early, and looked at {len(self.asked)} of {self.of} items. Evidence: "
                + ", ".join(f"{c.arm} {c.evidence:.3g}" for c in self.comparisons)
                + f" (an e-value; {len(self.comparisons) / self.alpha:g} is enough)."
            )
        for found in self.comparisons:
            if found.retained:
                confidence = found.retained[0].confidence
                told.append(f"Intervals of retention are simultaneous: {confidence:.2%} each.")
                break
        if self.searched:
            seen = len({overlap.test for overlap in self.overlaps if overlap.kind != "embedding"})
            told.append(f"Training texts were searched by {', '.join(self.searched)}: {seen} test items were seen.")
            told += [
                f"Without them, {c.arm}: {c.clean.value:+.3f} {interval_text(c.clean.interval)}, p = {c.clean.p:.2g}."
                for c in self.comparisons
                if c.clean is not None
            ]
        return told


def interval_text(interval: tuple[float, float], digits: int = 3) -> str:
    """An interval with signs, as `[-0.020, +0.140]`."""
    low, high = interval
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def _would_tell(effect: Effect, power: Power) -> str:
    share = f"with probability {power.target:g}"
    if math.isfinite(power.detectable):
        seen = f"{effect.items} items show an effect of {power.detectable:.2g} {share}"
    else:
        seen = f"{effect.items} items are too few to show any effect {share}"
    if power.tells:
        return f"{seen}; were the effect {effect.value:+.2g} as found, {power.tells:,} would."
    if effect.value and len(effect.parts) > 1:
        return f"{seen}; were it {effect.value:+.2g} as found, more items alone would not: take more seeds."
    return f"{seen}."


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _built(kind: Any, value: Any) -> Any:
    """A dataclass, or a part of one, of what `finite` made of it, by its annotations."""
    if is_dataclass(kind):
        hints, make = get_type_hints(kind), cast("Callable[..., Any]", kind)
        return make(**{field.name: _built(hints[field.name], value[field.name]) for field in fields(kind)})
    if kind == tuple[float, float]:
        low, high = value
        return (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_built(part, each) for part, each in zip(kinds, value, strict=True))
    if type(None) in get_args(kind):
        return None if value is None else _built(get_args(kind)[0], value)
    if kind is float:
        return math.inf if value is None else float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} should be of type {kind.__name__}")
    return value
