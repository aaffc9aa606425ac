"""The recipe, for LoRA and for a trail: learn a chain of tokens, inside a budget, and see what was lost.

    python examples/lora_with_trails.py                    SmolLM2-135M-Instruct
    python examples/lora_with_trails.py --model Qwen/Qwen3-0.6B --steps 100

Three ingredients, the same for both: the task is taught as a **chain of tokens**, look-up by look-up; a `Stay` on
texts that the frozen model wrote itself keeps it inside a **budget** of nats a token; and 1 % of **rehearsal** is mixed
into the task's examples. Only the adapter and its learning rate differ.

Both are measured on the same tokens: each of the kept texts is split into prompt and answer at three places, and what
follows is read. Read whole, as prompts, these texts would be moved by LoRA at every token and by the trail at the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from tasks import Item, make_items, read_answer

import tokenpaths as tp
from tokenpaths import forgetting
from tokenpaths.data import Task, Text
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.lab.peers import PeftAdapter
from tokenpaths.stats.intervals import wilson
from tokenpaths.trailmap import Adapter

KEPT = (  # what is measured afterwards, and never trained on
    "The old harbour was quiet that morning. Two boats had left before dawn, and the gulls followed them out to sea.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the leaves of plants.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rise for an hour, and bake it until it is brown.",
    "The council met on Tuesday to discuss the new bridge. Several members asked what it would cost and who would pay.",
    "Rivers carry sand and clay down from the hills. Where they reach the sea, the water slows and drops them.",
    "She opened the letter at the kitchen table, read it twice, and put it into the drawer with all the others.",
    "A bicycle has two wheels, a frame and a chain. The rider turns the pedals, and the chain turns the back wheel.",
    "In winter the lake froze from shore to shore, and the children of the village learned to skate on it.",
    "The museum is open from ten to five, except on Mondays. Tickets are sold at the door, and children enter free.",
    "Bees visit flowers for nectar and carry pollen from one to the next, so that fruit and seeds can grow.",
    "He tuned the old piano himself, one string after another, until the first chord sounded as it should.",
    "Glass is made of sand that was melted at great heat. While it is soft, it can be blown, pressed or rolled flat.",
)


@dataclass(frozen=True)
class Run:
    """The dials of the recipe."""

    model: str | None = None
    steps: int = 60
    train: int = 320
    test: int = 64
    samples: int = 24  # texts that the frozen model writes
    sample_tokens: int = 64
    batch: int = 16
    within: float = 0.01  # nats a token
    lora_lr: float = 1e-3
    trail_lr: float = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=Run.steps)
    options = parser.parse_args()
    compare(Run(model=options.model, steps=options.steps))


def compare(run: Run) -> dict[str, tuple[int, float]]:
    """Both methods, one after the other. Returns the right answers and the KL on kept texts of each."""
    model, tokenizer = demo_model(run.model, dtype=fast_dtype())
    train, test = make_items(run.train, seed=0), make_items(run.test, seed=0, held_out=True)
    own = tp.self_samples(model, tokenizer, run.samples, max_new_tokens=run.sample_tokens)
    chains = tp.encode([(item.question, item.chain) for item in train], tokenizer, eos=False)
    goals = [
        tp.Replay(tp.mix(chains, own, share=0.01)),  # 99 chains, 1 text; each by the tokens that it teaches
        tp.Stay(own, within=run.within, batch_size=4),
    ]
    print(f"Frozen: {score(answers(model, tokenizer, test), test)} of {len(test)} chains right")

    torch.manual_seed(0)
    depth = len(tp.site.find_blocks(model))
    sites = tp.sites(model, range(depth // 4, depth, 2), tp.Last(1) | tp.Answer())
    trails = tp.TrailMap({site: tp.LoReFT(tp.width(model), rank=8) for site in sites})
    with tp.attach(model, trails):
        learn(model, trails, goals, run, run.trail_lr)
        found = {"trail": measure(model, trails, tokenizer, test)}

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora_model = peft.get_peft_model(model, config)  # PEFT wraps the layers in place: from here on it is another model
    lora = PeftAdapter(lora_model)
    learn(lora_model, lora, goals, run, run.lora_lr)
    found["LoRA"] = measure(lora_model, lora, tokenizer, test)
    return found


def learn(model: Any, adapter: Adapter, goals: Sequence[tp.Objective], run: Run, lr: float) -> None:
    for step in tp.steps(model, adapter, goals, steps=run.steps, batch_size=run.batch, lr=lr, progress=False):
        if step.step % 20 == 0 or step.step == run.steps:
            print(f"  step {step.step}: task {step.losses[0]:.3f}, drift {step.losses[1]:.4f} nats a token")


def measure(model: Any, adapter: Adapter, tokenizer: Any, test: Sequence[Item]) -> tuple[int, float]:
    """What was learned, and what was lost."""
    right = score(answers(model, tokenizer, test), test)
    low, high = wilson((np.arange(len(test)) < right).astype(float))
    lost = forgetting(model, adapter, [Task("kept texts", tuple(map(Text, KEPT)))], tokenizer)
    print(
        f"\n{type(adapter).__name__}: {right} of {len(test)} held-out chains right, [{low:.2f}, {high:.2f}]\n{lost}\n"
    )
    return right, lost["kept texts", "KL to frozen"].after


@torch.no_grad()
def answers(model: Any, tokenizer: Any, items: Sequence[Item], batch: int = 32) -> list[str]:
    """What the model writes after each question, greedily."""
    texts: list[str] = []
    for start in range(0, len(items), batch):
        prompts = [item.question for item in items[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(texts: Sequence[str], items: Sequence[Item]) -> int:
    return sum(read_answer(t) == read_answer(item.answer) for t, item in zip(texts, items, strict=True))


if __name__ == "__main__":
    main()
