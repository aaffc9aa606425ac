"""Rehearsal: the loss is that of its definition, on texts and answers, and what is forgotten without it is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Imitate, Replay, Stay, mix, steps
from tokenpaths.data import Mix, collate
from tokenpaths.training import Step

Watch = Callable[[nn.Module], nn.Module]


def plain(count: int = 6, seed: int = 3) -> list[tp.Example]:
    return [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(count, seed)]


def both(count: int = 6) -> list[tp.Example]:
    return [e for pair in zip(plain(count), make_examples(count, 5), strict=True) for e in pair]


def by_hand(model: Any, examples: list[tp.Example]) -> tuple[Tensor, int]:
    """The loss text by text, in float64, and the number of its terms."""
    terms: list[Tensor] = []
    for e in examples:
        wanted = range(1, len(e)) if not any(e.answer) else [i for i in range(len(e)) if e.answer[i]]
        ids = torch.tensor([e.ids])
        prompt = torch.tensor([[i < e.prompt_length for i in range(len(e))]])
        logits = model(ids, prompt_mask=prompt).logits[0].double().log_softmax(-1)
        terms += [-logits[i - 1, e.ids[i]] for i in wanted]
    return torch.stack(terms).mean(), len(terms)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("examples", [plain(), make_examples(6), both()], ids=["texts", "answers", "both"])
def test_the_loss_and_its_gradient_are_those_of_the_definition(
    examples: list[tp.Example], side: Any, watch: Watch
) -> None:
    model = watch(llama().double())
    trails = tp.TrailMap({tp.Site(0): tp.LoReFT(DIM, 2, init="paper"), tp.Site(1, tp.Last(1)): tp.Additive(DIM)})
    trails.double()
    with tp.attach(model, trails):
        expected, terms = by_hand(model, examples)
        gradients = torch.autograd.grad(expected, list(trails.parameters()))
        goal = Replay(examples)
        found = goal.loss(model, trails, collate(examples, side=side))
        ours = torch.autograd.grad(found, list(trails.parameters()))
    assert goal.terms(examples) == terms
    tolerance = 1e-10 if side == "right" else 1e-5  # the rotations of shifted places, which Llama has in float32
    assert abs(float((found - expected).detach())) < tolerance
    for mine, definition in zip(ours, gradients, strict=True):
        assert (mine - definition).abs().max() < tolerance
    assert max(gradient.abs().max() for gradient in gradients) > 1e-4


def test_on_answers_it_is_imitation() -> None:
    model, trails, batch = llama(), make_trails(), collate(make_examples(8))
    with tp.attach(model, trails):
        found = Replay(make_examples(8)).loss(model, trails, batch)
        torch.testing.assert_close(found, Imitate(make_examples(8)).loss(model, trails, batch), rtol=1e-6, atol=0)


def test_the_loss_of_parts_weighted_by_their_terms_is_that_of_the_whole() -> None:
    model, trails, examples = llama(), make_trails(), both()
    goal = Replay(examples)
    with tp.attach(model, trails):
        whole = goal.loss(model, trails, collate(examples))
        parts = [examples[:3], examples[3:5], examples[5:]]
        losses = [goal.terms(p) / goal.terms(examples) * goal.loss(model, trails, collate(p)) for p in parts]
    assert float((sum(losses) - whole).detach()) == pytest.approx(0, abs=1e-5)


def test_token_rules_see_a_plain_text_as_prompt_throughout() -> None:
    examples, trails = plain(), tp.TrailMap({tp.Site(1, tp.Answer()): tp.Additive(DIM)})
    with torch.no_grad():
        trails[tp.Site(1, tp.Answer())].v.fill_(1.0)  # type: ignore[union-attr, operator]
    model = llama()
    with torch.no_grad():
        frozen = float(by_hand(lambda ids, prompt_mask: model(ids), examples)[0])
        with tp.attach(model, trails):
            found = float(Replay(examples).loss(model, trails, collate(examples)))
    assert found == pytest.approx(frozen, abs=1e-5)


def train(goals: list[Any], **options: Any) -> tuple[tp.TrailMap, list[Step]]:
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(i): tp.DiReFT(DIM, 4) for i in (0, 1, 2)})
    options = {"steps": 30, "batch_size": 8, "lr": 4e-2, "progress": False, **options}
    return trails, list(steps(llama(), trails, goals, **options))


def test_it_holds_what_is_forgotten_without_it() -> None:
    """Old answers are learned, or kept, beside the task's; without them, they are lost."""
    model, task = llama(), make_examples(16)
    old = [replace(e, ids=(*e.ids[:-1], int(model(torch.tensor([e.ids])).logits[0, -2].argmax()))) for e in plain(16)]

    def nats(trails: tp.TrailMap) -> float:
        with torch.no_grad(), tp.attach(model, trails):
            return float(Replay(old).loss(model, trails, collate(old)))

    without = nats(train([Imitate(task)])[0])
    rehearsed, done = train([Imitate(task), Replay(old, every=2, batch_size=4)])
    assert nats(rehearsed) < without - 1
    assert [step.losses[1] == step.losses[1] for step in done[:4]] == [True, False, True, False]  # NaN in between


