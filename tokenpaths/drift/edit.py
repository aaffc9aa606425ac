"""What an adapter does where, in three figures: reliability, generality and locality.

    reliability   what was taught, in the form in which it was taught
    generality    the same task in other forms
    locality      everything else: other requests, other text

Knowledge editing has these names (Yao et al. 2023, arXiv 2305.13172). `way_or_form` and `forgetting` tell them of a
trained adapter, and `fit_gate` tells them of a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import collate
from tokenpaths.engine.batches import batches
from tokenpaths.engine.divergence import at_least_float32, kl_of_logs
from tokenpaths.engine.readings import Run, read
from tokenpaths.report.tables import with_interval
from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval, wilson


@dataclass(frozen=True)
class Told:
    """One figure of one kind of items, with its 95 % interval over them."""

    name: str
    value: float
    interval: Interval
    items: int


def of_share(name: str, share: float, items: int) -> Told:
    """A share of items, with Wilson's interval; that of no share is unknown."""
    if not 0 <= share <= 1 or not items:
        return Told(name, share, UNKNOWN, items)
    return Told(name, share, wilson((np.arange(items) < round(share * items)).astype(float)), items)


@dataclass(frozen=True)
class Edit:
    """The three figures, kind by kind. `learned` and `lost` say what the first two and the third are shares or nats of.

    A part without kinds was not given, and nothing can be told of it.
    """

    reliability: tuple[Told, ...]
    generality: tuple[Told, ...]
    locality: tuple[Told, ...]
    learned: str = "accuracy"
    lost: str = "nats from the frozen model"

    def __str__(self) -> str:
        return "\n".join(
            [
                _line("reliability", self.reliability, self.learned, "no items of the trained form were given", min),
                _line("generality", self.generality, self.learned, "no other forms were given", min),
                _line("locality", self.locality, self.lost, "no other requests or texts were given", max),
            ]
        )


def _line(name: str, kinds: Sequence[Told], unit: str, missing: str, worst: Callable[..., Told]) -> str:
    if not kinds:
        return f"{name}: cannot tell, {missing}"
    if len(kinds) == 1:
        (only,) = kinds
        return f"{name}: {unit} {with_interval(only.value, only.interval)} of {only.items} items, {only.name}"
    values = np.array([kind.value for kind in kinds])
    far = worst(kinds, key=lambda kind: kind.value)
    mean, of_worst = with_interval(float(values.mean()), mean_interval(values)), with_interval(far.value, far.interval)
    return f"{name}: {unit} {mean} over {len(kinds)} kinds, {of_worst} of the worst, {far.name}"


def kl_behind(
    before: Run, after: Run, kinds: Mapping[str, Sequence[str]], tokenizer: Any, max_batch_tokens: int = 1500
) -> tuple[Told, ...]:
    """KL(before || after) of the token that comes behind each prompt, in nats; the mean over the prompts of each kind.

    Raises:
        ValueError: a kind without prompts, or a prompt of fewer than two tokens.
    """
    if empty := [name for name, prompts in kinds.items() if not prompts]:
        raise ValueError(f"no prompts of the kind {empty[0]!r} were given: leave it out, or give some")
    found = kl_of_prompts(before, after, kinds, tokenizer, max_batch_tokens)
    return tuple(
        Told(name, float(nats.mean()), mean_interval(nats) if len(nats) > 1 else UNKNOWN, len(nats))
        for name, nats in found.items()
    )


def kl_of_prompts(
    before: Run, after: Run, kinds: Mapping[str, Sequence[str]], tokenizer: Any, max_batch_tokens: int = 1500
) -> dict[str, Float[np.ndarray, " prompts"]]:
    """The same of each prompt, by kind. Raises as `kl_behind` for short prompts."""
    texts = encode_texts([prompt for prompts in kinds.values() for prompt in prompts], tokenizer) if kinds else []
    nats = np.zeros(len(texts))
    for some in batches([len(text) for text in texts], max_batch_tokens):
        for i, (x, y) in zip(some, read(before, after, collate([texts[i] for i in some])), strict=True):
            p, q = (torch.log_softmax(at_least_float32(reading.logits[-1]), -1) for reading in (x, y))
            nats[i] = float(kl_of_logs(p, q).clamp_min(0))
    found: dict[str, Float[np.ndarray, " prompts"]] = {}
    for name, prompts in kinds.items():
        found[name], nats = nats[: len(prompts)], nats[len(prompts) :]
    return found
