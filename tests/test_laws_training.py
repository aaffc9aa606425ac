"""Laws 4 and 8 over a training step: where the gradients come from, in which dtype, and what labels say."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from laws import PROMPTS, Case, assert_close, block_outputs, padded, plans
from subjects import MOVING, TRAILS
from torch import nn

from tokenpaths import All, Answer, First, Last, LoReFT, Prompt, Site, Trail, TrailMap, attach
from tokenpaths.site.host import find_blocks

FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])
STREAM = pytest.mark.parametrize("stream", ["block", "embedding", "attention", "mlp", "head"])


def laid(family: str, rule: str = "answer", stream: str = "block", trail: str = "LoReFT"):
    case = Case(family, FAMILIES[family].blocks, trail, rule, stream)
    model = case.model()
    return case, model, case.trails(model, MOVING[trail])


def labelled(rows, prompt=2):
    inputs = padded(rows, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return dict(**inputs, labels=labels)


def grads(trails):
    return [parameter.grad.clone() for parameter in trails.parameters()]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert_close(one, other)


# --- which forward a backward computes again


@pytest.mark.parametrize("reentrant", [False, True])
@STREAM
def test_one_backward_through_two_checkpointed_forwards(stream, reentrant):
    """The second forward has other tokens, another strength and other rows chosen; each is recomputed as it was."""
    results = []
    for checkpointing in (False, True):
        case, model, trails = laid("llama", "answer", stream)
        model.train().enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with attach(model, trails) as handle:
            first = model(**labelled(PROMPTS)).loss
            handle.strength = 0.5
            second = model(**labelled([row[::-1] for row in PROMPTS[:2]], prompt=3)).loss
            handle.strength = 0.0
            (first + 2 * second).backward()
        results.append(grads(trails))
    assert_same(*results)


def test_a_generation_between_forward_and_backward():
    results = []
    for checkpointing in (False, True):
        case, model, trails = laid("llama", "answer", "mlp")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with attach(model, trails):
            loss = model(**labelled(PROMPTS)).loss
            model.eval().generate(**padded(PROMPTS), max_new_tokens=2)
            model.train()
            loss.backward()
        results.append(grads(trails))
    assert_same(*results)


def test_a_loss_on_hidden_states_is_recomputed_as_it_was():
    results = []
    for checkpointing in (False, True):
        case, model, trails = laid("llama", "answer", "mlp")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with attach(model, trails):
            states = model(**labelled(PROMPTS), output_hidden_states=True).hidden_states
            with torch.no_grad(), trails.off():
                model(**padded(PROMPTS[:1]))
            states[2].square().mean().backward()
        results.append([torch.zeros(1) if p.grad is None else p.grad for p in trails.parameters()])
    assert_same(*results)


@FAMILY
def test_backward_after_the_end(family):
    """Without checkpointing the graph needs no hooks: the backward may come after the trails were removed."""
    _, model, trails = laid(family)
    with attach(model, trails):
        model(**labelled(PROMPTS)).loss.backward()
    inside = grads(trails)
    trails.zero_grad()
    with attach(model, trails):
        loss = model(**labelled(PROMPTS)).loss
    loss.backward()
    assert_same(grads(trails), inside)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stream", ["attention", "mlp", "head"])
def test_checkpointed_backward_after_the_end(stream, reentrant):
    """Reentrant checkpointing would leave the trails without a gradient, and say nothing."""
    _, model, trails = laid("llama", stream=stream)
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    with attach(model, trails):
        loss = model(**labelled(PROMPTS)).loss
    with pytest.raises(RuntimeError, match="removed before backward"):
        loss.backward()


# --- batches


@STREAM
@FAMILY
def test_eight_is_four_and_four(family, stream):
    _, model, trails = laid(family, "answer", stream)
    rows = [row[shift:] + row[:shift] for row in PROMPTS for shift in range(3)][:8]
    with attach(model, trails):
        for parts in ([rows], [rows[:4], rows[4:]], [[row] for row in rows]):
            trails.zero_grad()
            for part in parts:
                inputs = labelled(part)
                labels = inputs.pop("labels")
                mask = (labels == -100) & (inputs["attention_mask"] == 1)
                logits = model(**inputs, prompt_mask=mask).logits[:, :-1]
                nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
            if len(parts) == 1:
                whole = grads(trails)
            assert_same(grads(trails), whole)


@pytest.mark.parametrize("trail", TRAILS)
def test_every_trail_learns(trail):
    """From its fresh state a trail gets a gradient, and a few steps lower the loss; the model keeps its weights."""
    case = Case("llama", "model.layers", trail, "all", "block")
    model = case.model()
    trails = case.trails(model, TRAILS[trail])
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(trails.parameters(), lr=0.02)
    losses = []
    with attach(model, trails):
        for _ in range(8):
            loss = model(**labelled(PROMPTS)).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@STREAM
@FAMILY
def test_a_coarse_model(family, stream, dtype):
    """float32 trails on a half-precision model: fresh ones change no bit, moving ones round once."""
    case = Case(family, FAMILIES[family].blocks, "LoReFT", "last", stream)
    model = case.model().to(dtype)
    model.enable_input_require_grads()  # torch takes another attention kernel, which rounds otherwise, for a gradient
    inputs = padded(PROMPTS)
    frozen = model(**inputs).logits
    fresh, moving = (case.trails(model, make["LoReFT"]) for make in (TRAILS, MOVING))
    with attach(model, fresh):
        assert torch.equal(model(**inputs).logits, frozen)
    with attach(model, moving):
        output = model(**inputs)
        assert output.logits.dtype == dtype and not torch.equal(output.logits, frozen)
        output.logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moving.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_moved_state_is_rounded_once(dtype):
    case, model, trails = laid("llama", "all")
    model = model.to(dtype)
    one = TrailMap({Site(1): MOVING["LoReFT"](32)})
    inputs = padded(PROMPTS[:1])
    frozen = block_outputs(model, case, inputs)
    with attach(model, one):
        moved = block_outputs(model, case, inputs)
    h = frozen[1].float()
    with torch.no_grad():
        assert torch.equal(moved[1], (h + one[Site(1)](h)).to(dtype))


def test_coarse_trails_do_not_coarsen_the_state():
    case = Case("llama", "model.layers", "RED", "all", "block")
    model = case.model()
    inputs = padded(PROMPTS)
    fresh = case.trails(model, TRAILS["RED"]).to(torch.bfloat16)
    frozen = model(**inputs).logits
    with attach(model, fresh):
        assert torch.equal(model(**inputs).logits, frozen)


def test_a_double_model_keeps_its_digits_under_a_trail_without_parameters():
    class Nudge(Trail):
        def forward(self, h):
            return 1e-12 * h

    case, model, _ = laid("llama")
    model = model.double()
    inputs = padded(PROMPTS[:1])
    frozen = block_outputs(model, case, inputs)
    with attach(model, TrailMap({Site(0): Nudge()})):
        moved = block_outputs(model, case, inputs)
    torch.testing.assert_close(moved[0] / frozen[0] - 1, torch.full_like(moved[0], 1e-12), atol=1e-15, rtol=0)


@pytest.mark.parametrize("trail", TRAILS)
def test_autocast(trail):
    """Trails compute in their own dtype, not in autocast's: fresh ones change no bit."""
    case = Case("llama", "model.layers", trail, "all", "block")
    model = case.model()
    inputs = labelled(PROMPTS)
    trails = case.trails(model, TRAILS[trail])
    with torch.autocast("cpu", torch.bfloat16):
        frozen = model(**inputs).logits
        with attach(model, trails):
            output = model(**inputs)
    assert torch.equal(output.logits, frozen) or trail == "ConstantReFT"
    output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trails.parameters())


