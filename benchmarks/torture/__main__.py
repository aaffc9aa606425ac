"""What cannot be shown by a test: thousands of damaged files, kills, interruptions, and requests in threads.

    python -m benchmarks.torture                    # all: 90 minutes; it goes on where it was stopped
    python -m benchmarks.torture --only threads     # one of fuzz, kills, interrupts, threads, reports

`fuzz`        files with changed numbers that load, and errors that no loader documents
`kills`       training runs killed with SIGKILL at a random moment, which then go on
`interrupts`  KeyboardInterrupt at the call boundaries of each verb
`threads`     requests in threads on one model: steered, frozen, and with trails of their own
`reports`     the public reports of faults of like tools, tried here
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.folders import KEPT
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write
from benchmarks.torture import fuzz, interrupts, kills, reports, threads

WORK = KEPT / "torture"
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "threads": threads.run,
    "fuzz": fuzz.run,
    "kills": kills.run,
    "reports": lambda folder: reports.run(),
    "interrupts": lambda folder: interrupts.told(interrupts.run(folder)),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS)
    chosen = options.parse_args().only
    raw = {name: run(WORK) for name, run in PARTS.items() if chosen in (None, name)}
    write("torture" if chosen is None else f"torture_{chosen}", raw, claims(raw), seed=0)


def claims(raw: dict[str, Any]) -> list[Claim]:
    """One figure a claim, of the parts that were run."""
    told = {
        "fuzz_undetected": "files with changed numbers that load, of 10,000 mutants of one to eight bytes of trail "
        "files, checkpoints, cone stores and targets",
        "fuzz_foreign_exceptions": "errors that are not documented, of 400 mutants of each format of file",
        "kill9_survived": "training runs killed with SIGKILL at a random moment that then end equal to the "
        "uninterrupted one, with no stray file left, of 100",
        "interrupts_clean": "share of KeyboardInterrupts, at call boundaries of every verb, after which the model, "
        "hooks, modes and random state are as before",
        "threads_wrong": "answers that differ from those given alone, of 1,000 requests in four threads on one model",
        "public_reports_right": "share of the public reports of faults of like tools that work right here or are "
        "refused with a message",
    }
    targets = {"kill9_survived": "100", "interrupts_clean": "1.0", "public_reports_right": "1.0"}
    units = {"interrupts_clean": "share", "public_reports_right": "share"}
    return [
        Claim(name, text, part[name], units.get(name, "count"), targets.get(name, "0"))
        for name, text in told.items()
        for part in raw.values()
        if name in part
    ]


if __name__ == "__main__":
    main()
