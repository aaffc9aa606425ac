"""Attached trails move what they should and nothing else: against forward passes written out by hand."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from families import V5
from subjects import MOVING, TRAILS, tiny
from torch import Tensor

from tokenpaths import All, Answer, First, Last, Site, Trail, TrailMap, attach, width
from tokenpaths.tokens import Rule
from tokenpaths.trails import Chain, Scaled

FAMILIES = ("gpt2", "llama")
PLACES = (("embedding", 0), ("block", 1), ("attention", 1), ("mlp", 1), ("head", 1))
COLUMNS = 9
LENGTHS = {"none": (9, 9, 9), "left": (9, 5, 1), "right": (9, 5, 1)}
RULES: dict[str, Rule] = {"first": First(2), "last": Last(2), "both ends": First(1) | Last(3), "all": All()}

# What each rule chooses among 9, 5 and 1 real tokens, counted by hand.
CHOSEN = {
    "first": {9: (0, 1), 5: (0, 1), 1: (0,)},
    "last": {9: (7, 8), 5: (3, 4), 1: (0,)},
    "both ends": {9: (0, 6, 7, 8), 5: (0, 2, 3, 4), 1: (0,)},
    "all": {9: range(9), 5: range(5), 1: (0,)},
}

# A trail laid in the oracle: stream, layer, head, trail, chosen tokens
Laid = tuple[str, int, int, Trail, Tensor]


def batch(side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (3, COLUMNS), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS[side]):
        mask[row, slice(COLUMNS - length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": oracles.positions(mask)}


def chosen(rule: str, side: str) -> Tensor:
    mask = torch.zeros(3, COLUMNS, dtype=torch.bool)
    for row, length in enumerate(LENGTHS[side]):
        start = COLUMNS - length if side == "left" else 0
        for position in CHOSEN[rule][length]:
            mask[row, start + position] = True
    return mask


def site(stream: str, layer: int, rule: Rule, head: int = 2) -> Site:
    return Site(layer, rule, "attention", head) if stream == "head" else Site(layer, rule, stream)


def expected(family: str, model: Any, inputs: dict[str, Tensor], *laid: Laid) -> list[Tensor]:
    """The states after each block, and the logits, with the trails laid by hand. Later trails read the same state."""
    states: list[Tensor] = []

    def edit(stream: str, layer: int, h: Tensor) -> Tensor:
        moved = h.clone()
        for at, depth, head, trail, mask in laid:
            if (at, depth) == ("head", layer) and stream == "head":
                moved[:, :, head] += trail(h[:, :, head]) * mask[..., None]
            elif (at, depth) == (stream, layer):
                moved += trail(h) * mask[..., None]
        if stream == "block":
            states.append(moved)
        return moved

    logits = getattr(oracles, family)(model, inputs["input_ids"], inputs["attention_mask"], edit)
    return [*states, logits]


def found(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The same from the Hugging Face model, with whatever is attached to it."""
    states: list[Tensor] = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    keep = lambda *call: states.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])  # noqa: E731
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*states, logits]


def differ(some: list[Tensor], others: list[Tensor], inputs: dict[str, Tensor]) -> float:
    """The largest difference at a real token."""
    assert len(some) == len(others) == 4
    real = inputs["attention_mask"].bool()
    return max((a - b)[real].abs().max().item() for a, b in zip(some, others, strict=True))


@torch.no_grad()
def check(family: str, model: Any, inputs: dict[str, Tensor], trails: TrailMap, *laid: Laid) -> None:
    frozen = found(model, inputs)
    with attach(model, trails):
        moved = found(model, inputs)
    assert differ(moved, expected(family, model, inputs, *laid), inputs) < 1e-10
    assert differ(moved, frozen, inputs) > 1e-3
    again = found(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, frozen, strict=True))


# --- the oracle itself

ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}} if V5 else {"rope_theta": 50.0}
VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 17}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 10}),
    ("llama", {"tie_word_embeddings": True, **ROPE}),
]


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@torch.no_grad()
def test_the_oracle_is_the_model(family, changes, side):
    model, inputs = tiny(family, **changes), batch(side)
    frozen = found(model, inputs)
    for module in model.modules():
        module.forward = None  # the oracle calls none of them
    with pytest.raises(TypeError):
        model(**inputs)
    assert differ(expected(family, model, inputs), frozen, inputs) < 1e-10


