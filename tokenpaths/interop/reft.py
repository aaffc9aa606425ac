"""Trails of the ReFT family from the tensors of others, and what torch's `orthogonal` keeps of a rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenpaths.files import TrailFileError
from tokenpaths.trails.base import Trail
from tokenpaths.trails.reft import DiReFT, NoReFT, Rotated


def filled(told: str, cls: type[Any], turned: Tensor, W: Tensor | None, b: Tensor) -> Trail:
    """A trail of the ReFT family with these numbers: R or P, then W and b.

    Raises `TrailFileError` for rows that are not orthonormal where they must be.
    """
    rank, dim = turned.shape
    trail = cls(dim, rank)
    own: Any = trail
    if isinstance(trail, Rotated):
        rows = turned.double()
        error = float((rows @ rows.mT - torch.eye(rank, dtype=torch.float64)).abs().max())
        if not error < 1e-2:
            raise TrailFileError(
                f"{told}: its rotation is not orthonormal (R R^T differs from I by {error:.1e}). Weight "
                "decay does this to torch's parametrization"
            )
        own.rotation.weight.copy_(turned)
    else:
        getattr(own, "P" if cls is NoReFT else "W2").copy_(turned)
    if W is not None:
        getattr(own, "W1" if cls is DiReFT else "W").copy_(W)
    own.b.copy_(b)
    return trail


def rotation(told: str, tensors: dict[str, Tensor], name: str = "rotate_layer", wide: bool = False) -> Tensor | None:
    """R (r x d) out of what torch's `orthogonal` keeps of it, or out of R^T itself; takes them out of `tensors`.

    With X = original (d x r), A = tril(X, -1) and tau_j = 2 / (1 + sum_i A_ij^2), R^T = base H(A, tau) diag(int(X_jj)),
    where H is the product of the reflections; for a square X, R^T = base exp(tril(X) - tril(X)^T). A weight that is
    `wide` (r x d) is kept transposed. Raises `TrailFileError` for tensors that do not belong together.
    """
    if name in tensors:
        return tensors.pop(name).mT if not wide else tensors.pop(name)
    original = tensors.pop(f"{name}.parametrizations.weight.original", None)
    base = tensors.pop(f"{name}.parametrizations.weight.0.base", None)
    if original is None or base is None:
        return None
    X = original.double().mT if wide else original.double()
    if X.ndim != 2 or base.shape != (len(X), len(X)) or not 1 <= X.shape[1] <= len(X):
        raise TrailFileError(
            f"{told}: original {list(original.shape)} and base {list(base.shape)} do not fit each other"
        )
    if X.shape[0] == X.shape[1]:
        turn = torch.matrix_exp(X.tril() - X.tril().mT)
    else:
        A = X.tril(-1)
        turn = torch.linalg.householder_product(A, 2 / (1 + A.square().sum(0))) * X.diagonal().int()
    return (base.double() @ turn).mT.float()


def kept_rotation(R: Tensor) -> dict[str, Tensor]:
    """What torch's `orthogonal` keeps of R (r x d), as `rotation` reads it: `original`, and `base` with R^T in front.

    The diagonal of `original` is -1, for torch multiplies the reflections by it.
    """
    rows = R.detach().double().cpu()
    rank, dim = rows.shape
    if rank == dim:
        original, base = torch.zeros(dim, dim), rows.mT
    else:
        original = -torch.eye(dim, rank)
        base = torch.cat([rows.mT, torch.linalg.qr(rows.mT, mode="complete").Q[:, rank:]], 1)
    names = ("original", "0.base")
    return {
        f"rotate_layer.parametrizations.weight.{name}": part.float()
        for name, part in zip(names, (original, base), strict=True)
    }
