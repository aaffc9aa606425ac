"""What an audit found: scores, findings in words, and a rule whose false positives were counted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenpaths.files import write_text
from tokenpaths.lab.audit.scanning import Scan
from tokenpaths.report.figures import empty_figure

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
class Rule:
    """One-class: an adapter is flagged if, of any detector, its robust z among benign adapters is above `threshold`.

    z = 0.6745 (score - centre) / spread, with the median and the median absolute deviation of benign adapters (the
    latter at least a hundredth of the former, and 1e-3). `wrong` of `tested` benign adapters that were not used to make
    the rule were flagged: the measured false-positive rate; of none, if it was not tested.
    """

    centre: dict[str, float]
    spread: dict[str, float]
    threshold: float
    adapters: int
    wrong: int = 0
    tested: int = 0

    @classmethod
    def fit(
        cls, benign: Sequence[Mapping[str, float]], *, rate: float = 0.05, detectors: Sequence[str] | None = None
    ) -> Rule:
        """From the scores of n benign adapters; of others like them about a share `rate` will be flagged.

        The threshold is the ceil((1 - rate) (n + 1))-th smallest of their joint scores, as in split conformal
        prediction (Vovk et al. 2005): the (1 - rate) quantile of few adapters lies too low for those to come. With
        fewer than 1 / rate - 1 it is the largest, and about 1 in n + 1 will be flagged.

        Raises `ValueError` for fewer than eight, and for a rate outside (0, 1).
        """
        if len(benign) < 8 or not 0 < rate < 1:
            raise ValueError(f"a rule needs 8 benign adapters or more, not {len(benign)}, and 0 < rate={rate} < 1")
        names = [name for name in detectors or DETECTORS if all(name in scores for scores in benign)]
        if not names:
            raise ValueError(f"no detector has a score in all {len(benign)} audits: audit them all alike")
        table = torch.tensor([[scores[name] for name in names] for scores in benign], dtype=torch.float64)
        middle = table.quantile(0.5, 0)
        spread = (table - middle).abs().quantile(0.5, 0)
        spread = torch.maximum(spread, (0.01 * middle.abs()).clamp_min(1e-3))
        made = cls(
            dict(zip(names, middle.tolist(), strict=True)), dict(zip(names, spread.tolist(), strict=True)), 0.0, 0
        )
        joint = torch.tensor([made.joint(scores) for scores in benign], dtype=torch.float64)
        threshold = float(joint.sort().values[min(len(joint), math.ceil((1 - rate) * (len(joint) + 1))) - 1])
        return replace(made, threshold=threshold, adapters=len(benign))

    def on(self, benign: Sequence[Mapping[str, float]]) -> Rule:
        """With its false-positive rate measured on other benign adapters."""
        wrong = sum(1 for scores in benign if self.joint(scores) > self.threshold)
        return replace(self, wrong=wrong, tested=len(benign))

    def z(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The robust z of each detector that the rule and the scores have."""
        known = [name for name in self.centre if name in scores]
        return {name: 0.6745 * (scores[name] - self.centre[name]) / self.spread[name] for name in known}

    def joint(self, scores: Mapping[str, float]) -> float:
        """The largest z."""
        return float(max(self.z(scores).values(), default=0.0))

    def __str__(self) -> str:
        rate = f"{self.wrong} of {self.tested} other benign adapters flagged" if self.tested else "not tested on others"
        return f"flagged above z = {self.threshold:.3g}, from {self.adapters} benign adapters; {rate}"

    def save(self, path: str | os.PathLike[str]) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rule:
        """Raises `ValueError` for a file that is no rule."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is no rule that Rule.save wrote: {error}") from error


@dataclass(frozen=True)
class Found:
    """One thing that was seen, of a part or (part "") of the whole, and why it may matter."""

    part: str
    what: str
    why: str


@dataclass(frozen=True, eq=False)
class Audit:
    """The report of one adapter. `scans` are by the name of their detector; `parts` has the features of each part."""

    adapter: str
    scores: dict[str, float]
    found: tuple[Found, ...]
    parts: dict[str, dict[str, Any]]
    scans: dict[str, Scan]
    rule: Rule | None

    @property
    def suspicious(self) -> bool | None:
        """Whether the rule flags it; None without a rule."""
        return None if self.rule is None else self.rule.joint(self.scores) > self.rule.threshold

    def __str__(self) -> str:
        z = {} if self.rule is None else self.rule.z(self.scores)
        lines = [f"audit of {self.adapter}"]
        verdict = f"verdict: {_VERDICTS[self.suspicious]}"
        if self.rule is None:
            lines.append(f"{verdict} (Rule.fit, on benign adapters of this base)")
        else:
            lines.append(f"{verdict}, z = {self.rule.joint(self.scores):.3g} ({self.rule})")
        for name, score in sorted(self.scores.items(), key=lambda pair: -z.get(pair[0], 0.0)):
            beside = f"  z {z[name]:+7.2f}" if name in z else ""
            lines.append(f"  {name:<11}{score:>10.4g}{beside}  {DETECTORS[name]}")
        lines += [f"- {found.part + ': ' if found.part else ''}{found.what} ({found.why})" for found in self.found]
        return "\n".join([*lines, BLIND])

    def to_json(self) -> dict[str, Any]:
        scans = {name: asdict(scan) for name, scan in self.scans.items()}
        return {
            "adapter": self.adapter,
            "suspicious": self.suspicious,
            "scores": self.scores,
            "found": [asdict(found) for found in self.found],
            "parts": self.parts,
            "scans": scans,
            "rule": None if self.rule is None else asdict(self.rule),
            "blind": BLIND,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    def picture(self) -> Figure:
        """Three panels: the size of each part by depth, tails on clean text, and the candidates of the scans."""
        figure = empty_figure(f"verdict: {_VERDICTS[self.suspicious]}", 3.6, width=12.0)
        sizes, tails, scans = figure.subplots(1, 3)
        for kind in dict.fromkeys(part["kind"] for part in self.parts.values()):
            alike = [part for part in self.parts.values() if part["kind"] == kind]
            layers = [part["layer"] for part in alike]
            sizes.plot(layers, [part["features"]["sigma"] for part in alike], "o-", label=kind)
            seen = [part for part in alike if "moved_kurtosis" in part]
            tails.plot([part["layer"] for part in seen], [part["moved_kurtosis"] for part in seen], "o-", label=kind)
        sizes.set(xlabel="layer", ylabel="largest singular value")
        tails.set(xlabel="layer", ylabel="kurtosis of ||d|| / ||h||, clean tokens")
        sizes.legend(fontsize="small")
        for name, scan in self.scans.items():
            scans.plot([c.excess for c in scan.found], ".-", label=name)
            if scan.found:
                scans.annotate(repr(scan.found[0].text), (0, scan.found[0].excess), fontsize="small")
        scans.set(xlabel="candidate, by rank", ylabel="excess, nats")
        if self.scans:
            scans.legend(fontsize="small")
        return figure