def test_autocast_does_not_coarsen_a_trail():
    case = Case("llama", "model.layers", "LoReFT", "all", "block")
    model, one, inputs = case.model(), TrailMap({Site(1): MOVING["LoReFT"](32)}), padded(PROMPTS[:1])
    with torch.autocast("cpu", torch.bfloat16):
        h = block_outputs(model, case, inputs)[1]
        with attach(model, one):
            moved = block_outputs(model, case, inputs)[1]
    with torch.no_grad():
        assert torch.equal(moved, (h + one[Site(1)](h.float())).to(h.dtype))


# --- what labels say


def planned(handle, model, *args, **kwargs):
    """The masks by which a forward is moved."""
    with plans(handle) as seen:
        model(*args, **kwargs)
    return seen[-1].masks


def masks(model, trails, *args, **kwargs):
    with attach(model, trails) as handle:
        found = planned(handle, model, *args, **kwargs)
    return dict(zip([type(site.tokens).__name__ for site in trails.sites], found, strict=True))


def everywhere(*rules):
    return TrailMap({Site(0, rule): LoReFT(32, 1) for rule in rules})


RULES4 = (Prompt(), Answer(), Last(1), First(1))


@FAMILY
def test_labels_divide_prompt_from_answer(family):
    model = FAMILIES[family].make()
    inputs = labelled(PROMPTS[:2])
    for found in (
        masks(model, everywhere(*RULES4), **inputs),
        masks(model, everywhere(*RULES4), inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}),
    ):
        assert found["Prompt"].int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
        assert found["Answer"].int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
        assert found["Last"].int().tolist() == [[0, 1, 0, 0, 0, 0]] * 2


