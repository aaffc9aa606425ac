"""The measures at each token, against their definitions in float64, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

from tokenpaths.drift import (
    brier,
    confidence,
    correct,
    cosine_shift,
    curvature,
    displacement,
    flips,
    js,
    kl,
    nll,
    path_length,
    reverse_kl,
    step_length,
    turning_angle,
)
from tokenpaths.drift.measures import layer_names
from tokenpaths.engine import Reading

LAYERS, TOKENS, DIM, VOCAB = ("embedding", "block 0", "block 1", "block 2", "norm"), 7, 6, 11
MEASURES = (kl, reverse_kl, js, flips, displacement, cosine_shift)
OF_STATES = (displacement, cosine_shift)
OF_PATHS = (step_length, turning_angle, curvature, path_length)
QUANTITIES = (nll, brier, confidence, correct, *OF_PATHS)
SEEDS = st.integers(0, 2**31)


def make(seed: int, *, spread: float = 3.0, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Reading:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Reading(
        ids=torch.randint(VOCAB, (tokens,), generator=generator),
        prompt=torch.ones(tokens, dtype=torch.bool),
        answer=torch.zeros(tokens, dtype=torch.bool),
        logits=spread * draw(tokens, VOCAB),
        states={name: draw(tokens, DIM) for name in LAYERS},
    )


def change(
    reading: Reading, state: Callable[[Tensor], Tensor] = lambda h: h, logits: Callable[[Tensor], Tensor] = lambda x: x
) -> Reading:
    states = {name: state(h) for name, h in reading.states.items()}
    return Reading(reading.ids, reading.prompt, reading.answer, logits(reading.logits), states)


def probabilities(reading: Reading) -> np.ndarray:
    e = np.exp(reading.logits.double().numpy())
    return e / e.sum(-1, keepdims=True)


def states(reading: Reading) -> np.ndarray:
    return torch.stack(list(reading.states.values())).double().numpy()


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@given(SEEDS)
@settings(max_examples=20)
def test_divergences_are_scipys(seed: int) -> None:
    before, after = make(seed), make(seed + 1)
    p, q = probabilities(before), probabilities(after)
    np.testing.assert_allclose(kl(before, after), rel_entr(p, q).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(reverse_kl(before, after), rel_entr(q, p).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(js(before, after), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(flips(before, after), p.argmax(-1) != q.argmax(-1))


@pytest.mark.parametrize("vocab", [50_000, 200_000])  # 200,000: more than are worked on at once
@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_small_divergences_survive_float32(vocab: int, size: float) -> None:
    """Summed as p (log p - log q) alone, the error would be 1e-6 nats, the size of the smaller divergence here."""
    x = 3 * torch.randn(3, vocab)
    y = x + size * torch.randn(3, vocab)
    one = torch.ones(3)
    before, after = (Reading(one.long(), one.bool(), one.bool(), logits, {}) for logits in (x, y))
    p, q = probabilities(before), probabilities(after)
    assert kl(before, after).dtype == torch.float32
    np.testing.assert_allclose(kl(before, after), rel_entr(p, q).sum(-1), rtol=1e-3, atol=5e-8)
    m = (p + q) / 2
    np.testing.assert_allclose(js(before, after), (rel_entr(p, m) + rel_entr(q, m)).sum(-1) / 2, rtol=1e-3, atol=1e-9)


@given(SEEDS)
@settings(max_examples=20)
def test_js_is_symmetric_and_bounded(seed: int) -> None:
    before, after = make(seed, spread=100.0, dtype=torch.float32), make(seed + 1, spread=100.0, dtype=torch.float32)
    found = js(before, after)
    torch.testing.assert_close(found, js(after, before), rtol=1e-6, atol=0)
    assert (found >= 0).all() and (found <= math.log(2) + 1e-6).all()
    assert (kl(before, after) >= 0).all()


def test_words_that_cannot_be_said() -> None:
    """Logits of minus infinity: nothing where neither run can say the word, infinity where only the frozen one can."""
    before = make(0, dtype=torch.float32)
    same = change(before, logits=lambda x: x.index_fill(1, torch.tensor([2]), -math.inf))
    other = change(before, logits=lambda x: x.index_fill(1, torch.tensor([3]), -math.inf))
    assert (kl(same, same) == 0).all() and (js(same, same) == 0).all()
    assert (kl(before, same) == math.inf).all()
    p, q = probabilities(same), probabilities(other)
    assert kl(same, other).isinf().all()
    np.testing.assert_allclose(js(same, other), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_readings_measure_exactly_zero(measure: Callable[..., Tensor], dtype: torch.dtype) -> None:
    found = measure(make(3, dtype=dtype), make(3, dtype=dtype))
    assert found.shape == ((len(LAYERS), TOKENS) if measure in OF_STATES else (TOKENS,))
    assert found.dtype == torch.promote_types(dtype, torch.float32) or measure is flips
    assert (found == 0).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_different_readings_do_not_measure_zero(measure: Callable[..., Tensor]) -> None:
    assert measure(make(3), make(4)).sum() > 0.5


@pytest.mark.parametrize("function", [*MEASURES, *QUANTITIES])
def test_nan_passes_through(function: Callable[..., Tensor]) -> None:
    """A reading with NaN is refused when it is read; measured all the same, it must not look like no drift."""
    before = make(5)
    broken = change(before, lambda h: h.where(h != h[2, 1], math.nan), lambda x: x.where(x != x[2, 1], math.nan))
    found = function(before, broken) if function in MEASURES else function(broken)
    if function in (flips, correct):  # argmax takes NaN for the largest
        return
    assert found[..., 2].isnan().any()
    assert not found[..., :2].isnan().any()


@given(SEEDS)
@settings(max_examples=20)
def test_scores_of_the_next_token(seed: int) -> None:
    reading = make(seed)
    p, following = probabilities(reading), reading.ids.numpy()[1:]
    said = p[np.arange(TOKENS - 1), following]
    np.testing.assert_allclose(nll(reading)[:-1], -np.log(said), rtol=1e-12)
    np.testing.assert_allclose(brier(reading)[:-1], ((p[:-1] - np.eye(VOCAB)[following]) ** 2).sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(correct(reading)[:-1], p[:-1].argmax(-1) == following)
    np.testing.assert_allclose(confidence(reading), p.max(-1), rtol=1e-12)
    for score in (nll, brier, correct):
        assert score(reading).shape == (TOKENS,) and score(reading)[-1].isnan()


def test_scores_read_only() -> None:
    reading = make(0, dtype=torch.float32)
    logits = reading.logits.clone()
    log_probs = reading.log_probs.clone()
    for function in QUANTITIES:
        function(reading)
    for measure in MEASURES:
        measure(reading, reading)
    assert torch.equal(reading.logits, logits) and torch.equal(reading.log_probs, log_probs)


def test_brier_of_a_sure_model() -> None:
    reading = make(0, dtype=torch.float32)
    sure = torch.full((TOKENS, VOCAB), -100.0).scatter(1, reading.ids.roll(-1)[:, None], 0.0)
    assert (brier(change(reading, logits=lambda x: sure))[:-1] == 0).all()
    assert (brier(change(reading, logits=lambda x: sure.roll(1, 1)))[:-1] == 2).all()


def test_one_token_has_no_next_token() -> None:
    reading = make(0, tokens=1)
    assert nll(reading).isnan().all() and nll(reading).shape == (1,)
    assert kl(reading, reading).shape == (1,)


@given(SEEDS)
@settings(max_examples=20)
def test_states_against_the_definition(seed: int) -> None:
    before, after = make(seed), make(seed + 1)
    x, y = states(before), states(after)
    length = np.linalg.norm
    np.testing.assert_allclose(displacement(before, after), length(y - x, axis=-1) / length(x, axis=-1), rtol=1e-12)
    cosine = (x * y).sum(-1) / length(x, axis=-1) / length(y, axis=-1)
    np.testing.assert_allclose(cosine_shift(before, after), 1 - cosine, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_small_angles_survive_float32(angle: float) -> None:
    """1 - cos is 0 in float32 for an angle of 1e-4."""
    turn = torch.eye(DIM, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    h = torch.zeros(TOKENS, DIM)
    h[:, :2] = torch.tensor([1.0, 0.0])
    before = change(make(0, dtype=torch.float32), lambda _: h)
    after = change(before, lambda h: (h.double() @ turn.T).float())
    expected = torch.full((len(LAYERS), TOKENS), 2 * math.sin(angle / 2) ** 2)
    torch.testing.assert_close(cosine_shift(before, after), expected, rtol=1e-5, atol=0)
    path = dict(zip(LAYERS, [0 * h, h, h + (h.double() @ turn.T).float(), h, h], strict=True))
    found = turning_angle(Reading(before.ids, before.prompt, before.answer, before.logits, path))
    torch.testing.assert_close(found[0], torch.full((TOKENS,), angle), rtol=1e-3 if angle > 1e-5 else 0.1, atol=0)


@given(SEEDS, st.floats(0.01, 100.0))
@settings(max_examples=20)
def test_rotating_or_scaling_both_changes_nothing(seed: int, scale: float) -> None:
    before, after, turn = make(seed), make(seed + 1), rotation(seed)
    for measure in OF_STATES:
        found = measure(before, after)
        torch.testing.assert_close(
            measure(change(before, lambda h: h @ turn), change(after, lambda h: h @ turn)), found
        )
        torch.testing.assert_close(
            measure(change(before, lambda h: scale * h), change(after, lambda h: scale * h)), found
        )
    longer = change(after, lambda h: scale * h)
    torch.testing.assert_close(cosine_shift(before, longer), cosine_shift(before, after))
    torch.testing.assert_close(
        displacement(before, change(before, lambda h: scale * h)).max(), torch.tensor(abs(scale - 1)).double()
    )
    for quantity, power in ((step_length, 1), (turning_angle, 0), (curvature, -1), (path_length, 1)):
        found = quantity(before)
        torch.testing.assert_close(quantity(change(before, lambda h: scale * h @ turn)), scale**power * found)
        torch.testing.assert_close(quantity(change(before, lambda h: h + 3)), found)


@given(SEEDS)
@settings(max_examples=20)
def test_each_token_is_measured_on_its_own(seed: int) -> None:
    before, after = make(seed), make(seed + 1)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    pick = lambda x: x[order]  # noqa: E731
    for measure in MEASURES:
        found = measure(change(before, pick, pick), change(after, pick, pick))
        torch.testing.assert_close(found, measure(before, after)[..., order], rtol=1e-12, atol=1e-14)
    for quantity in (confidence, *OF_PATHS):
        torch.testing.assert_close(quantity(change(before, pick, pick)), quantity(before)[..., order])


def test_states_of_zero() -> None:
    zero, some = change(make(0), torch.zeros_like), make(1)
    assert (displacement(zero, zero) == 0).all()
    assert displacement(zero, some).isnan().all()
    assert (displacement(some, zero) == 1).all()
    assert cosine_shift(some, zero).isnan().all()
    assert turning_angle(zero).isnan().all() and (path_length(zero) == 0).all()


@given(SEEDS)
@settings(max_examples=20)
def test_path_against_the_definition(seed: int) -> None:
    """The final norm is no step: states 0 to 3 of the five."""
    reading = make(seed)
    steps = np.diff(states(reading)[:4], axis=0)
    lengths = np.linalg.norm(steps, axis=-1)
    np.testing.assert_allclose(step_length(reading), lengths, rtol=1e-12)
    np.testing.assert_allclose(path_length(reading), lengths.sum(0), rtol=1e-12)
    cosine = (steps[:-1] * steps[1:]).sum(-1) / lengths[:-1] / lengths[1:]
    np.testing.assert_allclose(turning_angle(reading), np.arccos(cosine), rtol=1e-7)
    np.testing.assert_allclose(curvature(reading), np.arccos(cosine) * 2 / (lengths[:-1] + lengths[1:]), rtol=1e-7)


def test_path_of_a_square() -> None:
    """Three sides of a square of side 2, counter-clockwise, then the angle straight back."""
    corners = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2], [2, 2]])
    names = ["embedding", "block 0", "block 1", "block 2", "block 3"]
    reading = make(0, tokens=1)
    square = Reading(
        reading.ids,
        reading.prompt,
        reading.answer,
        reading.logits,
        {n: c[None] for n, c in zip(names, corners, strict=True)},
    )
    assert step_length(square).flatten().tolist() == [2, 2, 2, 2]
    assert turning_angle(square).flatten().tolist() == pytest.approx([math.pi / 2, math.pi / 2, math.pi])
    assert curvature(square).flatten().tolist() == pytest.approx([math.pi / 4, math.pi / 4, math.pi / 2])
    assert path_length(square).tolist() == [8]


def test_layer_names() -> None:
    reading = make(0)
    assert layer_names(reading, len(displacement(reading, reading))) == list(LAYERS)
    assert layer_names(reading, len(step_length(reading))) == ["block 0", "block 1", "block 2"]
    assert layer_names(reading, len(turning_angle(reading))) == ["block 0", "block 1"]
    assert layer_names(reading, 4) == list(LAYERS[:4])
    with pytest.raises(ValueError, match=r"a measure with 7 layers.*embedding, block 0.*for each block \(3\)"):
        layer_names(reading, 7)


def test_path_of_one_width() -> None:
    reading = make(0)
    reading.states["block 1"] = torch.zeros(TOKENS, 4)
    with pytest.raises(ValueError, match=r"states of one width.*embedding 6, block 0 6, block 1 4"):
        step_length(reading)
    del reading.states["block 1"]
    reading.states["norm"] = torch.zeros(TOKENS, 4)
    step_length(reading)
