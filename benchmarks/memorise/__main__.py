"""How many tokens does one rank-1 trail at one layer hold?  The memorisation demonstration of the ReFT paper.

A constant trail, R^T (b - R h) with rank 1, moves the last token of the prompt `GO->` at one layer of SmolLM2-135M. It
is trained until the frozen model, so steered, writes a text of random words back exactly, by greedy decoding. The
longest length at which all seeds succeed is the figure.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write
from tokenpaths.demo import demo_model

WORDS = """
river stone lantern winter market garden captain silver morning letter forest window bridge harbour candle mountain
shadow engine kitchen orange painter ladder pocket thunder village basket blanket copper desert feather island jacket
""".split()


def make_text(seed: int, words: int = 200) -> str:
    """Random words: nothing that the model could know."""
    rng = random.Random(seed)
    return " " + " ".join(rng.choice(WORDS) for _ in range(words))


def memorise(
    model: Any, tokenizer: Any, length: int, *, seed: int, layer: int, lr: float, most_steps: int
) -> dict[str, Any]:
    """Train one rank-1 constant trail on the first `length` tokens of a text, and read them back greedily."""
    prompt, text = tokenizer("GO->")["input_ids"], tokenizer(make_text(seed))["input_ids"][:length]
    example = tp.Example(ids=(*prompt, *text), answer=(False,) * len(prompt) + (True,) * length)
    torch.manual_seed(seed)
    trails = tp.TrailMap({tp.Site(layer, tp.Last(1)): tp.trails.ConstantReFT(tp.width(model), rank=1)})
    done = 0
    run = tp.steps(
        model, trails, [tp.Imitate([example])], steps=most_steps, batch_size=1, lr=lr, schedule="constant", warmup=0.0,
        seed=seed, progress=False,
    )  # fmt: skip
    held = 0
    for step in run:
        done = step.step
        if step.loss < 0.7 and step.step % 20 == 0:
            held = read_back(model, trails, prompt, text)
            if held == length:
                break
    run.close()
    held = max(held, read_back(model, trails, prompt, text))
    return {"length": length, "seed": seed, "steps": done, "loss": step.loss, "held": held, "parameters": trails.size()}


def read_back(model: Any, trails: tp.TrailMap, prompt: list[int], text: list[int]) -> int:
    """How many tokens of the text the model writes before its first mistake."""
    ids, ends = torch.tensor([prompt]), {"eos_token_id": None, "pad_token_id": 0}
    with nullcontext() if tp.attachment.is_attached(model, trails) else tp.attach(model, trails):
        written = model.generate(ids, max_new_tokens=len(text), do_sample=False, **ends)
    same = [a == b for a, b in zip(written[0, len(prompt) :].tolist(), text, strict=True)]
    return same.index(False) if False in same else len(text)


def main() -> None:
    told = parser(__doc__, seeds=True)
    told.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 24, 32, 48])
    told.add_argument("--layer", type=int, default=8)
    told.add_argument("--lr", type=float, default=2e-2)
    told.add_argument("--steps", type=int, default=600)
    told.add_argument("--dry", action="store_true", help="print, but write no result file")
    options = told.parse_args()
    model, tokenizer = demo_model(dtype=torch.float32)
    runs = []
    for length in options.lengths:
        for seed in options.seeds:
            run = memorise(
                model, tokenizer, length, seed=seed, layer=options.layer, lr=options.lr, most_steps=options.steps
            )
            print(run, flush=True)
            runs.append(run)
        if all(run["held"] < length for run in runs[-len(options.seeds) :]):
            break
    whole = [n for n in options.lengths if all(r["held"] == n for r in runs if r["length"] == n)]
    claim = Claim(
        id="memorised_tokens_rank1",
        claim=f"tokens of random words that one rank-1 constant trail at layer {options.layer} of SmolLM2-135M writes "
        f"back exactly, the longest length tried at which all of {len(options.seeds)} seeds succeed",
        measured=max((n for n in whole if n in {r["length"] for r in runs}), default=0),
        unit="tokens",
    )
    if options.dry:
        print(claim)
    else:
        write("memorise", {"layer": options.layer, "lr": options.lr, "runs": runs}, [claim], seed=options.seeds)


if __name__ == "__main__":
    main()
