"""Killed runs: `steps(checkpoint=...)` is killed at random moments and resumed, and must end as if it had never been.

    run(folder)        # a hundred runs, each killed one to three times
    run(folder, 3)     # a quick look

The processes are forked from this one, which has imported everything, so that a run takes a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenpaths as tp
from benchmarks.torture.partial import lines, tell
from tokenpaths.files import digests

STEPS = 12
DIM = 16


def run(folder: Path, runs: int = 100) -> dict[str, Any]:
    """Kill and resume runs, and go on where an earlier call was stopped.

    Args:
        folder: where the runs and partial results are kept, as `kills.jsonl`.
        runs: how many runs.

    Returns:
        `kill9_survived`, the number of runs whose last checkpoint is the uninterrupted one's to the byte and that left
        no stray behind; and how often processes were killed, and of these, how many had written some checkpoint.
    """
    file, whole = folder / "kills.jsonl", folder / "whole"
    done = {line["run"]: line for line in lines(file)}
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    if _wait(_fork(whole)) != 0:
        raise RuntimeError("the uninterrupted run has failed")
    seconds = time.monotonic() - began
    expected = digests(whole / _last())
    for number in range(runs):
        if number not in done:
            done[number] = {"run": number, **_killed(folder / f"run-{number}", number, seconds, expected)}
            tell(file, done[number])
    found = [done[number] for number in range(runs)]
    return {
        "kill9_survived": sum(line["equal"] and not line["strays"] for line in found),
        "runs": runs,
        "kills": sum(line["kills"] for line in found),
        "kills_after_a_checkpoint": sum(line["after"] for line in found),
        "strays_before_resuming": sum(line["strays_before"] for line in found),
        "unequal": [line["run"] for line in found if not line["equal"]],
        "with_strays": [line["run"] for line in found if line["strays"]],
    }


def _killed(folder: Path, number: int, seconds: float, expected: dict[str, str]) -> dict[str, Any]:
    """One run in a folder, killed and resumed until it ends."""
    rng = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    kills = after = strays = 0
    for _ in range(rng.randint(1, 3)):
        child = _fork(folder)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        kills += _wait(child) == -signal.SIGKILL
        after += any(folder.glob("step-*"))
        strays += len(list(folder.rglob(".writing-*")))
    ended = _wait(_fork(folder))
    left = len(list(folder.rglob(".writing-*")))
    equal = ended == 0 and digests(folder / _last()) == expected
    if equal and not left:
        shutil.rmtree(folder)
    return {"kills": kills, "after": after, "strays_before": strays, "equal": equal, "strays": left}


def _last() -> str:
    return f"step-{STEPS:08d}"


def _fork(folder: Path) -> int:
    """A process that trains into a folder, from its newest checkpoint if it has one."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _train(folder)
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's is run


def _wait(child: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _train(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=DIM, intermediate_size=DIM, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    trails = tp.TrailMap({tp.Site(1, tp.Last()): tp.LoReFT(DIM, 2), tp.Site(0, tp.Prompt()): tp.LoReFT(DIM, 2)})
    draw = random.Random(0)
    examples = [tp.Example.of([draw.randrange(3, 32) for _ in range(5)], [draw.randrange(3, 32)]) for _ in range(16)]
    options: dict[str, Any] = dict(steps=STEPS, batch_size=4, checkpoint=folder, save_every=1, progress=False)
    for _ in tp.steps(model, trails, [tp.Imitate(examples)], resume=any(folder.glob("step-*")), **options):
        pass
