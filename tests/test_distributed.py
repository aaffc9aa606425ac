"""Two processes (gloo, on the CPU) train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import assert_equal, llama, make_examples, make_trails, state

from tokenpaths import TrailMap
from tokenpaths.objectives import Imitate
from tokenpaths.training import steps

HERE = Path(__file__)


def goals() -> list[Imitate]:
    """The second goal's answers are all on the first rank or all long: the ranks have unequal numbers of tokens."""
    return [Imitate(make_examples()), Imitate(make_examples(7, seed=5), weight=0.5)]


def run(folder: Path, trails: TrailMap, batch_size: int, accumulate: int = 1, **options: Any) -> list[float]:
    taken = steps(
        llama().double(),
        trails.double(),
        goals(),
        steps=4,
        lr=1e-2,
        batch_size=batch_size,
        accumulate=accumulate,
        checkpoint=folder / "run",
        save_every=2,
        progress=False,
        **options,
    )
    return [step.loss for step in taken]


def launch(task: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), task, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def loaded(folder: Path, name: str) -> Any:
    return torch.load(folder / name, weights_only=True)


def test_two_processes_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    alone = make_trails()
    losses = run(tmp_path / "alone", alone, batch_size=8)
    launch("split", tmp_path)
    first, second = loaded(tmp_path, "split-0.pt"), loaded(tmp_path, "split-1.pt")
    assert first["tokens"] != second["tokens"]  # of answers, in some step: the ranks' own means would be wrong
    assert_equal(first["trails"], second["trails"])  # not a bit apart, though they began apart
    assert_equal(first["trails"], state(alone), 1e-6)
    assert first["losses"] == second["losses"] == pytest.approx(losses, abs=1e-5)
    accumulated = make_trails()
    assert run(tmp_path / "accumulated", accumulated, batch_size=4, accumulate=2) == pytest.approx(losses, abs=1e-5)
    assert_equal(state(accumulated), state(alone), 1e-6)

    assert_equal(first["resumed"], first["trails"])
    assert second["error"] == first["error"] == "step 2: the loss of goal 0 (Breaks) is nan"


def test_ddp_around_a_model_with_trails_gives_the_same_gradients(tmp_path: Path) -> None:
    """For a loop of your own: DDP's forward is the user's, and answer_logits works through it."""
    launch("ddp", tmp_path)
    assert loaded(tmp_path, "ddp-0.pt")["difference"] < 1e-12


def split(folder: Path, rank: int) -> None:
    from accelerate.utils import gather_object

    from tokenpaths.training import feed

    counts: list[int] = []
    whole = feed.Feed.batches

    def counting(self: feed.Feed, number: int) -> Any:
        for place, batch, share in whole(self, number):
            counts.append(int((batch.labels != -100).sum()))
            yield place, batch, share

    feed.Feed.batches = counting  # type: ignore[method-assign]
    trails = make_trails()
    if rank:  # the processes must start from the trails of the first
        for parameter in trails.parameters():
            torch.nn.init.normal_(parameter)
    losses = run(folder, trails, batch_size=4)

    for checkpoint in sorted((folder / "run").iterdir())[1:]:
        if not rank:
            checkpoint.rename(folder / f"kept-{checkpoint.name}")
    gather_object([rank])  # wait
    resumed = make_trails()
    run(folder, resumed, batch_size=4, resume=True)

    class Breaks(Imitate):
        calls = 0

        def loss(self, model: Any, trails: Any, batch: Any) -> Any:
            self.calls += 1  # only on one rank: the other must not wait for it for ever
            return super().loss(model, trails, batch) * (float("nan") if rank and self.calls == 2 else 1.0)

    try:
        list(steps(llama(), make_trails(), [Breaks(make_examples())], steps=3, batch_size=2, progress=False))
        error = ""
    except FloatingPointError as caught:
        error = str(caught).split(".")[0]
    torch.save(
        {"trails": state(trails), "losses": losses, "tokens": counts, "resumed": state(resumed), "error": error},
        folder / f"split-{rank}.pt",
    )


def ddp(folder: Path, rank: int) -> None:
    from accelerate import Accelerator

    from tokenpaths.data import collate
    from tokenpaths.training import trainable

    accelerator = Accelerator()
    trails, model = make_trails().double(), llama().double()
    examples = make_examples(8)
    with trainable(model, trails):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        goal = Imitate(examples)
        mine = examples[rank::2]
        share = accelerator.num_processes * goal.terms(mine) / goal.terms(examples)
        (share * goal.loss(wrapped, trails, collate(mine))).backward()
        gradients = [p.grad.clone() for p in trails.parameters() if p.grad is not None]
        expected = torch.autograd.grad(goal.loss(model, trails, collate(examples)), list(trails.parameters()))
    assert len(gradients) == len(expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True))
    torch.save({"difference": difference}, folder / f"ddp-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"split": split, "ddp": ddp}[sys.argv[1]](Path(sys.argv[2]), int(os.environ["RANK"]))
