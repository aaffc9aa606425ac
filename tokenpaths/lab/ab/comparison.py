"""One arm against arm a, and the rule of the verdict.

Arm b is compared with arm a on the task, and on what it retains. The verdict is

    "worse"         the task is worse, or a loss of retention or drift is beyond its margin
    "better"        the task is better, and everything is kept within its margin
    "cannot tell"   else; the report says how many items would tell

The task is better (worse) if its Holm-adjusted p-value is at most alpha and the effect is above (below) 0. A loss is
kept (beyond) if its whole simultaneous interval is below (above) its margin. Neither is told of fewer items or moved
tokens than `stats.verdicts` asks for. There are two ways to be wrong: to call equal tasks different, and to call a loss
within its margin lost. Each has a probability of at most alpha over all arms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenpaths.lab.ab.retained import Retained
from tokenpaths.stats.paired import Effect
from tokenpaths.stats.power import Power
from tokenpaths.stats.verdicts import too_little

Verdict: TypeAlias = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Comparison:
    """An arm against arm a.

    Args:
        arm: its name.
        effect: its gain on the task.
        adjusted: the p-value of the effect, adjusted for the number of arms (Holm 1979).
        alpha: what `adjusted` is compared with.
        power: what the test can show.
        retained: what was kept of every task of retention.
        clean: the effect without items that training has seen; None where none was found, or the test could stop early.
        evidence: the largest e-value of all looks, where the test could stop early.
        moved: the share of the predictions behind the answers that the arm moves and arm a does not, or the other way
            round; NaN where one of them is a function, and in files of earlier versions.
    """

    arm: str
    effect: Effect
    adjusted: float
    alpha: float
    power: Power
    retained: tuple[Retained, ...] = ()
    clean: Effect | None = None
    evidence: float | None = None
    moved: float = math.nan

    @property
    def task(self) -> Verdict:
        """On the task alone."""
        if too_little(self.effect.items, self.moved) or self.adjusted > self.alpha or self.effect.value == 0:
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
        if few := too_little(self.effect.items, self.moved):
            told.append(f"Too little: {few}.")
        for figure in self.retained:
            name = f"{figure.task}, {figure.measure}"
            if figure.says == "lost":
                told.append(f"{name}: the loss of {figure.loss:.3g} is beyond the margin of {figure.margin:g}.")
            elif figure.too_little:
                told.append(f"{name}: cannot tell, {figure.too_little}.")
            elif figure.says == "cannot tell":
                more = f": about {figure.tells:,} items tell" if figure.tells else ""
                told.append(f"{name}: cannot tell whether the loss is within {figure.margin:g}{more}.")
        if self.retained and {figure.says for figure in self.retained} == {"kept"}:
            told.append("Retention and drift: all within their margins.")
        return told


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
