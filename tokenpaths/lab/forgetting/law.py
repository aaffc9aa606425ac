"""The scaling law of forgetting, fitted to your own small runs: which share of rehearsal keeps the loss under x nats?

    trials = [Trial(parameters=135e6, tokens=2e5, share=0.01, loss=3.61, before=3.59), ...]
    law = fit(trials)
    print(law)
    print(law.share_for(0.01, parameters=135e6, tokens=1e6))

Bethune et al., "Scaling Laws for Forgetting during Finetuning with Pretraining Data Injection" (arXiv 2502.06042):

    L = L0 + A D^beta / ((1 + B p) N)^alpha

L is the loss on text that must not be forgotten, in nats a token. The model has N parameters and was finetuned on D
tokens with a share p of original data. L0 is its loss before. They finetuned all weights for the loss of pre-training.
`rms` and the intervals say whether the law holds for your trails.

The fit is least squares of log L from several starts. Parameters that the trials cannot tell apart are named as
unidentified, and predictions that depend on them are refused. Intervals are from a bootstrap of the residuals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from tokenpaths.stats.intervals import Interval

Name: TypeAlias = Literal["L0", "A", "alpha", "beta", "B"]
NAMES: tuple[Name, ...] = ("L0", "A", "alpha", "beta", "B")
_LOOSE = 100.0
"""An interval whose ends lie further apart than this factor identifies nothing."""
_BOUNDS = {"L0": (0.0, math.inf), "scale": (-40.0, 20.0), "alpha": (0.0, 5.0), "beta": (0.0, 5.0), "B": (0.0, 16.0)}
"""Of what least squares moves. Scale and B are logarithms."""
_ALPHAS, _BS = (0.3, 1.0), (3.0, 6.0, 9.0)  # starts


@dataclass(frozen=True)
class Trial:
    """One finetuning run.

    Args:
        parameters: N, of the model.
        tokens: D, of finetuning.
        share: p, the share of original data among them, within 0 and 1.
        loss: on text that must not be forgotten, after the run, in nats a token.
        before: the loss of the frozen model on the same text. Where no trial has it, one L0 is fitted for all, which
            can only be right for trials of one model.

    Raises:
        ValueError: a number that is not finite or not above 0, or a share outside [0, 1].
    """

    parameters: float
    tokens: float
    share: float
    loss: float
    before: float | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "loss", "before"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} of a trial must be a finite number above 0, not {value}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of original data must be within 0 and 1, not {self.share}")


@dataclass(frozen=True)
class Share:
    """A share of original data with its 95 % interval; infinite where even original data alone forgets more.

    `note` names what lies beyond the range of the trials.
    """

    value: float
    interval: Interval
    note: str = ""

    def __str__(self) -> str:
        low, high = (_percent(bound) for bound in self.interval)
        return f"{_percent(self.value)} [{low}, {high}]" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law.

    Args:
        values: the parameters by name. NaN for one that such trials can never identify, and for L0 where each trial has
            its own.
        intervals: their 95 % intervals; NaN as `values`.
        unidentified: why a parameter is not identified, by its name.
        rms: the root mean square error of the losses, in nats a token.
        trials: what was fitted.
    """

    values: dict[Name, float]
    intervals: dict[Name, Interval]
    unidentified: dict[Name, str]
    rms: float
    trials: tuple[Trial, ...]
    _problem: _Problem
    _best: Float[np.ndarray, " k"]
    _draws: Float[np.ndarray, "draws k"]

    def nats(self, parameters: float, tokens: float, share: float) -> float:
        """L - L0, the nats a token that are lost at N `parameters`, D `tokens` and the `share` p.

        Raises:
            ValueError: it depends on a parameter that is not identified.
        """
        self._check(parameters, tokens)
        if share not in {trial.share for trial in self.trials}:
            self._need("B", "alpha")
        return float(self._problem.forgotten(self._best, parameters, tokens, share))

    def share_for(self, nats: float, *, parameters: float, tokens: float) -> Share:
        """The least share of original data that keeps L - L0 at `nats` or less, at N `parameters` and D `tokens`.

        p = ((A D^beta / (nats N^alpha))^(1/alpha) - 1) / B, and 0 where that is negative.

        Raises:
            ValueError: nats is not above 0, or the answer depends on a parameter that is not identified.
        """
        if not (math.isfinite(nats) and nats > 0):
            raise ValueError(f"nats must be a finite number above 0, not {nats}: by this law some is always lost")
        self._check(parameters, tokens)
        self._need("B", "alpha")
        value, *draws = (self._problem.share(row, nats, parameters, tokens) for row in (self._best, *self._draws))
        low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975), method="inverted_cdf"))
        return Share(value, (low, high), self._beyond(value, parameters, tokens))

    def __str__(self) -> str:
        lines = ["L = L0 + A D^beta / ((1 + B p) N)^alpha"]
        for name in NAMES:
            low, high = self.intervals[name]
            known = not math.isnan(self.values[name])
            figures = [f"{self.values[name]:.4g} [{low:.4g}, {high:.4g}]"] if known else []
            if name in self.unidentified:
                figures.append(f"not identified: {self.unidentified[name]}")
            lines.append(f"{name:6}" + ("; ".join(figures) or "given with each trial"))
        lines.append(f"{len(self.trials)} trials, rms error {self.rms:.2g} nats a token")
        return "\n".join(lines)

    def _check(self, parameters: float, tokens: float) -> None:
        Trial(parameters, tokens, 0.0, 1.0)
        if parameters not in {trial.parameters for trial in self.trials}:
            self._need("alpha", "A")
        if tokens not in {trial.tokens for trial in self.trials}:
            self._need("beta")

    def _need(self, *names: Name) -> None:
        for name in names:
            if name in self._problem.unidentified:
                raise ValueError(f"this cannot be told: {name} is not identified ({self.unidentified[name]})")

    def _beyond(self, share: float, parameters: float, tokens: float) -> str:
        asked = {"share": share, "parameters": parameters, "tokens": tokens}
        spans = {name: [getattr(trial, name) for trial in self.trials] for name in asked}
        beyond = [n for n, x in asked.items() if math.isfinite(x) and not min(spans[n]) <= x <= max(spans[n])]
        return f"beyond the trials in {' and '.join(beyond)}" if beyond else ""


