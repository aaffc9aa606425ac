"""Directions told in tokens: what a write direction makes likely, and which tokens a read direction hears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.site.host import find_blocks, output_embedding, unwrapped


@torch.no_grad()
def says(
    model: nn.Module, directions: Float[Tensor, "k dim"], top: int = 5, *, blocks: str | None = None
) -> list[list[int]]:
    """The logit lens (nostalgebraist 2020) of directions u: the tokens with the largest W_U (norm(u) - norm(-u)) / 2.

    The difference takes back the bias of a layer norm. Without an output embedding or a final norm of the model's own
    width the direction is read as it is.
    """
    head: Any = output_embedding(model)
    if head is None:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} has no output embedding: its directions cannot be told in tokens"
        )
    norm = _final_norm(model, directions.shape[1], blocks)
    u = directions.to(head.weight.device, head.weight.dtype)
    if norm is not None:
        u = (norm(u) - norm(-u)) / 2
    return nn.functional.linear(u, head.weight).topk(top).indices.tolist()


@torch.no_grad()
def hears(model: nn.Module, directions: Float[Tensor, "k dim"], top: int = 5) -> list[list[int]]:
    """The tokens whose input embedding points most along each direction: the largest cosines."""
    inner: Any = unwrapped(model)
    table = inner.get_input_embeddings().weight
    u = directions.to(table.device, table.dtype)
    return (u @ nn.functional.normalize(table, dim=1).T).topk(top).indices.tolist()


def _final_norm(model: nn.Module, dim: int, blocks: str | None) -> nn.Module | None:
    """The last norm beside the block list: what stands between it and the output embedding."""
    layers = find_blocks(model, blocks)
    for module in model.modules():
        if any(child is layers for child in module.children()):
            norms = [m for m in module.children() if _is_norm(m, dim)]
            return norms[-1] if norms else None
    return None


def _is_norm(module: nn.Module, dim: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (dim,)


def told(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text, one by one."""
    return [tokenizer.decode([i]) for i in ids]
