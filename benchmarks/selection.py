"""Does s1's selection find better items to learn from than chance?  A small procedural stand-in, and no more.

The pool holds questions of the demo's task (following links) of four difficulties, most of them easy: its domains are
the lengths of the paths, and a longer chain is a longer trace. Of each pool 64 items are chosen in four ways; a trail
is taught their chains for the same number of steps, and asked held-out questions of all four difficulties in equal
parts.

    s1       not solved by the frozen model, domains uniform, longer chains likelier (2^-rank)
    random   uniform over the whole pool
    longest  the longest chains of the pool, of equals the earlier
    diverse  domains uniform, within them uniform
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import Claim, write

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.lab.reasoning import Problem, select, solved_by_generation
from tokenpaths.stats.intervals import of_mean

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tasks import make_items, read_answer

SHARES = {(1, 1, 1): 0.55, (2, 2, 1): 0.25, (3, 3, 2): 0.15, (4, 4, 3): 0.05}  # of the pool, by lengths of paths
ARMS = ("s1", "random", "longest", "diverse")


@dataclass(frozen=True)
class Run:
    """The dials."""

    pool: int = 640
    chosen: int = 64
    test: int = 128  # in equal parts of each difficulty
    steps: int = 20
    batch: int = 16
    lr: float = 1e-2
    rank: int = 8
    first_layer: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


def problems(count: dict[tuple[int, ...], int], seed: int, held_out: bool = False) -> list[Problem]:
    made = [
        Problem(item.question, item.chain, item.answer.strip(" ."), f"{hops}")
        for hops, n in count.items()
        for item in make_items(n, seed, held_out=held_out, hops=hops)
    ]
    random.Random(seed).shuffle(made)
    return made


def choose(
    arm: str, pool: Sequence[Problem], model: Any, tokenizer: Any, run: Run, seed: int
) -> tuple[list[Problem], Any]:
    if arm == "s1":
        solves = lambda items: solved_by_generation(model, items, tokenizer, read_answer, max_new_tokens=5)  # noqa: E731
        found = select(pool, run.chosen, difficulty={"the frozen model": solves}, seed=seed)
        print(found.funnel, flush=True)
        return list(found.items), asdict(found.funnel)
    if arm == "diverse":
        rng = random.Random(seed)
        left = {domain: [p for p in pool if p.domain == domain] for domain in sorted({p.domain for p in pool})}
        picked: list[Problem] = []
        while len(picked) < run.chosen:
            items = left[rng.choice([domain for domain, items in left.items() if items])]
            picked.append(items.pop(rng.randrange(len(items))))
        return picked, None
    if arm == "longest":
        return sorted(pool, key=lambda p: -len(p.trace.split()))[: run.chosen], None
    return random.Random(seed).sample(list(pool), run.chosen), None


def learn(model: Any, tokenizer: Any, items: Sequence[Problem], run: Run, seed: int) -> tp.TrailMap:
    torch.manual_seed(seed)
    layers = range(run.first_layer, len(tp.site.find_blocks(model)), 2)
    rule = tp.Last(1) | tp.Answer()
    trails = tp.TrailMap({s: tp.LoReFT(tp.width(model), run.rank) for s in tp.sites(model, layers, rule)})
    goal = tp.Imitate(tp.encode([(p.question, p.trace) for p in items], tokenizer, eos=False))
    for _ in tp.steps(
        model, trails, [goal], steps=run.steps, batch_size=run.batch, lr=run.lr, seed=seed, progress=False
    ):
        pass
    return trails


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run = Run(seeds=tuple(parser.parse_args().seeds))
    torch.set_num_threads(1)
    model, tokenizer = demo_model(dtype=fast_dtype())
    each = run.test // len(SHARES)
    rows: list[dict[str, Any]] = []
    right: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    started = time.perf_counter()
    for seed in run.seeds:
        pool = problems({hops: round(share * run.pool) for hops, share in SHARES.items()}, seed)
        test = problems(dict.fromkeys(SHARES, each), seed, held_out=True)
        for arm in ARMS:
            items, funnel = choose(arm, pool, model, tokenizer, run, seed)
            trails = learn(model, tokenizer, items, run, seed)
            with tp.attach(model, trails):
                solved = solved_by_generation(model, test, tokenizer, read_answer, max_new_tokens=5)
            right[arm].append(np.array(solved, dtype=float))
            kinds = {
                hops: np.mean([s for s, p in zip(solved, test, strict=True) if p.domain == f"{hops}"])
                for hops in SHARES
            }
            rows.append(
                {
                    "seed": seed,
                    "arm": arm,
                    "accuracy": float(np.mean(solved)),
                    "by_domain": {f"{hops}": float(value) for hops, value in kinds.items()},
                    "chosen": dict(Counter(p.domain for p in items)),
                    "funnel": funnel,
                    "right": [int(s) for s in solved],
                }
            )
            print(seed, arm, f"{np.mean(solved):.3f}", rows[-1]["by_domain"], rows[-1]["chosen"], flush=True)
    pooled = {arm: np.concatenate(found) for arm, found in right.items()}
    claims: list[Claim] = []
    for arm in ("random", "longest", "diverse"):
        change = pooled["s1"] - pooled[arm]
        low, high = of_mean(change)
        print(f"s1 - {arm}: {change.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        claims.append(
            Claim(
                f"s1_selected_vs_{arm}",
                f"held-out accuracy of a trail taught {run.chosen} chains chosen by s1's selection, minus that of one "
                f"taught {run.chosen} chosen as {arm!r}, {len(run.seeds)} seeds pooled; bootstrap over questions",
                float(change.mean()),
                "difference of accuracies",
                "",
                (low, high),
            )
        )
    seconds = time.perf_counter() - started
    accuracy = {arm: {"mean": float(v.mean()), "interval": of_mean(v)} for arm, v in pooled.items()}
    raw = {
        "run": asdict(run),
        "shares": {f"{k}": v for k, v in SHARES.items()},
        "accuracy": accuracy,
        "rows": rows,
        "seconds": seconds,
    }
    write("selection", raw, claims, seed=list(run.seeds))


if __name__ == "__main__":
    main()
