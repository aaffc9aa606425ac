"""Do chains become less honest? CoT faithfulness before and after the demo's chains were taught, by trail and LoRA.

Both learn the chains of `examples/lay_a_trail.py` from the same questions in the same steps. The frozen model writes no
chains of its own for these questions, so all are tested on the right ones, with the same forced answers: the likeliest
of the people named in the question. Held-out questions, and longer ones than any in training.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import peft
import torch
from lay_a_trail import Run, learn
from tasks import LONGER_HOPS, make_items

import tokenpaths as tp
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write
from tokenpaths import faithfulness
from tokenpaths.data import Question
from tokenpaths.demo import demo_model
from tokenpaths.lab.chains import Faithfulness
from tokenpaths.lab.peers import PeftAdapter
from tokenpaths.stats.intervals import mean_interval

TESTS = ("early answering", "adding mistakes", "filler tokens")
LORA_LR = 1e-3
ARMS = {"trail": "a LoReFT trail", "lora": "LoRA r=8 on all linear layers"}


def people(item: Question) -> list[str]:
    """The answers that a question allows: everyone it names."""
    return [f" {name}." for name in dict.fromkeys(item.prompt.replace(".", " ").split())]


def look(model: Any, adapter: Any, tokenizer: Any, items: list[Question], seed: int) -> Faithfulness:
    return faithfulness(
        model, adapter, items, tokenizer, chains="given", options=people, separator=r"\s+", stop_strings=".",
        max_new_tokens=max(LONGER_HOPS) + 1, seed=seed,
    )  # fmt: skip


def lora(model: Any, tokenizer: Any, run: Run) -> Any:
    """The model with a LoRA, trained as `learn` trains trails."""
    torch.manual_seed(run.seed)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    adapter = PeftAdapter(adapted)
    pairs = [(item.question, item.chain) for item in make_items(run.train, run.seed)]
    goal = tp.Imitate(tp.encode(pairs, tokenizer, eos=False))
    for _ in tp.steps(adapted, adapter, [goal], steps=run.steps, batch_size=run.batch, lr=LORA_LR, seed=run.seed):
        pass
    return adapted, adapter


def main() -> None:
    told = parser(__doc__, seeds=True)
    told.add_argument("--items", type=int, default=40)
    told.add_argument("--longer", type=int, default=20)
    options = told.parse_args()
    model, tokenizer = demo_model()
    found: dict[str, list[Faithfulness]] = {arm: [] for arm in ARMS}
    started = time.process_time()
    for seed in options.seeds:
        run = Run(seed=seed)
        held_out = make_items(options.items, seed, held_out=True)
        held_out += make_items(options.longer, seed, held_out=True, hops=LONGER_HOPS)
        items = [Question(item.question, item.answer, item.chain) for item in held_out]
        trails = learn(model, tokenizer, make_items(run.train, seed), "chain", run)
        for arm in ARMS:
            adapted, adapter = (model, trails) if arm == "trail" else lora(model, tokenizer, run)
            learned = time.process_time() - started
            found[arm].append(look(adapted, adapter, tokenizer, items, seed))
            seconds = f"learned at {learned:.0f} s, measured at {time.process_time() - started:.0f} s of one core"
            print(f"\nseed {seed}, {ARMS[arm]}, {seconds}\n{found[arm][-1]}", flush=True)
        model = adapted.unload()
    pooled = {arm: {test: change_of(reports, test) for test in TESTS} for arm, reports in found.items()}
    claims = [
        Claim(
            id=f"faithfulness_change_{arm}",
            claim=f"change of the AOC of early answering by teaching the demo's chains with {words}, on the right "
            f"chains of held-out and longer questions ({len(options.seeds)} seeds pooled)",
            measured=round(pooled[arm]["early answering"]["change"], 4),
            interval=tuple(round(end, 4) for end in pooled[arm]["early answering"]["interval"]),
            unit="AOC",
        )
        for arm, words in ARMS.items()
    ]
    raw = {
        "run": asdict(Run()),
        "lora": {"r": 8, "alpha": 16, "targets": "all-linear", "lr": LORA_LR},
        "pooled": pooled,
        "seeds": {arm: [[asdict(c) | {"says": c.says} for c in r.changes] for r in rs] for arm, rs in found.items()},
        "verdicts": {arm: [report.verdict for report in reports] for arm, reports in found.items()},
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    write("faithfulness", raw, claims, seed=options.seeds)
    for arm, tests in pooled.items():
        for test, figures in tests.items():
            print(arm, test, figures)


def change_of(reports: list[Faithfulness], test: str) -> dict[str, Any]:
    """The AOC of all seeds' items together, and its change with the interval over these items, in pairs."""
    before, after = (
        np.concatenate([report.table(test, run).areas for report in reports]) for run in ("frozen", "steered")
    )
    change = after - before
    return {
        "frozen": float(before.mean()),
        "steered": float(after.mean()),
        "change": float(change.mean()),
        "interval": mean_interval(change),
        "items": len(change),
    }


if __name__ == "__main__":
    main()
