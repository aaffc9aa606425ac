"""How often do the intervals of `tokenpaths.stats.intervals` hold the truth, at 4 to 128 items?

    python -m benchmarks.coverage            # about four minutes on one core
    python -m benchmarks.coverage --times 200

Data of known means are drawn in the kinds that the library measures (changes of right answers, of nats a token, KL,
sums of nats over sums of tokens, areas in [0, 1]) and given to the functions themselves, 2,000 times a cell. Where few
items differ from the rest (fewer than 5 are expected to), all may be equal: the interval is then (v, v) by rule, and no
interval of this kind can cover. These cells are told apart. Those whose values lie within known bounds are read a
second time, with these bounds given (`mean_interval(..., within=)`), and then none is set apart.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common.record import Claim, write
from tokenpaths.stats.intervals import difference_interval, mean_interval, streamed_interval

ITEMS, TIMES, FEW, REPLICATES = (4, 8, 16, 50, 128), 2000, 5, 1000
STREAMED = ITEMS[1:4]
Draw = Callable[[np.random.Generator, int], Any]


def right(won: float, lost: float) -> tuple[Draw, float, float]:
    """Changes of right answers: drawn, their mean, and the share of items that differ."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        u = rng.random(n)
        return (u < won).astype(float) - (u >= 1 - lost)

    return draw, won - lost, won + lost


def mostly_zero(share: float, draw: Draw, mean: float) -> tuple[Draw, float, float]:
    return lambda rng, n: (rng.random(n) < share) * draw(rng, n), share * mean, share


def ratio(tokens: float, rate: float, rho: float) -> tuple[Draw, float]:
    """Texts of log-normal length whose log-normal rate has correlation rho with it: sums and lengths, E[v] / E[w]."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.normal(size=n)
        w = np.exp(5 + tokens * z)
        return w * np.exp(rate * (rho * z + math.sqrt(1 - rho**2) * rng.normal(size=n))), w

    return draw, math.exp(rate**2 / 2 + rate * tokens * rho)


def normal_ratio(tokens: float, rho: float) -> tuple[Draw, float]:
    """The same with a normal rate of mean 0.2 and deviation 1, as of a change of nats."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.normal(size=n)
        w = np.exp(5 + tokens * z)
        return w * (0.2 + rho * z + math.sqrt(1 - rho**2) * rng.normal(size=n)), w

    return draw, 0.2 + rho * tokens


MEANS: dict[str, tuple[Draw, float, float]] = {
    "right answers, 2 % won": right(0.02, 0),
    "right answers, 2 % won, 2 % lost": right(0.02, 0.02),
    "right answers, 10 % won": right(0.1, 0),
    "right answers, 10 % won, 5 % lost": right(0.1, 0.05),
    "right answers, 30 % won, 10 % lost": right(0.3, 0.1),
    "right answers, 25 % won, 25 % lost": right(0.25, 0.25),
    "right answers, 60 % won, 10 % lost": right(0.6, 0.1),
    "nats, normal": (lambda rng, n: rng.normal(0.2, 1, n), 0.2, 1),
    "nats, t of 3": (lambda rng, n: rng.standard_t(3, n), 0.0, 1),
    "nats, shifted log-normal": (lambda rng, n: rng.lognormal(0, 1, n) - 1.5, math.exp(0.5) - 1.5, 1),
    "nats, gamma of shape 0.5": (lambda rng, n: rng.gamma(0.5, 1, n) - 0.4, 0.1, 1),
    "nats, 8 of 10 zero, normal": mostly_zero(0.2, lambda rng, n: rng.normal(0.5, 1, n), 0.5),
    "nats, 7 of 10 zero, exponential": mostly_zero(0.3, lambda rng, n: rng.exponential(1, n), 1.0),
    "KL, log-normal, sigma 1": (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5), 1),
    "KL, log-normal, sigma 1.5": (lambda rng, n: rng.lognormal(0, 1.5, n), math.exp(1.125), 1),
    "areas, beta(0.5, 0.5)": (lambda rng, n: rng.beta(0.5, 0.5, n), 0.5, 1),
    "areas, beta(2, 5)": (lambda rng, n: rng.beta(2, 5, n), 2 / 7, 1),
}
WITHIN = {
    name: (0, 1) if name.startswith("areas") else (-1, 1) for name in MEANS if name.startswith(("areas", "right"))
}
RATIOS: dict[str, tuple[Draw, float]] = {
    "ratio, normal rate, tokens sigma 0.5, rho 0.2": normal_ratio(0.5, 0.2),
    "ratio, normal rate, tokens sigma 1, rho -0.2": normal_ratio(1.0, -0.2),
    "ratio, log-normal rate 0.5, tokens sigma 0.5, rho 0.2": ratio(0.5, 0.5, 0.2),
    "ratio, log-normal rate 1, tokens sigma 0.8, rho -0.2": ratio(0.8, 1.0, -0.2),
    "ratio, log-normal rate 1, tokens sigma 1, rho 0.3": ratio(1.0, 1.0, 0.3),
}
DIFFERENCES: dict[str, tuple[Draw, float]] = {
    "normal, deviations 1 and 2": (lambda rng, n: (rng.normal(0.2, 1, n), rng.normal(0, 2, n)), 0.2),
    "log-normal both": (lambda rng, n: (rng.lognormal(0, 1, n), rng.lognormal(0, 1, n)), 0.0),
    "log-normal, normal": (lambda rng, n: (rng.lognormal(0, 1, n), rng.normal(0, 0.5, n)), math.exp(0.5)),
    "beta(0.5, 0.5), beta(2, 5)": (lambda rng, n: (rng.beta(0.5, 0.5, n), rng.beta(2, 5, n)), 0.5 - 2 / 7),
}


