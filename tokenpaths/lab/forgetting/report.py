"""What `forgetting` found: each measure before and after, and its change; in print, as a picture, in a file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokenpaths.drift.edit import Edit, Told, of_share
from tokenpaths.report.escaping import markdown, terminal
from tokenpaths.report.figures import COLOURS, GREY, empty_figure, forest
from tokenpaths.report.records import Record
from tokenpaths.report.tables import markdown_table, text_table, with_interval
from tokenpaths.stats.intervals import Interval, at_most
from tokenpaths.stats.verdicts import ALPHA, LEAST_ITEMS, LEAST_MOVED, POWER, too_little, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Better: TypeAlias = Literal["higher", "lower", ""]
NATS, BITS, KL, ACCURACY = "nats a token", "bits a byte", "KL to frozen", "accuracy"


@dataclass(frozen=True)
class Loss:
    """One measure of one task in the frozen and the steered model.

    Args:
        task: the name of the task.
        measure: the name of the measure, with its unit.
        before: the measure in the frozen model.
        after: the measure in the steered model.
        change: after - before.
        interval: the 95 % interval of `change`, over items in pairs.
        items: the number of items.
        better: which way is better; "" for a distance from the frozen model.
        guess: of an accuracy, that of someone who does not read: who always names the commonest right option where all
            items have the same options, and draws one elsewhere. NaN for other measures.
        moved: the share of the scored predictions that the trails can move (`engine.reach`), or that did move. NaN
            where it is not known, as in files of earlier versions.
        adjusted: the interval that the verdict is by, as wide as the number of tasks asks for (Holm); None for a
            distance, and in files of earlier versions, whose verdict is by `interval`.
        margin: the change that counts as none.
        noticeable: the least change that these items show with probability 0.8; NaN where no item changed.
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
    adjusted: Interval | None = None
    margin: float = math.nan
    noticeable: float = math.nan

    @property
    def verdict(self) -> Literal["worse", "better", "same", "cannot tell", ""]:
        """What the whole adjusted interval says: that the measure is worse, or better, or the same within its margin.

        "cannot tell": it says none of these, or there are too few items or too few tokens moved (`stats.verdicts`).
        "same" is said of an interval of 0 alone too. "" for a distance.
        """
        if not self.better:
            return ""
        low, high = self.adjusted or self.interval
        if too_little(self.items, self.moved):
            return "cannot tell"
        if low > 0 or high < 0:
            return "better" if (low > 0) == (self.better == "higher") else "worse"
        return "same" if low == high == 0 or within((low, high), self.margin) else "cannot tell"

    @property
    def note(self) -> str:
        """What a reader needs beside the figures: perplexities, the share of moved tokens, what a guess scores."""
        if self.measure == NATS:
            if self.moved < LEAST_MOVED:
                return moved_text(self.moved)
            return f"perplexity {_exp(self.before):.4g} -> {_exp(self.after):.4g} ({_exp(self.change):.4g}x)"
        if self.measure == KL or self.moved < LEAST_MOVED:
            return moved_text(self.moved)
        return "" if math.isnan(self.guess) else f"guessing {self.guess:.3f}"

    @property
    def reason(self) -> str:
        """Why nothing can be told, or what may hide, in words; "" where a change was told, and for a distance."""
        where = f"{self.task}, {self.measure}"
        if not self.better or self.verdict in ("worse", "better"):
            return ""
        if few := too_little(self.items, self.moved):
            return f"{where}: {few}."
        if self.change == 0 and math.isnan(self.noticeable):
            return f"{where}: no item changed; up to {at_most(0, self.items):.1%} of such may."
        if math.isnan(self.noticeable):
            return ""
        hides = f"{self.items} items show a change of {self.noticeable:.2g} with probability {POWER:g}"
        return f"{where}: {hides}; smaller ones may hide."