def fit(trials: Sequence[Trial], *, draws: int = 400, seed: int = 0) -> Law:
    """Fit the law to trials by least squares of log L.

    These are not identified: beta and A where all trials have one D; A where they have one N, since A / N^alpha is one
    number; alpha and B where they have one N and fewer than three shares; B where they have one share. A parameter
    whose interval spans more than a factor of 100 is named as well. It keeps its value, and the interval of `share_for`
    says what is known.

    Args:
        trials: at least two more than the parameters that they identify.
        draws: refits to residuals that are drawn anew, for the intervals.
        seed: of the draws.

    Raises:
        ValueError: too few trials, or only some with `before`.
    """
    problem = _Problem(trials)
    spare = len(trials) - len(problem.free)
    if spare < 2:
        raise ValueError(
            f"{len(trials)} trials are too few for the {len(problem.free)} parameters that they could identify: the "
            f"errors that intervals are made of need {len(problem.free) + 2} or more"
        )
    best = min((problem.solve(problem.logs, start) for start in problem.starts()), key=lambda s: s.cost).x
    residuals = problem.logs - problem.predict(best)
    residuals *= math.sqrt(len(trials) / spare)  # a fit takes part of the errors up
    generator = np.random.default_rng(seed)
    found = np.array(
        [problem.solve(problem.predict(best) + generator.choice(residuals, len(trials)), best).x for _ in range(draws)]
    )
    values, spread = problem.named(best[None])[0], problem.named(found)
    ends = np.quantile(spread, (0.025, 0.975), axis=0)
    unidentified = dict(problem.unidentified)
    for name, (low, high) in zip(NAMES, ends.T, strict=True):
        if not (name in unidentified or math.isnan(low) or high <= _LOOSE * low):
            unidentified[name] = "the trials leave it open by more than a factor of 100; add trials further apart"
    lost = [name in problem.unidentified for name in NAMES]
    values, ends = np.where(lost, math.nan, values), np.where(lost, math.nan, ends)
    losses = np.array([trial.loss for trial in trials])
    return Law(
        values=dict(zip(NAMES, map(float, values), strict=True)),
        intervals={name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(NAMES)},
        unidentified=unidentified,
        rms=float(np.sqrt(np.mean((np.exp(problem.predict(best)) - losses) ** 2))),
        trials=tuple(trials),
        _problem=problem,
        _best=best,
        _draws=found,
    )


