"""What a `Meter` found: numbers by measure and layer, in print, in a file, in a table, in pictures.

found = tp.measure_drift(model, trails, texts, tokenizer)
print(found)
found["kl"].mean, found["kl"].interval        # a measure: one summary ...
found["displacement"]["block 3"].p99          # ... or one a layer
found["nll"].change.mean                      # a quantity: before, after, and its change
found.plot(["displacement"])                  # a picture, which shows itself in a notebook
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from tokenpaths.drift.plots import draw_heads, draw_layers, draw_positions
from tokenpaths.report.escaping import terminal
from tokenpaths.report.records import Record
from tokenpaths.report.tables import markdown_table
from tokenpaths.stats.verdicts import LEAST_MOVED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OFFSETS = np.arange(-64, 65)
"""Places of a token, counted from the last token of the prompt, which is 0. The ends stand for all beyond them."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]
RunName = Literal["", "before", "after", "change"]


@dataclass(frozen=True)
class Summary:
    """A measure over `count` tokens, in the measure's unit. Without any number (`count` 0) the others are NaN.

    `interval` is the 95 % interval of the mean over texts: texts are independent, tokens are not. It is without bounds
    where fewer than two texts have a number. `p50` and `p99` are within 0.5 % of the true quantiles; see `Tally`.
    """

    mean: float
    interval: tuple[float, float]
    p50: float
    p99: float
    max: float
    count: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.4g} [{low:.4g}, {high:.4g}] (p99 {self.p99:.3g}, max {self.max:.3g})"


@dataclass(frozen=True)
class Layered:
    """A summary for each layer: `layered["block 3"]`. `layers` are their names, in order of depth."""

    layers: tuple[str, ...]
    summaries: tuple[Summary, ...]

    def __getitem__(self, layer: str) -> Summary:
        if layer not in self.layers:
            raise KeyError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        return self.summaries[self.layers.index(layer)]

    @property
    def largest(self) -> str:
        """The layer with the largest mean."""
        return max(self.layers, key=lambda layer: -math.inf if math.isnan(self[layer].mean) else self[layer].mean)

    def __str__(self) -> str:
        return "\n".join(f"{layer}: {self[layer]}" for layer in self.layers)


@dataclass(frozen=True)
class Change:
    """A quantity of both runs, and its change at each token, after - before."""

    before: Summary | Layered
    after: Summary | Layered
    change: Summary | Layered

    def __str__(self) -> str:
        return f"before {self.before}\nafter {self.after}\nchange {self.change}"


@dataclass(frozen=True)
class Measured:
    """One measure or quantity in one run: a summary and a mean by position for each of its rows.

    `layers` names the rows; it is empty for a measure without layers, which has one row. `run` is "" for a measure of
    both runs. `by_position` has a mean for each of `OFFSETS`, None where no token is.
    """

    name: str
    run: RunName
    layers: tuple[str, ...]
    summaries: tuple[Summary, ...]
    by_position: tuple[tuple[float | None, ...], ...]

    @property
    def view(self) -> Summary | Layered:
        return Layered(self.layers, self.summaries) if self.layers else self.summaries[0]


