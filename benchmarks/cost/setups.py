"""What is timed: models of several shapes, and tasks that differ in the layers and tokens that trails move.

Texts are ids drawn at random, of one length: what a step costs depends on their number, and not on what they say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype

RANK = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and how many texts a step trains on."""

    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    batch: int
    kv_heads: int | None = None
    tied: bool = True

    def config(self) -> dict[str, Any]:
        """As keywords of `transformers.LlamaConfig`."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
        }


SMOLLM2 = Shape(576, 30, 9, 1536, 49152, batch=8, kv_heads=3)  # with its own weights, but in the peers' processes
SHAPES = {
    "smollm2": SMOLLM2,
    "tiny": Shape(64, 4, 4, 192, 512, batch=8),
    "mid": Shape(1024, 24, 16, 2816, 32000, batch=2),
    "1b": Shape(2048, 16, 32, 8192, 128256, batch=8, kv_heads=8),
    "8b": Shape(4096, 32, 32, 14336, 128256, batch=2, kv_heads=8, tied=False),
}
ON_GPU_ONLY = ("1b", "8b")


@dataclass(frozen=True)
class Task:
    """Which tokens are moved, from which share of the depth on, in texts of how many tokens.

    `shared` tokens begin all prompts, and `prompt` counts them as well.
    """

    tokens: tp.tokens.Rule
    depth: float = 0.0
    prompt: int = 224
    shared: int = 0
    answer: int = 32

    def small(self) -> Task:
        return replace(self, prompt=self.prompt // 8, shared=self.shared // 8, answer=self.answer // 8)


TASKS = {
    "all": Task(tp.All()),
    "upper": Task(tp.All(), depth=0.5),
    "shared prompt": Task(tp.Last(1) | tp.Answer(), shared=200),
    "own prompts": Task(tp.Last(1) | tp.Answer()),
}


class Bench:
    """One model and one task: what every arm begins from. `layers` are those of the task, unless given."""

    def __init__(
        self,
        shape: str,
        task: Task,
        *,
        batch: int | None = None,
        layers: list[int] | None = None,
        rank: int = RANK,
        model: Any = None,
    ) -> None:
        self.task, self.shape, self.rank = task, SHAPES[shape], rank
        self.batch = batch or self.shape.batch
        self.model = load(shape) if model is None else model
        count = len(tp.site.find_blocks(self.model))
        self.layers = list(range(int(task.depth * count), count)) if layers is None else layers
        self.width = tp.width(self.model)

    def trails(self, seed: int = 0) -> tp.TrailMap:
        torch.manual_seed(seed)
        sites = tp.sites(self.model, self.layers, self.task.tokens)
        return tp.TrailMap({site: tp.LoReFT(self.width, self.rank) for site in sites})

    def examples(self, count: int, seed: int = 0) -> list[tp.Example]:
        generator = torch.Generator().manual_seed(seed)
        task, length = self.task, self.task.prompt + self.task.answer
        ids = torch.randint(3, self.shape.vocabulary, (count, length), generator=generator)
        ids[:, : task.shared] = ids[0, : task.shared].clone()
        answer = (False,) * task.prompt + (True,) * task.answer
        return [tp.Example(tuple(row), answer) for row in ids.tolist()]

    def texts(self, count: int, length: int, seed: int = 1) -> list[tp.Example]:
        """Texts of no task, as rehearsal and drift readings take them."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.shape.vocabulary, (count, length), generator=generator)
        return [tp.Example(tuple(row), (False,) * length) for row in ids.tolist()]

    def batches(self, examples: list[tp.Example]) -> Iterator[tp.data.Batch]:
        """Batches of the examples, without end."""
        while True:
            for first in range(0, len(examples), self.batch):
                yield tp.data.collate(examples[first : first + self.batch]).to(DEVICE)

    def positions(self) -> list[int]:
        """The columns of the tokens that are moved: the same in every row."""
        from tokenpaths.tokens import Context

        batch = tp.data.collate(self.examples(1))
        mask = self.task.tokens.mask(Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids))
        return mask[0].nonzero().flatten().tolist()


def load(shape: str) -> Any:
    """The frozen model, in the quick dtype of this machine."""
    import transformers

    dtype = fast_dtype(DEVICE)
    if shape == "smollm2":
        model = demo_model(dtype=dtype)[0].to(DEVICE)
    else:
        with torch.device(DEVICE):
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**SHAPES[shape].config())
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
