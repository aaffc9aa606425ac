"""What does each limit keep, and what does it cost?  Trails on all layers and all tokens, taught TREC-6.

Each arm is one limit on rank-4 additive trails (`DiReFT`), trained the same way, on the same batches of the same seeds:

    python -m benchmarks.budget                     # the runs that are missing, one after another, then the table
    python -m benchmarks.budget --run guarded 0     # one run, to have several at a time
    python -m benchmarks.budget --table             # the table of what there is

Task accuracy is read on the whole test set. Forgetting is read, in pairs with the frozen model, on kinds of text no arm
has rehearsed (`common/texts.py`), on texts the frozen model wrote, on ARC-Easy and on BLiMP. Rehearsal and the fitting
of gates and subspaces read WikiText-2 validation text; the arms named `self` read only what the frozen model itself
wrote.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.common.options import parser

from .arms import ARMS
from .runs import path, run
from .table import table

if __name__ == "__main__":
    options = parser(__doc__, table=True)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--items", type=int, help="of ARC-Easy and of BLiMP; all unless told")
    options.add_argument("--run", nargs=2, metavar=("ARM", "SEED"))
    told = options.parse_args()
    if told.run:
        torch.set_num_threads(1)
        run(told.run[0], int(told.run[1]), told.batch, told.items)
    else:
        for seed in range(0 if told.table else told.seeds):
            for arm in ARMS:
                if not path(arm, seed, told.batch).exists():  # in a process of its own, which leaves nothing behind
                    sizes = ["--batch", str(told.batch)] + (["--items", str(told.items)] if told.items else [])
                    command = [sys.executable, "-m", "benchmarks.budget", *sizes, "--run", arm, str(seed)]
                    subprocess.run(command, check=True)
        table()
