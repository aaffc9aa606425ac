"""The largest difference between tokenpaths and the real pyreft 0.1.0, given the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

from _record import Claim, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pyreft_oracle import measure_parity


def main() -> None:
    differences = measure_parity()
    claim = Claim(
        id="pyreft_parity_max_abs",
        claim="largest difference of an output or gradient from pyreft 0.1.0's six classes, same weights, float32",
        measured=max(differences.values()),
        unit="share of the largest entry of pyreft's own",
        target="1e-6",
    )
    write("parity", differences, [claim], seed=0)
    print(claim)


if __name__ == "__main__":
    main()
