"""What a `Meter` found: figures by measure and layer, in print, in a file, in a table, by position.

found = tp.drift(model, trails, texts, tokenizer)
print(found)
found["kl"].mean, found["kl"].interval        # a measure: one summary ...
found["displacement"]["block 3"].p99          # ... or one a layer
found["nll"].change.mean                      # a quantity: before, after, and its change
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokenpaths.files import write_text

OFFSETS = np.arange(-64, 65)
"""Places of a token, counted from the last token of the prompt, which is 0. The ends stand for all beyond them."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]
RunName = Literal["", "before", "after", "change"]


@dataclass(frozen=True)
class Summary:
    """What a measure was over `count` tokens.

    `interval` is the 95 % interval of the mean over texts (texts are independent, tokens are not), without bounds where
    fewer than two texts have a figure. `p50` and `p99` are within 0.5 % of the true ones; see `Tally`. Without a single
    figure (`count` 0) all others are NaN.
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
class Figure:
    """One measure or quantity in one run: a summary and a mean by position for each of its rows.

    `layers` is empty for a figure that has no layers, which then has one row. `run` is "" for a measure of both runs.
    `by_position` has a mean for each of `OFFSETS`, None where no token is.
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
class SetFigure:
    """A set measure at one layer, over a sample of `count` tokens; NaN, and why, where it could not be computed.

    `run` is "" for a measure of both runs, else which of the two sets the value is of.
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
class Drift:
    """How far one run of a model is from another, over the tokens of some texts.

    `found["kl"]` is a `Summary`, of a measure with layers a `Layered`, of a quantity a `Change` of either. Of a set
    measure it is a dict of its value by layer, and of a quantity of one set a dict of such dicts, "before" and "after".

    `moved` is the share of tokens that differ at all after the last block: where it is near 0, the other figures say
    nothing (`Last(n)` moves no more than n tokens of a text). `massive` is the share with massive activations, which
    set measures leave out. `calibration` is the expected calibration error before and after, on `answers` tokens of
    answers; NaN without any.
    """

    figures: tuple[Figure, ...]
    sets: tuple[SetFigure, ...]
    calibration: tuple[float, float]
    answers: int
    moved: float
    massive: float
    tokens: int
    texts: int

    def __getitem__(self, name: str) -> Any:
        found = self._named.get(name)
        if found is not None:
            return (
                found[""].view if "" in found else Change(*(found[run].view for run in ("before", "after", "change")))
            )
        values: dict[RunName, dict[str, float]] = {}
        for figure in self.sets:
            if figure.name == name:
                values.setdefault(figure.run, {})[figure.layer] = figure.value
        if not values:
            raise KeyError(f"{name!r} was not measured; there are {', '.join(self.names)}")
        return values.get("", values)

    @property
    def names(self) -> list[str]:
        """What was measured."""
        return list(dict.fromkeys(figure.name for figure in (*self.figures, *self.sets)))

    @cached_property
    def _named(self) -> dict[str, dict[RunName, Figure]]:
        found: dict[str, dict[RunName, Figure]] = {}
        for figure in self.figures:
            found.setdefault(figure.name, {})[figure.run] = figure
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

        Of a quantity, `run` chooses "before", "after" or "change" (the default).
        """
        runs = self._named.get(name)
        if runs is None:
            raise KeyError(f"{name!r} has no positions; these have: {', '.join(self._named)}")
        figure = runs[run or ("" if "" in runs else "change")]
        means = np.array(figure.by_position, dtype=np.float64)  # None becomes NaN
        return OFFSETS.astype(np.float64), means if figure.layers else means[0]

    def records(self) -> list[dict[str, Any]]:
        """A flat list: one record for each name, run and layer. A set measure has a mean only."""
        found: list[dict[str, Any]] = []
        for figure in self.figures:
            for layer, s in zip(figure.layers or ("",), figure.summaries, strict=True):
                low, high = s.interval
                place = {"name": figure.name, "run": figure.run, "layer": layer}
                figures = {"mean": s.mean, "low": low, "high": high, "p50": s.p50, "p99": s.p99, "max": s.max}
                found.append({**place, **figures, "count": s.count})
        for figure in self.sets:
            place = {"name": figure.name, "run": figure.run, "layer": figure.layer, "mean": figure.value}
            found.append(
                {**place, **dict.fromkeys(("low", "high", "p50", "p99", "max"), math.nan), "count": figure.count}
            )
        return found

    def to_frame(self) -> Any:
        """`records()` as a pandas DataFrame. Raises `ImportError` where pandas is not installed."""
        try:
            import pandas
        except ImportError as missing:
            raise ImportError("to_frame() needs pandas: `pip install pandas`, or use records()") from missing
        return pandas.DataFrame(self.records())

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one JSON file, whole or not at all. Infinity and NaN become null."""
        write_text(path, json.dumps(finite(asdict(self)), allow_nan=False))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Drift:
        """Read what `to_json` wrote. Raises `ValueError` for any other file."""
        try:
            note = json.loads(Path(path).read_text())
            figures = tuple(_figure(**figure) for figure in note.pop("figures"))
            sets = tuple(_set_figure(**figure) for figure in note.pop("sets"))
            before, after = map(_number, note.pop("calibration"))
            return cls(figures=figures, sets=sets, calibration=(before, after), **note)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a drift report as to_json writes it: {error}") from error

    def to_markdown(self) -> str:
        """Two tables: what has one figure a token, and the means of what has layers."""
        lines = ["| measure | mean | 95 % interval | p50 | p99 | max |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {' '.join(filter(None, (f.name, f.run)))} | {s.mean:.4g} | {s.interval[0]:.4g} to {s.interval[1]:.4g} "
            f"| {s.p50:.3g} | {s.p99:.3g} | {s.max:.3g} |"
            for f, s in ((figure, figure.summaries[0]) for figure in self.figures if not figure.layers)
        ]
        columns: dict[str, dict[str, float]] = {}
        for record in self.records():
            if record["layer"]:
                title = " ".join(filter(None, (record["name"], record["run"])))
                columns.setdefault(title, {})[record["layer"]] = record["mean"]
        if columns:
            layers = list(dict.fromkeys(layer for column in columns.values() for layer in column))
            lines += ["", f"| layer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for layer in layers:
                cells = (f"{column[layer]:.4g}" if layer in column else "" for column in columns.values())
                lines.append(f"| {layer} | {' | '.join(cells)} |")
        share = f"{self.moved:.1%} of {self.tokens} tokens in {self.texts} texts moved"
        return "\n".join([*lines, "", f"{share}; {self.massive:.2%} of them have massive activations."])

    def __str__(self) -> str:
        return ", ".join([*self._said(), f"{self.moved:.1%} of {self.tokens} tokens in {self.texts} texts moved"])

    def _said(self) -> Iterator[str]:
        if "kl" in self._named:
            kl: Summary = self["kl"]
            low, high = kl.interval
            yield f"KL {kl.mean:.4f} [{low:.4f}, {high:.4f}] nats a token (p99 {kl.p99:.3f}, max {kl.max:.3f})"
        if "nll" in self._named:
            ppl = self.perplexity
            yield f"perplexity {ppl.before:.4g} -> {ppl.after:.4g} ({ppl.ratio:.3f}x)"
        if "flips" in self._named:
            yield f"top-1 flipped {self['flips'].mean:.1%}"
        if "displacement" in self._named:
            layered: Layered = self["displacement"]
            yield f"displacement at most {layered[layered.largest].mean:.3f} ({layered.largest})"


def _figure(
    name: str, run: RunName, layers: list[str], summaries: list[dict[str, Any]], by_position: list[list[float | None]]
) -> Figure:
    return Figure(name, run, tuple(layers), tuple(_summary(**s) for s in summaries), tuple(map(tuple, by_position)))


def _set_figure(value: float | None, **rest: Any) -> SetFigure:
    return SetFigure(value=_number(value), **rest)


def _summary(interval: list[float | None], count: int, **numbers: float | None) -> Summary:
    low, high = interval
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return Summary(interval=bounds, count=count, **{name: _number(value) for name, value in numbers.items()})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def finite(value: Any) -> Any:
    """The same, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # math.exp would raise
