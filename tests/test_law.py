"""The scaling law of forgetting: known laws are found again, intervals hold, and gaps in the trials are said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpaths.lab.forgetting import Trial, fit
from tokenpaths.lab.forgetting.law import _Problem

SIZES, TOKENS, SHARES = (3e7, 1e8, 3e8), (1e5, 1e6), (0.0, 0.005, 0.02, 0.1)
ALPHA, BETA, B = 0.4, 0.3, 800.0


def lost(n: float, d: float, p: float, alpha: float = ALPHA, beta: float = BETA, b: float = B) -> float:
    """A D^beta / ((1 + B p) N)^alpha, with the A that makes it half a nat at N = 1e8, D = 1e6 and p = 0."""
    a = 0.5 * 1e8**alpha / 1e6**beta
    return a * d**beta / ((1 + b * p) * n) ** alpha


def trials(
    sizes: Sequence[float] = SIZES,
    tokens: Sequence[float] = TOKENS,
    shares: Sequence[float] = SHARES,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Trial]:
    """The frozen loss hangs on the size, and the noise is in log L."""
    rng = np.random.default_rng(seed)
    found: list[Trial] = []
    for n in sizes:
        before = 3.5 - 0.2 * math.log10(n / 1e8)
        for d in tokens:
            for p in shares:
                loss = (before + lost(n, d, p)) * math.exp(noise * rng.standard_normal())
                found.append(Trial(n, d, p, loss, before))
    return found


@settings(max_examples=8)
@given(alpha=st.floats(0.15, 1.0), beta=st.floats(0.1, 0.8), b=st.floats(50, 5000))
def test_a_law_without_noise_is_found_again(alpha: float, beta: float, b: float) -> None:
    exact = [
        replace(trial, loss=trial.before + lost(trial.parameters, trial.tokens, trial.share, alpha, beta, b))
        for trial in trials()
    ]
    law = fit(exact, draws=2)
    assert law.values["alpha"] == pytest.approx(alpha, rel=1e-3)
    assert law.values["beta"] == pytest.approx(beta, rel=1e-3)
    assert law.values["B"] == pytest.approx(b, rel=1e-2)
    assert math.log(law.values["A"]) == pytest.approx(math.log(0.5 * 1e8**alpha / 1e6**beta), abs=0.02)
    assert law.nats(1e9, 1e7, 0.01) == pytest.approx(lost(1e9, 1e7, 0.01, alpha, beta, b), rel=1e-2)
    assert not law.unidentified
    assert law.rms < 1e-6


def test_l0_is_fitted_where_it_is_not_given() -> None:
    one = [replace(trial, before=None) for trial in trials(sizes=(1e8,), tokens=(1e5, 1e6, 1e7))]
    law = fit(one, draws=2)
    assert law.values["L0"] == pytest.approx(3.5, rel=1e-4)
    assert law.values["beta"] == pytest.approx(BETA, rel=1e-2)
    assert "L0    3.5" in str(law)
    assert "L0    given with each trial" in str(fit(trials(), draws=2))


@pytest.mark.parametrize("known", [True, False])
def test_the_jacobian_is_the_derivative(known: bool) -> None:
    rows = trials(noise=0.01)
    problem = _Problem(rows if known else [replace(row, before=None) for row in rows])
    for start in problem.starts():
        start = start + 0.1
        found = problem.jacobian(start)
        for column, step in enumerate(1e-6 * np.eye(len(start))):
            slope = (problem.predict(start + step) - problem.predict(start - step)) / 2e-6
            np.testing.assert_allclose(found[:, column], slope, rtol=1e-5, atol=1e-9)


def test_the_share_is_the_inverse_of_the_law() -> None:
    law = fit(trials(noise=2e-4), draws=50)
    for nats in (0.05, 0.1, 0.3):
        share = law.share_for(nats, parameters=1e8, tokens=1e6)
        assert law.nats(1e8, 1e6, share.value) == pytest.approx(nats)
        assert share.interval[0] < ((0.5 / nats) ** (1 / ALPHA) - 1) / B < share.interval[1]
    assert law.share_for(0.6, parameters=1e8, tokens=1e6).value == 0
    never = law.share_for(0.001, parameters=1e8, tokens=1e6)
    assert never.value == math.inf
    assert str(never).startswith("more than all")


def test_what_lies_beyond_the_trials_is_said() -> None:
    law = fit(trials(), draws=2)
    assert law.share_for(0.1, parameters=1e8, tokens=1e6).note == ""
    assert law.share_for(0.3, parameters=1e8, tokens=1e7).note == "beyond the trials in tokens"
    assert law.share_for(0.2, parameters=1e7, tokens=1e5).note == "beyond the trials in parameters"
    assert "(beyond the trials in share)" in str(law.share_for(0.05, parameters=1e8, tokens=1e6))


def test_one_size_merges_a_and_alpha() -> None:
    """But more than two shares still tell alpha, and with it the share for this very model."""
    law = fit(trials(sizes=(1e8,)), draws=20)
    assert set(law.unidentified) == {"A"}
    assert math.isnan(law.values["A"])
    assert law.values["alpha"] == pytest.approx(ALPHA, rel=1e-3)
    assert law.share_for(0.1, parameters=1e8, tokens=3e6).value == pytest.approx(
        ((lost(1e8, 3e6, 0) / 0.1) ** (1 / ALPHA) - 1) / B, rel=1e-2
    )
    with pytest.raises(ValueError, match="A is not identified .all trials have one N"):
        law.share_for(0.1, parameters=1e9, tokens=1e6)


def test_two_shares_of_one_size_tell_neither_alpha_nor_b() -> None:
    law = fit(trials(sizes=(1e8,), tokens=(1e5, 1e6, 1e7), shares=(0.0, 0.01)), draws=20)
    assert set(law.unidentified) == {"A", "alpha", "B"}
    assert law.values["beta"] == pytest.approx(BETA, rel=1e-3)
    assert law.nats(1e8, 5e5, 0.01) == pytest.approx(lost(1e8, 5e5, 0.01), rel=1e-3)  # a share that was tried
    with pytest.raises(ValueError, match="B is not identified"):
        law.nats(1e8, 1e6, 0.02)
    with pytest.raises(ValueError, match="B is not identified"):
        law.share_for(0.1, parameters=1e8, tokens=1e6)
    assert "B     not identified: with alpha unknown" in str(law)


def test_one_length_or_one_share_is_said_too() -> None:
    law = fit(trials(tokens=(1e6,)), draws=20)
    assert set(law.unidentified) == {"A", "beta"}
    assert law.values["alpha"] == pytest.approx(ALPHA, rel=1e-3)
    with pytest.raises(ValueError, match="beta is not identified .all trials have one D"):
        law.share_for(0.1, parameters=1e8, tokens=2e6)
    law = fit(trials(shares=(0.01,), tokens=(1e5, 1e6, 1e7)), draws=20)
    assert set(law.unidentified) == {"B"}
    assert law.nats(1e8, 1e6, 0.01) == pytest.approx(lost(1e8, 1e6, 0.01), rel=1e-3)


def test_noise_that_hides_b_is_said() -> None:
    law = fit(trials(shares=(0.0, 0.01, 0.02), noise=0.05), draws=60)
    assert "B" in law.unidentified
    assert "not identified: the trials leave it open" in str(law)


def test_what_cannot_be_fitted_is_refused() -> None:
    some = trials()
    with pytest.raises(ValueError, match="5 trials are too few for the 4 parameters"):
        fit([some[i] for i in (0, 3, 5, 10, 23)])
    with pytest.raises(ValueError, match="no trials"):
        fit([])
    with pytest.raises(ValueError, match="trial 1 has no `before`"):
        fit([some[0], replace(some[1], before=None)])
    with pytest.raises(ValueError, match="tokens of a trial must be a finite number above 0, not 0"):
        Trial(1.0, 0.0, 0.0, 3.0)
    with pytest.raises(ValueError, match=r"within 0 and 1, not 1\.5"):
        Trial(1.0, 1.0, 1.5, 3.0)
    with pytest.raises(ValueError, match="nats must be"):
        fit(some, draws=2).share_for(0.0, parameters=1e8, tokens=1e6)


def test_the_draws_are_seeded() -> None:
    some = trials(noise=0.002)
    assert str(fit(some, draws=10)) == str(fit(some, draws=10))
    assert str(fit(some, draws=10)) != str(fit(some, draws=10, seed=1))


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """95 % of them, give or take what 60 repeats and a bootstrap of 24 residuals allow."""
    truth = {"alpha": ALPHA, "beta": BETA, "B": B, "share": ((0.5 / 0.1) ** (1 / ALPHA) - 1) / B}
    held = dict.fromkeys(truth, 0)
    for seed in range(60):
        law = fit(trials(noise=0.002, seed=seed), draws=100)
        intervals = {**law.intervals, "share": law.share_for(0.1, parameters=1e8, tokens=1e6).interval}
        for name, value in truth.items():
            held[name] += intervals[name][0] <= value <= intervals[name][1]
    assert all(50 <= count <= 60 for count in held.values()), held