def test_labels_by_position():
    model = FAMILIES["llama"].make()
    inputs = labelled(PROMPTS[:2])
    by_position = (inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    found = masks(model, everywhere(*RULES4), *by_position)
    assert found["Last"].int().tolist() == [[0, 1, 0, 0, 0, 0]] * 2


def test_several_turns():
    """The prompt ends at the first label: later turns of the user are not of it."""
    model = FAMILIES["llama"].make()
    ids = torch.tensor([PROMPTS[0]])
    labels = torch.tensor([[-100, -100, 31, -100, 8, 90]])
    found = masks(model, everywhere(*RULES4), ids, labels=labels)
    assert found["Prompt"].int().tolist() == [[1, 1, 0, 0, 0, 0]]
    assert found["Answer"].int().tolist() == [[0, 0, 1, 1, 1, 1]]


def test_a_prompt_mask_comes_before_labels():
    model = FAMILIES["llama"].make()
    inputs = labelled(PROMPTS[:1])
    found = masks(model, everywhere(*RULES4), **inputs, prompt_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    assert found["Last"].int().tolist() == [[0, 0, 0, 1, 0, 0]]


def test_labels_of_a_classifier_are_not_read():
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    config = FAMILIES["llama"].make().config
    for cls, labels in (
        (LlamaForSequenceClassification, torch.tensor([0, 1])),
        (LlamaForTokenClassification, torch.tensor([[-100, -100, 1, 1, 1, 1]] * 2)),
    ):
        model = cls(config)
        found = masks(model, everywhere(*RULES4), **padded(PROMPTS[:2], "right"), labels=labels)
        assert found["Prompt"].int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_to_an_encoder_everything_is_prompt(family):
    model = FAMILIES[family].make()
    inputs = labelled(PROMPTS[:2])
    found = masks(model, everywhere(*RULES4), **inputs)
    assert torch.equal(found["Prompt"], inputs["attention_mask"].bool()) and not found["Answer"].any()


def test_the_two_sides_of_an_encoder_decoder():
    model = FAMILIES["t5"].make()
    inputs = labelled(PROMPTS[:2])
    for blocks, written in (("encoder.block", False), ("decoder.block", True)):
        trails = TrailMap({Site(0, rule): LoReFT(32, 1) for rule in RULES4}, blocks=blocks)
        found = masks(model, trails, **inputs)
        assert found["Answer"].any() == written and found["Prompt"].any() != written


def test_a_base_model_without_a_head():
    """It has no labels and does not generate, but its cache is known all the same."""
    model = FAMILIES["llama"].make().model
    trails = everywhere(*RULES4)
    with attach(model, trails) as handle:
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        found = planned(handle, model, torch.tensor([[7]]), past_key_values=cache)
    assert [bool(mask) for mask in found] == [False, True, False, False]


def test_all_sites_of_a_rule_share_one_mask():
    model = FAMILIES["llama"].make()
    trails = TrailMap({Site(layer, All()): LoReFT(32, 1) for layer in range(len(find_blocks(model)))})
    with attach(model, trails) as handle:
        found = planned(handle, model, torch.tensor([PROMPTS[0]]))
    assert len(found) == 1
