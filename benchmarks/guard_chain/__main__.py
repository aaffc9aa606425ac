"""Does a guard keep a trail that writes several tokens?  The chains of `make demo`, guarded.

The answer of the demo's task is written over several tokens, in a context full of the same names, so its states are
harder to tell from others than those of a question's last token. One trail is taught the chain, then guarded; accuracy
is read on the same held-out questions, and perplexity on text that neither the trail nor the gates have seen.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lay_a_trail import Run, complete, learn, score
from tasks import make_items

import tokenpaths as tp
from benchmarks.common.folders import KEPT
from benchmarks.common.models import Base
from benchmarks.common.options import parser
from benchmarks.common.reading import counts_of, nats_of, perplexity_ratio
from benchmarks.common.record import Claim, write
from benchmarks.common.texts import UNSEEN, kinds


def measure(seed: int) -> dict[str, Any]:
    run = Run(seed=seed)
    base = Base(KEPT)
    model, tokenizer = base.model, base.tokenizer
    train, test = make_items(run.train, seed), make_items(run.test, seed, held_out=True)
    trails = learn(model, tokenizer, train, "chain", run)
    task = tp.encode([(item.question, item.chain) for item in train], tokenizer, eos=False)
    original = base.original(64)
    (rule,) = {site.tokens for site in trails}
    guarded, fits = tp.guard(model, trails, task, original, tokens=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the names of the chain stand in the prompt too
        anywhere, _ = tp.guard(model, trails, task, original)
    # texts of which the second half is answer, so that the trails' own token rule finds tokens to move
    texts = {
        kind: [tp.Example(e.ids, tuple(i >= len(e) // 2 for i in range(len(e)))) for e in examples]
        for kind, examples in kinds(tokenizer, 4, 128).items()
        if kind in UNSEEN
    }
    found: dict[str, Any] = {"seed": seed, "fits": {site.layer: asdict(fit) for site, fit in fits.items()}}
    for arm, laid in (
        ("frozen", None), ("trails", trails), ("guarded", guarded), ("guarded on all tokens", anywhere)
    ):  # fmt: skip
        attached = None if laid is None else tp.attach(model, laid)
        right = score(complete(model, tokenizer, [item.question for item in test]), test)
        nats = nats_of(model, texts)
        found[arm] = {"right": right.right, "of": right.of, "nats": nats}
        if attached is not None:
            attached.remove()
        print(seed, arm, right, {kind: round(sum(values), 1) for kind, values in nats.items()}, flush=True)
    found["counts"] = counts_of(texts)
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


def main() -> None:
    told = parser(__doc__, seeds=True).parse_args()
    torch.set_num_threads(1)
    runs = [measure(seed) for seed in told.seeds]
    share = {arm: sum(r[arm]["right"] for r in runs) / sum(r[arm]["of"] for r in runs) for arm in ("trails", "guarded")}
    (free, without), (kind, change) = worst(runs, "trails"), worst(runs, "guarded")
    kept = f"accuracy of guarded chain trails over that of the same trails without gates, {len(runs)} seeds"
    lost = (
        f"perplexity of guarded chain trails over frozen on the worst unseen kind of text ({kind}), {len(runs)} seeds; "
        f"without gates {without.value:.3f} on {free}"
    )
    bounds = (change.low, change.high)
    claims = [
        Claim("guard_chain_accuracy_kept", kept, share["guarded"] / share["trails"], "ratio"),
        Claim("guard_chain_worst_unseen_ppl_ratio", lost, change.value, "ratio", "", bounds),
    ]
    write("guard_chain", runs, claims, seed=told.seeds)


if __name__ == "__main__":
    main()
