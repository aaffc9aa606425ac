"""The mean hidden state of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.data.examples import Example, collate
from tokenpaths.engine.batches import batches
from tokenpaths.engine.readings import Run, read_one
from tokenpaths.undo import tidy


@tidy
def mean_states(
    run: Run,
    examples: Sequence[Example],
    layer: str | None = None,
    *,
    skip_first: bool = False,
    max_batch_tokens: int = 1500,
) -> Float[Tensor, "texts dim"]:
    """The mean over the tokens of each text of a layer's states, in float64 on the CPU.

    Args:
        run: the model, and what it is read inside of.
        examples: the texts, at least one.
        layer: a layer of `Reading.states`: "embedding", "block 3", "norm". By default the last.
        skip_first: leave out the first token of each text, whose state is far larger than all others in most models.
        max_batch_tokens: the most tokens in one forward, padding included.

    Raises:
        ValueError: there are no texts, a text has fewer than two tokens, or there is no such layer.
    """
    means: dict[int, Float[Tensor, " dim"]] = {}
    if not examples:
        raise ValueError("there are no texts: nothing has a mean")
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        for i, reading in zip(rows, read_one(run, collate([examples[i] for i in rows])), strict=True):
            name = layer or list(reading.states)[-1]
            if name not in reading.states:
                raise ValueError(f"layer {name!r} is none of the model's, which are {', '.join(reading.states)}")
            means[i] = reading.states[name][int(skip_first) :].double().mean(0).cpu()
    return torch.stack([means[i] for i in range(len(examples))])
