"""One optimizer step: the gradients of all processes, clipped, at the learning rate of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tokenpaths.training.rate import FALLBACK, Found, find_rate
from tokenpaths.undo import Undo

if TYPE_CHECKING:
    from accelerate import Accelerator

MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
KEPT = "The trails are as after the step before; a lower lr or a smaller clip may help"


@runtime_checkable
class HeldStep(Protocol):
    """A limit in force in a run."""

    def hold(self) -> tuple[float, float]:
        """Shorten the step that was just taken. Returns the share of it that was kept, and its measure."""
        ...


class Descent:
    """The optimizer of a run, with its schedule and its clipping.

    Args:
        parameters: what is trained.
        make: a function from the list of parameters to an optimizer; AdamW without weight decay unless given.
        lr: the learning rate of AdamW; found in the first step unless given.
        schedule: a name that `transformers.get_scheduler` knows.
        warmup: the steps of the warm-up, which rises from 1/warmup of the rate to all of it; below 1, their share of
            all steps.
        clip: the largest norm of the gradient; None for any.
        total: the number of steps of the run.
        accelerator: the run's.
        explain: print how the rate was found.

    `held` is the limit on each step, if there is one. `rates` are the rates of the optimizer's groups, which the
    schedule multiplies, and `found` tells how they were found, where they were found.

    Raises:
        ValueError: both `make` and `lr` are given, or the schedule depends on more than the step.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        make: MakeOptimizer | None,
        lr: float | None,
        schedule: str,
        warmup: int | float,
        clip: int | float | None,
        total: int,
        accelerator: Accelerator,
        explain: bool = False,
    ) -> None:
        if make is not None and lr is not None:
            raise ValueError("with optimizer=, the learning rate is part of it: leave lr= out")
        if make is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters, lr=FALLBACK if lr is None else lr, weight_decay=0.0
            )
        else:
            self.optimizer = make(parameters)
        self.own = make is not None
        self.seeks = make is None and lr is None
        self.found: Found | None = None
        self.parameters = parameters
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.share_at = _schedule(schedule, warmup, total)
        self.most = math.inf if clip is None else clip
        self.accelerator = accelerator
        self.explain = explain
        self.prepared: Any = None
        self.held: HeldStep | None = None

    def describe(self) -> list[Any]:
        """What a checkpoint notes of the optimizer, so that a run with another is refused."""
        found = {"lr": "found"} if self.seeks else {}
        groups = [{**group, "params": len(group["params"]), **found} for group in self.optimizer.param_groups]
        return [type(self.optimizer).__name__, groups]

    def advice(self) -> str:
        """What to do where the run diverges."""
        if self.own:
            return "with this optimizer: lower its learning rate"
        rate = self.rates[0]
        other = "" if self.seeks else "leave lr= out, and one is found that suits the model, or "
        return f"at lr={rate:.2g}: {other}give a lower one, such as lr={rate / 5:.1g}"

    @contextmanager
    def ready(self) -> Generator[None]:
        """Inside, the accelerator has the optimizer, and steps can be taken. Afterwards no gradient is left."""
        with Undo() as undo:
            undo.add(self.optimizer.zero_grad)
            self.prepared = self.accelerator.prepare_optimizer(self.optimizer)
            yield

    def step(
        self, number: int, ruler: Callable[[], Callable[[], float]]
    ) -> tuple[float, float, float | None, float | None]:
        """Take step `number`, counted from 0, and hold it. A rate that is found is found in step 0.

        `ruler` makes what tells how far the states have gone from where they are when it is made.

        Returns the learning rate, the norm of the gradient before clipping, and what `held` tells: the share of the
        step that was kept, and its measure.

        Raises:
            FloatingPointError: the gradient is not finite. Nothing is changed then.
        """
        self._sum_gradients()
        norm = float(cast("Tensor", self.accelerator.clip_grad_norm_(self.parameters, self.most)))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such a step by itself
            raise FloatingPointError(f"step {number + 1}: the gradient is not finite ({norm}). {KEPT}")
        if self.seeks and number == 0 and math.isfinite(norm):
            self.found = find_rate(self.parameters, ruler())
            self.rates[:] = [self.found.lr or FALLBACK] * len(self.rates)
            if self.explain:
                self.accelerator.print(self.found)
        share = self.share_at(number)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.prepared.step()
        self.prepared.zero_grad()
        kept, went = (None, None) if self.held is None else self.held.hold()
        return self.rates[0] * share, norm, kept, went

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes. They are small, so the model needs no DDP around it."""
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        parts = sum_over_processes(flat, self.accelerator).split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def sum_over_processes(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum of a tensor over all processes."""
    return cast("Tensor", accelerator.reduce(tensor, "sum"))


def _schedule(name: str, warmup: int | float, total: int) -> Callable[[int], float]:
    """The share of the learning rate at each step, counted from 0, as a function of nothing but the step.

    It is that of transformers, one step ahead during the warm-up of w steps: (k + 1) / w at step k, not k / w, so that
    the first step trains.
    """
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    first = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    # a run that ends with its warm-up ends at the full rate, and not at the zero that a schedule ends with
    steps = max(total, first + 1)
    scheduler: Any = get_scheduler(name, stand_in, num_warmup_steps=first, num_training_steps=steps)
    if not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(f"schedule={name!r} depends on more than the step, so a run could not be resumed from it")
    share: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda step: share(step + 1 if step < first else step)
