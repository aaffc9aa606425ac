"""What an A/B test found, in print, in a file, as one page and as a picture. The rule is in `lab.ab.comparison`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenpaths import files
from tokenpaths.data.contamination import Overlap
from tokenpaths.data.items import Question
from tokenpaths.lab.ab import page
from tokenpaths.lab.ab.comparison import Comparison, Verdict
from tokenpaths.report import pages
from tokenpaths.report.escaping import markdown, terminal
from tokenpaths.report.figures import COLOURS, GREY, empty_figure, forest
from tokenpaths.report.records import Record
from tokenpaths.report.tables import interval_text, markdown_table, text_table
from tokenpaths.stats.verdicts import LEAST_ITEMS, LEAST_MOVED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 200
"""The most items on which arms differ that a page shows. The JSON file has all."""


@dataclass(frozen=True)
class Answers:
    """What an arm scored and what it wrote (or chose), both [seeds][items]."""

    arm: str
    scores: tuple[tuple[float, ...], ...]
    written: tuple[tuple[str, ...], ...]

    @property
    def mean(self) -> float:
        """The score over all items and seeds."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Report(Record):
    """The whole test: `report.verdict`, `report["steered"]` for one arm's `Comparison`, `print(report)`.

    Args:
        a: the name of the arm that the others are compared with.
        comparisons: of each other arm.
        asked: the items in the order in which they were looked at, each with its right answer.
        of: how many items there were to ask. Fewer were asked if the test stopped early.
        answers: what each arm answered, arm a first.
        alpha: the level of the test.
        overlaps: test items that are like training texts.
        searched: how training texts were searched for them.
    """

    what = "an A/B report"
    derived = ("verdicts",)

    a: str
    comparisons: tuple[Comparison, ...]
    asked: tuple[Question, ...]
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
    def verdicts(self) -> dict[str, Verdict]:
        """By the name of the arm."""
        return {found.arm: found.verdict for found in self.comparisons}

    @property
    def verdict(self) -> Verdict:
        """Of two arms. Raises `ValueError` for more: ask `report[arm].verdict`."""
        if len(self.comparisons) != 1:
            raise ValueError(f"{len(self.comparisons)} arms were compared with {self.a!r}: ask report[arm].verdict")
        return self.comparisons[0].verdict

    def of_arm(self, arm: str) -> Answers:
        """What an arm answered."""
        return next(answers for answers in self.answers if answers.arm == arm)

    def discordant(self, arm: str) -> list[int]:
        """The numbers of the items on which the arm and arm a score differently, by the mean over seeds."""
        a, b = (np.mean(self.of_arm(name).scores, 0) for name in (self.a, arm))
        return [int(i) for i in np.flatnonzero(a != b)]

    def __str__(self) -> str:
        told = [f"{c.arm} against {self.a}: {c.verdict}. {' '.join(c.reasons)}" for c in self.comparisons]
        return terminal("\n\n".join([*told, *map(text_table, self.tables()), *self.notes()]))

    def to_markdown(self) -> str:
        """What `print(report)` shows, in Markdown."""
        told: list[str] = []
        for found in self.comparisons:
            title = markdown(f"{found.arm} against {self.a}")
            told.append(f"**{title}: {found.verdict}.** {markdown(' '.join(found.reasons))}")
        return "\n\n".join([*told, *map(markdown_table, self.tables()), *map(markdown, self.notes())])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing from outside, whole or not at all."""
        title = f"{', '.join(found.arm for found in self.comparisons)} against {self.a}"
        task, *kept = self.tables()
        parts = [pages.heading(f"{title}, on {len(self.asked):,} items", 1), *map(page.verdict, self.comparisons)]
        parts += [pages.heading("The task"), pages.table(task), page.effects(self.comparisons, self.a)]
        parts += [pages.heading("What the number of items can tell"), *map(page.power, self.comparisons)]
        if kept:
            parts += [pages.heading("Retention and drift"), pages.table(kept[0]), *page.losses(self.comparisons)]
        if self.searched:
            parts += [pages.heading("Was the test seen in training?"), *self._overlaps()]
        parts.append(pages.heading("Where the arms differ"))
        for found in self.comparisons:
            parts += self._differences(found.arm)
        parts += [pages.heading("How to read this"), *map(pages.paragraph, [*self.notes(), *page.RULE])]
        files.write_text(path, pages.page(title, parts))

    def plot(self) -> Figure:
        """The gain of each arm over arm a with its interval. Green is better, orange is worse, grey cannot tell.

        The colour is that of the task alone. Needs the extra `plots`; `ImportError` without it.
        """
        figure = empty_figure(f"Gain over {self.a}", height=1.5 + 0.4 * len(self.comparisons))
        axes = figure.subplots()
        forest(
            axes,
            [found.arm for found in self.comparisons],
            [found.effect.value for found in self.comparisons],
            [found.effect.interval for found in self.comparisons],
            [{"worse": COLOURS[1], "better": COLOURS[2]}.get(found.task, GREY) for found in self.comparisons],
        )
        axes.set_ylabel("arm")
        axes.set_xlabel(f"gain in score, with its {self.comparisons[0].effect.confidence:.0%} interval")
        return figure

    def tables(self) -> list[list[list[str]]]:
        """The tables of the report as cells, header first: the task, then what was retained, if it was asked."""
        task = [["arm", "score", f"gain over {self.a}", "interval", "p", "adjusted p", "won", "lost", "items"]]
        task.append([self.a, f"{self.of_arm(self.a).mean:.3f}", "", "", "", "", "", "", str(len(self.asked))])
        kept = [["arm", "task", "measure", self.a, "arm's", "loss", "interval", "margin", "says", "items", ""]]
        for found in self.comparisons:
            e = found.effect
            gain = [f"{self.of_arm(found.arm).mean:.3f}", f"{e.value:+.3f}", interval_text(e.interval, sign="+")]
            counts = [str(e.wins), str(e.losses), str(e.items)]
            task.append([found.arm, *gain, f"{e.p:.2g}", f"{found.adjusted:.2g}", *counts])
            for r in found.retained:
                loss = [f"{r.before:.4f}", f"{r.after:.4f}", f"{r.loss:+.4f}", interval_text(r.interval, 4, "+")]
                kept.append([found.arm, r.task, r.measure, *loss, f"{r.margin:g}", r.says, str(r.items), r.note])
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
        if known := {c.arm: c.moved for c in self.comparisons if not math.isnan(c.moved)}:
            shares = ", ".join(f"{arm} {share:.1%}" for arm, share in known.items())
            told.append(f"Of the tokens that answers are read from, moved against {self.a}: {shares}.")
        told.append(f"A verdict needs {LEAST_ITEMS} items, with {LEAST_MOVED:.0%} of the tokens read moved.")
        if confidence := {kept.confidence for c in self.comparisons for kept in c.retained}:
            told.append(f"Intervals of retention are simultaneous: {max(confidence):.2%} each.")
        if self.searched:
            seen = len({overlap.test for overlap in self.overlaps if overlap.kind != "embedding"})
            told.append(f"Training texts were searched by {', '.join(self.searched)}: {seen} test items were seen.")
            for c in self.comparisons:
                if c.clean is not None:
                    interval = interval_text(c.clean.interval, sign="+")
                    told.append(f"Without them, {c.arm}: {c.clean.value:+.3f} {interval}, p = {c.clean.p:.2g}.")
        return told

    def _overlaps(self) -> list[str]:
        """The test items that are like training texts, for the page."""
        near = [overlap for overlap in self.overlaps if overlap.kind == "embedding"][:5]
        seen = [overlap for overlap in self.overlaps if overlap.kind != "embedding"][:MOST_ROWS]
        if not (seen or near):
            return [pages.paragraph("No test item was found in training.")]
        rows = [["found by", "test item", "training text", "score", "the item"]]
        for overlap in [*seen, *near]:
            score, prompt = f"{overlap.score:.3f}", self.asked[overlap.test].prompt
            rows.append([overlap.kind, str(overlap.test), str(overlap.train), score, prompt])
        told = "The closest by embedding are shown whether or not they are close." if near else ""
        return [pages.paragraph(told, "soft"), pages.table(rows, "items")]

    def _differences(self, arm: str) -> list[str]:
        """The items on which an arm and arm a differ, for the page: what their first seeds wrote, and mean scores."""
        numbers = self.discordant(arm)
        rows = [["item", "prompt", "right answer", self.a, "score", arm, "score"]]
        for i in numbers[:MOST_ROWS]:
            row = [str(i), self.asked[i].prompt, self.asked[i].answer]
            for answers in (self.of_arm(self.a), self.of_arm(arm)):
                row += [answers.written[0][i], f"{np.mean([seed[i] for seed in answers.scores]):.3g}"]
            rows.append(row)
        shown = f", of which the first {MOST_ROWS} are shown" if len(numbers) > MOST_ROWS else ""
        told = pages.paragraph(f"{len(numbers):,} of {len(self.asked):,} items{shown}.", "soft")
        return [pages.heading(arm, 3), told, *([pages.table(rows, "items")] if numbers else [])]
