"""What `import tokenpaths` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.common.record import Claim, write

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
    told = "`import tokenpaths` after `import torch`, median of fresh processes"
    interval = (round(seconds[5], 4), round(seconds[14], 4))  # 6th and 15th of 20: 95 % for the median
    claim = Claim("import_seconds", told, round(statistics.median(seconds), 4), "seconds", "under 0.1", interval)
    write("import_time", {"seconds": seconds}, [claim], seed=0)


if __name__ == "__main__":
    main()
