"""Tasks of lm-evaluation-harness (Gao et al. 2021), where it is installed: `pip install lm_eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.examples import Example, collate
from tokenpaths.engine.reach import predictors, reached
from tokenpaths.engine.readings import Run


@dataclass(frozen=True)
class Samples:
    """One metric of a task: the items' numbers, a value for each, which way is better, whether texts are written."""

    ids: tuple[int, ...]
    values: Float[np.ndarray, " items"]
    higher_is_better: bool
    written: bool = False


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness.

    Metrics that have one number an item are measured, such as `acc` and `acc_norm`. A metric over the whole task, such
    as a perplexity, has no paired interval and is left out.

    The harness scores a prompt and its continuation as one text, all of which is prompt to token rules: `Last(1)` then
    moves the last token that it runs, and `Answer()` none. Of trails with such rules the report says "cannot tell":
    write the items as a `Task`, whose prompts are known. Tasks that generate are steered as in `model.generate`.

    Args:
        tasks: their names.
        limit: the number of items of each, from the first; None for all.
        batch_size: of the harness.
        include: a folder with task files of your own.

    Raises:
        ValueError: `tasks` is no list of names, or empty.
    """

    tasks: Sequence[str]
    limit: int | None = None
    batch_size: int = 8
    include: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"tasks is a list of names of tasks, such as ['arc_easy'], not {self.tasks!r}")

    def samples(self, model: nn.Module, tokenizer: Any) -> Mapping[tuple[str, str], Samples]:
        """Run the tasks on a model as it stands, and give what each item scored, by task and metric.

        Raises:
            ImportError: lm-evaluation-harness is not installed.
            ValueError: a task has no metric with one number an item.
        """
        try:
            from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
            from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as missing:
            raise ImportError(f"a Harness needs lm-evaluation-harness: pip install lm_eval ({missing})") from missing
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
        found = simple_evaluate(
            model=wrapped,
            tasks=list(self.tasks),
            task_manager=TaskManager(include_path=self.include),
            limit=self.limit,
            log_samples=True,
            bootstrap_iters=0,
        )
        return {
            (task, metric): part
            for task, rows in found["samples"].items()
            for metric, part in _by_metric(
                task,
                rows,
                found["higher_is_better"].get(task, {}),
                found.get("configs", {}).get(task, {}).get("output_type") == "generate_until",
            ).items()
        }


def share_moved(before: Run, after: Run, written: bool) -> float:
    """The share of scored predictions that the second run moves in a task of the harness, as its rules tell.

    They are asked of a prompt of 16 tokens with 16 behind it, which are of the prompt too unless they are written. Of a
    rule that reads the tokens themselves nothing is known, and it counts as one that moves none.
    """
    ids = (-1,) * 32  # no tokens
    example = Example(ids, tuple(written and i >= 16 for i in range(32)))
    batch = collate([example])
    scored = predictors(collate([Example(ids, tuple(i >= 16 for i in range(32)))]))
    try:
        return float((reached(before, after, batch) & scored).sum() / scored.sum())
    except ValueError:
        return 0.0


def _by_metric(
    task: str, rows: Sequence[Mapping[str, Any]], better: Mapping[str, bool], written: bool
) -> dict[str, Samples]:
    rows = sorted(rows, key=lambda row: row["doc_id"])
    ids = tuple(int(row["doc_id"]) for row in rows)
    metrics = [name for name in rows[0].get("metrics", ()) if all(_is_number(row.get(name)) for row in rows)]
    if not metrics:
        raise ValueError(f"task {task!r} of lm-evaluation-harness has no metric with one number an item")
    return {
        name: Samples(ids, np.array([float(row[name]) for row in rows]), bool(better.get(name, True)), written)
        for name in metrics
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number))
