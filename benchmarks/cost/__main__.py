"""What does a training step, a forward, a token cost, beside pyreft, adapters, PEFT's LoRA and the frozen model?

    python -m benchmarks.cost                        # what has not been measured yet, then the table
    python -m benchmarks.cost --part steps           # some of it: steps, stay, forward, decode, arms, scale or memory
    python -m benchmarks.cost --part steps/smollm2   # or less, by the beginning of its name; --again measures it anew
    python -m benchmarks.cost --table                # the table of what there is
    python -m benchmarks.cost --quick                # every part once on a tiny model: that it runs, and no figures
    python -m benchmarks.cost --make-environment     # for adapters, which needs a transformers of its own

Arms take turns in one process, CPU seconds of one thread (on a GPU, seconds of the clock), and what is compared is the
ratio of two arms in one round. adapters runs in a process beside, in the same turns. Each part is kept in a file until
all are a table, so that it can be measured when the machine is quiet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common.folders import KEPT, PICTURES
from benchmarks.common.kept import write_json
from benchmarks.common.options import SUPPRESS, parser
from benchmarks.common.record import environment, write

from .arms import ADAPTERS
from .parts import Run, memory_of, parts
from .table import claims, picture

WORK = KEPT / "cost"  # what was measured, until it is a table


def path(name: str, run: Run) -> Path:
    return WORK / ("quick" if run.quick else "full") / f"{name.replace(' ', '-').replace('/', '--')}.json"


def table(run: Run) -> None:
    """All that was measured, as one result file with its claims and a picture; only printed after `--quick`."""
    files = {name: path(name, run) for name in parts(run)}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    for name in files.keys() - found.keys():
        print(f"not measured yet: {name}")
    if not found:
        raise SystemExit("nothing has been measured: run this without --table")
    measured = {name: part["measured"] for name, part in found.items()}
    made = claims(measured, next(iter(files)).split("/")[1])
    if run.quick:
        return print(*made, sep="\n")
    write("cost", found, made, seed=0)
    picture(measured).savefig(PICTURES / "cost.png", dpi=100)


def make_environment() -> None:
    """adapters 1.3.0 with the transformers that it needs and the torch of this environment."""
    folder = ADAPTERS.parents[1]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"
    pip = [str(ADAPTERS), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, torch_here], check=True)  # first and alone, so that pip takes the machine's own build
    subprocess.run([*pip, torch_here, "transformers==4.57.6", "adapters==1.3.0"], check=True)


def main() -> None:
    options = parser(__doc__, table=True)
    options.add_argument("--part", default="", help="the beginning of the names of what to measure")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--again", action="store_true", help="measure what has been measured")
    options.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    options.add_argument("--make-environment", action="store_true")
    options.add_argument("--memory", nargs=3, metavar=("SHAPE", "TASK", "ARM"), help=SUPPRESS)
    told = options.parse_args()
    torch.set_num_threads(1)
    run = Run(rounds=2 if told.quick else told.rounds, quick=told.quick)
    if told.make_environment:
        return make_environment()
    if told.memory:
        return print(json.dumps(memory_of(*told.memory, run)))
    chosen = {name: part for name, part in parts(run).items() if name.startswith(told.part)}
    if not chosen:
        options.error(f"--part {told.part!r} begins none of: {', '.join(parts(run))}")
    for name, part in chosen.items():
        if not told.table and (told.again or not path(name, run).exists()):
            print(name, flush=True)
            write_json(path(name, run), {"name": name, **environment(), "measured": part()})
    if not told.part or told.table:
        table(run)


if __name__ == "__main__":
    main()
