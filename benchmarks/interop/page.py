"""docs/compatibility.md, written from what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.common.folders import ROOT
from tokenpaths.files import write_text

PAGE = ROOT / "docs" / "compatibility.md"


def rows(told: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Counterpart, what goes in and out, the largest difference, what is refused and why."""

    def largest(part: str, *keys: str) -> str:
        return f"{max(row[key] for row in told[part].values() for key in keys):.1e}"

    vector = told["llama.cpp"]
    engine = max(value for key, value in told["engine"].items() if key != "moved")
    return [
        (
            "pyreft 0.1.0",
            "in: `from_pyreft`, all six classes, tied, `f+l`, a Trainer's folders; out: `to_pyreft`",
            f"{largest('pyreft', 'there', 'back')} <!-- claim: pyreft_roundtrip_max_abs -->",
            "linked interventions (the later reads what the earlier made); heads, q, k, v and `mlp_activation`; "
            "out: other rules than First and Last of the prompt, other classes, gates",
        ),
        (
            "adapters 1.2.0",
            "in: `from_adapters`, LoReFT, NoReFT, DiReFT, tied and untied",
            "below 1e-5 on its own GPT-2 ([fixture](../tests/fixtures/adapters/make.py))",
            "nonlinearities; a kind that the folder contradicts. A Llama that adapters itself changed is another model",
        ),
        (
            "weights",
            "`merge` and its `undo`: affine trails at attention, mlp, one head; constants at a block; any trail at the "
            "embedding",
            f"{largest('weights', 'merged')} <!-- claim: merge_max_abs -->",
            "rules other than `All()` (weights act on every token), trails that are not affine, trails that read the "
            "residual stream at a block (it passes every weight by), gates, quantised maps, a bias that the "
            "architecture lacks",
        ),
        (
            "PEFT",
            "out: `to_peft`, the same but full rank, as a LoRA; in: [`PeftAdapter`](peers.md), at work beside trails",
            f"{largest('weights', 'peft')} <!-- claim: lora_export_max_abs -->",
            "as above; RED (full rank). With b not 0 it has `lora_bias`, which vLLM and llama.cpp lack",
        ),
        (
            "llama.cpp, repeng",
            "`to_gguf`, `from_gguf`: constants at blocks from 1 up, as a control vector",
            f"{vector['vector']:.1e} <!-- claim: gguf_vs_attach_max_abs -->, where the frozen models differ by "
            f"{vector['frozen']:.1e} <!-- claim: gguf_frozen_max_abs -->",
            "block 0 (llama.cpp has no row for it), other rules and streams, trails that read the state",
        ),
        (
            "CAA, AxBench, repeng, steering-vectors, tensors",
            "in: `from_vectors`",
            "exact",
            "files that hold more than tensors; layers that nobody tells; AxBench without its max_act",
        ),
        (
            "engines with hooks on layers",
            "out: `serve.hook`, `serve.opens`",
            f"{engine:.1e} <!-- claim: serving_hook_max_abs --> over chunks of 1, 3 and all tokens",
            "rules that read token ids or text (a hook is told positions alone)",
        ),
        (
            "EasySteer",
            "out: `serve.easysteer`, the payload of its version 1",
            "below 1e-5 by its formula; not run in vLLM",
            "trails that are not affine, two trails at one layer, streams other than block, `Match`, `Span`, `&`",
        ),
    ]


def page(told: dict[str, Any]) -> str:
    lines = ["| with | what goes in and out | largest difference of logits | refused, and why |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(told)]
    table = "\n".join(lines)
    return f"""# What goes in and out

Written by `python -m benchmarks.interop` from [interop.json](../benchmarks/results/interop.json), measured on
SmolLM2-135M in float32, whose logits go up to 30. Each row is a test against the counterpart itself
(`tests/test_interop_*.py`).

{table}

No file is executed: `.bin` and `.pt` are read as tensors alone (`weights_only`), configurations as JSON, and no class
is imported by a name from a file. A file that is damaged, holds anything else or is of another model is refused with
the name of what is wrong.

How to: [from pyreft](how-to/from-pyreft.md), [from PEFT](how-to/from-peft.md), [serve](how-to/serve.md),
[with what you use already](how-to/ecosystem.md).
"""


def write_page(told: dict[str, Any]) -> None:
    write_text(PAGE, page(told))
