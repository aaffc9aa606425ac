"""A model card that says what was measured, and nothing else.

text = card(trails, model, drift={"WikiText-2": drift}, learned={"demo": report}, lost=found, gate=fit)
trails.push_to_hub("me/my-trails", model, card=text)       # the trails and the card, in one commit
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from tokenpaths.drift.report import Drift
from tokenpaths.site.fingerprint import describe
from tokenpaths.trailmap.trailmap import FILE_NAME, TrailMap

NOT_MEASURED = "not measured"
_TAGS = ("tokenpaths", "reft", "representation-finetuning")


@runtime_checkable
class Shown(Protocol):
    """A report that writes itself as Markdown, as `forgetting`, `ab_test` and `measure_drift` give them."""

    def to_markdown(self) -> str: ...


def card(
    trails: TrailMap,
    model: nn.Module,
    *,
    drift: Mapping[str, Drift] | None = None,
    learned: Mapping[str, Shown] | None = None,
    lost: Shown | None = None,
    gate: object = None,
    strength: float = 1.0,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    notes: str = "",
) -> str:
    """The README of a repository of trails: what they move, how to load them, and what was measured of them.

    Every number is one of the reports that are given; where none is given, the card says "not measured". The mean KL of
    each kind of text stands in the metadata too, where the Hub shows it.

    Args:
        trails: the map.
        model: the base model, whose name, revision and fingerprint are told. A folder of this machine is not.
        drift: reports of `measure_drift`, by the kind of text.
        learned: reports of `ab_test`, or others, by the name of the task.
        lost: the report of `forgetting`.
        gate: what `fit_gate` gave.
        strength: the strength that was tested.
        license: of the trails, as the Hub names it.
        datasets: what they were trained on, by the Hub's names.
        language: by the Hub's codes.
        notes: your own words, such as what the trails are for.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: the card would tell a path of this machine, or `huggingface_hub` finds it malformed.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base = describe(model)
    name = _public(base["name"])
    results = [
        EvalResult("text-generation", kind, kind, "kl", _number(found["kl"].mean), metric_name="KL(frozen || steered)")
        for kind, found in (drift or {}).items()
        if not found.too_little
    ]
    data = ModelCardData(
        base_model=name,
        library_name="tokenpaths",
        tags=[*_TAGS, *([f"base_model:adapter:{name}"] if name else [])],
        pipeline_tag="text-generation",
        license=license,
        datasets=list(datasets) or None,
        language=list(language) or None,
        model_name="trails" if results else None,
        eval_results=results or None,
    )
    told = name or "a model without a public name"
    body = [
        f"# Trails for {told}",
        notes,
        "Learned low-rank displacements of hidden states; the weights of the base model are not changed.",
        "## What is moved",
        _moved(trails),
        "## How to load it",
        _load(name),
        "## What was learned",
        _reports(learned),
        "## Where it acts",
        NOT_MEASURED if gate is None else _block(str(gate)),
        "## What was lost",
        NOT_MEASURED if lost is None else lost.to_markdown(),
        "## How far it moves other text",
        _reports(drift),
        "## Made with",
        _made(trails, base["fingerprint"], model, strength),
    ]
    text = f"---\n{data}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"
    for here in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        if str(here) != here.anchor and str(here) in text:
            raise ValueError(f"the card would tell {here}, a path of this machine: take it out of the notes or reports")
    ModelCard(text)  # raises for metadata that are not YAML
    return text


def _public(name: str) -> str | None:
    """A name that the Hub may know; None for a folder."""
    return None if os.path.isabs(name) or Path(name).exists() or name.count("/") != 1 else name


def _moved(trails: TrailMap) -> str:
    lines = [f"- `{site}`: `{trail}`" for site, trail in trails.items()]
    shown = [*lines[:8], *([f"- and {len(lines) - 8} more"] if len(lines) > 8 else [])]
    return "\n".join([*shown, f"\n{trails.size():,} parameters" + (", behind a gate" if trails.gate else "")])


def _load(name: str | None) -> str:
    return f"""```python
import tokenpaths as tp
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name or "the base model"!r})
trails = tp.TrailMap.from_pretrained("the name of this repository", model=model)
with tp.attach(model, trails):
    ...  # generate as ever
```"""


def _reports(found: Mapping[str, Shown] | None) -> str:
    if not found:
        return NOT_MEASURED
    return "\n\n".join(f"### {kind}\n\n{report.to_markdown()}" for kind, report in found.items())


def _made(trails: TrailMap, fingerprint: str, model: nn.Module, strength: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        trails.save(Path(folder, FILE_NAME), model)
        digest = hashlib.sha256(Path(folder, FILE_NAME).read_bytes()).hexdigest()
    config: Any = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None) or "not known"
    return "\n".join(
        f"- {what}: {value}"
        for what, value in {
            "tokenpaths": version("tokenpaths"),
            "torch": torch.__version__,
            "revision of the base model": revision,
            "fingerprint of its weights": f"`{fingerprint}`",
            f"sha256 of `{FILE_NAME}`": f"`{digest}`",
            "strength": f"{strength:g}",
            "machine": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }.items()
    )


def _block(text: str) -> str:
    return f"```\n{text}\n```"


def _number(value: float) -> float:
    return float(f"{value:.4g}")
