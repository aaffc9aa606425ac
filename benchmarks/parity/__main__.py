"""The largest difference between tokenpaths and the real pyreft 0.1.0, given the same weights."""

from __future__ import annotations

from pyreft_oracle import measure_parity

from benchmarks.common.record import Claim, write


def main() -> None:
    differences = measure_parity()
    told = "largest difference of an output or gradient from pyreft 0.1.0's six classes, same weights, float32"
    unit = "share of the largest entry of pyreft's own"
    claim = Claim("pyreft_parity_max_abs", told, max(differences.values()), unit, "1e-6")
    write("parity", differences, [claim], seed=0)


if __name__ == "__main__":
    main()
