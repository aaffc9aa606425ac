"""What does an orthonormal R cost? Ours, one batched thin QR for all layers, beside torch's parametrization.

Forward and backward of R (4 x 4096) for 32 layers. torch's `parametrizations.orthogonal`, which pyreft and adapters
use, is timed on a few layers and scaled up: layers do not touch each other there. The share is of a training step of
SmolLM2-135M (30 layers of width 576, rank 4; 8 texts of 256 tokens), with R for all of its layers beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.clock import alternate, ratio, timed
from benchmarks.common.options import parser
from benchmarks.common.record import of_ratio, write
from benchmarks.cost.arms import BATCHES, ours
from benchmarks.cost.setups import TASKS, Bench
from tokenpaths.trails import OrthonormalRows
from tokenpaths.trails.stiefel import prepare, release

LAYERS, DIM, RANK = 32, 4096, 4


class Ours:
    """R of all layers, as an attached map computes it: factorised together, in one forward, after each change."""

    def __init__(self, layers: int, dim: int, rank: int) -> None:
        self.modules = [OrthonormalRows(rank, dim) for _ in range(layers)]
        self.grads = torch.randn(layers, rank, dim)

    def __call__(self) -> None:
        with torch.no_grad():
            for module in self.modules:
                module.weight.mul_(1.0001)  # as after an optimizer step: nothing may be left from the last call
                module.weight.grad = None
        prepare(self.modules)
        torch.autograd.backward([module() for module in self.modules], list(self.grads))
        release(self.modules)


class Parametrized:
    """R^T of each layer by torch's parametrization, computed once for each forward, the kindest way to use it."""

    def __init__(self, layers: int, dim: int, rank: int) -> None:
        holders = [torch.nn.Linear(dim, rank, bias=False) for _ in range(layers)]
        self.modules: list[Any] = [torch.nn.utils.parametrizations.orthogonal(holder) for holder in holders]
        self.grads = torch.randn(layers, rank, dim)

    def __call__(self) -> None:
        for module in self.modules:
            module.zero_grad()
        torch.autograd.backward([module.weight for module in self.modules], list(self.grads))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="small sizes, few rounds, and no result file")
    quick = options.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    few, dim, rounds = (1, 256, 3) if quick else (2, DIM, 9)
    width = {
        "ours": timed(Ours(LAYERS, dim, RANK)),
        "torch's parametrization, a few layers": timed(Parametrized(few, dim, RANK)),
    }
    seconds = alternate(width, rounds, 2)
    theirs = [LAYERS / few * s for s in seconds["torch's parametrization, a few layers"]]
    found = ratio(seconds["ours"], theirs)

    task = TASKS["all"].small() if quick else TASKS["all"]
    bench = Bench("tiny" if quick else "smollm2", task)
    step = {"R": timed(Ours(len(bench.layers), bench.width, RANK)), "step": timed(ours(bench))}
    shared = alternate(step, rounds, BATCHES + 1)
    share = ratio(shared["R"], shared["step"])
    told = (
        f"CPU time of R for {LAYERS} layers, {RANK} x {DIM}, forward and backward, over that of torch's orthogonal "
        f"parametrization ({few} layers, scaled up), median of {rounds} rounds"
    )
    beside = (
        "CPU time of R for all layers, forward and backward, as a share of a training step: SmolLM2-135M, 8 x 256 "
        "tokens, LoReFT rank 4 on all layers"
    )
    claims = [
        of_ratio("orthonormal_vs_parametrization", told, found, "<= 0.01"),
        replace(of_ratio("orthonormal_share_of_step", beside, share, "<= 0.01"), unit="share"),
    ]
    if quick:
        print(*claims, sep="\n")
    else:
        write("orthonormal", {"width": seconds, "step": shared}, claims, seed=0)


if __name__ == "__main__":
    main()
