"""Who answers: a model inside a context, or any function from prompts to texts.

    frozen(model)                                   # with all trails off that are attached to it
    steered(model, trails)                          # one trained trail
    steered(model, *three_trails, name="chain")     # one method, three seeds
    Arm("LoRA", [Run(lora)])                        # Run of tokenpaths.engine; or the model itself
    Arm("service", [ask])                           # ask(prompts: list[str]) -> list[str]

Models write greedily, so an arm gives the same answers when it is asked again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tokenpaths.engine.readings import Run, runs
from tokenpaths.engine.readings import frozen as without_trails
from tokenpaths.trailmap.adapter import Adapter

Ask: TypeAlias = Callable[[list[str]], Sequence[str]]


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a test.

    Args:
        name: in the report.
        seeds: who answers. Several are seeds of one method. A model is made a `Run`.

    Raises:
        ValueError: no name, or nobody who answers.
    """

    name: str
    seeds: Sequence[nn.Module | Run | Ask]

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an arm needs a name, to be told from others in a report")
        if not self.seeds:
            raise ValueError(f"arm {self.name!r} has nobody who answers: give it a model, a Run or a function")
        as_runs = tuple(Run(one) if isinstance(one, nn.Module) else one for one in self.seeds)
        object.__setattr__(self, "seeds", as_runs)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of its models. Raises `ValueError` if a function answers, which tells no likelihood."""
        found = tuple(one for one in self.seeds if isinstance(one, Run))
        if len(found) < len(self.seeds):
            raise ValueError(
                f"arm {self.name!r} is a function from prompts to texts, which tells no likelihoods: choices and "
                "retention need a model"
            )
        return found


def frozen(model: nn.Module, *, name: str = "frozen") -> Arm:
    """The model itself: trails that are attached to it are off while it answers.

    An adapter of PEFT stays on; of such a model the frozen arm is `Arm("frozen", [Run(lora, lora.disable_adapter)])`.
    """
    return Arm(name, [Run(model, functools.partial(without_trails, model))])


def steered(model: nn.Module, *trails: Adapter, name: str = "steered", tokenizer: Any = None) -> Arm:
    """The model with trails, attached while it answers; several maps are seeds of one method.

    `tokenizer` is for the rule `Match`.
    """
    return Arm(name, [runs(model, each, tokenizer=tokenizer)[1] for each in trails])
