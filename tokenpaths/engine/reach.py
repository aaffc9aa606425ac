"""Which tokens one run of a model moves and another does not: what a comparison of the two is made on.

    reached(frozen, steered, batch)               # a mask [batch, seq], without a forward
    share_reached(frozen, steered, examples)      # of the tokens that are read, the share

Weights that differ, as LoRA's do, move every token. A trail moves the tokens that its rule chooses, and through the
attention of the blocks above all tokens behind them. A fresh trail or a shut gate counts as one that moves: it looked
at the state and left it. Trails that are off, or at strength 0, move nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokenpaths.attachment.handle import Attachment, attachments
from tokenpaths.attachment.moment import Moment
from tokenpaths.data.examples import IGNORED, Batch, Example, collate
from tokenpaths.engine.batches import batches
from tokenpaths.engine.readings import Run
from tokenpaths.site import Site
from tokenpaths.tokens import Context
from tokenpaths.trailmap.adapter import Adapter


def reached(before: Run, after: Run, batch: Batch) -> Bool[Tensor, "batch seq"]:
    """The tokens whose state after the last block may differ between two runs. Padding never is among them.

    Trails that are at work in one run alone decide, by their rules. Where every trail that is laid into the models is
    at work in both, or none is laid, the runs differ by something else, as their weights: all real tokens are reached.

    Raises `ValueError` as `attach` does, and as a rule that finds no span or no text to read.
    """
    real = batch.attention_mask.bool()
    none = torch.zeros_like(real)
    if before is after:
        return none
    first, second = _laid(before, batch, real), _laid(after, batch, real)
    laid = {**first, **second}
    alone = [key for key in laid if first.get(key) is None or second.get(key) is None]
    if not alone:
        return real
    for key in alone:
        for mask in (first.get(key), second.get(key)):
            none = none if mask is None else none | mask
    return none


def predictors(batch: Batch) -> Bool[Tensor, "batch seq"]:
    """The tokens whose predictions are scored: those before a token of the answer, or before any without an answer."""
    answer = batch.labels != IGNORED
    real = batch.attention_mask.bool()
    scored = torch.where(answer.any(1, keepdim=True), answer, real)
    return scored.roll(-1, 1) & real & (torch.arange(real.shape[1]) < real.shape[1] - 1)


def share_reached(before: Run, after: Run, examples: Sequence[Example], max_batch_tokens: int = 1500) -> float:
    """Of all predictions that are scored in examples, the share that the second run can change; NaN without any."""
    moved = scored = 0
    with before.ready(), after.ready():
        for rows in batches([len(example) for example in examples], max_batch_tokens):
            batch = collate([examples[i] for i in rows])
            read = predictors(batch)
            moved += int((reached(before, after, batch) & read).sum())
            scored += int(read.sum())
    return moved / scored if scored else math.nan


def _laid(run: Run, batch: Batch, real: Tensor) -> dict[tuple[Adapter, float], Tensor | None]:
    """The tokens that each map laid into a run's model moves there, by map and strength; None of one not at work."""
    with run.reading():
        return {
            (laid.trails, float(laid.strength)): _chosen(laid, batch, real)
            if laid.trails.enabled and laid.strength != 0
            else None
            for laid in attachments(run.model)
        }


def _chosen(attachment: Attachment, batch: Batch, real: Tensor) -> Tensor:
    """What the rules of an attachment choose, and what lies behind it where a later block reads it."""
    context = Context(real, batch.prompt_mask, batch.input_ids, spans=dict(batch.spans))
    sites = attachment.trails.sites
    if not sites:  # weights that differ
        return real
    rules = list(dict.fromkeys(site.tokens for site in sites))
    masks = dict(zip(rules, attachment.masks(Moment(context, 0, real.shape[1])), strict=True))
    found = torch.zeros_like(real)
    for site in sites:
        mask = masks[site.tokens]
        found |= mask if _is_last(site, attachment.host.blocks) else mask.cummax(1).values
    return found & real


def _is_last(site: Site, blocks: nn.ModuleList) -> bool:
    """Whether no attention reads what is added there: behind the attention of the last block."""
    return site.stream != "embedding" and site.layer % len(blocks) == len(blocks) - 1
