"""Directions in tokens: which tokens a write direction makes likelier, and which tokens a read direction points to."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.site import Host
from tokenpaths.site.host import output_embedding, unwrapped


@torch.no_grad()
def logit_lens(
    model: nn.Module, directions: Float[Tensor, "k dim"], top: int = 5, *, blocks: str | None = None
) -> list[list[int]]:
    """The tokens that write directions u make likelier, by the logit lens (nostalgebraist 2020).

    These are the largest entries of W_U (norm(u) - norm(-u)) / 2, W_U the output embedding and norm the final norm. The
    difference takes the bias of a layer norm away. Where the model has no final norm of its own width, they are those
    of W_U u.

    Args:
        model: a causal language model.
        directions: directions in the residual stream.
        top: how many token ids to give for each direction, the likeliest first.
        blocks: the name of the block list, in a model that has several.

    Raises:
        ValueError: the model has no output embedding.
    """
    head: Any = output_embedding(model)
    if head is None:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} has no output embedding: its directions cannot be told in tokens"
        )
    norm = _final_norm(Host.of(model, blocks), directions.shape[1])
    u = directions.to(head.weight.device, head.weight.dtype)
    if norm is not None:
        u = (norm(u) - norm(-u)) / 2
    return nn.functional.linear(u, head.weight).topk(top).indices.tolist()


@torch.no_grad()
def nearest_inputs(model: nn.Module, directions: Float[Tensor, "k dim"], top: int = 5) -> list[list[int]]:
    """The tokens whose input embeddings have the largest cosine with each read direction.

    Args:
        model: a language model.
        directions: directions in the residual stream.
        top: how many token ids to give for each direction, the nearest first.
    """
    inner: Any = unwrapped(model)
    table = inner.get_input_embeddings().weight
    u = directions.to(table.device, table.dtype)
    return (u @ nn.functional.normalize(table, dim=1).T).topk(top).indices.tolist()


def _final_norm(host: Host, dim: int) -> nn.Module | None:
    """The last norm beside the block list, which stands between the blocks and the output embedding."""
    *_, holder = host.path.values()
    norms = [module for module in holder.children() if _is_norm(module, dim)]
    return norms[-1] if norms else None


def _is_norm(module: nn.Module, dim: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (dim,)
