"""What `import tokenpaths` adds to `import torch`, alone and with the names of README's example, in fresh processes.

The import alone loads nothing: names are loaded when they are asked for.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.common.record import Claim, write

RUNS = 21
PROGRAM = """
import time, torch
start = time.perf_counter()
import tokenpaths as tp
alone = time.perf_counter() - start
tp.sites, tp.width, tp.Last, tp.Answer, tp.TrailMap, tp.LoReFT, tp.encode, tp.Imitate
tp.steps, tp.attach, tp.measure_drift
print(alone, time.perf_counter() - start)
"""


def main() -> None:
    pairs = [subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).split() for _ in range(RUNS)]
    alone, used = (sorted(map(float, seconds)) for seconds in zip(*pairs[1:], strict=True))  # the first may compile
    told = "after `import torch`, median of fresh processes"
    claims = [
        claim("import_seconds", f"`import tokenpaths` {told}", alone, "under 0.1"),
        claim("import_seconds_in_use", f"`import tokenpaths` and the names of README's example, {told}", used, ""),
    ]
    write("import_time", {"alone": alone, "in use": used}, claims, seed=0)


def claim(name: str, told: str, seconds: list[float], target: str) -> Claim:
    interval = (round(seconds[5], 4), round(seconds[14], 4))  # 6th and 15th of 20: 95 % for the median
    return Claim(name, told, round(statistics.median(seconds), 4), "seconds", target, interval)


if __name__ == "__main__":
    main()
