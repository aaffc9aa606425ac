"""One forward: its tokens, those before them, and which are the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokenpaths.tokens import Context


@dataclass(frozen=True, eq=False)
class Moment:
    """One forward, over columns `past` to `past + length` of the sequences that `context` knows.

    `repeats` rows of the batch stand for one row that the user gave: beams, or several returned sequences.
    All columns of a `written` forward are known, by their place, to lie behind the prompt: it decodes.
    """

    context: Context
    past: int
    length: int
    repeats: int = 1
    written: bool = False


@runtime_checkable
class Listener(Protocol):
    """An attachment, as the watcher sees it. A moment of None: the model reads no tokens, but images for instance."""

    plan: Any

    def begin(self, moment: Moment | None) -> None: ...

    def end(self) -> None: ...

    def resume(self, plan: Any) -> None: ...


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
