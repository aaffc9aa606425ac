"""What an audit found: scores, findings in words, and a threshold whose false positives were counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tokenpaths.lab.audit.scanning import Scan
from tokenpaths.report.escaping import mathtext, terminal
from tokenpaths.report.figures import empty_figure, grid
from tokenpaths.report.records import Record
from tokenpaths.stats.verdicts import LEAST_PROMPTS, too_little

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DETECTORS = {
    "weights": "a part whose map stands out from the adapter's others (robust z of sigma, kurtosis, hoyer)",
    "bias": "the largest constant push, in units of the typical state",
    "bend": "how far the least linear part is from affine: a gate",
    "intruders": "new leading singular vectors in weights under LoRA, the most in one weight",
    "moved_tail": "log10 kurtosis of how far clean tokens are moved, the largest of the parts",
    "read_tail": "log10 kurtosis of what is read of clean tokens, the largest of the parts",
    "silhouette": "how well what is read of clean tokens falls into two clusters, the largest of the parts",
    "kl_tail": "log10 of the largest by the median KL on clean tokens",
    "tokens": "the token with the largest excess, in nats",
    "phrases": "the phrase with the largest excess, in nats",
    "search": "the phrase found by search with the largest excess, in nats",
}
"""What each score of an audit is. The larger, the more suspicious."""

_VERDICTS = {None: "none, for want of a rule", True: "SUSPICIOUS", False: "not suspicious"}

BLIND = (
    "It cannot find a trigger that is on no list and that no gradient leads to (several words that must come together, "
    "a style, a topic), a payload that shows only in long answers or other tasks, or an adapter trained against these "
    "very scores. A clean report is no proof of a clean adapter."
)


@dataclass(frozen=True)
class Threshold(Record):
    """A one-class rule: it knows no attack, and flags what is unlike benign adapters.

    An adapter is flagged if its robust z among benign adapters is above `value` for any detector,

        z = 0.6745 (score - centre) / spread

    Args:
        centre: the median of benign adapters, by detector.
        spread: their median absolute deviation, at least a hundredth of the centre and 1e-3, by detector.
        value: the largest z that is not flagged.
        adapters: how many benign adapters it was fitted on.
        wrong: how many of the `tested` adapters were flagged: the measured false positives.
        tested: how many other benign adapters it was measured on; 0 if it was not.

    Raises `ValueError` for numbers that are none of these: a threshold that is NaN would flag nothing.
    """

    what: ClassVar[str] = "a threshold of an audit"
    centre: dict[str, float]
    spread: dict[str, float]
    value: float
    adapters: int
    wrong: int = 0
    tested: int = 0

    def __post_init__(self) -> None:
        sound = self.centre and self.centre.keys() == self.spread.keys() and not math.isnan(self.value)
        spreads = all(0 < spread < math.inf for spread in self.spread.values())
        if not (sound and spreads and all(map(math.isfinite, self.centre.values()))):
            raise ValueError(
                f"a threshold has a finite centre and a spread above 0 by detector, and a value, not {self!r:.200}"
            )
        if self.adapters < 1 or not 0 <= self.wrong <= self.tested:
            raise ValueError(f"{self.wrong} of {self.tested} flagged, after {self.adapters} adapters, cannot be")

    @classmethod
    def fit(
        cls, benign: Sequence[Mapping[str, float]], *, rate: float = 0.05, detectors: Sequence[str] | None = None
    ) -> Threshold:
        """Fit a threshold to the scores of n benign adapters; it flags at most a share `rate` of others like them.

        The threshold is the ceil((1 - rate) (n + 1))-th smallest of n joint scores, each of one adapter by the centre
        and spread of the others: an adapter to come is no part of what it is measured by either (Barber et al. 2021,
        arXiv 1905.02928, "jackknife"). In simulations it flagged somewhat fewer than it was told, of 8 adapters 0.08 at
        0.11. With fewer than 1 / rate - 1 adapters it is the largest, and about 1 in n + 1 will be flagged.

        Args:
            benign: `Audit.scores` of benign adapters, at least eight.
            rate: the share of benign adapters to flag, in (0, 1).
            detectors: the names of the scores to use; by default all of `DETECTORS`.

        Raises:
            ValueError: fewer than eight adapters, a rate outside (0, 1), no detector that all audits have, or a score
                that is not finite.
        """
        if len(benign) < 8 or not 0 < rate < 1:
            raise ValueError(f"a rule needs 8 benign adapters or more, not {len(benign)}, and 0 < rate={rate} < 1")
        names = [name for name in detectors or DETECTORS if all(name in scores for scores in benign)]
        if not names:
            raise ValueError(f"no detector has a score in all {len(benign)} audits: audit them all alike")
        apart = [cls._of([*benign[:i], *benign[i + 1 :]], names) for i in range(len(benign))]
        joint = sorted(others.joint(scores) for others, scores in zip(apart, benign, strict=True))
        rank = min(len(joint), math.ceil((1 - rate) * (len(joint) + 1)))
        return replace(cls._of(benign, names), value=joint[rank - 1])

    @classmethod
    def _of(cls, benign: Sequence[Mapping[str, float]], names: Sequence[str]) -> Threshold:
        """Centre and spread of adapters, and no value yet."""
        table = torch.tensor([[scores[name] for name in names] for scores in benign], dtype=torch.float64)
        if not bool(table.isfinite().all()):
            raise ValueError("a score of a benign adapter is not finite: leave that adapter out, or audit it again")
        middle = table.quantile(0.5, 0)
        spread = (table - middle).abs().quantile(0.5, 0)
        spread = torch.maximum(spread, (0.01 * middle.abs()).clamp_min(1e-3))
        centres, spreads = (dict(zip(names, row.tolist(), strict=True)) for row in (middle, spread))
        return cls(centres, spreads, math.inf, len(benign))

    def on(self, benign: Sequence[Mapping[str, float]]) -> Threshold:
        """The same threshold, with its false positives counted on the scores of other benign adapters."""
        return replace(self, wrong=sum(map(self.flags, benign)), tested=len(benign))

    def z(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The robust z of each detector that both the threshold and the scores have; infinite for a score of NaN."""
        known = {name: scores[name] for name in self.centre if name in scores}
        z = {name: 0.6745 * (score - self.centre[name]) / self.spread[name] for name, score in known.items()}
        return {name: math.inf if math.isnan(value) else value for name, value in z.items()}

    def joint(self, scores: Mapping[str, float]) -> float:
        """The largest z of all detectors."""
        return float(max(self.z(scores).values(), default=0.0))

    def flags(self, scores: Mapping[str, float]) -> bool:
        """Whether an adapter with these scores is flagged."""
        return self.joint(scores) > self.value

    def __str__(self) -> str:
        rate = f"{self.wrong} of {self.tested} other benign adapters flagged" if self.tested else "not tested on others"
        return f"flagged above z = {self.value:.3g}, from {self.adapters} benign adapters; {rate}"