# --- one site


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("stream", "layer"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stream_and_rule(family, stream, layer, rule, side, watch):
    model = watch(tiny(family))
    place = site(stream, layer, RULES[rule])
    assert width(model, place) == (6 if stream == "head" else 24)
    trail = MOVING["Chain"](width(model, place)).double()
    check(family, model, batch(side), TrailMap({place: trail}), (stream, layer, 2, trail, chosen(rule, side)))


@pytest.mark.parametrize("name", TRAILS)
@pytest.mark.parametrize(("stream", "layer"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trail_at_every_stream(family, stream, layer, name):
    model = tiny(family)
    place = site(stream, layer, First(1) | Last(3))
    trail = MOVING[name](width(model, place)).double()
    laid = (stream, layer, 2, trail, chosen("both ends", "left"))
    check(family, model, batch("left"), TrailMap({place: trail}), laid)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("head", range(4))
def test_every_head(family, changes, layer, head):
    model = tiny(family, **changes)
    place = site("head", layer, All(), head)
    trail = MOVING["LoReFT"](width(model, place)).double()
    check(family, model, batch("right"), TrailMap({place: trail}), ("head", layer, head, trail, chosen("all", "right")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_labels(family):
    """With labels, the prompt ends before the first of them."""
    model, inputs = tiny(family), batch("left")
    labels = inputs["input_ids"].clone()
    labels[:, :8] = -100
    labels[0, 4:8] = inputs["input_ids"][0, 4:8]
    inputs["labels"] = labels
    last = torch.zeros(3, COLUMNS, dtype=torch.bool)
    last[0, 3] = last[1, 7] = True  # the third row is all answer: it has no prompt
    answer = torch.zeros(3, COLUMNS, dtype=torch.bool)
    answer[0, 4:] = answer[1:, 8] = True
    one, other = (MOVING[name](24).double() for name in ("LoReFT", "DiReFT"))
    trails = TrailMap({Site(1, Last(1)): one, Site(1, Answer()): other})
    check(family, model, inputs, trails, ("block", 1, 0, one, last), ("block", 1, 0, other, answer))


# --- several


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_streams_of_all_layers_at_once(family, side):
    model = tiny(family)
    names, rules = list(TRAILS), list(RULES)
    trails: dict[Site, Trail] = {}
    laid: list[Laid] = []
    places = [("embedding", 0, 0)]
    for layer in range(3):
        places += [("block", layer, 0), ("attention", layer, 0), ("mlp", layer, 0)]
        places += [("head", layer, head) for head in range(4)]
    for count, (stream, layer, head) in enumerate(places):
        rule = rules[count % len(rules)]
        place = site(stream, layer - 3 if stream == "mlp" else layer, RULES[rule], head)
        trail = Scaled(MOVING[names[count % len(names)]](width(model, place)).double(), 0.1)
        trails[place] = trail
        laid.append((stream, layer, head, trail, chosen(rule, side)))
    check(family, model, batch(side), TrailMap(trails), *laid)


@pytest.mark.parametrize(("stream", "layer"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trails_at_one_place_read_the_same_state_and_add_up(family, stream, layer):
    model, rules = tiny(family), ("first", "both ends", "all")
    dim = width(model, site(stream, layer, All()))
    three = [MOVING[name](dim).double() for name in ("LoReFT", "RED", "PSR")]
    trails = TrailMap({site(stream, layer, RULES[rule]): trail for rule, trail in zip(rules, three, strict=True)})
    laid = [(stream, layer, 2, t, chosen(r, "right")) for r, t in zip(rules, three, strict=True)]
    check(family, model, batch("right"), trails, *laid)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_trail_is_the_same_at_all_its_sites(family):
    model, trail = tiny(family), MOVING["NoReFT"](24).double()
    trails = TrailMap({Site(layer, Last(2)): trail for layer in (0, 2)})
    laid = [("block", layer, 0, trail, chosen("last", "left")) for layer in (0, 2)]
    check(family, model, batch("left"), trails, *laid)


@pytest.mark.parametrize(("stream", "layer"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_later_attachment_reads_the_state_as_moved(family, stream, layer):
    model, inputs, place = tiny(family), batch("left"), site(stream, layer, First(2))
    one, other = (MOVING[name](width(model, place)).double() for name in ("LoReFT", "RED"))
    with attach(model, TrailMap({place: one})), attach(model, TrailMap({place: other})):
        moved = found(model, inputs)
    laid = (stream, layer, 2, Chain(one, other), chosen("first", "left"))
    assert differ(moved, expected(family, model, inputs, laid), inputs) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_strength_multiplies_every_displacement(family):
    model, inputs = tiny(family), batch("right")
    one, other = (MOVING[name](24).double() for name in ("LoReFT", "DiReFT"))
    trails = TrailMap({Site(0, Last(2)): one, Site(2, All(), "mlp"): other})
    with attach(model, trails) as handle:
        for strength in (0.5, -1.0, 0.0):
            handle.strength = strength
            laid = (
                ("block", 0, 0, Scaled(one, strength), chosen("last", "right")),
                ("mlp", 2, 0, Scaled(other, strength), chosen("all", "right")),
            )
            assert differ(found(model, inputs), expected(family, model, inputs, *laid), inputs) < 1e-10


@pytest.mark.parametrize(("stream", "layer"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_trails(family, stream, layer):
    model, inputs = tiny(family).requires_grad_(False), batch("left")
    place = site(stream, layer, Last(2))
    trail = MOVING["LoReFT"](width(model, place)).double()
    real = inputs["attention_mask"].bool()
    cotangent = torch.randn(3, COLUMNS, 61, dtype=torch.float64)[real]

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logits[real] * cotangent).sum(), list(trail.parameters())))

    with attach(model, TrailMap({place: trail})):
        ours = gradients(model(**inputs).logits)
    laid = (stream, layer, 2, trail, chosen("last", "left"))
    theirs = gradients(expected(family, model, inputs, laid)[-1])
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the backward of RMSNorm is float32
