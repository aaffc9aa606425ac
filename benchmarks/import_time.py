"""What `import tokenpaths` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from _record import Claim, write

RUNS = 21
PROGRAM = """
import time, torch
start = time.perf_counter()
import tokenpaths
print(time.perf_counter() - start)
"""


def main() -> None:
    seconds = [float(subprocess.check_output([sys.executable, "-c", PROGRAM])) for _ in range(RUNS)]
    seconds = sorted(seconds[1:])  # the first run may compile the byte code
    claim = Claim(
        id="import_seconds",
        claim="`import tokenpaths` after `import torch`, median of fresh processes",
        measured=round(statistics.median(seconds), 4),
        interval=(round(seconds[5], 4), round(seconds[14], 4)),  # 6th and 15th of 20: 95 % for the median
        unit="seconds",
        target="under 0.1",
    )
    write("import_time", {"seconds": seconds}, [claim], seed=0)
    print(claim)


if __name__ == "__main__":
    main()
