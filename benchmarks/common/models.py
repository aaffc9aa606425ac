"""The model of the experiments, frozen, and the texts that its protections read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import tokenpaths as tp
from benchmarks.common.folders import DATA
from benchmarks.common.texts import as_text, cut
from tokenpaths.demo import demo_model

WIDTH = 64  # tokens of a text of rehearsal


class Base:
    """SmolLM2-135M-Instruct with its tokenizer. What it writes is kept in `folder`."""

    def __init__(self, folder: Path, *, eager: bool = False) -> None:
        self.folder = folder
        self.model, self.tokenizer = demo_model()
        self.model.requires_grad_(False)
        self.dim = tp.width(self.model)
        if eager:  # the quicker attention for short texts in bfloat16 on a processor
            self.model.set_attn_implementation("eager")

    def original(self, count: int, width: int = WIDTH) -> list[tp.Example]:
        """Original text: WikiText-2 validation, of which no test is made."""
        return cut(self.tokenizer, (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8"), count, width)

    def own(self, seed: int, count: int, prompts: Sequence[tp.Example] = (), name: str = "") -> list[tp.Example]:
        """What the frozen model writes by itself, or behind the first tokens of prompts, as text that is all prompt.

        `name` tells the file of one set of prompts from that of another.
        """
        openings = None
        if prompts:
            starts = [e.ids[:8] for e in prompts if e.prompt_length > 12]
            openings = [self.tokenizer.decode(ids) for ids in starts[:: max(1, len(starts) // count)][:count]]
        path = self.folder / f"own-{seed}-{count}{name}.jsonl"
        options: dict[str, Any] = {"max_new_tokens": WIDTH, "seed": seed, "openings": openings, "path": path}
        return [as_text(e) for e in tp.self_samples(self.model, self.tokenizer, count, **options)]


def twin(model: nn.Module) -> Any:
    """The same weights in other modules, for who wraps them, hooks them or puts others among them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
