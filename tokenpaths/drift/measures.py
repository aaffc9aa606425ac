"""Measures of drift at each token: of its next-token distribution, its hidden states, its path through the layers.

A **measure** compares two readings of one text of n tokens, the frozen model's and the steered one's. A **quantity** is
a function of one reading, and its change from the frozen run to the steered one is the drift. Both are plain functions,
and you can write your own::

    def margin(reading: Reading) -> Tensor:  # [n]
        first, second = reading.log_probs.topk(2).values.unbind(-1)
        return first - second

They return one number a token, [n], or one a layer and token, [layers, n]; `layer_names` names the layers. NaN means
that a token has no such number: the last one has no next token. It is left out of every count. Two equal readings
measure exactly 0. Everything is computed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenpaths.engine.divergence import at_least_float32, jensen_shannon
from tokenpaths.engine.readings import Reading

MASSIVE = 10


def kl(before: Reading, after: Reading) -> Float[Tensor, " n"]:
    """KL(frozen || steered) of the next-token distribution, sum_k p_k (log p_k - log q_k), in nats; 0 to infinity."""
    return _by_token(_kl, before, after)


def reverse_kl(before: Reading, after: Reading) -> Float[Tensor, " n"]:
    """KL(steered || frozen), in nats; 0 to infinity. Large where only the steered model says a word."""
    return kl(after, before)


def js(before: Reading, after: Reading) -> Float[Tensor, " n"]:
    """Jensen-Shannon divergence of the next-token distributions, in nats; 0 to ln 2. See `jensen_shannon`."""
    return _by_token(lambda log_p, log_q: jensen_shannon(log_p.exp(), log_q.exp()), before, after)


def flips(before: Reading, after: Reading) -> Float[Tensor, " n"]:
    """1 where the most likely next token differs, else 0. The mean is the share of flipped tokens."""
    return (before.logits.argmax(-1) != after.logits.argmax(-1)).float()


def moved(before: Reading, after: Reading) -> Bool[Tensor, " n"]:
    """Whether the state after the last block differs at all."""
    last = [name for name in before.states if name.startswith("block")][-1]
    return (before.states[last] != after.states[last]).any(-1)


def nll(reading: Reading) -> Float[Tensor, " n"]:
    """-log p(next token), in nats; NaN at the last token. The exponential of its mean is the perplexity."""
    return _at_next(reading, lambda log_p, following: -log_p.gather(-1, following).squeeze(-1))


def brier(reading: Reading) -> Float[Tensor, " n"]:
    """Brier score (1950), sum_k (p_k - 1[k is the next token])^2; 0 (best) to 2; NaN at the last token."""
    return _at_next(reading, _brier)


def confidence(reading: Reading) -> Float[Tensor, " n"]:
    """The probability of the most likely next token; 1/vocabulary to 1."""
    return reading.log_probs.amax(-1).exp()


def correct(reading: Reading) -> Float[Tensor, " n"]:
    """1 where the most likely next token is the one that follows, else 0; NaN at the last token."""
    return _at_next(reading, lambda log_p, following: (log_p.argmax(-1, keepdim=True) == following).squeeze(-1))


def displacement(before: Reading, after: Reading) -> Float[Tensor, "layers n"]:
    """||h' - h|| / ||h|| of the frozen state h and the steered one h' at each layer; 0 to infinity.

    It does not change if both states are rotated or scaled alike. Where h is 0 it is 0 if h' is 0 too, else NaN.
    """
    moved = torch.stack([(y - x).norm(dim=-1) for x, y in _states(before, after)])
    return torch.where(moved == 0, 0, moved / before.norms.where(before.norms != 0, math.nan))


def cosine_shift(before: Reading, after: Reading) -> Float[Tensor, "layers n"]:
    """1 - cos(h, h') at each layer; 0 to 2. It does not see a change of length. NaN where a state is 0.

    Computed as half the squared distance of the unit vectors, because 1 - cos has lost an angle below 3e-4 to rounding.
    """
    return torch.stack([(_unit(y) - _unit(x)).square().sum(-1) / 2 for x, y in _states(before, after)])


def step_length(reading: Reading) -> Float[Tensor, "blocks n"]:
    """||h_l - h_(l-1)||, how far each block moves a token. The step into "block 0" comes from the embedding.

    The states of a token, from the embedding to the last block, are its path through the model: the chain of embedding
    (Wang et al. 2024, arXiv:2410.13640; there of the states averaged over tokens). The final norm is no step of it.
    """
    return _steps(reading).norm(dim=-1)


def turning_angle(reading: Reading) -> Float[Tensor, "turns n"]:
    """The angle between the step into a block's state and the step out of it, in radians; 0 (straight on) to pi (back).

    Not the angle of the cited paper, which lies between the states themselves as seen from the origin. Kahan's form
    2 atan2(||u - v||, ||u + v||) of the unit vectors is exact for small angles too. NaN where a step has no length.
    """
    directions = _unit(_steps(reading))
    into, out = directions[:-1], directions[1:]
    return 2 * torch.atan2((into - out).norm(dim=-1), (into + out).norm(dim=-1))


def curvature(reading: Reading) -> Float[Tensor, "turns n"]:
    """The turning angle over the mean length of the two steps, in radians per unit of state; 0 to infinity."""
    lengths = step_length(reading)
    return turning_angle(reading) / ((lengths[:-1] + lengths[1:]) / 2)


def path_length(reading: Reading) -> Float[Tensor, " n"]:
    """The sum of a token's step lengths, from the embedding to the last block, in the unit of the states."""
    return step_length(reading).sum(0)


def massive(norms: Float[Tensor, "*layers n"]) -> Bool[Tensor, "*layers n"]:
    """Which of the n states of a layer, given by their lengths, are massive activations (Sun et al. 2024).

    Those are more than `MASSIVE` = 10 times as long as the median of the layer.
    """
    return norms > MASSIVE * norms.median(dim=-1, keepdim=True).values


def layer_names(reading: Reading, rows: int) -> list[str]:
    """The names of the rows of a layered measure: every state, all but "norm", every block, or all blocks but the last.

    Args:
        reading: a reading of the model.
        rows: the number of rows.

    Raises:
        ValueError: no such list of layers has this number of rows.
    """
    path = list(_path(reading))
    for names in (list(reading.states), path, path[1:], path[1:-1]):
        if len(names) == rows:
            return names
    raise ValueError(
        f"a measure with {rows} layers, where the model has the states {', '.join(reading.states)}: a layered measure "
        f"has a row for each of them, for each block ({len(path) - 1}), or for each block but the last"
    )


_AT_ONCE = 2**17  # numbers: a few such tensors stay in the cache of a core, where this is several times faster


def _by_token(divergence: Callable[[Tensor, Tensor], Tensor], before: Reading, after: Reading) -> Tensor:
    """A divergence of the two log-probabilities, a few tokens at a time on a CPU."""
    log_p, log_q = before.log_probs, after.log_probs
    tokens = max(1, _AT_ONCE // log_p.shape[-1]) if log_p.device.type == "cpu" else len(log_p)
    parts = zip(log_p.split(tokens), log_q.split(tokens), strict=True)
    return torch.cat([divergence(p, q) for p, q in parts])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The sum of p (log p - log q) - p + q, which takes back what the two normalisers have lost to rounding.

    `engine.divergence.kl_of_logs` is the plain sum over finite log-probabilities, for callers that take its gradient.
    Here its rounding, of either sign, would hide a small drift, and words may have probability 0.
    """
    p, q = log_p.exp(), log_q.exp()
    # the differences of words that one run never says, or neither
    ratio = (log_p - log_q).nan_to_num_(nan=0, posinf=math.inf, neginf=torch.finfo(p.dtype).min)
    return torch.addcmul(q - p, p, ratio).sum(-1).clamp_min(0)  # below 0 only by rounding


def _at_next(reading: Reading, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score every token's prediction by the token that follows, and the last one's by NaN."""
    scores = score(reading.log_probs[:-1], reading.ids[1:, None]).to(reading.log_probs.dtype)
    return torch.cat([scores, scores.new_full((1,), math.nan)])


def _brier(log_p: Tensor, following: Tensor) -> Tensor:
    p = log_p.exp()
    return p.scatter_add(-1, following, -torch.ones_like(p[:, :1])).square().sum(-1)


def _states(before: Reading, after: Reading) -> list[tuple[Tensor, Tensor]]:
    return [(at_least_float32(before.states[layer]), at_least_float32(after.states[layer])) for layer in before.states]


def _path(reading: Reading) -> dict[str, Tensor]:
    return {layer: state for layer, state in reading.states.items() if layer != "norm"}


def _steps(reading: Reading) -> Float[Tensor, "blocks n dim"]:
    path = _path(reading)
    if len({state.shape[-1] for state in path.values()}) > 1:
        widths = ", ".join(f"{layer} {state.shape[-1]}" for layer, state in path.items())
        raise ValueError(f"a path needs states of one width, and this model's have several: {widths}")
    return torch.stack([at_least_float32(state) for state in path.values()]).diff(dim=0)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
