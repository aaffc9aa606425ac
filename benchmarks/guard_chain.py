"""Does a guard keep a trail that writes several tokens?  The chains of `make demo`, guarded.

The answer of the demo's task is written over several tokens, in a context full of the same names, so its states are
harder to tell from others than those of a question's last token. One trail is taught the chain, then guarded; accuracy
is read on the same held-out questions, and perplexity on text that neither the trail nor the gates have seen.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _evaluate import nats, perplexity_ratio
from _record import Claim, write
from _texts import cut, kinds
from budget import DATA, UNSEEN

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lay_a_trail import Run, complete, learn, score
from tasks import make_items


def measure(seed: int) -> dict[str, Any]:
    run = Run(seed=seed)
    model, tokenizer = demo_model(dtype=fast_dtype())
    train, test = make_items(run.train, seed), make_items(run.test, seed, held_out=True)
    trails = learn(model, tokenizer, train, "chain", run)
    task = tp.encode([(item.question, item.chain) for item in train], tokenizer, eos=False)
    original = cut(tokenizer, (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8"), 64, 64)
    (rule,) = {site.tokens for site in trails}
    guarded, fits = tp.guard(model, trails, task, original, tokens=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the names of the chain stand in the prompt too
        anywhere, _ = tp.guard(model, trails, task, original)
    # texts of which the second half is answer, so that the trails' own token rule finds tokens to move
    texts = {
        kind: [tp.Example(e.ids, tuple(i >= len(e) // 2 for i in range(len(e)))) for e in examples]
        for kind, examples in kinds(tokenizer, DATA, 4, 128).items()
        if kind in UNSEEN
    }
    found: dict[str, Any] = {"seed": seed, "fits": {site.layer: vars(fit) for site, fit in fits.items()}}
    for arm, laid in (
        ("frozen", None), ("trails", trails), ("guarded", guarded), ("guarded on all tokens", anywhere)
    ):  # fmt: skip
        attached = None if laid is None else tp.attach(model, laid)
        right = score(complete(model, tokenizer, [item.question for item in test]), test)
        lost = {kind: nats(model, examples)[0].tolist() for kind, examples in texts.items()}
        found[arm] = {"right": right.right, "of": right.of, "nats": lost}
        if attached is not None:
            attached.remove()
        print(seed, arm, right, {kind: round(sum(values), 1) for kind, values in lost.items()}, flush=True)
    found["counts"] = {kind: [sum(e.answer) for e in examples] for kind, examples in texts.items()}
    return found


def worst(runs: list[dict[str, Any]], arm: str) -> tuple[str, Any]:
    """The kind of text that has lost most, and its perplexity ratio over windows and seeds."""
    ratios = {
        kind: perplexity_ratio(
            np.concatenate([run["frozen"]["nats"][kind] for run in runs]),
            np.concatenate([run[arm]["nats"][kind] for run in runs]),
            np.concatenate([run["counts"][kind] for run in runs]),
        )
        for kind in UNSEEN
    }
    return max(ratios.items(), key=lambda item: item[1].value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    told = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measure(seed) for seed in told.seeds]
    share = {arm: sum(r[arm]["right"] for r in runs) / sum(r[arm]["of"] for r in runs) for arm in ("trails", "guarded")}
    (free, without), (kind, change) = worst(runs, "trails"), worst(runs, "guarded")
    print(share, free, without, kind, change)
    write(
        "guard_chain",
        runs,
        [
            Claim(
                "guard_chain_accuracy_kept",
                f"accuracy of guarded chain trails over that of the same trails without gates, {len(runs)} seeds",
                share["guarded"] / share["trails"],
                "ratio",
            ),
            Claim(
                "guard_chain_worst_unseen_ppl_ratio",
                f"perplexity of guarded chain trails over frozen on the worst unseen kind of text ({kind}), "
                f"{len(runs)} seeds; without gates {without.value:.3f} on {free}",
                change.value,
                "ratio",
                "",
                (change.low, change.high),
            ),
        ],
        seed=told.seeds,
    )
