"""Statistics of the A/B test: against scipy, formulas and exact enumeration, and the rules of a fair comparison."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm, permutation_test, skew, ttest_1samp, ttest_ind

from tokenpaths.stats import always_valid, effect, evidence, foresee, holm, mcnemar_power
from tokenpaths.stats.intervals import at_most, difference_interval, mean_interval
from tokenpaths.stats.paired import LEAST_P, mcnemar, sign_flips, tango
from tokenpaths.stats.sequential import log_evidence

WRONG_OR_RIGHT = st.sampled_from([0.0, 1.0])
REAL = st.integers(-20, 20).map(lambda k: k / 8)
COUNTS = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)).filter(any)


def paired(values: st.SearchStrategy[float], least: int = 1, most: int = 12) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(values, values), min_size=least, max_size=most)
    return pairs.map(lambda told: np.array(told).T)


def outcomes(wins: int, losses: int, ties: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.array([0] * wins + [1] * losses + [1] * ties, dtype=float)
    b = np.array([1] * wins + [0] * losses + [1] * ties, dtype=float)
    return a, b


# Against definitions and scipy


@settings(max_examples=20)
@given(COUNTS)
def test_mcnemar_is_the_binomial_test_and_the_sign_flips_of_zeros_and_ones(counts: tuple[int, int, int]) -> None:
    wins, losses, ties = counts
    found = effect(*outcomes(wins, losses, ties))
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
    assert found.p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    if wins + losses <= 10:
        d = np.array([1.0] * wins + [-1.0] * losses)
        assert sign_flips(d) == pytest.approx(found.p)


@settings(max_examples=20)
@given(st.lists(REAL, min_size=2, max_size=9))
def test_sign_flips_are_those_of_all_patterns(d: list[float]) -> None:
    values = np.array(d)
    signs = np.array(list(itertools.product([1, -1], repeat=len(d))))
    sums = np.abs((signs * values).sum(1))
    assert sign_flips(values) == pytest.approx((sums >= abs(values.sum()) - 1e-9).mean())


def test_sign_flips_of_many_items_agree_with_scipy_and_with_t() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 60)
    theirs = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=9999, rng=7).pvalue
    assert sign_flips(d) == pytest.approx(theirs, abs=0.01)
    assert sign_flips(d) == pytest.approx(ttest_1samp(d, 0).pvalue, abs=0.01)


def score(wins: int, losses: int, items: int, change: float) -> float:
    """Tango's z by its definition: the estimate less `change` over its error at the likeliest nuisance parameter."""

    def cost(q: float) -> float:
        shares = np.array([q + change, q, 1 - 2 * q - change])
        counts = np.array([wins, losses, items - wins - losses])
        return -sum(c * math.log(s) for c, s in zip(counts, np.clip(shares, 1e-300, 1), strict=True) if c)

    low, high = max(0.0, -change), (1 - change) / 2
    q = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (wins - losses - items * change) / math.sqrt(items * (2 * q + change - change**2))


@pytest.mark.parametrize(("wins", "losses", "items"), [(5, 2, 50), (1, 9, 44), (0, 6, 20), (12, 12, 30), (3, 0, 3)])
def test_the_bounds_of_tango_are_where_its_score_is_the_quantile(wins: int, losses: int, items: int) -> None:
    for confidence in (0.9, 0.95, 0.99):
        z = norm.ppf((1 + confidence) / 2)
        for bound, sign in zip(tango(wins, losses, items, confidence), (1, -1), strict=True):
            if abs(bound) < 1:
                assert score(wins, losses, items, bound) == pytest.approx(sign * z, abs=1e-4)


def test_tango_where_no_item_differs() -> None:
    """Its closed form, +- z^2 / (n + z^2)."""
    z2 = norm.ppf(0.975) ** 2
    assert tango(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)))