def streamed(v: np.ndarray, w: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    return streamed_interval(float(v.sum()), float(w.sum()), drawn @ v, drawn @ w, len(v))


def cell(function: str, data: str, n: int, times: int) -> dict[str, Any]:
    """The share of intervals that hold the truth, their mean width, and how often all items were equal."""
    rng = np.random.default_rng([n, *data.encode()])
    draw, truth, *rest = {**MEANS, **RATIOS, **DIFFERENCES}[data]
    held = equal = 0
    widths: list[float] = []
    weights = np.ones((1, n))
    for number in range(times):
        if function == "streamed" and number % 20 == 0:  # they are independent of the data
            weights = rng.poisson(1.0, (REPLICATES, n)).astype(np.float64)
        drawn = draw(rng, n)
        if function == "difference":
            low, high = difference_interval(*drawn)
        else:
            v, w = drawn if isinstance(drawn, tuple) else (drawn, None)
            equal += bool((v == v[0]).all())
            if function == "streamed":
                low, high = streamed(v, np.ones(n) if w is None else w, weights)
            else:
                low, high = mean_interval(v, w, within=WITHIN[data] if function == "within" else None)
        held += low - 1e-12 <= truth <= high + 1e-12
        widths.append(high - low)
    differ = n * rest[0] if rest else float(n)
    found = {"function": function, "data": data, "n": n, "differ": differ, "coverage": held / times}
    return {**found, "width": float(np.mean(widths)), "all_equal": equal / times}


def claims(raw: list[dict[str, Any]], times: int) -> list[Claim]:
    made: list[Claim] = []
    for function, what in (
        ("mean", "`mean_interval` of a mean, a paired change or a ratio of sums"),
        ("within", "`mean_interval(..., within=)` of changes of right answers and of areas"),
        ("streamed", "the streamed interval of the drift meter (texts, Poisson bootstrap)"),
        ("difference", "`difference_interval` of two independent means"),
    ):
        for n in STREAMED if function == "streamed" else ITEMS:
            cells = [c for c in raw if c["function"] == function and c["n"] == n]
            apart = [function != "within" and c["differ"] < min(FEW, n) for c in cells]
            enough = sorted(
                (c for c, alone in zip(cells, apart, strict=True) if not alone), key=lambda c: c["coverage"]
            )
            few = sorted(c["coverage"] for c, alone in zip(cells, apart, strict=True) if alone)
            middle = float(np.median([c["coverage"] for c in enough]))
            told = (
                f"lowest coverage of {what}, 95 %, {n} items, over {len(enough)} kinds of data, {times} experiments "
                f"each ({enough[0]['data']}); lowest and highest kind; the median kind has {middle:.3f}"
            )
            if few:
                told += (
                    f". In the {len(few)} kinds in which fewer than {FEW} items are expected to differ: "
                    f"{few[0]:.3f} to {few[-1]:.3f}"
                )
            ends = (enough[0]["coverage"], enough[-1]["coverage"])
            made.append(Claim(f"interval_coverage_{function}_n{n}", told, ends[0], "share", "", ends))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=TIMES, help="experiments a cell")
    options = parser.parse_args()
    raw: list[dict[str, Any]] = []
    for function, kinds in (
        ("mean", [*MEANS, *RATIOS]), ("within", WITHIN), ("difference", DIFFERENCES), ("streamed", [*MEANS, *RATIOS])
    ):  # fmt: skip
        for data in kinds:
            began, sizes = time.perf_counter(), STREAMED if function == "streamed" else ITEMS
            raw += [cell(function, data, n, options.times) for n in sizes]
            told = " ".join(f"{c['coverage']:.3f}" for c in raw[-len(sizes) :])
            print(f"{function:10} {data:55} {told}   {time.perf_counter() - began:.0f} s", flush=True)
    for made in claims(raw, options.times):
        print(made)
    write("coverage", raw, claims(raw, options.times), seed=list(ITEMS))
