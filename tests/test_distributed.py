"""Two processes (gloo, on the CPU) train what one process trains."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_equal, llama, make_examples, make_trails, state

from tokenpaths import Imitate, TrailMap, steps
from tokenpaths.training import checkpoints

HERE = Path(__file__)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "rate": (dict(lr=1e-3), r"optimizer is .*'lr': 0.01.*, is .*'lr': 0.001.* there"),
    "data": (dict(goals=[Imitate(make_examples(11))]), "goals is .*12 .* is .*11 .* there"),
    "order": (dict(goals=[Imitate(make_examples()[::-1])]), "goals is .*examples.* there"),
    "seed": (dict(seed=1), "seed is 0, is 1 there"),
    "base": (dict(model=llama(vocab_size=97)), "model is '.*', is '.*' there"),
    "trails": (dict(trails=make_trails(0.5)), "trails is .*dropout=0.0.* is .*dropout=0.5.* there"),
    "clip": (dict(clip=None), "clip is 1.0, is None there"),
    "length": (dict(steps=2), "steps is 3, is 2 there"),
}
"""What process 1 is given instead, and what the refusal says."""


def goals() -> list[Imitate]:
    """Answers of 1 to 3 tokens, so that the processes have unequal numbers of them."""
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


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found: see `work`."""
    folder = tmp_path_factory.mktemp("both")
    launch(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def launch(folder: Path) -> None:
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
            [sys.executable, str(HERE), str(folder)],
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


def test_two_processes_are_one_process_with_the_whole_batch(tmp_path: Path, both: list[dict[str, Any]]) -> None:
    alone, accumulated = make_trails(), make_trails()
    losses = run(tmp_path / "alone", alone, batch_size=8)
    first, second = both
    assert first["answers"] != second["answers"]  # tokens in each batch: a mean of the ranks' means would be wrong
    assert_equal(first["trails"], second["trails"])  # not a bit apart, though they began apart
    assert_equal(first["trails"], state(alone), 1e-6)
    assert first["losses"] == second["losses"] == pytest.approx(losses, abs=1e-5)
    assert run(tmp_path / "accumulated", accumulated, batch_size=4, accumulate=2) == pytest.approx(losses, abs=1e-5)
    assert_equal(state(accumulated), state(alone), 1e-6)


def test_two_processes_resume_bit_for_bit(both: list[dict[str, Any]]) -> None:
    for one in both:
        assert_equal(one["resumed"], one["trails"])


def test_a_loss_that_breaks_on_one_process_stops_both(both: list[dict[str, Any]]) -> None:
    assert [one["error"] for one in both] == ["step 2: the loss of goal 0 (Breaks) is nan"] * 2


def test_every_process_can_load_the_last_checkpoint_at_once(both: list[dict[str, Any]]) -> None:
    for one in both:
        assert_equal(one["loaded"], one["trails"])


@pytest.mark.parametrize("name", DIFFERENT)
def test_processes_that_were_given_different_runs_are_all_refused(name: str, both: list[dict[str, Any]]) -> None:
    for one in both:
        assert one["refused"][name].startswith("process 1 was given another run than process 0: ")
        assert re.search(DIFFERENT[name][1], one["refused"][name])
        assert one["untouched"]


def test_a_checkpoint_that_cannot_be_written_stops_both(both: list[dict[str, Any]]) -> None:
    assert both[0]["full"] == "OSError('no space left')"
    assert both[1]["full"] == "RuntimeError(\"process 0 failed, and the run ends: OSError('no space left')\")"


def test_two_processes_find_the_rate_that_one_finds(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["rate"] == second["rate"] == pytest.approx(found(batch_size=8), rel=1e-6)


def test_ddp_around_a_model_with_trails_gives_the_same_gradients(both: list[dict[str, Any]]) -> None:
    """For a loop of your own: DDP's forward is the user's, and answer_logits works through it."""
    assert max(one["ddp_difference"] for one in both) < 1e-12


def split(folder: Path, rank: int) -> dict[str, Any]:
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
    with slow_writing():
        losses = run(folder, trails, batch_size=4)
        loaded = state(TrailMap.from_pretrained(folder / "run" / "step-00000004"))

    gather_object([rank])  # both have loaded
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
        list(steps(llama(), make_trails(), [Breaks(make_examples())], steps=3, batch_size=2, lr=1e-3, progress=False))
        error = ""
    except FloatingPointError as caught:
        error = str(caught).split(".")[0]
    return {
        **dict(trails=state(trails), losses=losses, answers=counts, resumed=state(resumed), error=error),
        **dict(loaded=loaded, full=full(folder), rate=found(batch_size=4), **refusals(rank)),
    }


@contextmanager
def slow_writing() -> Iterator[None]:
    """Process 0 takes its time for each checkpoint."""
    write = checkpoints.Checkpoints.write

    def slowly(*given: Any) -> None:
        time.sleep(0.5)
        write(*given)

    checkpoints.Checkpoints.write = slowly  # type: ignore[method-assign]
    yield
    checkpoints.Checkpoints.write = write  # type: ignore[method-assign]


def full(folder: Path) -> str:
    """What each process is told when process 0 cannot write."""
    write = checkpoints.Checkpoints.write

    def fail(*given: Any) -> None:
        raise OSError("no space left")

    checkpoints.Checkpoints.write = fail  # type: ignore[method-assign]
    try:
        run(folder / "full", make_trails(), batch_size=4)
    except (OSError, RuntimeError) as caught:
        return repr(caught)
    finally:
        checkpoints.Checkpoints.write = write  # type: ignore[method-assign]
    return "nothing"


def refusals(rank: int) -> dict[str, Any]:
    """What each process is told when process 1 was given something else, and whether all is as before."""
    refused: dict[str, str] = {}
    untouched = True
    for name, (other, _) in DIFFERENT.items():
        given: dict[str, Any] = dict(model=llama(), trails=make_trails(), goals=[Imitate(make_examples())])
        given |= dict(steps=3, lr=1e-2, batch_size=2, progress=False) | (other if rank else {})
        before = state(given["trails"])
        try:
            list(steps(**given))
            refused[name] = "nothing"
        except ValueError as caught:
            refused[name] = str(caught)
        untouched &= all(torch.equal(tensor, before[key]) for key, tensor in state(given["trails"]).items())
        untouched &= all(p.requires_grad for p in given["model"].parameters())
    return {"refused": refused, "untouched": untouched}


def found(batch_size: int) -> float:
    """The rate of a run that is given none."""
    trails = make_trails().double()
    (step,) = steps(llama().double(), trails, goals(), steps=1, batch_size=batch_size, progress=False)
    return step.lr


def ddp_difference(rank: int) -> float:
    from accelerate import Accelerator

    from tokenpaths import trainable
    from tokenpaths.data import collate

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
    return max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True))


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.save({**split(folder, rank), "ddp_difference": ddp_difference(rank)}, folder / f"{rank}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(os.environ["RANK"]))
