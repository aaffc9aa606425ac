"""What an adapter does on clean text, token by token: heavy tails, clusters, and states far from the others.

An affine part has no gate, so a payload that waits for a trigger must read a direction that clean text hardly uses:
then few tokens are moved far, and most not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.data.examples import Example, collate
from tokenpaths.drift import measures
from tokenpaths.engine.readings import read, runs
from tokenpaths.lab.audit.maps import Part
from tokenpaths.lab.audit.respond import recording_inputs
from tokenpaths.stats.sampling import some
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import tidy


@dataclass(frozen=True)
class Tail:
    """How uneven numbers of at least 0 are.

    Args:
        kurtosis: m4 / m2^2; 3 for normal numbers.
        ratio: the largest divided by the median.
        count: how many numbers there are.
    """

    kurtosis: float
    ratio: float
    count: int


@dataclass(frozen=True)
class Use:
    """What one part did on clean text.

    Args:
        length: the median ||h|| of the states that enter the part.
        moved: the tail of ||d|| / ||h||, how far the part moves each token.
        read: the tail of ||code - mean code||, the code being `AffineMap.code`.
        silhouette: that of two clusters of codes, 512 of them drawn at random: 0 for none, 1 for two far apart.
    """

    length: float
    moved: Tail
    read: Tail
    silhouette: float


@dataclass(frozen=True)
class OnTexts:
    """What was seen on clean text.

    Args:
        parts: what each part did, by its name. A part whose rule chooses no token there is left out.
        kl: the tail of KL(frozen || adapted) at all tokens, in nats.
        mean_kl: its mean.
    """

    parts: dict[str, Use]
    kl: Tail
    mean_kl: float


@tidy
def on_texts(
    model: nn.Module,
    trails: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any = None,
    parts: Sequence[Part] = (),
    *,
    batch_size: int = 8,
) -> OnTexts:
    """Run clean examples frozen and adapted, and record what each part reads and how far it moves its tokens.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: clean examples, at least one.
        tokenizer: the model's tokenizer, for the rule `Match`.
        parts: the parts of the adapter; without them only the KL is read.
        batch_size: examples in one forward.
    """
    kl: list[Tensor] = []
    modules = {part.name: part.module for part in parts}
    entered: dict[str, list[Tensor]] = {name: [] for name in modules}
    before, after = runs(model, trails, tokenizer=tokenizer)
    with after.ready():
        for start in range(0, len(prompts), batch_size):
            batch = collate(prompts[start : start + batch_size])
            with recording_inputs(modules, entered, batch.attention_mask.bool()):
                kl += [measures.kl(x, y).double().cpu() for x, y in read(before, after, batch)]
    every = torch.cat(kl)
    used = {part.name: _use(part, torch.cat(entered[part.name]).double()) for part in parts if entered[part.name]}
    return OnTexts(used, tail(every), float(every.mean()))


def _use(part: Part, h: Float[Tensor, "n dim"]) -> Use:
    codes, lengths = part.map.code(h), h.norm(dim=-1)
    moved = tail(part.map(h).norm(dim=-1) / lengths.clamp_min(1e-12))
    read = tail((codes - codes.mean(0)).norm(dim=-1))
    return Use(float(lengths.quantile(0.5)), moved, read, silhouette(codes[some(len(codes), 512)]))


def tail(values: Float[Tensor, " n"]) -> Tail:
    """The tail of numbers. The kurtosis of numbers that are all alike is 0, and their ratio 1."""
    x = values.double()
    spread = float((x - x.mean()).square().mean())
    if spread <= 1e-24 * float(x.square().mean()):
        return Tail(0.0, 1.0, len(x))
    kurtosis = float((x - x.mean()).pow(4).mean()) / spread**2
    return Tail(kurtosis, float(x.max() / x.quantile(0.5).clamp_min(1e-3 * float(x.max()))), len(x))


def spectral_signature(states: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """<h_i - mu, v_1>^2, with v_1 the first right singular vector of the centred states.

    Tran, Li and Madry 2018 (arXiv 1811.00636).
    """
    centred = states.double() - states.double().mean(0)
    v = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ v).square()


def mahalanobis(states: Float[Tensor, "n dim"], clean: Float[Tensor, "m dim"]) -> Float[Tensor, " n"]:
    """The distance of each state from clean states, sqrt((h - mu)^T S^-1 (h - mu)).

    mu and S are the mean and the covariance of the clean states, S shrunk by 1 % towards its mean variance.
    """
    x, mu = clean.double(), clean.double().mean(0)
    s = (x - mu).T @ (x - mu) / len(x)
    s = 0.99 * s + 0.01 * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    gap = states.double() - mu
    return (gap * torch.linalg.solve(s, gap.T).T).sum(-1).clamp_min(0).sqrt()


def activation_clusters(states: Float[Tensor, "n dim"], *, rounds: int = 20) -> Int[Tensor, " n"]:
    """Activation clustering (Chen et al. 2018, arXiv 1811.03728): 2-means of the first 10 principal components.

    The clusters begin at the two ends of the first component, so that nothing is drawn. 1 marks the smaller one. There
    are `rounds` rounds of 2-means.
    """
    return _two_means(_components(states), rounds)


def silhouette(states: Float[Tensor, "n dim"]) -> float:
    """The silhouette of the two activation clusters (Rousseeuw 1987).

    It is the mean of (b - a) / max(a, b), with a and b the mean distances of a state to its own cluster and to the
    other one; 0 for fewer than four states, and where they are all alike.
    """
    if len(states) < 4 or not states.shape[1]:
        return 0.0
    x = _components(states)
    label, far = _two_means(x), torch.cdist(x, x)
    counts = label.bincount(minlength=2)
    if not int(counts.min()):
        return 0.0
    sums = torch.stack([far[:, label == i].sum(1) for i in (0, 1)], 1)
    own, other = sums.gather(1, label[:, None]).squeeze(1), sums.gather(1, 1 - label[:, None]).squeeze(1)
    a = own / (counts[label] - 1).clamp_min(1)
    b = other / counts[1 - label]
    s = (b - a) / torch.maximum(a, b).clamp_min(1e-30)
    return float(torch.where(counts[label] == 1, 0.0, s).mean())


def _two_means(x: Float[Tensor, "n k"], rounds: int = 20) -> Int[Tensor, " n"]:
    centres = torch.stack([x[x[:, 0].argmin()], x[x[:, 0].argmax()]])
    label = torch.zeros(len(x), dtype=torch.long)
    for _ in range(rounds):
        label = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[label == i].mean(0) if bool((label == i).any()) else centres[i] for i in (0, 1)])
    return label if float(label.double().mean()) <= 0.5 else 1 - label


def _components(states: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
    """The first 10 principal components of each state."""
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :10] * s[:10]
