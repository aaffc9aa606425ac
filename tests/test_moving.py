"""What moving states costs, counted in operations; and the cheap ways move what the dense one does."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from laws import assert_close, padded
from subjects import MOVING
from tiny import DIM, llama
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpaths import All, Answer, First, Last, Prompt, TrailMap, attach, sites
from tokenpaths.tokens import Rule

INPUTS = padded([[5, 47, 31, 66, 8, 90], [17, 4, 73, 29], [61, 12, 36]])
PROMPT_RULES = [Last(1), First(2) | Last(1), Prompt(), Prompt() - Last(1), ~First(1) & Last(2)]


class Counted(TorchDispatchMode):
    """The names of the aten operations that run inside the blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.inside = False
        first, last = model.model.layers[0], model.model.norm
        self.hooks = [
            first.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            last.register_forward_pre_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self.hooks:
            hook.remove()


def laid(model: Any, rule: Rule, name: str = "LoReFT") -> TrailMap:
    return TrailMap({site: MOVING[name](DIM) for site in sites(model, "all", rule)})


def decode_step(model: Any, trails: TrailMap | None) -> list[str]:
    """The operations inside the blocks at the step that follows a prefill."""
    cache, mask = transformers.DynamicCache(), torch.ones(3, 7, dtype=torch.long)
    handle = None if trails is None else attach(model, trails)
    model(INPUTS["input_ids"], past_key_values=cache, attention_mask=mask[:, :6])
    with Counted(model) as counted:
        model(INPUTS["input_ids"][:, :1], past_key_values=cache, attention_mask=mask)
    if handle is not None:
        handle.remove()
    return counted.ops


@pytest.mark.parametrize("rule", PROMPT_RULES, ids=str)
@torch.no_grad()
def test_decoding_under_a_prompt_rule_runs_what_the_frozen_model_runs(rule: Rule) -> None:
    model = llama()
    assert decode_step(model, laid(model, rule)) == decode_step(model, None)


@torch.no_grad()
def test_decoding_under_an_answer_rule_does_run_more() -> None:
    model = llama()
    assert len(decode_step(model, laid(model, Answer()))) > len(decode_step(model, None))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "inputs", "taken", "left_out"),
    [
        (All(), {"input_ids": INPUTS["input_ids"]}, "aten.linear", "aten.index_select.default"),
        (All(), INPUTS, "aten.index_select.default", "aten.where.self"),
        (Last(1), INPUTS, "aten.index_copy.default", "aten.where.self"),
    ],
)
def test_no_masked_copy_of_all_states(rule: Rule, inputs: Any, taken: str, left_out: str) -> None:
    model = llama()
    with Counted(model) as frozen:
        model(**inputs)
    with attach(model, laid(model, rule)), Counted(model) as moved:
        model(**inputs)
    extra = len(moved.ops) - len(frozen.ops)
    assert extra > 0 and moved.ops.count(left_out) == frozen.ops.count(left_out)
    if taken != "aten.linear":
        assert moved.ops.count(taken) == frozen.ops.count(taken) + len(model.model.layers)


@pytest.mark.parametrize("name", MOVING)
def test_a_place_where_nothing_is_chosen_gives_zero_gradients(name: str) -> None:
    """As a masked sum would: DDP waits for every parameter, and an optimizer tells none from zero."""
    model = llama().requires_grad_(False)
    trails = laid(model, Answer(), name)
    with attach(model, trails):  # without labels, everything is prompt
        logits = model(**INPUTS).logits
        logits.sum().backward()
    assert torch.equal(logits, model(**INPUTS).logits)
    for parameter in trails.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def densely(plan: Any, moment: Any) -> Any:
    return dataclasses.replace(plan(moment), chosen=None)


@pytest.mark.parametrize("name", MOVING)
def test_gathered_states_move_as_all_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the gathered way equal those of the dense way, which torch.compile takes."""
    model = llama().double().requires_grad_(False)
    trails = laid(model, First(1) | Last(2), name).double()
    outputs: list[torch.Tensor] = []
    grads: list[list[torch.Tensor]] = []
    for dense in (False, True):
        trails.zero_grad()
        with attach(model, trails) as handle:
            if dense:
                monkeypatch.setattr(handle, "_plan", partial(densely, handle._plan))
            outputs.append(model(**INPUTS).logits)
            outputs[-1].square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in trails.parameters()])
    assert_close(*outputs)
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)
