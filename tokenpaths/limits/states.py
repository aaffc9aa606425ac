"""The states that enter trails, batch by batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.handle import attaching, is_attached
from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.examples import Batch, Example, collate
from tokenpaths.engine.forwards import forward_states
from tokenpaths.engine.states import recording
from tokenpaths.site import Host, Site
from tokenpaths.tokens import Context, token_pieces
from tokenpaths.trailmap.trailmap import TrailMap


def entering(
    model: nn.Module, trails: TrailMap, examples: Sequence[Example], strength: float, tokenizer: Any, batch_size: int
) -> Generator[tuple[Batch, Context, dict[Site, tuple[Tensor, Tensor]]]]:
    """Batch by batch: its tokens, the states that enter the trails at a strength, and which each rule chooses.

    Raises `ValueError` for trails that are attached already.
    """
    pieces = None if tokenizer is None else token_pieces(tokenizer)
    spans = sorted({name for example in examples for name in example.spans})
    host = Host.of(model, trails.blocks)
    places = {site: host.locate(site)[1] for site in trails}
    with (
        recording(places, entering=True) as states,  # before the trails are attached: the states that enter them
        attached_at(model, trails, strength, tokenizer),
        evaluating(model),
        evaluating(trails),
    ):
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], spans=spans)
            states.clear()
            with torch.no_grad():
                forward_states(model, batch.to(host.device))
            context = Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids, batch.spans, pieces)
            yield batch, context, {site: (h, site.tokens.mask(context)) for site, h in states.items()}


@contextmanager
def attached_at(model: nn.Module, trails: TrailMap, strength: float, tokenizer: Any) -> Generator[None]:
    """Inside, trails are attached at a strength. Raises `ValueError` for trails that are attached already."""
    if is_attached(model, trails):
        raise ValueError("the trails are attached already, at a strength of their own: remove them first")
    with attaching(model, trails, strength=strength, tokenizer=tokenizer, everywhere=False):
        yield