class _Problem:
    """The law in the numbers that least squares moves: L0, log of the scale, alpha, beta, log B; some held fixed.

    With n and d the logs of N and D less their means in the trials, log(L - L0) = scale + beta d - alpha n
    - alpha log(1 + B p). The scale is then known well even where A, which lies far outside of the trials, is not.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        given = [trial.before is not None for trial in trials]
        if any(given) and not all(given):
            raise ValueError(f"trial {given.index(False)} has no `before`, others have: give it for all or for none")
        if not trials:
            raise ValueError("there are no trials to fit")
        self.n, self.d, self.p, loss, before = np.array(
            [(t.parameters, t.tokens, t.share, t.loss, t.before or math.nan) for t in trials]
        ).T
        self.logs, self.before = np.log(loss), None if not all(given) else before
        self.mean_n, self.mean_d = float(np.log(self.n).mean()), float(np.log(self.d).mean())
        self.unidentified = _unidentified(self.n, self.d, self.p)
        fixed = {"L0"} if self.before is not None else set[str]()
        fixed |= {name for name in ("alpha", "beta") if name in self.unidentified}
        if len(set(self.p)) < 2:
            fixed |= {"B"}
        self.free = [i for i, name in enumerate(_BOUNDS) if name not in fixed]
        self.bounds = np.array([bounds for name, bounds in _BOUNDS.items() if name not in fixed]).T
        self.fixed = np.array([math.nan, math.nan, 1.0, 0.0, -math.inf])  # no alpha: its power is a part of 1 + B p

    def starts(self) -> list[Float[np.ndarray, " k"]]:
        """Several: the sum of squares has more than one valley."""
        least = float(np.exp(self.logs.min()))
        base = 0.98 * least if self.before is None else math.nan
        excess = np.exp(self.logs) - (base if self.before is None else self.before)
        scale = math.log(max(float(np.median(excess)), 1e-4))
        whole = [np.array([base, scale + alpha, alpha, 0.5, b]) for alpha in _ALPHAS for b in _BS]
        return [np.clip(row[self.free], *self.bounds) for row in whole]

    def solve(self, logs: Float[np.ndarray, " n"], start: Float[np.ndarray, " k"]) -> Any:
        from scipy.optimize import least_squares

        jacobian: Any = self.jacobian
        bounds = tuple(self.bounds)
        return least_squares(lambda free: self.predict(free) - logs, start, jacobian, bounds, x_scale="jac")

    def predict(self, free: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
        """Log L of the trials."""
        return np.log(self._base(free) + self.forgotten(free, self.n, self.d, self.p))

    def jacobian(self, free: Float[np.ndarray, " k"]) -> Float[np.ndarray, "n k"]:
        """Of `predict`: dL/dL0 = 1, and with F = L - L0 the rest is F times the derivative of log F."""
        _, _, alpha, _, log_b = self._full(free)
        lost = self.forgotten(free, self.n, self.d, self.p)
        grown = np.exp(log_b) * self.p
        ones = np.ones(len(self.n))
        of_log = [ones, -self._n(self.n) - np.log1p(grown), self._d(self.d), -alpha * grown / (1 + grown)]
        whole = np.stack([ones, *(lost * part for part in of_log)], 1)
        return whole[:, self.free] / (self._base(free) + lost)[:, None]

    def forgotten(self, free: Float[np.ndarray, " k"], n: Any, d: Any, p: Any) -> Any:
        """F = A D^beta / ((1 + B p) N)^alpha."""
        _, scale, alpha, beta, log_b = self._full(free)
        return np.exp(scale + beta * self._d(d) - alpha * (self._n(n) + np.log1p(np.exp(log_b) * p)))

    def share(self, free: Float[np.ndarray, " k"], nats: float, n: float, d: float) -> float:
        """The least p of 0 or more at which F is `nats` or less; infinite if that is not so even at 1."""
        _, _, alpha, _, log_b = self._full(free)
        over = math.log(float(self.forgotten(free, n, d, 0.0))) - math.log(nats)
        if over <= 0:
            return 0.0
        needed = math.expm1(min(over / max(alpha, 1e-9), 700.0)) / math.exp(log_b)
        return needed if needed <= 1 else math.inf

    def named(self, rows: Float[np.ndarray, "rows k"]) -> Float[np.ndarray, "rows 5"]:
        """L0, A, alpha, beta, B of rows of free numbers."""
        base, scale, alpha, beta, log_b = np.array([self._full(row) for row in rows]).T
        a = np.exp(np.minimum(scale - beta * self.mean_d + alpha * self.mean_n, 700.0))
        return np.stack([base, a, alpha, beta, np.exp(log_b)], 1)

    def _full(self, free: Float[np.ndarray, " k"]) -> Float[np.ndarray, " 5"]:
        whole = self.fixed.copy()
        whole[self.free] = free
        return whole

    def _base(self, free: Float[np.ndarray, " k"]) -> Any:
        return free[0] if self.before is None else self.before

    def _n(self, n: Any) -> Any:
        return np.log(n) - self.mean_n

    def _d(self, d: Any) -> Any:
        return np.log(d) - self.mean_d


def _unidentified(
    n: Float[np.ndarray, " n"], d: Float[np.ndarray, " n"], p: Float[np.ndarray, " n"]
) -> dict[Name, str]:
    """What no trials of these N, D and p could tell, whatever their losses."""
    found: dict[Name, str] = {}
    one_n, shares = len(set(n)) == 1, len(set(p))
    if one_n:
        found["A"] = "all trials have one N, so A and alpha merge into A / N^alpha; add models of other sizes"
    if len(set(d)) == 1:
        found["beta"] = "all trials have one D; add shorter or longer runs"
        found["A"] = found.get(
            "A", "all trials have one D, so A and beta merge into A D^beta; add shorter or longer runs"
        )
    if one_n and shares < 3:
        found["alpha"] = "all trials have one N and fewer than three shares; add sizes, or shares for it to show in p"
        found["B"] = "with alpha unknown only (1 + B p)^alpha shows at the shares tried; add a third share"
    if shares < 2:
        found["B"] = "all trials have one share; add others, and 0 among them"
    return found


def _percent(share: float) -> str:
    return "more than all" if math.isinf(share) else f"{100 * share:.3g} %"
