"""Is budget forcing exact?  200 random budgets on SmolLM2's tokenizer, its rows apart, and plain outputs kept.

The model is a tiny random Llama with SmolLM2's vocabulary, which is made to stop now and then by a bias on the stop
tokens: what is measured is the bookkeeping, and a trained model would only stop less. Every row of every setting is
counted again from its tokens, by the definition.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from tiny import llama
from torch import Tensor

from benchmarks.common.record import Claim, write
from tokenpaths.demo import demo_model
from tokenpaths.lab.reasoning import BudgetForcing
from tokenpaths.stats.intervals import wilson

SETTINGS, ROWS, NEW, EXACT = 200, 4, 48, 20
WORDS = "the sea is deep and cold so we count the boats that left before dawn one two three four".split()
ENDS: list[Any] = ["</think>", "<|im_start|>answer", "Final Answer:", ["</think>", " </think>"], "<|im_end|>", " so"]
WAITS = ["Wait", " Hmm, wait.", "\nWait, let me check that again."]


def prompts(tokenizer: Any, rng: random.Random, rows: int) -> Any:
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(rows)]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


def generate(model: Any, tokenizer: Any, inputs: Any, seed: int, *processors: Any, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    fixed = dict(
        max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model.generate(**inputs, logits_processor=list(processors), **{**fixed, **options})


def draw(rng: random.Random) -> dict[str, Any]:
    most, end = rng.choice([None, *range(25)]), rng.choice(ENDS)
    return dict(
        end=end,
        answer="" if end == "<|im_end|>" else rng.choice(["", "\nFinal Answer:", " So"]),  # nothing follows the end
        min_tokens=rng.randint(0, 24 if most is None else most),
        max_tokens=most,
        waits=rng.randint(0, 3),
        wait=rng.choice(WAITS),
    )


def thinking(written: list[int], ends: list[list[int]], eos: int) -> int:
    """The thinking tokens of a row, by the definition."""
    for i, token in enumerate(written):
        if token == eos or any(written[i : i + len(end)] == end for end in ends):
            return i
    return len(written)


def check(model: Any, tokenizer: Any, number: int) -> dict[str, Any]:
    """One setting: whether each row has the count that is reported, within its budget."""
    rng = random.Random(number)
    setting, inputs, sampled = draw(rng), prompts(tokenizer, rng, ROWS), rng.random() < 0.5
    width = inputs["input_ids"].shape[1]
    budget = BudgetForcing(tokenizer, inputs["input_ids"], **setting)
    bias = {(stop,): rng.uniform(0, 30) for stop in budget.stops}
    options = dict(do_sample=True, top_k=20, temperature=1.3) if sampled else {}
    output = generate(model, tokenizer, inputs, number, budget, sequence_bias=bias, **options)
    rows: list[dict[str, Any]] = []
    for row, count in zip(output[:, width:].tolist(), budget.counts(output), strict=True):
        tokens = thinking(row, budget.ends, tokenizer.eos_token_id)
        most = setting["max_tokens"]
        fits = setting["min_tokens"] <= tokens and (most is None or tokens <= most)
        forced = budget.ends[0] + budget.answer
        closed = count.ended != "maximum" or row[tokens:][: len(forced)] == forced
        exact = tokens == count.tokens and fits and closed
        rows.append({"tokens": tokens, "waits": count.waits, "ended": count.ended, "exact": exact})
    plain = generate(model, tokenizer, inputs, number, **options)
    unlimited = BudgetForcing(tokenizer, inputs["input_ids"], end=setting["end"])
    same = generate(model, tokenizer, inputs, number, unlimited, **options).equal(plain)
    return {**setting, "sampled": sampled, "rows": rows, "plain_is_same": same}


def apart(model: Any, tokenizer: Any, number: int) -> bool:
    """Whether a batch of eight is eight of one, greedily."""
    rng = random.Random(f"apart {number}")
    setting, inputs = draw(rng), prompts(tokenizer, rng, 8)
    width = inputs["input_ids"].shape[1]
    budget = BudgetForcing(tokenizer, inputs["input_ids"], **setting)
    bias = {(stop,): 10.0 for stop in budget.stops}
    together = generate(model, tokenizer, inputs, 0, budget, sequence_bias=bias)
    counts = budget.counts(together)
    for row in range(8):
        real = inputs["attention_mask"][row].bool()
        one = {name: value[row, real][None] for name, value in inputs.items()}
        alone = BudgetForcing(tokenizer, one["input_ids"], **setting)
        output = generate(model, tokenizer, one, 0, alone, sequence_bias=bias)
        length = output.shape[1] - one["input_ids"].shape[1]
        if output[0, one["input_ids"].shape[1] :].tolist() != together[row, width : width + length].tolist():
            return False
        if alone.counts(output) != [counts[row]]:
            return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    _, tokenizer = demo_model()
    model = llama(len(tokenizer))
    settings = [check(model, tokenizer, number) for number in range(SETTINGS)]
    rows = [row for setting in settings for row in setting["rows"]]
    exact = [setting["plain_is_same"] and all(row["exact"] for row in setting["rows"]) for setting in settings]
    separate = [apart(model, tokenizer, number) for number in range(EXACT)]
    ended = {kind: sum(row["ended"] == kind for row in rows) for kind in ("itself", "maximum", "eos", "unfinished")}
    print(f"{len(rows)} rows ended {ended}, {sum(row['waits'] for row in rows)} Waits")
    told = {
        "budget_forcing_exact": f"share of {SETTINGS} random budgets (SmolLM2's tokenizer, tiny random model, {ROWS} "
        "rows each, greedy and sampled) in which every row's thinking tokens are those reported and within the budget, "
        "and every output without limits is that of plain generate",
        "budget_forcing_rows_apart": f"share of {EXACT} random budgets in which a greedy batch of 8 equals 8 of 1, in "
        "tokens and counts",
    }
    claims = [
        Claim(name, told[name], float(np.mean(right)), "share of settings", "1.0", wilson(np.array(right, dtype=float)))
        for name, right in zip(told, (exact, separate), strict=True)
    ]
    write("budget_forcing", {"settings": settings, "ended": ended, "rows_apart": separate}, claims, seed=0)


if __name__ == "__main__":
    main()
