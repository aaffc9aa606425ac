"""Set measures against their definitions and other libraries; what they are blind to, and what chance alone gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from scipy.spatial import distance
from torch import Tensor

from tokenpaths import drift
from tokenpaths.drift import (
    biased_cka,
    cka,
    effective_rank,
    frechet,
    mmd,
    participation_ratio,
    principal_angle,
    procrustes,
    pwcca,
    rsa,
    sliced_w2,
    svcca,
)

Measure = Callable[[Tensor, Tensor], float]
SIMILARITIES: list[Measure] = [cka, biased_cka, svcca, pwcca, rsa]
DISTANCES: list[Measure] = [procrustes, mmd, frechet, sliced_w2, principal_angle]
NAMES = [measure.__name__ for measure in SIMILARITIES + DISTANCES]
SHAPES = [(30, 7), (7, 30), (12, 12)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Frozen states of uneven spread, and the same mixed, shifted and with noise."""
    x = normal(n, d, seed=seed) * torch.linspace(3, 0.5, d) + 1
    return x, x + 0.3 * x @ normal(d, d, seed=seed + 1) / math.sqrt(d) + 0.5 * normal(n, d, seed=seed + 2) - 0.7


def rotation(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def standardised(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)


# Against definitions and other libraries.


def hsic_1(k: Tensor, ell: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, letter by letter."""
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    k, ell = k - k.diag().diag(), ell - ell.diag().diag()
    total = (one @ k @ one) * (one @ ell @ one) / ((n - 1) * (n - 2))
    return ((k @ ell).trace() + total - 2 / (n - 2) * one @ k @ ell @ one) / (n * (n - 3))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_cka_is_its_definition_in_both_forms(n, d):
    """The definition is on Gram matrices; for d < n, cka never forms them."""
    x, y = related(n, d)
    a, b = standardised(x, y)
    k, ell = a @ a.T, b @ b.T
    expected = hsic_1(k, ell) / (hsic_1(k, k) * hsic_1(ell, ell)).sqrt()
    assert cka(x, y) == pytest.approx(expected.item(), abs=1e-12)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, ell = h @ k @ h, h @ ell @ h
    assert biased_cka(x, y) == pytest.approx(((k * ell).sum() / (k.norm() * ell.norm())).item(), abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_cka_agrees_with_pytorch_cka(n, d):
    from cka import cka_from_features

    x, y = related(n, d)
    assert cka(x, y) == pytest.approx(cka_from_features(*standardised(x, y)).item(), abs=1e-10)


def test_a_dimension_that_is_constant_in_the_frozen_set_is_left_out_of_cka():
    x, y = related(20, 5)
    constant = torch.full((20, 1), 0.1, dtype=torch.float64)  # its mean is not exact, so its deviation may not be 0
    assert cka(torch.cat((x, constant), 1), torch.cat((y, normal(20, 1)), 1)) == pytest.approx(cka(x, y), abs=1e-12)


def test_figures_of_repsim():
    """What repsim 0.1.5, which needs a compiler to install, says of the same numbers.

    By its pwcca (the mean of both orders), cca ("pillai"), cka ("linear", "gretton") and hsic ("linear", "song"). Its
    own debiased CKA divides by biased norms and its svcca cuts whitened states, so these are not compared.
    """
    t = torch.arange(300, dtype=torch.float64)
    x = (t**2).sin().view(60, 5)
    y = x.flip(1) * torch.arange(1, 6) + (t**2 / 7).cos().view(60, 5)
    both = (pwcca(x, y, keep=1.0) + pwcca(y, x, keep=1.0)) / 2
    assert both == pytest.approx(0.9302869163541834, abs=1e-12)
    assert svcca(x, y, keep=1.0) == pytest.approx(0.9073302245726165, abs=1e-12)
    assert biased_cka(x, y) == pytest.approx(0.7455586185413964, abs=1e-12)
    assert cka(x, y) == pytest.approx(0.7297173367276065, abs=1e-12)


def test_svcca_and_pwcca_are_cca_of_the_kept_directions():
    """CCA in its first form: the eigenvalues of C_xx^-1 C_xy C_yy^-1 C_yx are the squared correlations."""
    x, y = related(400, 6)
    x[:, -1] *= 0.01  # below 1 % of the variance: cut
    kept = []
    for states in (x, y):
        centred = states - states.mean(0)
        variances, directions = np.linalg.eigh(np.cov(centred.T))
        variances, directions = variances[::-1], directions[:, ::-1]
        k = int(np.searchsorted(variances.cumsum() / variances.sum(), 0.99)) + 1
        kept.append(centred.numpy() @ directions[:, :k])
    a, b = kept
    assert a.shape[1] == 5
    squared, coefficients = linalg.eig(linalg.solve(a.T @ a, a.T @ b) @ linalg.solve(b.T @ b, b.T @ a))
    rho = np.sqrt(squared.real)
    assert svcca(x, y) == pytest.approx(rho.mean(), abs=1e-10)
    variates = a @ coefficients.real
    variates /= np.linalg.norm(variates, axis=0)
    weight = abs(variates.T @ (x - x.mean(0)).numpy()).sum(1)
    assert pwcca(x, y) == pytest.approx((weight * rho).sum() / weight.sum(), abs=1e-10)


def test_directions_of_rounding_are_not_kept():
    """Two directions in six dimensions, one of them faint, are two."""
    x, y = related(40, 2)
    faint, mix = torch.tensor([1, 1e-5], dtype=torch.float64), normal(2, 6)
    assert svcca(x * faint @ mix, y * faint @ mix, keep=1.0) == pytest.approx(svcca(x, y, keep=1.0), abs=1e-8)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_procrustes_agrees_with_scipy(n, d):
    x, y = related(n, d)
    a, b = ((states - states.mean(0)).numpy() for states in (x, y))
    _, nuclear_norm = linalg.orthogonal_procrustes(a, b)
    expected = math.acos(nuclear_norm / (linalg.norm(a) * linalg.norm(b)))
    assert procrustes(x, y) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rsa_agrees_with_scipy(n, d):
    x, y = related(n, d)
    x[3], y[3] = x[1], y[1]  # equal tokens tie
    expected = stats.spearmanr(distance.pdist(x, "correlation").round(12), distance.pdist(y, "correlation").round(12))
    assert rsa(x, y) == pytest.approx(expected.statistic, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(30, 7), (7, 30)])
def test_mmd_is_its_definition(n, d):
    x, y = related(n, d)
    median = np.median(distance.pdist(x))
    k = lambda a, b: sum(math.exp(-((a - b).norm() ** 2) / (2 * (w * median) ** 2)) for w in (0.5, 1, 2)) / 3  # noqa: E731
    pairs = [(s, t) for s in range(n) for t in range(n) if s != t]
    expected = np.mean([k(x[s], x[t]) + k(y[s], y[t]) - 2 * k(x[s], y[t]) for s, t in pairs])
    assert mmd(x, y) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_frechet_agrees_with_pot(n, d):
    from ot.gaussian import bures_wasserstein_distance

    x, y = related(n, d)
    expected = bures_wasserstein_distance(x.mean(0), y.mean(0), x.T.cov(), y.T.cov())
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_agrees_with_the_matrix_root():
    x, y = related(30, 7)
    a, b = x.T.cov().numpy(), y.T.cov().numpy()
    squared = (x.mean(0) - y.mean(0)).square().sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet(x, y) == pytest.approx(math.sqrt(squared), rel=1e-9)


def test_sliced_w2_agrees_with_pot():
    import ot

    x, y = related(30, 7)
    expected = ot.sliced_wasserstein_distance(x, y, n_projections=20_000, seed=1).item()
    assert sliced_w2(x, y, directions=20_000) == pytest.approx(expected, rel=0.01)  # different draws
    assert sliced_w2(x, y) == pytest.approx(expected, rel=0.1)
    line, other = x[:, :1], y[:, :1]
    assert sliced_w2(line, other) == pytest.approx(math.sqrt(ot.wasserstein_1d(line, other, p=2).item()), abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(30, 7), (7, 30)])
def test_principal_angle_agrees_with_scipy(n, d):
    x, y = related(n, d)
    y[:, 3:] *= 0.01  # fewer kept directions
    bases = []
    for states in (x, y):
        _, s, vh = linalg.svd((states - states.mean(0)).numpy())
        k = int(np.searchsorted((s**2).cumsum() / (s**2).sum(), 0.99)) + 1
        bases.append(vh[:k].T)
    assert bases[0].shape[1] > bases[1].shape[1]
    assert principal_angle(x, y) == pytest.approx(linalg.subspace_angles(*bases).max(), abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_spectral_measures_are_their_definitions(n, d):
    x, _ = related(n, d)
    variances = np.linalg.eigvalsh(x.T.cov().numpy()).clip(0)
    share = np.sqrt(variances) / np.sqrt(variances).sum()
    assert effective_rank(x) == pytest.approx(math.exp(stats.entropy(share)), rel=1e-5)
    assert participation_ratio(x) == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-12)


# Known answers.


def test_a_shift_is_read_back():
    x, v = normal(50, 4), torch.tensor([3.0, 0, 0, 4], dtype=torch.float64)
    assert frechet(x, x + v) == pytest.approx(5)
    assert sliced_w2(x, x + v, directions=5000) == pytest.approx(5 / math.sqrt(4), rel=0.05)
    assert mmd(x, x + 100 * v) > 0.4
    assert procrustes(x, x + v) == pytest.approx(0, abs=1e-12)


def test_a_scaling_is_read_back():
    x = normal(50, 4)
    x = x - x.mean(0)
    assert frechet(x, 1.5 * x) == pytest.approx(0.5 * math.sqrt(x.T.cov().trace().item()))


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 1.0, math.pi / 2])
def test_a_turned_plane_is_read_back(angle):
    """Also where its cosine rounds to 1."""
    x = torch.cat((normal(40, 2), torch.zeros(40, 1, dtype=torch.float64)), 1)
    turn = torch.eye(3, dtype=torch.float64)
    turn[1:, 1:] = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    assert principal_angle(x, x @ turn, keep=1.0) == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("measure", [procrustes, frechet])
def test_a_small_move_does_not_drown_in_rounding(measure, n, d):
    """The distance falls in proportion to the move, down to moves whose square is below the rounding."""
    x, noise = normal(n, d), normal(n, d, seed=1)
    coarse, fine = (measure(x, x + size * noise) / size for size in (1e-6, 1e-10))
    assert coarse > 0.01
    assert fine == pytest.approx(coarse, rel=1e-3)


def test_ranks_of_a_set_of_k_equal_directions_is_k():
    k = 5
    x = torch.cat((torch.eye(k), -torch.eye(k)), 0).double() @ rotation(9)[:k]
    assert effective_rank(x) == pytest.approx(k)
    assert participation_ratio(x) == pytest.approx(k)


# Laws of all measures.


@pytest.mark.parametrize(("n", "d"), [(40, 3), (5, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_equal_sets_give_exactly_one_or_zero(name, n, d):
    measure = getattr(drift, name)
    for x in (normal(n, d), torch.ones(n, d)):  # also where the measure is otherwise undefined
        assert measure(x, x.clone()) == (1.0 if measure in SIMILARITIES else 0.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("svcca", "pwcca")])
def test_fewer_tokens_than_dimensions_are_measured(name):
    x, y = related(6, 50)
    value = getattr(drift, name)(x, y)
    assert math.isfinite(value) and value not in (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_coarse_states_are_computed_in_float64_and_without_gradient(name, dtype):
    x, y = (states.to(dtype).requires_grad_() for states in related(80, 4))
    measure = getattr(drift, name)
    assert measure(x, y) == measure(x.detach().double(), y.detach().double())


JOINT_ROTATION = [svcca, procrustes, mmd, frechet, principal_angle]
OWN_ROTATION = [svcca, pwcca, procrustes]
OWN_SCALING = [cka, biased_cka, svcca, pwcca, procrustes, rsa, principal_angle]
OWN_SHIFT = [cka, biased_cka, svcca, pwcca, procrustes, principal_angle]
OWN_PERMUTATION = [frechet, sliced_w2, principal_angle]  # they do not know which token is which
JOINT_SCALING = [cka, biased_cka, svcca, pwcca, procrustes, rsa, mmd, principal_angle]
HOMOGENEOUS = [frechet, sliced_w2]  # in the unit of the states


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 5), scale=st.floats(1e-3, 1e3))
def test_what_measures_are_blind_to(seed, d, scale):
    x, y = related(60, d, seed)
    turn, order, shift = rotation(d, seed), torch.randperm(60), scale * normal(d, seed=seed)
    moved = {
        "tokens of both permuted": (SIMILARITIES + DISTANCES, x[order], y[order]),
        "both rotated": (JOINT_ROTATION, x @ turn, y @ turn),
        "both scaled": (JOINT_SCALING, scale * x, scale * y),
        "both shifted": ([*OWN_SHIFT, mmd, frechet, sliced_w2], x + shift, y + shift),
        "steered rotated": (OWN_ROTATION, x, y @ turn),
        "steered scaled": (OWN_SCALING, x, scale * y),
        "steered shifted": (OWN_SHIFT, x, y + shift),
        "tokens of steered permuted": (OWN_PERMUTATION, x, y[order]),
        "each dimension of both scaled": ([cka, biased_cka], x * shift, y * shift),
    }
    for how, (measures, a, b) in moved.items():
        for measure in measures:
            assert measure(a, b) == pytest.approx(measure(x, y), rel=1e-5, abs=1e-7), (how, measure.__name__)
    for measure in HOMOGENEOUS:
        assert measure(scale * x, scale * y) == pytest.approx(scale * measure(x, y), rel=1e-9)
    for measure in (effective_rank, participation_ratio):
        assert measure(scale * y[order] @ turn + shift) == pytest.approx(measure(y), rel=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), d=st.integers(2, 40))
def test_every_measure_stays_in_its_range(seed, n, d):
    x, y = related(n, d, seed)
    assert -1 <= cka(x, y) <= 1
    assert 0 <= biased_cka(x, y) <= 1
    assert -1 <= rsa(x, y) <= 1
    assert 0 <= procrustes(x, y) <= math.pi / 2
    assert 0 <= principal_angle(x, y) <= math.pi / 2
    assert -2 / (n - 1) <= mmd(x, y) <= 2
    assert frechet(x, y) > 0
    assert sliced_w2(x, y) > 0
    assert 1 <= participation_ratio(x) <= effective_rank(x) * (1 + 1e-9) <= min(n - 1, d) * (1 + 2e-9)


# What chance alone gives.


@pytest.mark.parametrize("seed", range(5))
def test_independent_sets_of_few_tokens_look_alike_to_biased_cka_only(seed):
    x, y = normal(64, 256, seed=seed), normal(64, 256, seed=seed + 100)
    assert abs(cka(x, y)) < 0.15
    assert biased_cka(x, y) > 0.79
    assert abs(rsa(x, y)) < 0.15


def test_cka_and_mmd_of_independent_sets_are_zero_on_average():
    """Within three standard errors over 200 draws, though n < d."""
    for measure in (cka, mmd):
        values = [measure(normal(10, 20, seed=2 * i), normal(10, 20, seed=2 * i + 1)) for i in range(200)]
        assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)


def test_mmd_sees_another_spread_where_the_means_agree():
    x, y = normal(200, 5), 2 * normal(200, 5, seed=1)
    same = [mmd(x, normal(200, 5, seed=seed)) for seed in range(2, 12)]
    assert mmd(x, y) > 5 * max(same)


def test_independent_sets_have_the_canonical_correlation_that_is_documented():
    assert svcca(normal(2000, 200), normal(2000, 200, seed=1), keep=0.95) < 0.3
    assert svcca(normal(2000, 20), normal(2000, 20, seed=1)) == pytest.approx(0.85 * math.sqrt(20 / 2000), rel=0.1)


# Refusals.


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_refused_by_name(name):
    x, y = related(50, 3)
    y[4, 1], y[7, 2] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 50 steered states hold NaN or infinity"):
        getattr(drift, name)(x, y)
    with pytest.raises(ValueError, match="2 of 50 frozen states"):
        getattr(drift, name)(y, x)


@pytest.mark.parametrize("measure", [effective_rank, participation_ratio])
def test_a_measure_of_one_set_refuses_what_has_no_shape(measure):
    with pytest.raises(ValueError, match="1 of 3 states hold NaN"):
        measure(torch.tensor([[0.0, 1], [1, 0], [math.nan, 0]]))
    with pytest.raises(ValueError, match="all 5 states of a set are equal"):
        measure(torch.ones(5, 3))
    with pytest.raises(ValueError, match="1 tokens are too few"):
        measure(torch.ones(1, 3))


@pytest.mark.parametrize(("name", "least"), [("cka", 4), ("rsa", 3), ("frechet", 2), ("mmd", 2)])
def test_too_few_tokens_are_refused(name, least):
    x, y = related(least - 1, 5)
    with pytest.raises(ValueError, match=f"{least - 1} tokens are too few, this measure needs {least} or more"):
        getattr(drift, name)(x, y)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_cca_says_how_many_tokens_it_needs(measure):
    with pytest.raises(ValueError, match="30 tokens are too few for 7 kept directions.* read 70 tokens or more"):
        measure(normal(30, 7), normal(30, 7, seed=1))


@pytest.mark.parametrize("name", ["cka", "biased_cka", "svcca", "pwcca", "procrustes", "principal_angle"])
def test_a_set_that_collapsed_to_a_point_has_no_shape(name):
    point = torch.full((50, 3), 0.1)
    for pair in ((normal(50, 3).float(), point), (point, normal(50, 3).float())):
        with pytest.raises(ValueError, match="all 50 states of a set are equal"):
            getattr(drift, name)(*pair)


def test_a_collapsed_set_has_a_distance():
    x = normal(50, 3)
    point = torch.zeros(50, 3, dtype=torch.float64)
    assert frechet(x, point) == pytest.approx(math.hypot(x.mean(0).norm(), math.sqrt(x.T.cov().trace())))
    assert sliced_w2(x, point) > 0
    assert mmd(x, point) > 0.1


def test_other_undefined_cases_are_refused():
    x, point = normal(9, 4), torch.eye(4, dtype=torch.float64)[[0] * 9]
    with pytest.raises(ValueError, match="half of the pairs of frozen states are equal"):
        mmd(point, x)
    with pytest.raises(ValueError, match="all tokens are equally alike"):
        rsa(x, point)
    with pytest.raises(ValueError, match="9 of 9 states have equal dimensions"):
        rsa(x, torch.ones(9, 4))
    with pytest.raises(ValueError, match="keep is 1.5"):
        principal_angle(x, x + 1, keep=1.5)


@pytest.mark.usefixtures("unchecked")
def test_sets_of_different_tokens_are_refused():
    for measure in SIMILARITIES + DISTANCES:
        with pytest.raises(ValueError, match=r"frozen states are \(9, 4\) and the steered ones \(8, 4\)"):
            measure(normal(9, 4), normal(8, 4))
