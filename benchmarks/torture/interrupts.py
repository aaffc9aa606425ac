"""KeyboardInterrupt at an even sample of the calls of every verb: what share leaves all as it was?

`run` writes a line for each verb to a file of the folder, and goes on behind them when it is started again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the verbs stand there, under the law

from interrupts import LORA_VERBS, VERBS, Subject, evenly


def run(
    folder: Path, *, verbs: Sequence[str] = (*VERBS, *LORA_VERBS), points: int = 2000, seconds: float = 30.0
) -> dict[str, list[int]]:
    """For each verb, how often it was interrupted, and how often that left all as it was.

    Args:
        folder: for the lines of the verbs that are done.
        verbs: the verbs.
        points: how often each is interrupted, spread over its calls.
        seconds: or how long, if that comes first: the moments are then spread as evenly, but fewer.
    """
    lines = folder / "interrupts.jsonl"
    found: dict[str, list[int]] = {}
    for line in lines.read_text().splitlines() if lines.exists() else []:
        verb, struck, clean, _ = json.loads(line)
        found[verb] = [struck, clean]
    folder.mkdir(parents=True, exist_ok=True)
    for verb in verbs:
        if verb not in found:
            with closing(Subject(verb)) as subject:
                struck, leaks = strike(subject, points, seconds)
            found[verb] = [struck, struck - len(leaks)]
            with lines.open("a") as file:
                file.write(json.dumps([verb, *found[verb], leaks]) + "\n")
            print(f"{verb}: {found[verb][1]} of {struck} clean", flush=True)
    return found


def strike(subject: Subject, points: int, seconds: float) -> tuple[int, dict[int, list[str]]]:
    """How often it was interrupted, and what was left behind, by the number of the call."""
    began, left, struck = time.monotonic(), {}, 0
    numbers = list(evenly(subject.calls, points))
    step = 64  # first every 64th, then those between: evenly spread wherever it stops
    for start in sorted(range(step), key=lambda i: int(f"{i:06b}"[::-1], 2)):
        if time.monotonic() - began > seconds:
            break
        for number in numbers[start::step]:
            struck += 1
            if names := subject.leak(number):
                left[number] = names[:8]
    if not subject.works():
        left[-1] = ["it no longer works as before"]
    return struck, left


def told(found: dict[str, list[int]]) -> dict[str, Any]:
    """`interrupts_clean`, the mean over verbs of the share of interruptions that left all as it was, and the counts."""
    clean = sum(clean / struck for struck, clean in found.values()) / len(found)
    return {
        "interrupts_clean": clean,
        "interrupts": {verb: dict(zip(("struck", "clean"), n, strict=True)) for verb, n in found.items()},
    }
