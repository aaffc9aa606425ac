"""Who answers a request, of the trails of the tasks so far: their gates, or a router that was published.

A router learns the tasks one after another, from their prompts, and gives each prompt a strength for every task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tokenpaths as tp
from tokenpaths.data.tokenizing import tokenized
from tokenpaths.limits.requests import features
from tokenpaths.site import Host
from tokenpaths.trailmap.gate import Gate

Forms = Mapping[str, Sequence[str]]


class Router:
    """One that learns task after task, and weighs them by `strengths`."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    def learn(self, forms: Forms, earlier: Forms) -> None:
        raise NotImplementedError

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        raise NotImplementedError


class Gates(Router):
    """A gate for each task, which may leave a prompt to the frozen model. It is shown some prompts of earlier tasks."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        super().__init__(model, tokenizer, seed)
        self.gates: list[Gate] = []

    def learn(self, forms: Forms, earlier: Forms) -> None:
        made = tp.fit_gate(self.model, self.tokenizer, forms, other=earlier, seed=self.seed)
        self.gates.append(made.gate)

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """A row for each prompt, a column for each task."""
        z = features(Host.of(self.model), self.tokenizer, prompts, self.gates[0], 1500)
        return torch.stack([z @ gate.weight.double() + gate.bias.double() for gate in self.gates], 1)

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        return [tuple(float(score > 0) for score in row) for row in self.scores(prompts).tolist()]


class Highest(Router):
    """The task whose gate has the highest score, though it be shut: no prompt is left to the frozen model."""

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates.model, gates.tokenizer, gates.seed)
        self.gates = gates

    def learn(self, forms: Forms, earlier: Forms) -> None: ...

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        return one_of(self.gates.scores(prompts))


class Alone(Highest):
    """Of the gates that open the one with the highest score, or none: `attach(..., alone=True)`."""

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        scores = self.gates.scores(prompts)
        highest = one_of(scores)
        return [
            row if any(x > 0 for x in told) else (0.0,) * len(row) for row, told in zip(highest, scores, strict=True)
        ]


class Centroids(Router):
    """The task of the nearest centroid, one a form, of the mean input embedding (ARIADNE, arXiv 2606.19079)."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        super().__init__(model, tokenizer, seed)
        self.centroids: list[Tensor] = []

    def learn(self, forms: Forms, earlier: Forms) -> None:
        means = [embedded(self.model, self.tokenizer, prompts).mean(0) for prompts in forms.values()]
        self.centroids.append(torch.stack(means))

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        read = embedded(self.model, self.tokenizer, prompts)
        near = [torch.cosine_similarity(read[:, None], some[None], dim=-1).amax(1) for some in self.centroids]
        return one_of(torch.stack(near, 1))


class GainLora(Router):
    """Gates of GainLoRA (Liang and Li 2025, arXiv 2505.15424, section 3), on the mean input embedding x of a prompt.

        a_t(x) = |2 sigmoid(4 cos(f_t(x), k_t)) - 1|,    f_t(x) = W2 silu(W1 x)

    f_t begins as f_(t-1), and k_t orthogonal to what f_t makes of old tasks' prompts, so that a_t is 0 on them; what
    is learned is orthogonal to what the old prompts put into W1, W2 and k_t, so that it stays 0. Here a_t is taught by
    itself, to be 1 on the prompts of its task, where the paper teaches it with the branch by the loss of the task.
    Strengths are rounded to quarters, so that prompts can be answered together.
    """

    WIDTH, STEPS, RATE, ENERGY = 100, 200, 1e-2, 0.99

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        super().__init__(model, tokenizer, seed)
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seen: list[Tensor] = []  # old prompts
        self.rng = torch.Generator().manual_seed(seed)

    def learn(self, forms: Forms, earlier: Forms) -> None:
        x = torch.cat([embedded(self.model, self.tokenizer, prompts) for prompts in forms.values()])
        weights = self._begun(x.shape[1])
        inside = [span(part, self.ENERGY) for part in self._passed(weights)] if self.seen else []
        if inside:
            weights[2] = off(weights[2], inside[2])
        for weight in weights:
            weight.requires_grad_()
        optimizer = torch.optim.SGD(weights, self.RATE, momentum=0.9)  # Adam's steps would leave the span
        for _ in range(self.STEPS):
            optimizer.zero_grad()
            gain(x, *weights).clamp_min(1e-6).log().mean().neg().backward()
            for weight, basis in zip(weights, inside, strict=bool(inside)):
                assert weight.grad is not None
                weight.grad = off(weight.grad, basis)
            optimizer.step()
        w1, w2, key = (weight.detach() for weight in weights)
        self.layers.append((w1, w2, key))
        self.seen.append(x)

    def _begun(self, dim: int) -> list[Tensor]:
        key = torch.randn(self.WIDTH, generator=self.rng)
        if self.layers:
            w1, w2, _ = self.layers[-1]
            return [w1.clone(), w2.clone(), key]
        first = torch.randn(self.WIDTH, dim, generator=self.rng) / dim**0.5
        return [first, torch.randn(self.WIDTH, self.WIDTH, generator=self.rng) / self.WIDTH**0.5, key]

    def _passed(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What old prompts put into the first layer, into the second, and against the key."""
        x = torch.cat(self.seen)
        hidden = torch.nn.functional.silu(x @ weights[0].T)
        return [x, hidden, hidden @ weights[1].T]

    def strengths(self, prompts: Sequence[str]) -> list[tuple[float, ...]]:
        x = embedded(self.model, self.tokenizer, prompts)
        gains = torch.stack([gain(x, *weights) for weights in self.layers], 1)
        return [tuple(row) for row in ((gains * 4).round() / 4).tolist()]


def gain(x: Tensor, w1: Tensor, w2: Tensor, key: Tensor) -> Tensor:
    f = torch.nn.functional.silu(x @ w1.T) @ w2.T
    return (2 * torch.sigmoid(4 * torch.cosine_similarity(f, key[None], dim=-1)) - 1).abs()


def span(rows: Tensor, energy: float) -> Tensor:
    """An orthonormal basis of the directions that hold this share of the energy of rows."""
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    return v[: int((share < energy).sum()) + 1]


def off(weight: Tensor, basis: Tensor) -> Tensor:
    """Without what reads the directions of a basis."""
    return weight - (weight @ basis.T) @ basis


def one_of(scores: Tensor) -> list[tuple[float, ...]]:
    """1 for the task with the highest score."""
    best = scores.argmax(1).tolist()
    return [tuple(float(task == one) for task in range(scores.shape[1])) for one in best]


@torch.no_grad()
def embedded(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """The mean input embedding of each prompt, of length 1."""
    table = model.get_input_embeddings()
    means = [table(torch.tensor(tokenized(tokenizer, p, goes_on=True))).float().mean(0) for p in prompts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)
