"""How much of what a model could do may be lost: what "the same" and "kept" mean."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Margins:
    """How much an arm may lose.

    Args:
        nats: nats a token of texts, against the model or arm that is compared with.
        accuracy: the share of right choices, against the same.
        kl: nats a token of KL to the reference.

    Raises:
        ValueError: a margin of 0 or less, which no sample could show to be kept.
    """

    nats: float = 0.05
    accuracy: float = 0.05
    kl: float = 0.1

    def __post_init__(self) -> None:
        for name, margin in vars(self).items():
            if not 0 < margin < math.inf:
                raise ValueError(f"the margin of {name} is {margin}, but must be above 0: no sample shows no loss")


MARGINS = Margins()
