"""R with orthonormal rows at every step, under any optimizer.

The free parameter is a `rank x dim` matrix A; R is the Q of its thin QR factorisation. Weight decay, momentum, a coarse
dtype or a resumed run may move A anywhere, and R R^T = I still holds. No `dim x dim` buffer is needed. (torch's
`parametrizations.orthogonal` stores one, and weight decay sets it to zero.)

The factors are computed once for each value of A. Every forward and backward shares them until A changes. `prepare`
computes them for all layers at once: it stacks the matrices of equal shape into one batched QR.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OrthonormalRows(nn.Module):
    """R, `rank x dim`, with R R^T = I. Calling the module returns R in float32 at least, differentiable in `weight`.

    Args:
        rank: the number of rows, at most `dim`.
        dim: their length.
    """

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, dim)))
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None  # the weight they were made of, R, triangle

    def forward(self) -> Float[Tensor, "rank dim"]:
        if torch.compiler.is_compiling():
            return _thin_qr(_at_least_float32(self.weight))[0]
        if self._factors is None or not (_is_prepared(self) or _is_current(self._factors[0], self.weight)):
            _factorise([self])
        assert self._factors is not None
        _, rows, triangle = self._factors
        return _WithFactors.apply(self.weight, rows, triangle) if torch.is_grad_enabled() else rows

    def _apply(self, fn: Any, recurse: bool = True) -> OrthonormalRows:
        """Move the factors to another device with the weight that they were made of.

        If R were computed anew there, rounding would set it apart from the W = R of a fresh LoReFT, which would move h.
        """
        super()._apply(fn, recurse)
        old, weight = self._factors, self.weight
        if old is not None:
            same = old[0].dtype == weight.dtype and not (old[0].is_meta or weight.is_meta)
            made_of, rows, triangle = (factor.to(weight.device) if same else factor for factor in old)
            self._factors = (made_of, rows, triangle) if same else None
        return self


class _Prepared(threading.local):
    """The matrices whose factors are current in the forward that this thread runs, and their weights' versions.

    An interrupted forward cannot release them. What it leaves here is of no use to a weight that was written since.
    """

    def __init__(self) -> None:
        self.versions: WeakKeyDictionary[OrthonormalRows, int] = WeakKeyDictionary()


_PREPARED = _Prepared()


def _version(weight: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count it."""
    return -1 if weight.is_inference() else weight._version


def _is_prepared(module: OrthonormalRows) -> bool:
    return _PREPARED.versions.get(module) == _version(module.weight)


def groups(modules: Iterable[OrthonormalRows]) -> list[list[OrthonormalRows]]:
    """The matrices that are factorised and compared together: those of one shape, dtype and device."""
    alike: dict[Any, list[OrthonormalRows]] = defaultdict(list)
    for module in modules:
        alike[module.weight.shape, module.weight.dtype, module.weight.device].append(module)
    return list(alike.values())


def changed(group: Sequence[OrthonormalRows]) -> Bool[Tensor, ""]:
    """Whether the matrices of a group have other factors by now, on their device: to ask for it waits for the device.

    Values are compared: optimizers that write through `.data` leave no trace in the version counter.
    """
    weights = [module.weight.detach() for module in group]
    made_of = [module._factors[0] for module in group if module._factors is not None]  # pyright: ignore[reportPrivateUsage]
    if len(made_of) < len(group) or any(_unlike(a, b) for a, b in zip(made_of, weights, strict=True)):
        return weights[0].new_ones((), dtype=torch.bool)
    return (torch.stack(made_of) != torch.stack(weights)).any()


def prepare(modules: Sequence[OrthonormalRows], known: Sequence[bool] | None = None) -> None:
    """Factorise all matrices that changed, batched by shape. Until `release`, no forward compares them again.

    `known` tells of each of `groups(modules)` whether it is `changed`.
    """
    if torch.compiler.is_compiling():
        return
    together = groups(modules)
    for group, stale in zip(together, map(changed, together) if known is None else known, strict=True):
        if stale:
            _factorise(group)
    for module in modules:
        _PREPARED.versions[module] = _version(module.weight)


def release(modules: Sequence[OrthonormalRows]) -> None:
    """Let every forward compare the factors with the weight again: after this, weights may change."""
    for module in modules:
        _PREPARED.versions.pop(module, None)


@torch.inference_mode(False)  # factors made while generating must serve a later training step
@torch.no_grad()
def _factorise(group: Sequence[OrthonormalRows]) -> None:
    weights = torch.stack([module.weight.detach() for module in group])
    rows, triangles = _thin_qr(_at_least_float32(weights))
    for module, weight, row, triangle in zip(group, weights, rows, triangles, strict=True):
        module._factors = (weight, row, triangle)  # pyright: ignore[reportPrivateUsage]


def _thin_qr(
    weight: Float[Tensor, "*layers rank dim"],
) -> tuple[Float[Tensor, "*layers rank dim"], Float[Tensor, "*layers rank rank"]]:
    """`weight^T = R^T T` with R's rows orthonormal and T upper triangular with a positive diagonal, so R is unique."""
    q, triangle = torch.linalg.qr(weight.mT)
    sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(weight.dtype)
    return (q * sign.unsqueeze(-2)).mT.contiguous(), triangle * sign.unsqueeze(-1)


class _WithFactors(torch.autograd.Function):
    """R as a function of A, with factors that are known already. Each backward costs one triangular solve.

    For A^T = Q T the gradient is  dA^T = (dQ + Q copyltu(-dQ^T Q)) T^{-T}  (Walter and Lehmann 2012), where copyltu
    copies the lower triangle to the upper.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, triangle: Tensor) -> Tensor:
        ctx.save_for_backward(rows, triangle)
        ctx.dtype = weight.dtype
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        rows, triangle = ctx.saved_tensors
        (grad,) = grads
        m = -grad @ rows.mT
        symmetric = m.tril() + m.tril(-1).mT
        # rows and grad are Q^T and dQ^T: this is the formula, transposed
        right = grad + symmetric @ rows
        return torch.linalg.solve_triangular(triangle, right, upper=True).to(ctx.dtype), None, None


def _is_current(made_of: Tensor, weight: Tensor) -> bool:
    return not _unlike(made_of, weight) and torch.equal(made_of, weight)


def _unlike(made_of: Tensor, weight: Tensor) -> bool:
    return (made_of.shape, made_of.dtype, made_of.device) != (weight.shape, weight.dtype, weight.device)


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