@dataclass(frozen=True)
class Forgetting(Record):
    """What `forgetting` found: `found["trec", "accuracy"]` is a `Loss`, `print(found)` a table of all.

    `trained` and `forms` name the tasks that were taught, in the trained form and in others.
    """

    what = "a forgetting report"

    losses: tuple[Loss, ...]
    trained: str = ""
    forms: tuple[str, ...] = ()

    @property
    def edit(self) -> Edit:
        """Reliability and generality: the accuracy on tasks that were taught. Locality: the KL on tasks of text."""
        right = {
            loss.task: of_share(loss.task, loss.after, loss.items)
            for loss in self.losses
            if loss.task in (self.trained, *self.forms) and loss.measure == ACCURACY
        }
        far = [Told(loss.task, loss.after, loss.interval, loss.items) for loss in self.losses if loss.measure == KL]
        forms = [right[name] for name in self.forms if name in right]
        return Edit((right[self.trained],) if self.trained in right else (), tuple(forms), tuple(far))

    def __getitem__(self, key: tuple[str, str]) -> Loss:
        for loss in self.losses:
            if (loss.task, loss.measure) == key:
                return loss
        raise KeyError(f"{key} was not measured; there are {[(loss.task, loss.measure) for loss in self.losses]}")

    def __str__(self) -> str:
        return terminal("\n".join([text_table(self._cells()), *self._told()]))

    def to_markdown(self) -> str:
        """What `print(found)` shows, in Markdown."""
        return "\n\n".join([markdown_table(self._cells()), *map(markdown, self._told())])

    def notes(self) -> list[str]:
        """What the verdicts are by, and what could hide behind so few items: a sentence or two each."""
        judged = [loss for loss in self.losses if loss.better]
        if not judged:
            return []
        tests = sum(loss.measure != BITS for loss in judged)  # bits are nats in another unit
        margins = {loss.measure: f"{loss.measure} {loss.margin:.3g}" for loss in judged if loss.margin > 0}
        told = [
            f"Verdicts of {tests} test(s) at {ALPHA:g} together (Holm), each of {LEAST_ITEMS} items or more with "
            f"{LEAST_MOVED:.0%} or more of the scored tokens moved."
        ]
        if margins:
            told[0] += f" Same: the whole interval is within the margin, {', '.join(margins.values())}."
        return [*told, *(loss.reason for loss in judged if loss.reason and loss.measure != BITS)]

    def _told(self) -> list[str]:
        rule, *reasons = self.notes() or [""]
        return [line for line in (rule, *str(self.edit).splitlines(), *reasons) if line]

    def records(self) -> list[dict[str, Any]]:
        """A flat list, one record for each task and measure."""
        return [{**asdict(loss), "verdict": loss.verdict} for loss in self.losses]

    def plot(self) -> Figure:
        """What the trails changed, task by task: each change with its 95 % interval, a panel for each unit.

        Nats a token and KL to the frozen model share a panel, and so do all other measures but bits a byte, which are
        nats again: these are drawn in points, hundredths of the measure. Orange is worse, green is better, grey is
        all else. Needs the extra `plots`; `ImportError` without it.
        """
        panels: dict[str, list[Loss]] = {}
        for loss in self.losses:
            if loss.measure != BITS:
                unit = "nats a token" if loss.measure in (NATS, KL) else "points"
                panels.setdefault(unit, []).append(loss)
        figure = empty_figure(
            "What the trails changed, against the frozen model, with 95 % intervals",
            height=1.2 + 0.8 * len(panels) + 0.3 * sum(map(len, panels.values())),
        )
        rows = figure.subplots(len(panels), squeeze=False, height_ratios=[1 + len(part) for part in panels.values()])
        for axes, (unit, part) in zip(rows[:, 0], panels.items(), strict=True):
            scale = 100 if unit == "points" else 1
            forest(
                axes,
                [f"{loss.task}: {loss.measure}" for loss in part],
                [scale * loss.change for loss in part],
                [(scale * loss.interval[0], scale * loss.interval[1]) for loss in part],
                [{"worse": COLOURS[1], "better": COLOURS[2]}.get(loss.verdict, GREY) for loss in part],
            )
            axes.set_ylabel("task")
            axes.set_xlabel(f"change, {unit}")
        return figure

    def _cells(self) -> list[list[str]]:
        rows = [["task", "measure", "frozen", "steered", "change [95 % interval]", "", "items", ""]]
        for loss in self.losses:
            change = with_interval(loss.change, loss.interval, 4, "+")
            figures = [f"{loss.before:.4f}", f"{loss.after:.4f}", change, loss.verdict, str(loss.items), loss.note]
            rows.append([loss.task, loss.measure, *figures])
        return rows


def moved_text(share: float) -> str:
    """The share of moved tokens in words, and whether it is too small for the figures to say much."""
    return f"{share:.1%} of tokens moved" + (": too few to say much" if share < LEAST_MOVED else "")


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # math.exp would raise
