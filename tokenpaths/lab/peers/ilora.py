"""I-LoRA, Ren et al. 2024 (arXiv 2402.18865): an adapter that learns is kept near a slow copy of itself.

    memory = DualMemory(lora)                                       # lora = PeftAdapter(peft_model)
    goals = [Imitate(second_task), ReplayNear(list(reservoir), memory)]
    for step in steps(peft_model, lora, goals, steps=200, lr=1e-4):
        memory.update()
    with memory.slow():                                             # the slow weights are what is used in the end
        peft_model.generate(...)

The fast weights w are trained. The slow weights l follow them after each step,

    l <- lambda l + (1 - lambda) w

The mean is taken of each factor, A and B, by itself, as in the authors' code and as PEFT can hold it. That is not the
mean of the changes: mean(B) mean(A) is not mean(B A), and the further the factors move meanwhile, the more they differ.
The mean of B A itself has the rank of all steps together and fits no LoRA.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.attachment.hooks import alone
from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.examples import IGNORED, Batch
from tokenpaths.engine.divergence import at_least_float32
from tokenpaths.engine.forwards import forward, forward_states
from tokenpaths.engine.logits import cross_entropy, logits_at
from tokenpaths.engine.states import recording
from tokenpaths.lab.peers.adapter import exchanged
from tokenpaths.site import Place, find_blocks
from tokenpaths.trailmap import notes
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.imitate import Imitate
from tokenpaths.undo import Undo, tidy

Schedule: TypeAlias = Literal["constant", "published-code"]
Sides: TypeAlias = Literal["both", "below"]


class DualMemory:
    """Slow weights beside the trained ones of an adapter: their exponential mean.

    With `schedule="published-code"`, lambda at the k-th update (from 0) is min(1 - 1 / (k + 1), 0.25): the slow weights
    are then about where the fast ones were a step ago, and hardly a memory. The default of 0.99 is ours, and averages
    about a hundred steps.

    Args:
        trails: an adapter of any kind. Where the rows of trails are orthonormal, the mean is taken of the weights that
            they are made from, so the slow rows are orthonormal too.
        decay: lambda, in [0, 1).
        schedule: "constant", or that of the authors' code, which ignores `decay`.

    Raises:
        ValueError: an adapter that does not learn, or a decay or schedule that is not allowed.
    """

    def __init__(self, trails: Adapter, decay: float = 0.99, schedule: Schedule = "constant") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"DualMemory: decay={decay} must be at least 0 and below 1")
        if schedule not in get_args(Schedule):
            raise ValueError(f"DualMemory: schedule={schedule!r} must be 'constant' or 'published-code'")
        self.trails = trails
        self.decay = decay
        self.schedule: Schedule = schedule
        self.updates = 0
        self._fast = {name: p for name, p in trails.named_parameters() if p.requires_grad}
        if not self._fast:
            raise ValueError("DualMemory: every parameter of the adapter is frozen, so there is nothing to follow")
        self._slow = {name: p.detach().clone() for name, p in self._fast.items()}
        self._in_use = False
        self._read_at: set[int] = set()  # which values of the fast weights it was read beside, since the last update

    def __repr__(self) -> str:
        return f"DualMemory(decay={self.decay}, schedule={self.schedule!r}): {self.updates} updates"

    def next_decay(self) -> float:
        """The lambda of the next update."""
        return self.decay if self.schedule == "constant" else min(1 - 1 / (self.updates + 1), 0.25)

    @tidy
    @torch.no_grad()
    def update(self) -> None:
        """Let the slow weights follow the fast ones by one step. Call it after each step.

        Raises:
            RuntimeError: inside `slow()`, where the adapter has its slow weights.
        """
        if self._in_use:
            raise RuntimeError("update() inside slow(): the adapter has its slow weights now, and would follow itself")
        for name, fast in self._fast.items():
            self._slow[name] = torch.lerp(fast.detach(), self._slow[name].to(fast.device), self.next_decay())
        self.updates += 1
        self._read_at.clear()

    @contextmanager
    def slow(self) -> Generator[None]:
        """Inside, the adapter has its slow weights and is in evaluation mode; afterwards all is as it was, to the bit.

        A graph that waits for its backward keeps the fast weights. An adapter that is saved inside is the slow one.

        Raises:
            RuntimeError: at the end, if the adapter was trained inside.
        """
        with alone(self.trails.running, "has the slow weights of this adapter in use"), Undo() as undo:
            if self._in_use:
                yield
                return
            undo.set(self, "_in_use", True)
            with exchanged([(fast, self._slow[name]) for name, fast in self._fast.items()]), evaluating(self.trails):
                before = self._written()
                yield
                if self._written() != before:
                    raise RuntimeError(
                        "the adapter was trained inside slow(), so its slow weights were changed and what it learned "
                        "is no longer in it: train outside, and update() after each step"
                    )

    def expect_updates(self) -> None:
        """Warn if the fast weights are trained and the slow ones do not follow. For what reads them in a run."""
        known = len(self._read_at)
        self._read_at.add(self._written())
        if known < len(self._read_at) == 3:
            warnings.warn(
                "DualMemory: the adapter has been trained for two steps, and its slow weights stay where they are: "
                "call memory.update() after each step",
                stacklevel=2,
            )

    def _written(self) -> int:
        """How often the fast weights were written to."""
        return sum(p._version for p in self._fast.values())  # pyright: ignore[reportPrivateUsage]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the slow weights and the number of updates to one safetensors file, whole or not at all."""
        files.write(path, self._slow, {"dual memory": self.updates})

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote.

        Raises `FileNotFoundError`, `IsADirectoryError`, and `TrailFileError` for any other file, or numbers that are
        not finite.
        """
        tensors, note = files.read(path)
        updates = note.get("dual memory")
        if set(note) != {"dual memory"} or type(updates) is not int or updates < 0:
            raise files.TrailFileError(f"{os.fspath(path)} is not a file of a DualMemory")
        try:
            notes.check_shapes(self._slow, tensors)
            notes.check_numbers(self._slow, tensors)
        except files.TrailFileError as error:
            raise files.TrailFileError(f"{os.fspath(path)}: {error}") from None
        self._slow, self.updates = tensors, note["dual memory"]


@dataclass
class ReplayNear(Imitate):
    """Replay of earlier examples, with the hidden states kept near those of the slow weights.

    The loss is a mean over examples of

        -1/n sum_t log p(answer_t) + gamma 1/(L T dim) sum_{blocks, tokens} ||g(h_fast - h_slow)||^2

    over the n answer tokens, and over all T tokens of the example after each of L blocks. Gradients reach the fast
    weights only. With sides="both" g is the identity, as in the paper. With "below", as in the authors' code, only
    entries of h_fast that lie below those of h_slow are pulled: g(d) = min(d, 0).

    With `Imitate` on the new task this is the loss of the paper: cross-entropy on new and old data, and the distance on
    the old. (The code halves both cross-entropies, and takes the embedding, which LoRA does not move, into the mean
    over layers.)

    Args:
        examples: examples of earlier tasks, with answers: `list(reservoir)`.
        memory: the slow weights of the adapter that is trained.
        gamma: the weight of the distance.
        sides: as above.

    Raises:
        ValueError: an example without an answer, or a gamma or sides that are not allowed.
    """

    memory: DualMemory = field(kw_only=True)
    gamma: float = field(default=1.0, kw_only=True)
    sides: Sides = field(default="both", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"ReplayNear: gamma={self.gamma} must be a finite number, at least 0")
        if self.sides not in get_args(Sides):
            raise ValueError(f"ReplayNear: sides={self.sides!r} must be 'both' or 'below'")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        if trails is not self.memory.trails:
            raise ValueError("ReplayNear: its memory is of another adapter than the one that is trained")
        if torch.is_grad_enabled():
            self.memory.expect_updates()
        places = {block: Place(block, "output") for block in find_blocks(model, trails.blocks)}
        predicts = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
        with self.memory.slow(), torch.no_grad(), recording(places) as slow:
            forward_states(model, batch)
        with recording(places) as fast:
            logits = logits_at(model, lambda: forward(model, batch), predicts)
        targets = batch.labels[:, 1:][predicts[:, :-1]].to(logits.states.device)
        counts = predicts.sum(1)
        share = (1 / (len(counts) * counts)).repeat_interleave(counts).to(targets.device)  # the mean over examples
        said = logits.sum(lambda z, t, w: w * cross_entropy(z, t), targets, share)
        near = self._apart(list(fast.values()), list(slow.values()), batch)
        return said + self.gamma * near.to(said.device)

    def _apart(self, fast: list[Tensor], slow: list[Tensor], batch: Batch) -> Float[Tensor, ""]:
        """The distance: the mean over blocks and rows of the mean square over a row's tokens and entries."""
        real = batch.attention_mask.bool()
        found: list[Tensor] = []
        for x, y in zip(fast, slow, strict=True):
            d = at_least_float32(x) - at_least_float32(y)
            square = (d if self.sides == "both" else d.clamp_max(0)).square().mean(-1)
            here = real.to(square.device)
            found.append(((square * here).sum(1) / here.sum(1)).mean())
        return torch.stack(found).mean()

    def terms(self, examples: Sequence[object]) -> int:
        return len(examples)
