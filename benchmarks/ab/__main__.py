"""Can the A/B test be believed?  Coverage of its intervals, errors of its tests, and the time of one whole run.

    python -m benchmarks.ab                  # what has not been measured yet, then the table
    python -m benchmarks.ab --part numbers   # one of: shares, numbers, flips, seeds, looks, arms, time
    python -m benchmarks.ab --table          # the table of what there is

Outcomes of 50 items are drawn from known distributions, 2,000 times a cell, and given to `tokenpaths.ab`. Where all
tables of counts can be listed, coverage and errors are exact besides. `time` runs examples/ab_test.py from the command
to the page. Each part is kept in a file until all are a table.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, multinomial, norm, t

from benchmarks.common.folders import EXAMPLES, KEPT
from benchmarks.common.kept import keep, read
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write
from tokenpaths.stats import always_valid, effect, evidence, holm, mcnemar_power
from tokenpaths.stats.intervals import mean_interval
from tokenpaths.stats.paired import mcnemar, sign_flips, tango

ITEMS, TIMES, ALPHA = 50, 2000, 0.05
FLIPS, SAME = 20_000, 200  # experiments for sign flips, whose error is alpha itself: 2,000 tell it to within 0.01 only
RIVAL = 500  # experiments for BCa alone, which is no part of the test
FEW = 5  # where fewer items than this are expected to differ, counts are too few for any exact test or interval
WORK = KEPT / "ab"


# Right or wrong


def cells() -> Iterator[tuple[float, float, float, list[float]]]:
    """Accuracies of both arms, their correlation, and the shares of items won, lost and neither."""
    for p in (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98):
        for gain in (0.0, 0.05, 0.1, 0.2, 0.4):
            for rho in (0.0, 0.3, 0.6, 0.9):
                q = p + gain
                both = p * q + rho * math.sqrt(max(0.0, p * (1 - p) * q * (1 - q)))
                if q < 0.99 and both <= min(p, q) + 1e-12:
                    yield p, q, rho, [q - both, p - both, 1 - p - q + 2 * both]


def wald(wins: int, losses: int, items: int) -> tuple[float, float]:
    """The textbook interval, as a rival."""
    d = (wins - losses) / items
    half = norm.ppf(1 - ALPHA / 2) * math.sqrt(((wins + losses) / items - d * d) / items)
    return d - half, d + half


def shares() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    counts = np.array([(w, x, ITEMS - w - x) for w in range(ITEMS + 1) for x in range(ITEMS + 1 - w)])
    bounds = {f.__name__: np.array([f(int(w), int(x), ITEMS) for w, x, _ in counts]) for f in (tango, wald)}
    p_values = {(int(w), int(x)): mcnemar(int(w), int(x)) for w, x, _ in counts}
    row_of = {(int(w), int(x)): i for i, (w, x, _) in enumerate(counts)}
    found: list[dict[str, Any]] = []
    for p, q, rho, likely in cells():
        weights = multinomial.pmf(counts, ITEMS, likely)

        def covered(b: np.ndarray, gain: float = q - p) -> np.ndarray:
            return (b[:, 0] <= gain + 1e-12) & (gain - 1e-12 <= b[:, 1])

        drawn = rng.multinomial(ITEMS, likely, TIMES)
        rows = [row_of[int(w), int(x)] for w, x, _ in drawn]
        cell: dict[str, Any] = {"p": p, "q": q, "rho": rho, "differ": ITEMS * (likely[0] + likely[1])}
        cell |= {f"{name}_exact": float(weights[covered(b)].sum()) for name, b in bounds.items()}
        cell["tango_simulated"] = float(covered(bounds["tango"])[rows].mean())
        if p == q:
            cell["mcnemar_exact"] = mcnemar_power(ITEMS, 0.0, likely[0] + likely[1])
            cell["mcnemar_simulated"] = float(np.mean([p_values[int(w), int(x)] <= ALPHA for w, x, _ in drawn]))
        found.append(cell)
    return found


# Any numbers


SHAPES: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], float]] = {
    "normal": (lambda rng: rng.normal(0.2, 1, ITEMS), 0.2),
    "heavy tails, t of 3": (lambda rng: rng.standard_t(3, ITEMS), 0.0),
    "skewed, exponential": (lambda rng: rng.exponential(1, ITEMS), 1.0),
    "skewed, log-normal": (lambda rng: rng.lognormal(0, 1, ITEMS), math.exp(0.5)),
    "differences of scores in [0, 1]": (lambda rng: rng.beta(5, 1, ITEMS) - rng.beta(2, 2, ITEMS), 5 / 6 - 0.5),
    "four in five equal": (lambda rng: (rng.random(ITEMS) < 0.2) * rng.normal(0.5, 1, ITEMS), 0.1),
    "seven in ten equal, the rest skewed": (lambda rng: (rng.random(ITEMS) < 0.3) * rng.exponential(1, ITEMS), 0.3),
}
NULLS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(0, 1, ITEMS),
    "heavy tails, t of 3": lambda rng: rng.standard_t(3, ITEMS),
    "equal skewed arms": lambda rng: rng.exponential(1, ITEMS) - rng.exponential(1, ITEMS),
    "four in five equal": lambda rng: (rng.random(ITEMS) < 0.2) * rng.normal(0, 1, ITEMS),
}


def numbers() -> dict[str, Any]:
    rng, coverage = np.random.default_rng(1), dict[str, dict[str, float]]()
    for name, (draw, mean) in SHAPES.items():
        hits = dict.fromkeys(("ours", "BCa alone", "t alone"), 0)
        for number in range(TIMES):
            d = draw(rng)
            half = t.ppf(1 - ALPHA / 2, ITEMS - 1) * d.std(ddof=1) / math.sqrt(ITEMS)
            bounds = {"ours": mean_interval(d), "t alone": (d.mean() - half, d.mean() + half)}
            if number < RIVAL:
                bca = bootstrap((d,), np.mean, n_resamples=9999, batch=500, method="BCa", rng=0).confidence_interval
                bounds["BCa alone"] = bca
            for kind, (low, high) in bounds.items():
                hits[kind] += bool(low <= mean <= high)
        times = {"ours": TIMES, "t alone": TIMES, "BCa alone": RIVAL}
        coverage[name] = {kind: hits[kind] / times[kind] for kind in hits}
        print(name, coverage[name], flush=True)
    return coverage


def flips() -> dict[str, dict[str, float]]:
    """The test written out for many experiments at once; on the first ones the package's own must say the same."""
    rng, found = np.random.default_rng(5), dict[str, dict[str, float]]()
    for name, null in NULLS.items():
        p: list[float] = []
        for _ in range(FLIPS // TIMES):
            d = np.stack([null(rng) for _ in range(TIMES)])
            signs = rng.choice([-1.0, 1.0], (9999, ITEMS))
            drawn, seen = d @ signs.T, d.sum(1, keepdims=True)
            tails = [((side * drawn >= side * seen).sum(1) + 1) / 10_000 for side in (1, -1)]
            if not p:
                same = np.array([sign_flips(row) for row in d[:SAME]]) - 2 * np.minimum(*tails)[:SAME].clip(max=0.5)
            p += (2 * np.minimum(*tails)).tolist()
        found[name] = {"type1": float(np.mean(np.array(p) <= ALPHA)), "p_differs_by": float(np.abs(same).max())}
        print(name, found[name], flush=True)
    return found


# Seeds


def seeds() -> list[dict[str, Any]]:
    """Three kinds of seeds: equal, as unlike as items make the mean uncertain, and far more."""
    rng, found = np.random.default_rng(2), list[dict[str, Any]]()
    for count in (2, 3, 5):
        for spread in (0.0, 0.15, 0.6):
            hits = rejected = 0
            for _ in range(TIMES):
                item, skill = rng.normal(0, 1, (1, ITEMS)), rng.normal(0, spread, (count, 1))
                a = (rng.normal(0, 1, (1, ITEMS)) < 0).astype(float)
                b = (rng.normal(0, 1, (count, ITEMS)) < item + skill).astype(float)  # right half the time, on average
                told = effect(a, b)
                hits += told.interval[0] <= 0 <= told.interval[1]
                rejected += told.p <= ALPHA
            found.append({"seeds": count, "spread": spread, "coverage": hits / TIMES, "type1": rejected / TIMES})
            print(found[-1], flush=True)
    return found


# Looking again and again


def looks() -> dict[str, Any]:
    """Exact chance that the evidence ever tells equal arms apart, with a look at every item; and the interval's."""
    alive, crossed = {0: 1.0}, 0.0
    for total in range(1, 1001):
        after: dict[int, float] = {}
        for wins, share in alive.items():
            for more in (0, 1):
                after[wins + more] = after.get(wins + more, 0.0) + share / 2
        told = {wins: evidence(wins, total - wins) >= 1 / ALPHA for wins in after}
        crossed += sum(share for wins, share in after.items() if told[wins])
        alive = {wins: share for wins, share in after.items() if not told[wins]}
    interval, plain = functools.cache(always_valid), functools.cache(mcnemar)
    rng, cells = np.random.default_rng(3), list[dict[str, Any]]()
    for differ, gain in ((0.1, 0.0), (0.1, 0.05), (0.4, 0.0), (0.4, 0.2), (1.0, 0.0)):
        misses = rejected = naive = 0
        for _ in range(TIMES):
            likely = [(differ + gain) / 2, (differ - gain) / 2, 1 - differ]
            drawn = rng.choice([1, -1, 0], size=200, p=likely)
            at = [(int((drawn[:n] > 0).sum()), int((drawn[:n] < 0).sum()), n) for n in range(10, 201, 10)]
            bounds = [interval(*look) for look in at]
            misses += any(not low <= gain <= high for low, high in bounds)
            rejected += any(evidence(w, x) >= 1 / ALPHA for w, x, _ in at)
            naive += any(plain(w, x) <= ALPHA for w, x, _ in at)
        cell = {"differ": differ, "gain": gain, "coverage_at_all_looks": 1 - misses / TIMES}
        cells.append({**cell, "told": rejected / TIMES, "told_by_mcnemar_at_each_look": naive / TIMES})
        print(cells[-1], flush=True)
    return {"type1_exact_1000_looks": crossed, "cells": cells}


def arms() -> dict[str, float]:
    """Three arms that are no better than a, at accuracy 0.5: how often any is called different."""
    rng = np.random.default_rng(4)
    rejected = plain = 0
    for _ in range(TIMES):
        outcomes = (rng.normal(0, 1, (4, ITEMS)) < rng.normal(0, 1, ITEMS)).astype(float)
        p = [effect(outcomes[0], row).p for row in outcomes[1:]]
        rejected, plain = rejected + (min(holm(p)) <= ALPHA), plain + (min(p) <= ALPHA)
    return {"holm": rejected / TIMES, "without": plain / TIMES}


def timed() -> dict[str, float]:
    """From the command to the page: 50 questions, the frozen model and a trail that is trained first."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, str(EXAMPLES / "ab_test.py"), "--out", str(page)], check=True)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": seconds, "cpu_seconds": used, "load": os.getloadavg()[0], "bytes": page.stat().st_size}


PARTS: dict[str, Callable[[], Any]] = {
    **{part.__name__: part for part in (shares, numbers, flips, seeds, looks, arms)},
    "time": timed,
}


def table() -> None:
    raw = {part: found for part in PARTS for found in read([WORK / f"{part}.json"])}
    if not raw:
        raise SystemExit(f"no part is kept in {WORK}: run this without --table")
    claims: list[Claim] = []
    if "shares" in raw:
        claims.append(coverage_of_shares(raw["shares"]))
    if "numbers" in raw:
        ours = [cell["ours"] for cell in raw["numbers"].values()]
        told = f"the same of a mean difference of numbers, over {len(ours)} distributions, {TIMES} experiments each"
        bounds = (min(ours), max(ours))
        claims.append(Claim("ab_interval_coverage_numbers", told, min(ours), "share", "0.93 to 0.97", bounds))
    if errors := errors_under_the_null(raw):
        claims.append(largest_error(errors))
        for name, rate in errors.items():
            print(f"{name:40} {rate:.4f}")
    if "time" in raw:
        told = "minutes from the command to the HTML page: 50 questions, the frozen model and a trail, "
        minutes = raw["time"]["seconds"] / 60
        claims.append(Claim("ab_50_minutes", f"{told}training included", minutes, "minutes", "< 5"))
    write("ab", raw, claims, seed=[0, 1, 2, 3, 4, 5])


def coverage_of_shares(cells: list[dict[str, Any]]) -> Claim:
    exact = [cell["tango_exact"] for cell in cells if cell["differ"] >= FEW]
    few = [cell["tango_exact"] for cell in cells if cell["differ"] < FEW]
    told = (
        f"lowest coverage of the 95 % interval of a difference of accuracies, 50 items, over {len(exact)} cells "
        f"(accuracies, correlation) in which {FEW} items or more are expected to differ, exact; lowest and highest "
        f"cell. In the {len(few)} cells with fewer: {min(few):.3f} to {max(few):.3f}"
    )
    return Claim("ab_interval_coverage", told, min(exact), "share", "0.93 to 0.97", (min(exact), max(exact)))


def errors_under_the_null(raw: dict[str, Any]) -> dict[str, float]:
    """Of each cell of each test, the share of experiments in which equal arms were called different."""
    shares = enumerate(raw.get("shares", []))
    rates = {
        "mcnemar": {str(i): c["mcnemar_simulated"] for i, c in shares if c["p"] == c["q"]},
        "sign flips": {name: cell["type1"] for name, cell in raw.get("flips", {}).items()},
        "seeds": {f"{c['seeds']}, {c['spread']}": c["type1"] for c in raw.get("seeds", [])},
        "looks": {str(c["differ"]): c["told"] for c in raw.get("looks", {}).get("cells", []) if c["gain"] == 0},
        "arms": {"holm": raw["arms"]["holm"]} if "arms" in raw else {},
    }
    return {f"{part} {cell}": rate for part, cells in rates.items() for cell, rate in cells.items()}


def largest_error(errors: dict[str, float]) -> Claim:
    worst = max(errors, key=lambda name: errors[name])
    times = FLIPS if worst.startswith("sign flips") else TIMES
    interval = binomtest(round(errors[worst] * times), times).proportion_ci(method="wilson")
    told = (
        f"largest share of experiments under the null in which a test said different, of {len(errors)} cells of "
        f"all tests and the early stop, {TIMES} experiments each ({FLIPS} of sign flips): {worst}"
    )
    return Claim("ab_type1_error", told, errors[worst], "share", "<= 0.05", (float(interval.low), float(interval.high)))


if __name__ == "__main__":
    options = parser(__doc__, table=True)
    options.add_argument("--part", choices=list(PARTS))
    told = options.parse_args()
    for part, measure in PARTS.items():
        if not told.table and told.part in (None, part):
            keep(WORK / f"{part}.json", measure)
    if told.part is None:
        table()
