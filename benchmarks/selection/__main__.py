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

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lay_a_trail import Run, learn
from tasks import Item, make_items, read_answer

import tokenpaths as tp
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write
from tokenpaths.data import Question
from tokenpaths.demo import demo_model
from tokenpaths.lab.reasoning import select, solved_by_generation
from tokenpaths.stats.intervals import mean_interval

SHARES = {(1, 1, 1): 0.55, (2, 2, 1): 0.25, (3, 3, 2): 0.15, (4, 4, 3): 0.05}  # of the pool, by lengths of paths
ARMS = ("s1", "random", "longest", "diverse")


@dataclass(frozen=True)
class Sizes:
    """How many problems."""

    pool: int = 640
    chosen: int = 64
    test: int = 128  # in equal parts of each difficulty


def problems(count: dict[tuple[int, ...], int], seed: int, held_out: bool = False) -> list[Question]:
    made = [
        Question(item.question, item.answer.strip(" ."), item.chain, domain=f"{hops}")
        for hops, n in count.items()
        for item in make_items(n, seed, held_out=held_out, hops=hops)
    ]
    random.Random(seed).shuffle(made)
    return made


def choose(arm: str, pool: Sequence[Question], count: int, solves: Any, seed: int) -> tuple[list[Question], Any]:
    """So many problems of the pool, and of s1 what each of its steps left."""
    rng = random.Random(seed)
    if arm == "s1":
        found = select(pool, count, difficulty={"the frozen model": solves}, seed=seed)
        print(found.funnel, flush=True)
        return list(found.items), asdict(found.funnel)
    if arm == "diverse":
        left = {domain: [p for p in pool if p.domain == domain] for domain in sorted({p.domain for p in pool})}
        picked: list[Question] = []
        while len(picked) < count:
            items = left[rng.choice([domain for domain, items in left.items() if items])]
            picked.append(items.pop(rng.randrange(len(items))))
        return picked, None
    if arm == "longest":
        return sorted(pool, key=lambda p: -len(p.chain.split()))[:count], None
    return rng.sample(list(pool), count), None


def measure(sizes: Sizes, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Of each seed and arm: what was chosen, and which held-out questions came out right."""
    model, tokenizer = demo_model()

    def solves(items: Sequence[Question]) -> list[bool]:
        return solved_by_generation(model, items, tokenizer, read_answer=read_answer, max_new_tokens=5)

    rows: list[dict[str, Any]] = []
    for seed in seeds:
        pool = problems({hops: round(share * sizes.pool) for hops, share in SHARES.items()}, seed)
        test = problems(dict.fromkeys(SHARES, sizes.test // len(SHARES)), seed, held_out=True)
        for arm in ARMS:
            items, funnel = choose(arm, pool, sizes.chosen, solves, seed)
            taught = [Item(item.prompt, item.chain, item.answer) for item in items]
            with tp.attach(model, learn(model, tokenizer, taught, "chain", Run(seed=seed))):
                solved = solves(test)
            by_domain = {
                f"{hops}": float(np.mean([s for s, p in zip(solved, test, strict=True) if p.domain == f"{hops}"]))
                for hops in SHARES
            }
            row = {"seed": seed, "arm": arm, "accuracy": float(np.mean(solved)), "by_domain": by_domain}
            row |= {"chosen": dict(Counter(p.domain for p in items)), "funnel": funnel}
            print(row, flush=True)
            rows.append({**row, "right": [int(s) for s in solved]})
    return rows


def main() -> None:
    seeds, sizes = parser(__doc__, seeds=True).parse_args().seeds, Sizes()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = measure(sizes, seeds)
    pooled = {arm: np.concatenate([np.array(r["right"], float) for r in rows if r["arm"] == arm]) for arm in ARMS}
    claims: list[Claim] = []
    for arm in ARMS[1:]:
        change = pooled["s1"] - pooled[arm]
        told = (
            f"held-out accuracy of a trail taught {sizes.chosen} chains chosen by s1's selection, minus that of one "
            f"taught {sizes.chosen} chosen as {arm!r}, {len(seeds)} seeds pooled; bootstrap over questions"
        )
        value, unit = float(change.mean()), "difference of accuracies"
        claims.append(Claim(f"s1_selected_vs_{arm}", told, value, unit, "", mean_interval(change)))
    raw = {
        "run": asdict(sizes),
        "taught": asdict(Run()),
        "shares": {f"{k}": v for k, v in SHARES.items()},
        "accuracy": {arm: {"mean": float(v.mean()), "interval": mean_interval(v)} for arm, v in pooled.items()},
        "rows": rows,
        "seconds": time.perf_counter() - started,
    }
    write("selection", raw, claims, seed=seeds)


if __name__ == "__main__":
    main()
