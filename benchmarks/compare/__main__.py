"""Side by side: trails, LoReFT, LoRA, SC-LoRA, CURLoRA, I-LoRA and others, with and without the same protections.

    python -m benchmarks.compare                   # what has not been measured yet, then the tables
    python -m benchmarks.compare --only trec LoRA  # the runs whose names hold these words
    python -m benchmarks.compare --table           # the tables of what there is
    python -m benchmarks.compare --quick           # a small honest version, about 15 minutes (`make compare-quick`)

A run is a method, a protection, a task and a seed, in a process of its own, kept in a file until all are a table; start
the script twice to use two cores. All methods see the same examples in the same order for the same number of steps, at
the learning rate that of three was right most often on validation items, which neither training nor test holds.
Protections: none; **rehearsal**, cross-entropy of WikiText-2 validation text, one text in 97 examples; **budget**,
`Stay` within 0.01 nats on that text and on what the frozen model writes itself; **both**. Methods whose steps have
other FLOPs than LoRA's run a second time, without protections, for as many steps as its FLOPs allow (**equal FLOPs**).
Forgetting is read in pairs with the frozen model on kinds of text that no run has rehearsed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.common.kept import claim, read, write_json
from benchmarks.common.options import SUPPRESS, parser

from .methods import METHODS
from .runs import EQUAL, One, measure, trials
from .tables import tables
from .tasks import COMPARED

PROTECTIONS = ("none", "both", EQUAL, "budget", "rehearsal")


def plan(quick: bool) -> Iterator[One]:
    """Every run, the most telling first."""
    methods = [name for name in METHODS if not quick or name in ("guarded trail", "LoRA", "SC-LoRA")]
    for protection in ("none", "both") if quick else PROTECTIONS:
        for task in COMPARED[: 1 if quick else None]:
            for method in methods:
                recipe = METHODS[method]
                if protection == "none" or (recipe.equal if protection == EQUAL else recipe.protected):
                    yield from (One(task, method, protection, seed, quick=quick) for seed in range(1 if quick else 3))


def behind(one: One) -> list[One]:
    """A run behind all that it needs."""
    return [*(part for other in needs(one) for part in behind(other)), one]


def needs(one: One) -> list[One]:
    """The runs that must be there before it."""
    same = ("LoRA", one.method) if one.protection == EQUAL else ()
    return [*trials(one), *(One(one.task, method, "none", one.seed, quick=one.quick) for method in same)]


def work(wanted: list[One]) -> None:
    """Measure what is missing. Several may work side by side."""
    while missing := [one for one in wanted if not one.file.exists()]:
        if not any(done(one) for one in missing):
            time.sleep(5)


def done(one: One) -> bool:
    """Measure a run in a process of its own, if all is there that it needs and no other process is at it."""
    if not all(other.file.exists() for other in needs(one)):
        return False
    with claim(one.file) as mine:
        if mine:
            print(time.strftime("%H:%M:%S"), one.name, flush=True)
            told = ["--run", json.dumps(vars(one))]
            subprocess.run([sys.executable, "-m", "benchmarks.compare", *told], check=True)
        return mine


def main() -> None:
    options = parser(__doc__, table=True)
    options.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs whose names hold all of these")
    options.add_argument("--quick", action="store_true", help="one task, one seed, three methods, half the steps")
    options.add_argument("--run", help=SUPPRESS)
    told = options.parse_args()
    if told.run:
        torch.set_num_threads(1)
        one = One(**json.loads(told.run))
        return write_json(one.file, measure(one))
    runs = list(plan(told.quick))
    chosen = [one for one in runs if all(word in one.name for word in told.only)]
    if not told.table:
        work(list(dict.fromkeys(part for one in chosen for part in behind(one))))
    if not told.only:
        found = read(one.file for one in runs)
        print(f"{len(found)} of {len(runs)} runs")
        tables(found, COMPARED, quick=told.quick)


if __name__ == "__main__":
    main()