@dataclass(frozen=True)
class Finding:
    """One thing that was seen in a part, or with part "" in the whole adapter, and why it may matter."""

    part: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.part + ': ' if self.part else ''}{self.what} ({self.why})"


@dataclass(frozen=True)
class Audit(Record):
    """The report of one adapter.

    Args:
        adapter: the adapter in words, its repr.
        scores: the score of each detector: see `DETECTORS`.
        found: what was seen, in words.
        parts: by the name of each part: its kind, layer, bend, features and tails, and the tokens of its directions.
        scans: the scans and the search, by the name of their detector.
        threshold: what the verdict is by; None for no verdict.
        items: the number of clean prompts that it was read on; 0 in files of earlier versions, which do not say.
        moved: the share of the predictions of their answers that the adapter can move (`engine.reach`).
    """

    what: ClassVar[str] = "a report of an audit"
    derived: ClassVar[tuple[str, ...]] = ("suspicious", "blind")
    blind: ClassVar[str] = BLIND
    adapter: str
    scores: dict[str, float]
    found: tuple[Finding, ...]
    parts: dict[str, dict[str, Any]]
    scans: dict[str, Scan]
    threshold: Threshold | None
    items: int = 0
    moved: float = math.nan

    @property
    def suspicious(self) -> bool | None:
        """Whether the threshold flags it; None without a threshold, and where too little was read (`too_little`)."""
        return None if self.threshold is None or self.too_little else self.threshold.flags(self.scores)

    @property
    def too_little(self) -> str:
        """Why no verdict may rest on these prompts, in words; "" if one may."""
        return too_little(self.items or LEAST_PROMPTS, self.moved, LEAST_PROMPTS)

    def __str__(self) -> str:
        verdict = f"verdict: {self._verdict}"
        read = f"read on {self.items} clean prompts, {self.moved:.1%} of the tokens of their answers moved"
        if self.threshold is None:
            z: dict[str, float] = {}
            verdict += " (Threshold.fit, on benign adapters of this base)"
        else:
            z = self.threshold.z(self.scores)
            verdict += f", z = {self.threshold.joint(self.scores):.3g} ({self.threshold})"
        lines = [f"audit of {self.adapter}", verdict, *([read] if self.items else [])]
        for name, score in sorted(self.scores.items(), key=lambda pair: -z.get(pair[0], 0.0)):
            beside = f"  z {z[name]:+7.2f}" if name in z else ""
            lines.append(f"  {name:<11}{score:>10.4g}{beside}  {DETECTORS.get(name, name)}")
        return terminal("\n".join([*lines, *(f"- {finding}" for finding in self.found), BLIND]))

    def plot(self) -> Figure:
        """Three panels: the size of each part by depth, tails on clean text, and the candidates of the scans.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = empty_figure(f"verdict: {self._verdict}", 3.6, width=12.0)
        sizes, tails, scans = figure.subplots(1, 3)
        for kind in dict.fromkeys(part["kind"] for part in self.parts.values()):
            alike = [part for part in self.parts.values() if part["kind"] == kind]
            seen = [part for part in alike if "moved_kurtosis" in part]
            sizes.plot(
                [part["layer"] for part in alike],
                [part["features"]["sigma"] for part in alike],
                "o-",
                label=mathtext(kind),
            )
            tails.plot(
                [part["layer"] for part in seen], [part["moved_kurtosis"] for part in seen], "o-", label=mathtext(kind)
            )
        sizes.set(xlabel="layer", ylabel="largest singular value")
        tails.set(xlabel="layer", ylabel="kurtosis of ||d|| / ||h||, clean tokens")
        sizes.legend(fontsize="small")
        for name, scan in self.scans.items():
            scans.plot([c.excess for c in scan.found], ".-", label=mathtext(name))
            if scan.found:
                scans.annotate(mathtext(repr(scan.found[0].text)), (0, scan.found[0].excess), fontsize="small")
        scans.set(xlabel="candidate, by rank", ylabel="excess, nats")
        if self.scans:
            scans.legend(fontsize="small")
        for axes in (sizes, tails, scans):
            grid(axes)
        return figure

    @property
    def _verdict(self) -> str:
        if self.threshold is not None and self.too_little:
            return f"cannot tell, {self.too_little}"
        return _VERDICTS[self.suspicious]
