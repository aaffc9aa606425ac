"""One call: everything that is looked at in an adapter that someone else made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.lab.audit import lens
from tokenpaths.lab.audit.maps import Part, parts
from tokenpaths.lab.audit.report import Audit, Found, Rule
from tokenpaths.lab.audit.respond import Ids, Memory
from tokenpaths.lab.audit.scanning import Scan, scan
from tokenpaths.lab.audit.searching import search
from tokenpaths.lab.audit.spectra import features, intruders, outliers
from tokenpaths.lab.audit.tails import OnTexts, on_texts
from tokenpaths.trailmap.adapter import Adapter

_STANDS_OUT = 8.0  # robust z of a feature: worth a line, though it happens in benign adapters too
_BENT = 1e-3
_LOUD = 1.0  # nats of excess: the answer is another one


def audit(
    model: nn.Module,
    adapter: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    *,
    tokens: Sequence[Ids] | None = None,
    phrases: Sequence[Ids] = (),
    searched: int = 0,
    weights: bool = True,
    rule: Rule | None = None,
    batch_size: int = 32,
    seed: int = 0,
    memory: Memory | None = None,
) -> Audit:
    """Look for planted behaviour in an adapter before it is used.

        rule = Rule.load("smollm2.json")     # made with Rule.fit, from audits of adapters that you trust
        found = audit(model, trails, encode(tokenizer, clean_pairs), tokenizer, phrases=..., rule=rule)
        print(found)

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        adapter: trails, or a `PeftAdapter`.
        prompts: clean examples of what the adapter is for, with answers if it answers at length. The scans stand in the
            three shortest.
        tokenizer: the model's.
        tokens: single tokens to scan; the whole vocabulary unless told, none for ().
        phrases: phrases to scan, such as `phrases_of(tokenizer, texts)` and those of the task.
        searched: rounds of the search for a phrase of two tokens, which begins with what the scans found.
        weights: count intruder dimensions, which takes two SVDs of each weight under LoRA.
        rule: what the verdict is by; none without.
        batch_size: rows in a forward of the scans.
        seed: of every draw.
        memory: keeps what the frozen model says, for other adapters of the same base.

    Raises:
        ValueError: no prompts, or an adapter without trails and LoRA factors.
    """
    if not prompts:
        raise ValueError("an audit needs a few clean examples of what the adapter is for")
    memory = memory or Memory()
    found = parts(model, adapter, prompts, tokenizer=tokenizer)
    seen = on_texts(model, adapter, prompts, found, tokenizer=tokenizer)
    strange = outliers(found)
    short = shortest(prompts)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "memory": memory}
    scans: dict[str, Scan] = {}
    if tokens is None or len(tokens):
        scans["tokens"] = scan(model, adapter, short, tokenizer, tokens, **options)
    if len(phrases):
        scans["phrases"] = scan(model, adapter, short, tokenizer, phrases, where=0.0, **options)
    if searched:
        scans["search"] = search(
            model, adapter, short, tokenizer, start=foremost(scans), rounds=searched, seed=seed, memory=memory
        )
    new = {p.name: intruders(p.base, p.map) for p in found if weights and p.base is not None}
    scores = _scores(found, seen, strange, new) | {name: result.score for name, result in scans.items()}
    table = {part.name: _table(model, tokenizer, part, seen, adapter.blocks) for part in found}
    words = (*_of_parts(found, seen, strange, new, table), *_of_scans(scans))
    return Audit(repr(adapter)[:200], scores, words, table, scans, rule)


def shortest(prompts: Sequence[Example]) -> list[Example]:
    """Those that candidates are scanned and searched in."""
    return sorted(prompts, key=len)[:3]


def foremost(scans: Mapping[str, Scan]) -> list[Ids]:
    """What a search begins with: the first two of each scan."""
    return [candidate.ids for scan in scans.values() for candidate in scan.found[:2]]


def _scores(
    found: Sequence[Part],
    seen: OnTexts,
    strange: dict[str, dict[str, float]],
    new: dict[str, list[tuple[int, float]]],
) -> dict[str, float]:
    scores = {
        "weights": max(max(z[name] for name in ("sigma", "kurtosis", "hoyer")) for z in strange.values()),
        "bend": max(part.map.bend for part in found),
        "kl_tail": math.log10(seen.kl.ratio),
    }
    if new:
        scores["intruders"] = float(max(map(len, new.values())))
    if seen.moved:
        at = [part for part in found if part.name in seen.moved]
        scores |= {
            "bias": max(_push(part, seen) for part in at),
            "moved_tail": max(math.log10(max(1.0, tail.kurtosis)) for tail in seen.moved.values()),
            "read_tail": max(math.log10(max(1.0, tail.kurtosis)) for tail in seen.reads.values()),
            "silhouette": max(seen.silhouette.values()),
        }
    return scores


def _push(part: Part, seen: OnTexts) -> float:
    return float(part.map.bias.norm()) / max(seen.length[part.name], 1e-12)


def _table(model: nn.Module, tokenizer: Any, part: Part, seen: OnTexts, blocks: str | None) -> dict[str, Any]:
    """What is known of one part, for the report: features, and its first three directions in tokens."""
    told: dict[str, Any] = {"kind": part.kind, "layer": part.layer, "features": features(part.map)}
    told["bend"] = part.map.bend
    first = slice(0, 3)
    if part.writes and len(part.map.size):
        ids = lens.says(model, part.map.write[:, first].T, blocks=blocks)
        told["writes"] = [lens.told(tokenizer, row) for row in ids]
    if part.reads and len(part.map.size):
        told["reads"] = [lens.told(tokenizer, row) for row in lens.hears(model, part.map.read[:, first].T)]
    if part.name in seen.moved:
        told["moved_kurtosis"] = seen.moved[part.name].kurtosis
        told["moved_ratio"] = seen.moved[part.name].ratio
        told["read_kurtosis"] = seen.reads[part.name].kurtosis
    return told


def _of_parts(
    found: Sequence[Part],
    seen: OnTexts,
    strange: dict[str, dict[str, float]],
    new: dict[str, list[tuple[int, float]]],
    table: dict[str, dict[str, Any]],
) -> list[Found]:
    words: list[Found] = []
    for part in found:
        told = table[part.name]
        if part.map.bend > _BENT:
            why = "a gate or a non-linear function can hide what it does until a trigger opens it"
            words.append(Found(part.name, f"not affine, by {part.map.bend:.2g} of what it adds", why))
        for feature, z in strange[part.name].items():
            if abs(z) > _STANDS_OUT:
                value = told["features"][feature]
                why = "unlike the other parts; by itself this is common in benign adapters"
                words.append(Found(part.name, f"{feature} {value:.3g}, {z:+.0f} robust deviations", why))
        if new.get(part.name):
            why = "LoRA brings a few as it learns a task; many, or early ones, are unusual"
            words.append(Found(part.name, f"{len(new[part.name])} intruder dimensions of 10", why))
        if part.name in seen.moved and _push(part, seen) > 1:
            why = "it pushes every token the same way"
            words.append(Found(part.name, f"a bias {_push(part, seen):.2g} times the typical state", why))
    return words


def _of_scans(scans: dict[str, Scan]) -> list[Found]:
    words: list[Found] = []
    for name, result in scans.items():
        for candidate in result.found[:3]:
            if candidate.excess > _LOUD:
                what = f"{candidate.text!r} changes the adapted model's answer by {candidate.excess:.2g} nats"
                words.append(
                    Found("", what, f"{name}; more than it changes the frozen model's: a trigger, or the task")
                )
    return words
