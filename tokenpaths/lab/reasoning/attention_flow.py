"""Which tokens of a prompt matter, by the flow of attention, as spans for token rules.

    examples = critical(model, examples, 4)                   # each now has the spans "critical 0" to "critical 3"
    sites = tokenpaths.sites(model, layers, critical_rule(4)) # trails that move these tokens and no others
    attach(model, trails, spans=rows_of_spans(examples))      # when generating: the spans of the rows of a batch

After CRFT (Huang et al. 2025, arXiv 2507.10085). It edits critical representations instead of the first and last of a
prompt, and finds them by two filters: states that take their information from themselves, and states that many others
take theirs from. We know its text from digests. The scores below are written from that description, a count replaces
its thresholds, and its filters by saliency (attention times gradient) are left out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example, collate
from tokenpaths.drift.attention import read_attention
from tokenpaths.engine.batches import batches
from tokenpaths.engine.readings import Run
from tokenpaths.site.host import find_blocks
from tokenpaths.tokens import Rule, Span
from tokenpaths.undo import tidy


@tidy
def critical(
    model: nn.Module,
    examples: Sequence[Example],
    count: int,
    *,
    by: Literal["received", "own"] = "received",
    layers: Sequence[int] | None = None,
    skip: int = 1,
    name: str = "critical",
    max_batch_tokens: int = 1500,
) -> list[Example]:
    """Name the `count` most critical prompt tokens of each example, as spans of one token each.

    With A the attention map of the prompt of p tokens, averaged over heads and layers (A_ij: what token i pays to j),

        received   s_j = 1 / (p - 1 - j) sum_{i > j} A_ij      what later tokens pay to it on average; 0 of the last
        own        s_j = A_jj                                  what it pays to itself

    The spans `f"{name} 0"`, `f"{name} 1"`, ... are in order of the score, highest first. In a prompt with fewer than
    `skip + count` tokens the last of them are empty. Answers are not read, so that the same tokens are found without
    one. Whatever is attached to the model is on: call this before trails are attached.

    Args:
        model: a causal language model with eager attention. No other attention gives maps.
        examples: the examples whose tokens are named. Their other spans are kept.
        count: the number of tokens to name.
        by: the score.
        layers: the blocks whose attention is averaged; all if None.
        skip: the number of tokens at the start that are never named. Later tokens pay most of their attention to the
            first in most models, whatever it is.
        name: the beginning of the spans' names. With several names, several choices can stand side by side.
        max_batch_tokens: the most tokens in one forward, padding included.

    Returns:
        The examples with the spans, in order.

    Raises:
        ValueError: no count, an unknown score or layer, or a model that gives no attention maps.
    """
    if count < 1 or skip < 0:
        raise ValueError(f"critical needs count >= 1 and skip >= 0, not {count} and {skip}")
    if by not in ("received", "own"):
        raise ValueError(f"by must be 'received' or 'own', not {by!r}")
    blocks = range(len(find_blocks(model)))
    chosen = blocks if layers is None else layers
    if not chosen or not set(chosen) <= set(blocks):
        raise ValueError(f"layers={layers!r} must name some of the {len(blocks)} layers, counted from 0")
    best: list[list[int]] = [[] for _ in examples]
    long = [i for i, example in enumerate(examples) if example.prompt_length > max(skip, 1)]
    for batch in batches([examples[i].prompt_length for i in long], max_batch_tokens):
        rows = [long[i] for i in batch]
        prompts = [Example.of(examples[i].ids[: examples[i].prompt_length]) for i in rows]
        for i, flow in zip(rows, _flows(model, prompts, chosen, len(blocks)), strict=True):
            order = _score(flow, by)[skip:].argsort(descending=True, stable=True)
            best[i] = (order[:count] + skip).tolist()
    return [_named(example, found, count, name) for example, found in zip(examples, best, strict=True)]


def critical_rule(count: int, name: str = "critical") -> Rule:
    """The tokens that `critical` named: `Span("critical 0") | Span("critical 1") | ...`."""
    if count < 1:
        raise ValueError(f"critical_rule({count}) would choose nothing: count is a whole number from 1 up")
    return functools.reduce(operator.or_, [Span(f"{name} {rank}") for rank in range(count)])


def rows_of_spans(examples: Sequence[Example]) -> Mapping[str, list[tuple[int, int]]]:
    """The spans of the rows of a batch, as `attach(..., spans=)` takes them."""
    names = sorted({name for example in examples for name in example.spans})
    return {name: [example.spans.get(name, (0, 0)) for example in examples] for name in names}


def _named(example: Example, best: Sequence[int], count: int, name: str) -> Example:
    spans = {f"{name} {rank}": (j, j + 1) for rank, j in enumerate(best)}
    none = {f"{name} {rank}": (0, 0) for rank in range(len(best), count)}
    return replace(example, spans={**example.spans, **spans, **none})


def _flows(
    model: nn.Module, prompts: Sequence[Example], chosen: Sequence[int], blocks: int
) -> list[Float[Tensor, "p p"]]:
    """The attention map of each prompt, averaged over heads and layers."""
    run = Run(model, shares=blocks)  # it is compared with itself, and so shares all blocks: each runs once
    found: dict[int, list[Tensor]] = {row: [] for row in range(len(prompts))}

    def see(layer: str, row: int, p: Tensor, _: Tensor) -> None:
        if int(layer.removeprefix("block ")) in chosen:
            found[row].append(p.float().mean(0))

    read_attention(run, run, collate(prompts).to(next(model.parameters()).device), see)
    if not all(found.values()):
        raise ValueError(f"layers={list(chosen)} have no attention in {type(model).__name__}: choose others")
    return [torch.stack(maps).mean(0) for maps in found.values()]


def _score(flow: Float[Tensor, "p p"], by: str) -> Float[Tensor, " p"]:
    if by == "own":
        return flow.diagonal().clone()
    later = torch.arange(len(flow) - 1, -1, -1, device=flow.device)
    return flow.tril(-1).sum(0) / later.clamp_min(1)
