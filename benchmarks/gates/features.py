"""What a gate reads of every prompt of a task, once for all splits: features by kind, kept in a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gates.prompts import TASKS, Wordings, by_others, far_known, far_test, own
from tokenpaths.data.tokenizing import inner
from tokenpaths.limits.requests import PROBES, features, made_asks, written
from tokenpaths.site import Host, find_blocks, width
from tokenpaths.trailmap.gate import Gate

Role = Literal["form", "ask", "made", "far"]
Kind = tuple[str, Role, Literal["fit", "test"], Any]
FITTED, TESTED = 24, 40  # prompts of a form, or half as many of an ask


def bare(model: Any, tokenizer: Any) -> Gate:
    """A gate as `fit_gate` makes one, without numbers."""
    return Gate((len(find_blocks(model)) - 1,), [inner(tokenizer, probe) for probe in PROBES], width(model))


def gather(model: Any, tokenizer: Any, task: str, folder: Path) -> dict[Any, Tensor]:
    """Features by (name, role, part, form that it belongs to)."""
    host = Host.of(model)
    gate = bare(model, tokenizer)
    found: dict[Any, Tensor] = {}
    made: dict[str, Callable[[], list[tuple[Kind, Sequence[str]]]]] = {
        "mine": lambda: of_hand("mine", task, own(task)),
        "a": lambda: of_hand("a", task, own(task, "_a")),
        "theirs": lambda: of_hand("theirs", task, by_others(task)),
        "far": lambda: of_far(model, tokenizer, task),
    }
    for hand, kinds in made.items():
        path = folder / f"{task}-{hand}.pt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            read = {key: features(host, tokenizer, prompts, gate, 1500).float() for key, prompts in kinds()}
            torch.save(read, path)
        found |= torch.load(path, weights_only=True)
    return found


def of_hand(hand: str, task: str, wordings: Wordings) -> list[tuple[Kind, Sequence[str]]]:
    """The prompts of one hand's forms and asks, and the asks that the library makes of its forms."""
    items, rng = TASKS[task](), random.Random(0)
    made: list[tuple[Kind, Sequence[str]]] = []
    for name, wording in {**wordings.forms, **wordings.asks}.items():
        role: Role = "form" if name in wordings.forms else "ask"
        if hand == "a" and name == "trained":
            continue
        few = FITTED if role == "form" else FITTED // 2
        fitted = [wording.prompt(item) for item in rng.sample(list(items.fit), few)]
        tested = [wording.prompt(item) for item in rng.sample(list(items.test), TESTED)]
        made += [((f"{hand}: {name}", role, "fit", None), fitted), ((f"{hand}: {name}", role, "test", None), tested)]
        if role == "form":
            first = name == "trained"
            for kind in made_asks(fitted, 0 if first else 1, plain=first, cues=48 if first else 16, seed=0):
                made.append(((f"{hand}: {name} / {kind.name}", "made", "fit", f"{hand}: {name}"), kind.prompts))
    return made


def of_far(model: Any, tokenizer: Any, task: str) -> list[tuple[Kind, Sequence[str]]]:
    """What is far from the task: written by the model, given, and kept for the test."""
    made: list[tuple[Kind, Sequence[str]]] = []
    made += [((kind.name, "far", "fit", None), kind.prompts) for kind in written(model, tokenizer, 160, 0)]
    made += [((name, "far", "fit", "given"), prompts) for name, prompts in far_known(40).items()]
    made += [((name, "far", "test", None), prompts) for name, prompts in far_test(task, TESTED).items()]
    return made
