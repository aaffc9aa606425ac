"""What a gate reads of every prompt of a task, once for all splits: features by kind, kept in a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gates.prompts import (
    FITTED,
    HANDS,
    RENAMED,
    SHOWN,
    TASKS,
    TESTED,
    TRAINED,
    far_known,
    far_test,
    renamed,
    wordings,
)
from tokenpaths.data.tokenizing import inner
from tokenpaths.limits.requests import PROBES, features, made_asks, written
from tokenpaths.site import Host, find_blocks, width
from tokenpaths.trailmap.gate import Gate

Role = Literal["form", "ask", "made", "far", "renamed"]
Kind = tuple[str, Role, Literal["fit", "test"], Any]


def bare(model: Any, tokenizer: Any) -> Gate:
    """A gate as `fit_gate` makes one, without numbers."""
    return Gate((len(find_blocks(model)) - 1,), [inner(tokenizer, probe) for probe in PROBES], width(model))


def gather(model: Any, tokenizer: Any, task: str, folder: Path) -> dict[Any, Tensor]:
    """Features by (name, role, part, form that it belongs to)."""
    host = Host.of(model)
    gate = bare(model, tokenizer)
    found: dict[Any, Tensor] = {}
    made: dict[str, Callable[[], list[tuple[Kind, Sequence[str]]]]] = {
        **{hand: partial(of_hand, hand, task) for hand in HANDS},
        "far": partial(of_far, model, tokenizer, task),
    }
    for hand, kinds in made.items():
        path = folder / f"{task}-{hand}.pt"
        if not path.exists() and (some := kinds()):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({key: features(host, tokenizer, prompts, gate, 1500).float() for key, prompts in some}, path)
        found |= torch.load(path, weights_only=True) if path.exists() else {}
    return found


def of_hand(hand: str, task: str) -> list[tuple[Kind, Sequence[str]]]:
    """The prompts of one hand's forms and asks, and the asks that the library makes of its forms."""
    items, words, rng = TASKS[task](), wordings(task), random.Random(0)
    made: list[tuple[Kind, Sequence[str]]] = []
    for name, wording in {**words.forms, **words.asks}.items():
        if not name.startswith(f"{hand}: "):
            continue
        first = name == TRAINED
        role: Role = "form" if name in words.forms else "ask"
        few = FITTED if role == "form" else FITTED // 2
        fitted = [wording.prompt(item) for item in rng.sample(list(items.fit), few)]
        tested = [wording.prompt(item) for item in items.test[: SHOWN if first else TESTED]]
        made += [((name, role, "fit", None), fitted), ((name, role, "test", None), tested)]
        if role == "form":
            for kind in made_asks(fitted, 0 if first else 1, plain=first, cues=48 if first else 16, seed=0):
                made.append(((f"{name} / {kind.name}", "made", "fit", name), kind.prompts))
    if task == "links" and hand == "mine":
        trained = words.forms[TRAINED]
        made.append(((RENAMED, "renamed", "test", None), [trained.prompt(renamed(i)) for i in items.test[:SHOWN]]))
    return made


def of_far(model: Any, tokenizer: Any, task: str) -> list[tuple[Kind, Sequence[str]]]:
    """What is far from the task: written by the model, given, and kept for the test."""
    made: list[tuple[Kind, Sequence[str]]] = []
    made += [((kind.name, "far", "fit", None), kind.prompts) for kind in written(model, tokenizer, 160, 0)]
    made += [((name, "far", "fit", "given"), prompts) for name, prompts in far_known(40).items()]
    made += [((name, "far", "test", None), prompts) for name, prompts in far_test(task, TESTED).items()]
    return made
