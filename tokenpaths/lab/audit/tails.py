"""What an adapter does on clean text, token by token: heavy tails, clusters, and states off the beaten way.

An affine part has no gate, so a payload that waits for a trigger must read a direction that clean text hardly uses:
then few tokens are moved far, and most not at all.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.data.examples import Example, collate
from tokenpaths.drift import measures
from tokenpaths.engine.readings import read, runs
from tokenpaths.engine.states import observing
from tokenpaths.lab.audit.maps import Part
from tokenpaths.site import Place
from tokenpaths.trailmap.adapter import Adapter


@dataclass(frozen=True)
class Tail:
    """How uneven numbers of at least 0 are: `kurtosis` m4 / m2^2 (3 for normal ones), and the largest by the median."""

    kurtosis: float
    ratio: float
    count: int


@dataclass(frozen=True, eq=False)
class OnTexts:
    """What was seen on clean text. Tails are by the name of the part; `kl` is of all tokens, in nats.

    `length` is the median ||h|| of the states that enter a part, `moved` is ||d|| / ||h|| of each token, `reads` the
    length of the code of a state, and `silhouette` that of two clusters of codes (0 none, 1 far apart).
    """

    length: dict[str, float]
    moved: dict[str, Tail]
    reads: dict[str, Tail]
    silhouette: dict[str, float]
    kl: Tail
    mean_kl: float


def on_texts(
    model: nn.Module,
    adapter: Adapter,
    examples: Sequence[Example],
    parts: Sequence[Part] = (),
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
) -> OnTexts:
    """Run clean examples frozen and adapted, and see what each part reads and how far it moves its tokens."""
    kl: list[Tensor] = []
    entered: dict[str, list[Tensor]] = {part.name: [] for part in parts}
    before, after = runs(model, adapter, tokenizer=tokenizer)
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        with listening(parts, batch.attention_mask.bool(), entered):
            kl += [measures.kl(x, y).double().cpu() for x, y in read(before, after, batch)]
    length: dict[str, float] = {}
    moved: dict[str, Tail] = {}
    reads: dict[str, Tail] = {}
    silhouettes: dict[str, float] = {}
    for part in parts:
        if not entered[part.name]:  # its rule chooses no token here
            continue
        h = torch.cat(entered[part.name]).double()
        codes = part.map.code(h)
        length[part.name] = float(h.norm(dim=-1).quantile(0.5))
        moved[part.name] = tail(part.map(h).norm(dim=-1) / h.norm(dim=-1).clamp_min(1e-12))
        reads[part.name] = tail((codes - codes.mean(0)).norm(dim=-1))
        silhouettes[part.name] = silhouette(codes[:512])
    every = torch.cat(kl)
    return OnTexts(length, moved, reads, silhouettes, tail(every), float(every.mean()))


def tail(values: Float[Tensor, " n"]) -> Tail:
    """Of numbers that are not all alike; 0 and 1 for those that are."""
    x = values.double()
    spread = float((x - x.mean()).square().mean())
    if spread <= 1e-24 * float(x.square().mean()):
        return Tail(0.0, 1.0, len(x))
    kurtosis = float((x - x.mean()).pow(4).mean()) / spread**2
    return Tail(kurtosis, float(x.max() / x.quantile(0.5).clamp_min(1e-3 * float(x.max()))), len(x))


def spectral_signature(states: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """<h_i - mu, v_1>^2, v_1 the first right singular vector of the centred states (Tran, Li and Madry 2018)."""
    centred = states.double() - states.double().mean(0)
    v = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ v).square()


def mahalanobis(states: Float[Tensor, "n dim"], clean: Float[Tensor, "m dim"]) -> Float[Tensor, " n"]:
    """Distance from clean states, sqrt((h - mu)^T S^-1 (h - mu)), S shrunk by 1 % towards its mean variance."""
    x, mu = clean.double(), clean.double().mean(0)
    s = (x - mu).T @ (x - mu) / len(x)
    s = 0.99 * s + 0.01 * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    gap = states.double() - mu
    return (gap * torch.linalg.solve(s, gap.T).T).sum(-1).clamp_min(0).sqrt()


def clusters(states: Float[Tensor, "n dim"], *, rounds: int = 20) -> Int[Tensor, " n"]:
    """Activation clustering (Chen et al. 2018, arXiv 1811.03728): 2-means of the first 10 principal components.

    The clusters begin at the two ends of the first component, so that nothing is drawn. 1 marks the smaller one.
    """
    x = _components(states)
    centres = torch.stack([x[x[:, 0].argmin()], x[x[:, 0].argmax()]])
    label = torch.zeros(len(x), dtype=torch.long)
    for _ in range(rounds):
        label = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[label == i].mean(0) if bool((label == i).any()) else centres[i] for i in (0, 1)])
    return label if float(label.double().mean()) <= 0.5 else 1 - label


def silhouette(states: Float[Tensor, "n dim"]) -> float:
    """Of the two clusters: the mean of (b - a) / max(a, b), a and b the mean distances to the own and other cluster.

    0 for fewer than four states, and where they are all alike.
    """
    if len(states) < 4 or not states.shape[1]:
        return 0.0
    label, far = clusters(states), torch.cdist(_components(states), _components(states))
    counts = label.bincount(minlength=2)
    if not int(counts.min()):
        return 0.0
    sums = torch.stack([far[:, label == i].sum(1) for i in (0, 1)], 1)
    own, other = sums.gather(1, label[:, None]).squeeze(1), sums.gather(1, 1 - label[:, None]).squeeze(1)
    a = own / (counts[label] - 1).clamp_min(1)
    b = other / counts[1 - label]
    s = (b - a) / torch.maximum(a, b).clamp_min(1e-30)
    return float(torch.where(counts[label] == 1, 0.0, s).mean())


def _components(states: Tensor) -> Tensor:
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :10] * s[:10]


@contextmanager
def listening(parts: Sequence[Part], real: Tensor, entered: dict[str, list[Tensor]]) -> Generator[None]:
    """Inside, the states that enter each part at work are kept, without padding."""
    modules = {part.name: part.module for part in parts}

    def keep(name: str, h: Tensor) -> None:
        if getattr(modules[name], "disable_adapters", False):  # PEFT's layers also run for the frozen model
            return
        h = h.detach()
        rows = h[real.to(h.device)] if h.shape[:-1] == real.shape else h.flatten(0, -2)
        entered[name].append(rows.float().cpu())

    with observing({name: Place(module, "input") for name, module in modules.items()}, keep):
        yield
