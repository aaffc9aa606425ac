"""Divergences of probability distributions, row by row, in nats."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_of_logs(log_p: Float[Tensor, "*rows k"], log_q: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    """KL(p || q) = sum_k p_k (log p_k - log q_k), from log-probabilities that are finite; 0 to infinity."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_of_rows(p: Float[Tensor, "*rows k"], q: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    """KL(p || q) from probabilities, such as attention rows. Where p is 0 a term is 0; where q is 0 it is large."""
    return (torch.xlogy(p, p) - p * q.clamp_min(torch.finfo(torch.float32).tiny).log()).sum(-1)


def jensen_shannon(p: Float[Tensor, "*rows k"], q: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    """(KL(p || m) + KL(q || m)) / 2 of the rows of two arrays of probabilities, with m = (p + q) / 2 (Lin 1991).

    Symmetric, and finite where KL is not. The logarithms are log(p / m) = log1p(d) and log(q / m) = log1p(-d) with
    d = (p - q) / (p + q): in this form a small divergence does not vanish in rounding.
    """
    limits = torch.finfo(p.dtype)
    d = ((p - q) / (p + q).clamp_min(limits.tiny)).clamp(limits.eps - 1, 1 - limits.eps)
    return (p * d.log1p() + q * (-d).log1p()).sum(-1).clamp_min(0) / 2


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers, in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
