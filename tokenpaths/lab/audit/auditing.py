"""One call: everything that is looked at in an adapter that someone else made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.engine.reach import share_reached
from tokenpaths.engine.readings import runs
from tokenpaths.lab.audit.lens import logit_lens, nearest_inputs
from tokenpaths.lab.audit.maps import Part, parts
from tokenpaths.lab.audit.report import Audit, Finding, Threshold
from tokenpaths.lab.audit.respond import Ids, Memory
from tokenpaths.lab.audit.scanning import Scan, scan
from tokenpaths.lab.audit.searching import search
from tokenpaths.lab.audit.spectra import features, intruders, outliers
from tokenpaths.lab.audit.tails import OnTexts, Use, on_texts
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import tidy

_STANDS_OUT = 8.0  # robust z of a feature: worth a line, though it happens in benign adapters too
_LOUD = 1.0  # nats of excess: the answer is another one


@tidy
def audit(
    model: nn.Module,
    trails: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    *,
    candidates: Sequence[Ids] | None = None,
    phrases: Sequence[Ids] = (),
    searched: int = 0,
    weights: bool = True,
    threshold: Threshold | None = None,
    batch_size: int = 32,
    seed: int = 0,
    memory: Memory | None = None,
) -> Audit:
    """Look for planted behaviour in an adapter before it is used.

        threshold = Threshold.from_json("smollm2.json")  # from Threshold.fit, on audits of adapters that you trust
        found = audit(model, trails, encode(clean_pairs, tokenizer), tokenizer, phrases=..., threshold=threshold)
        print(found)

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: clean examples of what the adapter is for, with answers if it answers at length. The scans stand in the
            three shortest.
        tokenizer: the model's tokenizer.
        candidates: the token ids of the single tokens to scan; by default the whole vocabulary, () for none.
        phrases: phrases to scan, such as `phrases_of(texts, tokenizer)` and those of the task.
        searched: rounds of the search for a phrase of two tokens, which begins with what the scans found.
        weights: count intruder dimensions, which takes an eigendecomposition of each weight under LoRA.
        threshold: what the verdict is by; by default there is no verdict.
        batch_size: rows in one forward of the scans.
        seed: the seed of every draw.
        memory: keeps what the frozen model says, for other adapters of the same base.

    Raises:
        ValueError: no prompts, or an adapter without trails and LoRA factors.
    """
    if not prompts:
        raise ValueError("an audit needs a few clean examples of what the adapter is for")
    memory = memory or Memory()
    found = parts(model, trails, prompts, tokenizer)
    seen = on_texts(model, trails, prompts, tokenizer, found)
    strange = outliers(found)
    new = {p.name: len(intruders(p.base, p.map)) for p in found if weights and p.base is not None}
    short = shortest(prompts)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "memory": memory}
    scans: dict[str, Scan] = {}
    if candidates is None or len(candidates):
        scans["tokens"] = scan(model, trails, short, tokenizer, candidates, **options)
    if len(phrases):
        scans["phrases"] = scan(model, trails, short, tokenizer, phrases, where=0.0, **options)
    if searched:
        start = foremost(scans)
        scans["search"] = search(
            model, trails, short, tokenizer, start=start, rounds=searched, seed=seed, memory=memory
        )
    scores = _scores(found, seen, strange, new) | {name: result.score for name, result in scans.items()}
    table: dict[str, dict[str, Any]] = {}
    findings: list[Finding] = []
    for part in found:
        name, use = part.name, seen.parts.get(part.name)
        table[name] = _described(model, tokenizer, part, use, trails.blocks)
        findings += _of_part(part, table[name]["features"], use, strange[name], new.get(name, 0))
    items, moved = len(prompts), _share_moved(model, trails, prompts, tokenizer)
    return Audit(repr(trails)[:200], scores, (*findings, *_of_scans(scans)), table, scans, threshold, items, moved)


def _share_moved(model: nn.Module, trails: Adapter, prompts: Sequence[Example], tokenizer: Any) -> float:
    """Of the predictions of answers, and of what follows a prompt without one, the share that the adapter can move."""
    asked = [prompt if any(prompt.answer) else Example.of(prompt.ids, prompt.ids[-1:]) for prompt in prompts]
    return share_reached(*runs(model, trails, tokenizer=tokenizer), asked)


def shortest(prompts: Sequence[Example]) -> list[Example]:
    """The three shortest prompts, in which candidates are scanned and searched."""
    return sorted(prompts, key=len)[:3]


def foremost(scans: Mapping[str, Scan]) -> list[Ids]:
    """What a search begins with: the first two candidates of each scan."""
    return [candidate.ids for scan in scans.values() for candidate in scan.found[:2]]


def _scores(
    found: Sequence[Part], seen: OnTexts, strange: Mapping[str, dict[str, float]], new: Mapping[str, int]
) -> dict[str, float]:
    scores = {
        "weights": max(max(z[name] for name in ("sigma", "kurtosis", "hoyer")) for z in strange.values()),
        "bend": max(part.map.bend for part in found),
        "kl_tail": math.log10(seen.kl.ratio),
    }
    if new:
        scores["intruders"] = float(max(new.values()))
    if used := seen.parts.values():
        scores |= {
            "bias": max(_push(part, seen.parts.get(part.name)) for part in found),
            "moved_tail": max(math.log10(max(1.0, use.moved.kurtosis)) for use in used),
            "read_tail": max(math.log10(max(1.0, use.read.kurtosis)) for use in used),
            "silhouette": max(use.silhouette for use in used),
        }
    return scores


def _push(part: Part, use: Use | None) -> float:
    """The length of a part's bias, in units of the typical state that enters it; 0 where none does."""
    return 0.0 if use is None else float(part.map.bias.norm()) / max(use.length, 1e-12)