def test_rehearsal_by_kl_is_stay_at_a_fixed_weight() -> None:
    _, done = train([Imitate(make_examples(16)), Stay(plain(), weight=0.7, gain=0.0)], steps=5)
    assert {step.weights[1] for step in done} == {0.7}


def test_one_stream_trains_on_answers_and_on_texts() -> None:
    mixed = mix(make_examples(12), plain(4), 0.25)
    goal = Replay(mixed)
    assert goal.terms(mixed) == sum(sum(e.answer) or len(e) - 1 for e in mixed)
    trails, done = train([goal], steps=4, batch_size=4)
    again, _ = train([Replay(mixed)], steps=4, batch_size=2, accumulate=2)
    assert_equal(state(trails), state(again), 1e-3)
    assert all(step.loss > 0 for step in done)


@dataclass
class Seen(Replay):
    """Notes which texts each step is made of."""

    steps: list[list[int]] = field(default_factory=list)

    def loss(self, model: nn.Module, trails: tp.TrailMap, batch: tp.data.Batch) -> Tensor:
        self.steps.append(sorted(batch.attention_mask.sum(1).tolist()))
        return super().loss(model, trails, batch)


def test_every_step_has_its_share_of_one_stream_and_a_resumed_run_goes_on_in_it(tmp_path: Path) -> None:
    """Of 24 questions and 5 texts, longer than any of them, 1 in 8 is a text: in each step of 8, for many epochs."""
    texts = [tp.Example(tuple(range(3, 23 + i)), (False,) * (20 + i)) for i in range(5)]
    mixed = mix(make_examples(24), texts, 0.125, seed=4)
    options: dict[str, Any] = {"steps": 9, "batch_size": 8, "checkpoint": tmp_path, "save_every": 4}
    whole = Seen(mixed)
    train([whole], **{**options, "checkpoint": tmp_path / "whole"})
    assert [step[:-1] for step in whole.steps] == [sorted(len(e) for e in step) for step in unmixed(mixed, 9)]
    assert [step[-1] for step in whole.steps] == [len(e) for e in originals(mixed, 9)]
    cut = Seen(mixed)
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(i): tp.DiReFT(DIM, 4) for i in (0, 1, 2)})
    run = steps(llama(), trails, [cut], lr=4e-2, progress=False, **options)
    for step in run:
        if step.step == 6:
            run.close()
    again = Seen(mixed)
    list(steps(llama(), trails, [again], lr=4e-2, progress=False, resume=True, **options))
    assert again.steps == whole.steps[4:]


def unmixed(mixed: Mix[tp.Example], steps: int) -> list[list[tp.Example]]:
    found = [[mixed.at(i) for i in range(8 * n, 8 * n + 8) if mixed.origin(i)[0] == "task"] for n in range(steps)]
    assert {len(step) for step in found} == {7}
    return found


def originals(mixed: Mix[tp.Example], steps: int) -> list[tp.Example]:
    return [mixed.at(i) for i in range(8 * steps) if mixed.origin(i)[0] == "original"]


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="Replay: example 1 has one token, and none after it to predict"):
        Replay([tp.Example((3, 4), (False, False)), tp.Example((3,), (False,))])
    with pytest.raises(ValueError, match="Replay has no examples to train on"):
        Replay([])