@dataclass(frozen=True)
class MeasuredSet:
    """A set measure at one layer, over a sample of `count` tokens. Its value is NaN where `reason` says why.

    `run` is "" for a measure of both runs, else the run whose states the value is of.
    """

    name: str
    run: RunName
    layer: str
    value: float
    count: int
    reason: str = ""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the texts before and after; `ratio` is after / before."""

    before: float
    after: float
    ratio: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Drift(Record):
    """How far one run of a model is from another, over the tokens of some texts.

    `found["kl"]` is a `Summary`; for a measure with layers it is a `Layered`, and for a quantity a `Change` of either.
    For a set measure it is a dict of values by layer, and for a quantity of one set a dict of two such dicts, "before"
    and "after".

    Args:
        figures: the measures and quantities.
        sets: the set measures.
        calibration: the expected calibration error before and after, on tokens of answers; NaN without any.
        answers: the number of tokens of answers.
        moved: the share of tokens that differ at all after the last block. Where it is near 0, the other numbers say
            nothing: `Last(n)` moves no more than n tokens of a text.
        massive: the share of tokens with massive activations, which set measures leave out.
        tokens: the number of tokens.
        texts: the number of texts.
        reached: the share of tokens that the run moves: those that it can change, as `engine.reach` tells, a shut gate
            and a fresh trail included. All means are over all tokens, so below `LEAST_MOVED` of `stats.verdicts` the
            report says "cannot tell". NaN in files of earlier versions.
    """

    what: ClassVar[str] = "a drift report"

    figures: tuple[Measured, ...]
    sets: tuple[MeasuredSet, ...]
    calibration: tuple[float, ...]  # not tuple[float, float]: a `Record` would read it as an interval
    answers: int
    moved: float
    massive: float
    tokens: int
    texts: int
    reached: float = math.nan

    def __getitem__(self, name: str) -> Any:
        if runs := self._named.get(name):
            return runs[""].view if "" in runs else Change(*(runs[run].view for run in ("before", "after", "change")))
        values: dict[RunName, dict[str, float]] = {}
        for found in self.sets:
            if found.name == name:
                values.setdefault(found.run, {})[found.layer] = found.value
        if not values:
            raise KeyError(f"{name!r} was not measured; there are {', '.join(self.names)}")
        return values.get("", values)

    @property
    def names(self) -> list[str]:
        """What was measured."""
        return list(dict.fromkeys(found.name for found in (*self.figures, *self.sets)))

    @cached_property
    def _named(self) -> dict[str, dict[RunName, Measured]]:
        found: dict[str, dict[RunName, Measured]] = {}
        for measured in self.figures:
            found.setdefault(measured.name, {})[measured.run] = measured
        return found

    @property
    def perplexity(self) -> Perplexity:
        """Perplexity of the texts, from the quantity `nll`; the interval of the ratio is over texts."""
        nll: Change = self["nll"]
        assert isinstance(nll.before, Summary) and isinstance(nll.after, Summary) and isinstance(nll.change, Summary)
        low, high = nll.change.interval
        return Perplexity(_exp(nll.before.mean), _exp(nll.after.mean), _exp(nll.change.mean), (_exp(low), _exp(high)))

    def by_position(self, name: str, run: RunName | None = None) -> tuple[Numbers, Numbers]:
        """`OFFSETS`, and the mean at each: [offsets], or [layers, offsets]; NaN where no token is.

        Args:
            name: a measure or quantity.
            run: for a quantity, "before", "after" or "change" (the default).

        Raises:
            KeyError: the report has no positions for this name.
        """
        measured = self._positions(name, run)
        means = np.array(measured.by_position, dtype=np.float64)  # None becomes NaN
        return OFFSETS.astype(np.float64), means if measured.layers else means[0]

    def records(self) -> list[dict[str, Any]]:
        """A flat list: one record for each name, run and layer. A set measure has a mean only."""
        nan = math.nan
        rows = [
            (found.name, found.run, layer, summary)
            for found in self.figures
            for layer, summary in zip(found.layers or ("",), found.summaries, strict=True)
        ]
        rows += [(s.name, s.run, s.layer, Summary(s.value, (nan, nan), nan, nan, nan, s.count)) for s in self.sets]
        keys = ("name", "run", "layer", "mean", "low", "high", "p50", "p99", "max", "count")
        return [
            dict(zip(keys, (*row, s.mean, *s.interval, s.p50, s.p99, s.max, s.count), strict=True)) for *row, s in rows
        ]

    def to_frame(self) -> Any:
        """`records()` as a pandas DataFrame. Raises `ImportError` where pandas is not installed."""
        try:
            import pandas
        except ImportError as missing:
            raise ImportError("to_frame() needs pandas: `pip install pandas`, or use records()") from missing
        return pandas.DataFrame(self.records())

    def to_markdown(self) -> str:
        """Two tables: what has one number a token, and the means of what has layers."""
        plain: list[Sequence[str]] = [("measure", "mean", "95 % interval", "p50", "p99", "max")]
        columns: dict[str, dict[str, str]] = {}
        for r in self.records():
            title = f"{r['name']} {r['run']}".rstrip()
            if r["layer"]:
                columns.setdefault(title, {})[r["layer"]] = f"{r['mean']:.4g}"
            else:
                interval = f"{r['low']:.4g} to {r['high']:.4g}"
                plain.append([title, f"{r['mean']:.4g}", interval, *(f"{r[key]:.3g}" for key in ("p50", "p99", "max"))])
        layers = dict.fromkeys(layer for column in columns.values() for layer in column)
        layered = [["layer", *columns], *([layer, *(c.get(layer, "") for c in columns.values())] for layer in layers)]
        tables = [markdown_table(rows) for rows in ([plain, layered] if columns else [plain])]
        told = self.too_little or self._moved()
        return "\n\n".join([*tables, f"{told}; {self.massive:.2%} of them have massive activations."])

    def plot(self, names: Sequence[str] = ("displacement",)) -> Figure:
        """Measures by layer, averaged over tokens: a panel for each name, the 95 % interval over texts as a band.

        Args:
            names: measures, quantities or set measures with layers. Of a quantity, the frozen and the steered run are
                drawn together. A set measure has no interval.

        Raises:
            ValueError: no names, or a name that was not measured by layer.
            ImportError: matplotlib is not installed, here as in the other plots.
        """
        if not names:
            raise ValueError(f"plot was given no names; the report has {', '.join(self.names)}")
        panels: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
        for record in self._by_layer(*names):
            if record["run"] != "change" and record["name"] in panels:
                panels[record["name"]].setdefault(record["run"], []).append(record)
        title = f"Drift by layer: mean over {self.tokens:,} tokens, 95 % interval over {self.texts:,} texts"
        return draw_layers(panels, title)

    def plot_positions(self, name: str = "displacement", run: RunName | None = None) -> Figure:
        """A heat map of a measure: layers upward, and tokens by their distance from the end of the prompt, at 0.

        The outermost columns stand for all tokens beyond them; grey has no tokens. The colours end at the 99th
        percentile.

        Args:
            name: a measure or quantity with layers.
            run: for a quantity, "before", "after" or "change" (the default).

        Raises:
            ValueError: the measure was not measured by layer.
            KeyError: the report has no positions for this name.
        """
        measured = self._positions(name, run)
        self._by_layer(name)
        title = f"Drift by layer and position: mean over {self.tokens:,} tokens"
        return draw_positions(*self.by_position(name, run), measured.layers, name, title)

    def plot_heads(self, name: str = "attention_js", run: RunName | None = None) -> Figure:
        """A heat map of an attention measure, averaged over tokens: layers upward, heads along. Grey has no head.

        Args:
            name: an attention measure or quantity.
            run: for a quantity, "before", "after" or "change" (the default).

        Raises:
            ValueError: the name was not measured by head.
        """
        records = [r for r in self.records() if r["name"] == name and " head " in r["layer"]]
        run = run or ("change" if any(r["run"] == "change" for r in records) else "")
        places = [(*r["layer"].split(" head "), r["mean"]) for r in records if r["run"] == run]
        if not places:
            raise ValueError(
                f"{name!r} was not measured by head; give it to the meter: Meter(..., attention=(attention_js,)). "
                f"The report has {', '.join(self.names)}"
            )
        layers = list(dict.fromkeys(layer for layer, _, _ in places))
        means = np.full((len(layers), 1 + max(int(head) for _, head, _ in places)), np.nan)
        for layer, head, mean in places:
            means[layers.index(layer), int(head)] = mean
        return draw_heads(means, layers, name, f"Drift of attention: mean over {self.tokens:,} tokens")

    @property
    def too_little(self) -> str:
        """Why the means say little, in words; "" if enough of the tokens were moved."""
        if not self.reached < LEAST_MOVED:
            return ""
        return (
            f"cannot tell: {self.reached:.1%} of {self.tokens} tokens in {self.texts} texts moved, of the "
            f"{LEAST_MOVED:.0%} that a mean over all needs (give texts a prompt and an answer, as split_texts does)"
        )

    def __str__(self) -> str:
        if self.too_little:
            return terminal(", ".join([self.too_little, *self._said()]))
        return terminal(", ".join([*self._said(), self._moved()]))

    def _moved(self) -> str:
        return f"{self.moved:.1%} of {self.tokens} tokens in {self.texts} texts moved"

    def _said(self) -> Iterator[str]:
        """The main figures. Where few tokens were moved, the perplexity is that of the others, and is left out."""
        if "kl" in self._named:
            kl: Summary = self["kl"]
            low, high = kl.interval
            each = f", {kl.mean / self.reached:.4f} a moved one" if self.too_little and self.reached else ""
            yield f"KL {kl.mean:.4f} [{low:.4f}, {high:.4f}] nats a token{each} (p99 {kl.p99:.3f}, max {kl.max:.3f})"
        if "nll" in self._named and not self.too_little:
            ppl = self.perplexity
            yield f"perplexity {ppl.before:.4g} -> {ppl.after:.4g} ({ppl.ratio:.3f}x)"
        if "flips" in self._named:
            yield f"top-1 flipped {self['flips'].mean:.1%}"
        if "displacement" in self._named:
            layered: Layered = self["displacement"]
            yield f"displacement at most {layered[layered.largest].mean:.3f} ({layered.largest})"

    def _positions(self, name: str, run: RunName | None) -> Measured:
        """The measure of a name that has positions; of a quantity, its change or the run that is asked for."""
        runs = self._named.get(name)
        if runs is None:
            raise KeyError(f"{name!r} has no positions; these have: {', '.join(self._named)}")
        return runs[run or ("" if "" in runs else "change")]

    def _by_layer(self, *names: str) -> list[dict[str, Any]]:
        """The records of what was measured by layer and not by head, which each of the names must be."""
        found = [r for r in self.records() if r["layer"] and " head " not in r["layer"]]
        known = dict.fromkeys(r["name"] for r in found)
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} was not measured by layer; these were: {', '.join(known)}")
        return found


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # math.exp would raise