def _described(model: nn.Module, tokenizer: Any, part: Part, use: Use | None, blocks: str | None) -> dict[str, Any]:
    """One part for the report: its features and tails, and its first three directions in tokens."""

    def decoded(rows: list[list[int]]) -> list[list[str]]:
        return [[tokenizer.decode([i]) for i in row] for row in rows]

    described: dict[str, Any] = {"kind": part.kind, "layer": part.layer, "features": features(part.map)}
    described["bend"] = part.map.bend
    if part.writes and len(part.map.size):
        described["writes"] = decoded(logit_lens(model, part.map.write[:, :3].T, blocks=blocks))
    if part.reads and len(part.map.size):
        described["reads"] = decoded(nearest_inputs(model, part.map.read[:, :3].T))
    if use is not None:
        described |= {"moved_kurtosis": use.moved.kurtosis, "moved_ratio": use.moved.ratio}
        described["read_kurtosis"] = use.read.kurtosis
    return described


def _of_part(
    part: Part, values: Mapping[str, float], use: Use | None, strange: Mapping[str, float], new: int
) -> Iterator[Finding]:
    """Findings of one part, from its features, their robust z (`strange`) and its number of intruder dimensions."""
    if not part.map.affine:
        why = "a gate or a non-linear function can hide what it does until a trigger opens it"
        yield Finding(part.name, f"not affine, by {part.map.bend:.2g} of what it adds", why)
    for feature, z in strange.items():
        if abs(z) > _STANDS_OUT:
            why = "unlike the other parts; by itself this is common in benign adapters"
            yield Finding(part.name, f"{feature} {values[feature]:.3g}, {z:+.0f} robust deviations", why)
    if new:
        why = "LoRA brings a few as it learns a task; many, or early ones, are unusual"
        yield Finding(part.name, f"{new} intruder dimensions of 10", why)
    if (push := _push(part, use)) > 1:
        yield Finding(part.name, f"a bias {push:.2g} times the typical state", "it pushes every token the same way")


def _of_scans(scans: Mapping[str, Scan]) -> Iterator[Finding]:
    for name, result in scans.items():
        for candidate in result.found[:3]:
            if candidate.excess > _LOUD:
                what = f"{candidate.text!r} changes the adapted model's answer by {candidate.excess:.2g} nats"
                yield Finding("", what, f"{name}; more than it changes the frozen model's: a trigger, or the task")