@cache
def table(items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All counts of items won and lost with their intervals, the lost ones by symmetry."""
    counts = [(w, x) for w in range(items + 1) for x in range(min(w, items - w) + 1)]
    bounds = np.array([tango(w, x, items) for w, x in counts])
    wins, losses = np.array(counts).T
    mirrored = wins != losses
    won = np.concatenate([wins, losses[mirrored]])
    lost = np.concatenate([losses, wins[mirrored]])
    return won, lost, np.concatenate([bounds, -bounds[mirrored][:, ::-1]])


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.3, 0.5), (0.5, 0.5), (0.7, 0.9), (0.9, 0.9), (0.05, 0.2)])
def test_the_interval_covers_at_50_items(p: float, q: float, rho: float) -> None:
    """Exactly: the sum of the probabilities of all tables whose interval has the truth in it."""
    both = min(p * q + rho * math.sqrt(p * (1 - p) * q * (1 - q)), p, q)
    shares = [q - both, p - both, 1 - p - q + 2 * both]
    won, lost, bounds = table(50)
    likely = multinomial.pmf(np.stack([won, lost, 50 - won - lost], 1), 50, shares)
    covered = likely[(bounds[:, 0] <= q - p) & (q - p <= bounds[:, 1])].sum()
    assert 0.93 <= covered <= 0.97


def hall(value: float, error: float, skewness: float, t: float) -> tuple[float, float]:
    """By definition: all means whose studentised distance, freed of skewness, lies within t."""

    def freed(mean: float) -> float:
        x = (value - mean) / error
        return x + skewness * x**2 / 3 + skewness**2 * x**3 / 27 + skewness / 6

    far = 1e3 * error
    low, high = (brentq(lambda m, y=y: freed(m) - y, value - far, value + far, xtol=1e-14) for y in (t, -t))
    return low, high


@pytest.mark.parametrize("kind", ["exponential", "normal", "standard_cauchy"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_of_numbers_is_on_each_side_the_wider_of_t_and_halls(kind: str, sign: int) -> None:
    d = sign * getattr(np.random.default_rng(1), kind)(size=40)
    t, mean, error = 2.02269092, d.mean(), d.std(ddof=1) / math.sqrt(40)
    low, high = hall(mean, error, skew(d, bias=False) / math.sqrt(40), t)
    wider = min(low, mean - t * error), max(high, mean + t * error)
    assert mean_interval(d) == pytest.approx(wider, rel=1e-6)


def test_a_difference_of_means_is_freed_of_the_skewness_of_both() -> None:
    random = np.random.default_rng(3)
    x, y = random.lognormal(size=9), random.normal(size=14)
    welch = ttest_ind(x, y, equal_var=False).confidence_interval()
    value, parts = x.mean() - y.mean(), [d.var(ddof=1) / len(d) for d in (x, y)]
    thirds = [skew(d, bias=False) * d.std(ddof=1) ** 3 / len(d) ** 2 for d in (x, y)]
    error = math.sqrt(sum(parts))
    low, high = hall(value, error, (thirds[0] - thirds[1]) / error**3, (welch.high - welch.low) / 2 / error)
    assert difference_interval(x, y) == pytest.approx((min(low, welch.low), max(high, welch.high)), rel=1e-6)


def test_where_no_item_differs_what_the_values_can_be_bounds_what_others_may() -> None:
    """0 of 8 changed: with probability 0.975 no more than 0.37 of all change, by 1 at most."""
    same = np.zeros(8)
    share = 1 - 0.025 ** (1 / 8)
    assert at_most(0, 8, 0.975) == pytest.approx(share)
    limit = binomtest(3, 20, alternative="less").proportion_ci(confidence_level=0.95).high
    assert at_most(3, 20) == pytest.approx(limit) and at_most(4, 4) == 1
    assert mean_interval(same) == (0, 0)
    assert mean_interval(same, within=(-1, 1)) == pytest.approx((-share, share))
    assert mean_interval(np.ones(8), within=(0, 1)) == pytest.approx((1 - share, 1))
    assert mean_interval(same, within=(0, math.inf)) == (0, math.inf)
    assert mean_interval(same[:1], within=(-1, 1)) == (-1, 1)
    assert mean_interval(np.array([0.0, 0.9, 1.0]), within=(0, 1)) == (0, 1)  # cut
    with pytest.raises(ValueError, match=r"within=\(0, 1\), but the values lie from 0 to 2"):
        mean_interval(np.array([0.0, 2.0]), within=(0, 1))
    with pytest.raises(ValueError, match="leave out the weights"):
        mean_interval(same, np.ones(8), within=(0, 1))


@pytest.mark.parametrize("items", [4, 8, 16])
@pytest.mark.parametrize(
    ("kind", "least"), [("normal", (0.94, 0.94, 0.94)), ("exponential", (0.92, 0.93, 0.93)), ("rare", (0.94,) * 3)]
)
def test_few_items_are_enough_for_an_interval_to_hold_its_mean(items: int, kind: str, least: tuple[float, ...]) -> None:
    """The percentile bootstrap held 0.80 to 0.90 of them, and where all items were equal nothing was held at all."""
    random, held = np.random.default_rng(items), 0
    for _ in range(1500):
        if kind == "rare":
            low, high = mean_interval((random.random(items) < 0.1).astype(float), within=(0, 1))
            held += low <= 0.1 <= high
        else:
            low, high = mean_interval(getattr(random, kind)(1.0, size=items))
            held += low <= 1 <= high
    assert held / 1500 >= least[(4, 8, 16).index(items)]


def test_what_is_drawn_hangs_on_neither_order_nor_sign() -> None:
    d = np.random.default_rng(2).exponential(1, 40) - 0.8
    assert sign_flips(-d) == sign_flips(d) == sign_flips(d[::-1]) == sign_flips(np.append(d, [0.0, 0.0]))
    low, high = mean_interval(d)
    assert mean_interval(-d) == (-high, -low) and mean_interval(d[::-1]) == (low, high)


def test_two_seeds_widen_the_interval_by_what_seeds_differ() -> None:
    rng = np.random.default_rng(2)
    item = rng.normal(0.4, 1, 40)
    a = np.zeros((1, 40))
    alike, unlike = np.stack([item, item]), np.stack([item - 0.3, item + 0.3])
    one, same, other = effect(a, item), effect(a, alike), effect(a, unlike)
    t39, t1 = 2.0226909, 12.7062047
    variance = item.var(ddof=1) / 40
    assert same.interval[1] - same.value == pytest.approx(t39 * math.sqrt(variance), rel=1e-6)
    seeds = 0.3**2 * 2 / 2
    wide = math.sqrt(t39**2 * variance + t1**2 * seeds)
    assert other.interval[1] - other.value == pytest.approx(wide, rel=1e-6)
    assert one.value == same.value == pytest.approx(other.value)
    assert same.p == pytest.approx(ttest_1samp(item, 0).pvalue, rel=1e-6)
    assert other.p > 0.05 > same.p
    low, high = effect(a, unlike, confidence=1 - other.p).interval
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6)  # the test is the interval, inverted


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_between_bonferroni_and_none(p: list[float]) -> None:
    adjusted = holm(p)
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert all(raw <= new <= min(1.0, len(p) * raw) + 1e-12 for raw, new in zip(p, adjusted, strict=True))


# The rules of a fair comparison


@settings(max_examples=25)
@given(paired(WRONG_OR_RIGHT) | paired(REAL), st.randoms())
def test_swapped_arms_and_shuffled_items_change_nothing_but_the_sign(pairs: np.ndarray, random: Any) -> None:
    a, b = pairs
    found, swapped = effect(a, b), effect(b, a)
    order = random.sample(range(len(a)), len(a))
    shuffled = effect(a[order], b[order])
    assert swapped.p == shuffled.p == found.p
    assert swapped.value == pytest.approx(-found.value)
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=1e-9)
    assert shuffled.interval == pytest.approx(found.interval)
    assert (swapped.wins, swapped.losses) == (found.losses, found.wins)


@settings(max_examples=25)
@given(paired(WRONG_OR_RIGHT) | paired(REAL), st.integers(1, 20))
def test_an_interval_has_its_estimate_and_equal_items_add_no_significance(pairs: np.ndarray, more: int) -> None:
    a, b = pairs
    found = effect(a, b)
    assert found.interval[0] - 1e-12 <= found.value <= found.interval[1] + 1e-12
    assert 0 < found.p <= 1
    longer = effect(np.append(a, np.ones(more)), np.append(b, np.ones(more)))
    assert longer.p >= found.p - 1e-12


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 12), st.integers(0, 99))
def test_seeds_keep_the_same_rules(s: int, t: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (s, n)).astype(float), rng.integers(0, 2, (t, n)).astype(float)
    found, swapped = effect(a, b), effect(b, a)
    assert 0 < found.p <= 1 and swapped.p == pytest.approx(found.p)
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    assert found.interval[0] <= found.value <= found.interval[1]
    order = rng.permutation(t)
    assert effect(a, b[order]).p == pytest.approx(found.p)


def test_where_all_differences_are_equal_nothing_is_claimed_of_their_spread() -> None:
    found = effect(np.zeros(8), np.full(8, 0.5))
    assert found.interval == (-math.inf, math.inf) and "all differences are equal" in found.method
    assert found.p == pytest.approx(2 / 2**8)  # the signs still tell
    assert effect(np.zeros(50), np.zeros(50)).interval == pytest.approx((-0.0713, 0.0713), abs=1e-4)  # 0 and 1
    same = effect(np.zeros((1, 8)), np.full((2, 8), 0.5))
    assert same.interval == (-math.inf, math.inf) and same.p == pytest.approx(2 / 2**8)
    assert effect(np.array([0.3]), np.array([0.7])).p == 1.0
    huge = effect(np.zeros((1, 200)), 1e6 + np.random.default_rng(0).normal(size=(9, 200)))
    assert huge.p == LEAST_P


def test_outcomes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"shapes \[1, 3\] and \[1, 2\]: give both arms one number for each of the same"
    ):
        effect(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="give both arms one number"):
        effect(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="not a finite number"):
        effect(np.array([0.0, math.nan]), np.zeros(2))
    with pytest.raises(ValueError, match=r"confidence=1.0 must lie between 0 and 1"):
        effect(np.zeros(2), np.ones(2), confidence=1.0)


# What the number of items can tell


@pytest.mark.parametrize(("items", "gain", "discordant"), [(20, 0.2, 0.4), (30, -0.15, 0.15), (12, 0.0, 0.5)])
def test_power_is_the_probability_of_all_tables_that_are_rejected(items: int, gain: float, discordant: float) -> None:
    won, lost = (discordant + gain) / 2, (discordant - gain) / 2
    total = 0.0
    for w in range(items + 1):
        for x in range(items + 1 - w):
            if w + x and binomtest(w, w + x).pvalue <= 0.05:
                total += multinomial.pmf([w, x, items - w - x], items, [won, lost, 1 - won - lost])
    assert mcnemar_power(items, gain, discordant) == pytest.approx(total, abs=1e-9)


def test_what_is_foreseen_is_what_power_says() -> None:
    found = effect(*outcomes(9, 5, 36))
    power = foresee(found)
    assert power.tells is not None and power.tells > 50
    assert mcnemar_power(power.tells, 0.08, 0.28) >= 0.8 > mcnemar_power(power.tells - 1, 0.08, 0.28)
    assert mcnemar_power(50, power.detectable, max(0.28, power.detectable)) == pytest.approx(0.8, abs=1e-6)
    assert dict(power.curve)[10] == pytest.approx(mcnemar_power(10, 0.08, 0.28))
    assert [n for n, _ in power.curve] == sorted(n for n, _ in power.curve)


def test_no_number_of_items_tells_arms_apart_that_do_not_differ() -> None:
    assert foresee(effect(*outcomes(3, 3, 44))).tells is None
    assert foresee(effect(*outcomes(1, 0, 3))).detectable == math.inf  # with 4 items the exact test never rejects
    rng = np.random.default_rng(3)
    item, seeds = rng.normal(0.1, 0.5, 30), np.array([[-0.6], [0.0], [0.7]])
    assert foresee(effect(np.zeros((1, 30)), item + seeds)).tells is None  # more seeds, not more items


def test_power_of_numbers_agrees_with_the_t_test_that_is_simulated() -> None:
    rng = np.random.default_rng(4)
    found = effect(np.zeros(40), rng.normal(0.25, 1, 40))
    power = foresee(found)
    sd = math.sqrt(found.parts[0][0] * 40)
    drawn = rng.normal(power.detectable, sd, (4000, 40))
    assert (ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05).mean() == pytest.approx(0.8, abs=0.03)
    assert power.tells is not None and power.tells > 40
    more = rng.normal(found.value, sd, (4000, power.tells))
    assert (ttest_1samp(more, 0, axis=1).pvalue <= 0.05).mean() == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="alpha=0.0 and target=0.8 are probabilities"):
        foresee(found, alpha=0.0)
    with pytest.raises(ValueError, match=r"gain=0.5 cannot exceed the share of items that differ, discordant=0.2"):
        mcnemar_power(10, 0.5, 0.2)


# Looking again and again


@settings(max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60))
def test_evidence_is_a_martingale(wins: int, losses: int) -> None:
    """Under chance the mean of E after the next item is E: Ville's inequality needs no more."""
    after = (evidence(wins + 1, losses) + evidence(wins, losses + 1)) / 2
    assert after == pytest.approx(evidence(wins, losses), rel=1e-9)
    assert evidence(0, 0) == 1.0
    assert log_evidence(wins, losses) == pytest.approx(
        math.log(2.0 ** (wins + losses) / ((wins + losses + 1) * math.comb(wins + losses, wins)))
    )


def test_chance_crosses_the_line_with_probability_alpha_at_most() -> None:
    """Exactly, at every look up to 400 discordant items: walk through all counts that have not crossed yet."""
    alive, crossed = {0: 1.0}, 0.0  # wins so far -> probability
    for total in range(1, 401):
        after: dict[int, float] = {}
        for wins, share in alive.items():
            for more in (0, 1):
                after[wins + more] = after.get(wins + more, 0.0) + share / 2
        alive = {}
        for wins, share in after.items():
            if evidence(wins, total - wins) >= 20:
                crossed += share
            else:
                alive[wins] = share
    assert 0.005 < crossed <= 0.05


@settings(max_examples=25)
@given(COUNTS)
def test_an_always_valid_interval_is_wider_and_has_its_estimate(counts: tuple[int, int, int]) -> None:
    wins, losses, ties = counts
    items = sum(counts)
    low, high = always_valid(wins, losses, items)
    assert low - 1e-9 <= (wins - losses) / items <= high + 1e-9
    assert always_valid(losses, wins, items) == pytest.approx((-high, -low), abs=1e-9)
    if wins + losses >= 5:
        narrow = tango(wins, losses, items)
        assert high - low > narrow[1] - narrow[0]


def test_the_always_valid_bound_is_where_the_likelihood_is_alpha_of_the_mixture() -> None:
    wins, losses, ties = 9, 3, 18
    low, _ = always_valid(wins, losses, 30)
    q = np.linspace(1e-6, 1, 200_001)
    shares = np.stack([q + low, q, 1 - 2 * q - low])
    likely = (shares.clip(1e-300) ** np.array([[wins], [losses], [ties]])).prod(0)[(shares > 0).all(0)].max()
    seen = {0: 0, 1: 0, 2: 0}  # the mixture by its predictions, (n_k + 1/2) / (n + 3/2), one item after another
    mixture = 1.0
    for kind in [0] * wins + [1] * losses + [2] * ties:
        mixture *= (seen[kind] + 0.5) / (sum(seen.values()) + 1.5)
        seen[kind] += 1
    assert math.log(likely) == pytest.approx(math.log(0.05 * mixture), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_an_always_valid_interval_covers_at_all_looks(share: float) -> None:
    rng = np.random.default_rng(5)
    change, misses = 0.3 * share, 0
    won, lost = (share + change) / 2, (share - change) / 2
    for _ in range(500):
        drawn = rng.choice([1, -1, 0], size=120, p=[won, lost, 1 - won - lost])
        for n in range(10, 121, 10):
            low, high = always_valid(int((drawn[:n] > 0).sum()), int((drawn[:n] < 0).sum()), n)
            if not low <= change <= high:
                misses += 1
                break
    assert misses / 500 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed apart"])
def test_sign_flips_reject_equal_arms_with_probability_alpha_at_most(kind: str) -> None:
    """2,000 experiments of 50 items; the allowance is two standard errors."""
    rng, rejected = np.random.default_rng(6), 0
    for _ in range(2000):
        d = {
            "normal": lambda: rng.normal(0, 1, 50),
            "heavy": lambda: rng.standard_t(3, 50),
            "skewed apart": lambda: rng.exponential(1, 50) - rng.exponential(1, 50),
        }[kind]()
        rejected += sign_flips(d) <= 0.05
    assert rejected / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.15, 0.6])
def test_seeds_that_differ_do_not_make_equal_methods_different(seeds: int, spread: float) -> None:
    rng, rejected = np.random.default_rng(7), 0
    for _ in range(2000):
        skill = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, (1, 50))
        a = (rng.normal(0, 1, (1, 50)) < 0).astype(float)
        b = (rng.normal(0, 1, (seeds, 50)) < skill).astype(float)
        rejected += effect(a, b).p <= 0.05
    assert rejected / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_mcnemar_never_rejects_more_often_than_alpha() -> None:
    """Exactly, for every share of items that differ: conservative, because counts are few."""
    found = [mcnemar_power(50, 0.0, share / 100) for share in range(1, 101)]
    assert max(found) <= 0.05
    assert found[4] < 0.001  # 5 % differ: too few to reject at all
    assert mcnemar(0, 5) > 0.05 > mcnemar(0, 6)
    assert binom.cdf(0, 6, 0.5) * 2 == mcnemar(0, 6)
