"""Closed-form goldens of the ReFT family: one small input, six formulas, and the numbers they must give.

h in R^d is moved by rank-r maps R or P (orthonormal rows: R; any rows: P), W and b, all stored `rank x dim`:

    function       Phi(h) =                  pyreft 0.1.0 class       where
    loreft         h + R^T (W h + b - R h)   LoreftIntervention       Wu et al. 2024 (arXiv 2404.03592), section 3.2
    noreft         h + P^T (W h + b - P h)   NoreftIntervention       its ablations, appendix E
    direct         h + R^T (W h + b)         DireftIntervention       appendix E; not the paper's DiReFT
    direft_paper   h + P^T (W h + b)         NodireftIntervention     equation 3
    constant       h + R^T (b - R h)         ConsreftIntervention     appendix E
    bias           h + R^T b                 LobireftIntervention     appendix E

The input is that of PEERS.md section 4. R is the Q of qr(sin(arange(12)).view(6, 2)), transposed, as LAPACK signed it
on one machine: the other signs are as orthonormal and give other sums, so it is written out. In the figures P = R,
which is why loreft and noreft, and direct and direft_paper, agree.
"""

import torch
from jaxtyping import Float
from torch import Tensor

X: Float[Tensor, "batch=2 seq=2 dim=6"] = torch.arange(24, dtype=torch.float64).view(2, 2, 6) / 10

R: Float[Tensor, "rank=2 dim=6"] = torch.tensor(
    [
        [0.0, -0.5480845250016491, 0.4561672824797588,
         0.16841938192113237, -0.5963416684791673, 0.327912015756568],
        [0.5557094331655797, -0.2607243677939287, -0.33871019142918535,
         0.5426307171329937, -0.11291792126721983, -0.44864984568332805],
    ],
    dtype=torch.float64,
)  # fmt: skip

W: Float[Tensor, "rank=2 dim=6"] = torch.cos(torch.arange(12, dtype=torch.float64).view(2, 6) / 7)

B: Float[Tensor, "rank=2"] = torch.tensor([0.3, -0.2], dtype=torch.float64)

# The sum of Phi(X) over its 24 numbers, with P = R.
SUMS: dict[str, float] = {
    "loreft": 21.95369,
    "noreft": 21.95369,
    "constant": 27.23231,
    "bias": 27.41982,
    "direct": 22.14120,
    "direft_paper": 22.14120,
}

# loreft(X)[0, 0]
LOREFT_ROW: Float[Tensor, "dim=6"] = torch.tensor(
    [0.15465, -0.83064, 0.81991, 0.71469, -0.56506, 0.88852], dtype=torch.float64
)

# Figures above are rounded to five decimals.
ROUNDING = 5e-6


def loreft(
    h: Float[Tensor, "*shape dim"],
    R: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + R^T (W h + b - R h): replace the coordinates of h in the rows of R by W h + b."""
    return h + (h @ W.T + b - h @ R.T) @ R


def noreft(
    h: Float[Tensor, "*shape dim"],
    P: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + P^T (W h + b - P h): LoReFT whose rows need not be orthonormal."""
    return h + (h @ W.T + b - h @ P.T) @ P


def direct(
    h: Float[Tensor, "*shape dim"],
    R: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + R^T (W h + b): what pyreft calls DiReFT, the paper an ablation."""
    return h + (h @ W.T + b) @ R


def direft_paper(
    h: Float[Tensor, "*shape dim"],
    P: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + P^T (W h + b), rows of P free: the paper's DiReFT (equation 3, P = W2, W = W1), pyreft's NodiReFT."""
    return h + (h @ W.T + b) @ P


def constant(
    h: Float[Tensor, "*shape dim"],
    R: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + R^T (b - R h): the coordinates of h in the rows of R become b. W is not used."""
    return h + (b - h @ R.T) @ R


def bias(
    h: Float[Tensor, "*shape dim"],
    R: Float[Tensor, "rank dim"],
    W: Float[Tensor, "rank dim"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*shape dim"]:
    """h + R^T b: the same step for every token. W is not used."""
    return h + b @ R


FORMULAS = {f.__name__: f for f in (loreft, noreft, direct, direft_paper, constant, bias)}
