"""One forward: its tokens, those before them, and which are the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from tokenpaths.tokens import Context


class Decision(NamedTuple):
    """What a gate has decided: the rows that it opens, and how many columns the prompts had that it read."""

    opens: Bool[Tensor, " batch"]
    width: int


@dataclass(frozen=True, eq=False)
class Moment:
    """One forward, over columns `past` to `past + length` of the sequences that `context` knows.

    `repeats` rows of the batch stand for one row that the user gave: beams, or several returned sequences.
    All columns of a `written` forward are known, by their place, to lie behind the prompt: it decodes.
    `restarts` are the real tokens whose position falls back behind that of the token before: a packed row begins anew.
    `prompt_given` tells that the user has said which tokens are the prompt, of each of them.
    `movers` are the numbers of the attachments that moved the cached tokens, and of those that move these; None for a
    cache in which nobody moves any.
    Where the upper blocks see only the last tokens, as whose logits alone are asked for, `kept` is their number.
    `decisions` are those of the gates, by the numbers of their attachments.
    """

    context: Context
    past: int
    length: int
    repeats: int = 1
    written: bool = False
    restarts: Tensor | None = None
    prompt_given: bool = False
    movers: frozenset[int] | None = frozenset()
    kept: int = 0
    decisions: Mapping[int, Decision] = field(default_factory=dict[int, Decision])


@runtime_checkable
class Listener(Protocol):
    """An attachment, as the watcher sees it. A moment of None: the model reads no tokens, but images for instance.

    Its `plan` is that of the forward of the running thread. Its `number` is its own, and of no other one.
    """

    number: int

    unclear: bool
    """Whether it cannot be told if it is meant for threads in which it does not act."""
    gate: Any
    """What decides for each request whether it acts; None where it always does."""
    rows: Any
    """The rows of a batch in which it acts; None for all."""

    @property
    def alone(self) -> bool:
        """Whether it gives way where the gate of another such one has a higher score."""
        ...

    @property
    def plan(self) -> Any: ...

    def acts(self) -> bool:
        """Whether it hears of the forwards of the running thread, or task."""
        ...

    def begin(self, moment: Moment | None, resting: bool = False) -> None:
        """A forward begins. While it is `resting`, nothing is moved: gates read the frozen model."""
        ...

    def end(self, before: Any) -> None:
        """The forward is over, or has failed; `before` is the plan of the forward that it was inside of, or None."""
        ...

    def resume(self, plan: Any, backward: int) -> None:
        """The backward of this number begins, through the forward that had this plan."""
        ...


def context_of(real: Tensor, prompt: Tensor, ids: Tensor | None = None) -> Context:
    """A context without spans."""
    return Context(real, prompt, ids, spans={})  # torch.compile cannot trace the default of `spans`


def merged(real: Tensor, ids: Tensor | None, whole: Context, spans: dict[str, Tensor]) -> Context:
    """What a forward shows, and beyond its columns what is known of the rest of the prompt."""
    repeats, width = len(real) // len(whole.real), max(real.shape[1], whole.prompt.shape[1])
    rest_real, prompt, rest_ids = (
        None if part is None else part.to(real.device).repeat_interleave(repeats, 0)
        for part in (whole.real, whole.prompt, whole.ids)
    )
    assert rest_real is not None and prompt is not None
    if ids is not None:
        ids = torch.cat([ids, ids[:, :0] if rest_ids is None else rest_ids[:, ids.shape[1] :]], 1)
        ids = fit(ids, width, -1)
    return Context(
        real=torch.cat([real, rest_real[:, real.shape[1] :]], 1),
        prompt=fit(prompt, width, False),
        ids=ids,
        spans={name: fit(mask, width, False) for name, mask in spans.items()},
    )


def fit(values: Tensor, width: int, filler: bool | int) -> Tensor:
    """Widen to `width` columns, or cut."""
    if values.shape[1] >= width:
        return values[:, :width]
    return torch.cat([values, values.new_full((len(values), width - values.shape[1]), filler)], 1)
