"""Staying close: each distance by its definition, budgets that are kept, and steps that go no further than they may."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, VOCAB, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import DiReFT, Imitate, Stay, steps
from tokenpaths.data import collate
from tokenpaths.drift import attention_js, displacement, kl
from tokenpaths.engine import Logits, read, runs
from tokenpaths.engine import logits as head
from tokenpaths.engine.logits import kl_from
from tokenpaths.limits import TrustRegion
from tokenpaths.training import StayAttention, StayMoments, StayStates, Step

Watch = Callable[[nn.Module], nn.Module]
KINDS = [Stay, StayStates, StayMoments, StayAttention]


def texts(count: int = 6) -> list[tp.Example]:
    return [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(count, seed=3)]


def model_for(kind: type[Stay] = Stay) -> Any:
    model = llama()
    if kind is StayAttention:
        model.set_attn_implementation("eager")
    return model


def moving(init: Any = "paper") -> tp.TrailMap:
    torch.manual_seed(0)
    return tp.TrailMap({site: DiReFT(DIM, 2, init=init) for site in (tp.Site(0), tp.Site(1))})


def by_hand(kind: type[Stay], model: Any, trails: tp.TrailMap, examples: list[tp.Example]) -> float:
    """The distance from two plain forwards, text by text, in float64."""
    seen: list[list[Any]] = []
    states: list[list[Tensor]] = []  # of each run, text and block; what transformers 4 gives lacks what trails add

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states[-1].append((output[0] if isinstance(output, tuple) else output).reshape(-1, DIM))

    for on in (False, True):
        outputs: list[Any] = []
        states.append([])
        with torch.no_grad(), tp.attach(model, trails) if on else nullcontext():
            handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
            for example in examples:
                outputs.append(model(torch.tensor([example.ids]), output_attentions=kind is StayAttention))
            for handle in handles:
                handle.remove()
        seen.append(outputs)
    if kind is Stay:
        p, q = (torch.cat([o.logits[0] for o in run]).double().log_softmax(-1) for run in seen)
        return float((p.exp() * (p - q)).sum(-1).mean())
    if kind is StayAttention:
        rows = [
            (p[0].double() * (p[0].double().clamp_min(1e-30).log() - q[0].double().clamp_min(1e-30).log())).sum(-1)
            for x, y in zip(*seen, strict=True)
            for p, q in zip(x.attentions, y.attentions, strict=True)
        ]
        return float(sum(r.sum() for r in rows) / sum(r.numel() for r in rows))
    found: list[Tensor] = []
    for layer in range(2):
        x, y = (torch.cat(run[layer::2]).double() for run in states)
        if kind is StayStates:
            found.append(((y - x).norm(dim=-1) ** 2 / x.norm(dim=-1) ** 2).mean())
        else:
            c, c2 = (torch.cov(z.mT, correction=0) for z in (x, y))
            found.append(((y.mean(0) - x.mean(0)).square().sum() + (c2 - c).norm()) / c.trace())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("count", [3, 12])  # fewer and more tokens than dimensions
@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_the_definition(kind: type[Stay], count: int) -> None:
    model, trails, examples = model_for(kind), moving(), texts(count)
    if kind in (StayStates, StayMoments):  # two blocks, so that none lies behind the final norm
        del model.model.layers[2]
        model.config.num_hidden_layers = 2
        model.model.norm = nn.Identity()
    expected = by_hand(kind, model, trails, examples)
    with tp.attach(model, trails):
        found = kind(examples).loss(model, trails, collate(examples))
    assert expected > 1e-3
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


class Backward(Stay):
    """KL(steered || frozen): a distance of one's own."""

    def distance(self, frozen: Logits, steered: Logits) -> Tensor:
        return steered.sum(lambda q, p: kl_from(p, q), frozen) / len(steered)


@pytest.mark.parametrize("kind", [Stay, Backward])
def test_the_divergence_and_its_gradient_are_those_of_whole_logits(
    kind: type[Stay], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", 4 * VOCAB * 3)  # three tokens at a time
    model, trails = watch(llama().double().requires_grad_(False)), moving().double()
    batch = collate(texts(), side="left")
    inputs: dict[str, Any] = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    with tp.attach(model, trails):
        with trails.off():
            p = model(**inputs).logits[batch.attention_mask.bool()].log_softmax(-1)
        q = model(**inputs).logits[batch.attention_mask.bool()].log_softmax(-1)
        p, q = (p, q) if kind is Stay else (q, p)
        expected = (p.exp() * (p - q)).sum(-1).mean()
        found = kind(texts()).loss(model, trails, batch)
        full, mine = (torch.autograd.grad(loss, list(trails.parameters())) for loss in (expected, found))
    assert found.dtype == torch.float64
    assert (expected - found).abs() < 1e-10
    assert all(a.abs().max() > 1e-6 and (a - b).abs().max() < 1e-10 for a, b in zip(full, mine, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_trails_are_at_distance_zero(kind: type[Stay], watch: Watch) -> None:
    model, trails = watch(model_for(kind)), moving("identity")
    with tp.attach(model, trails):
        found = kind(texts()).loss(model, trails, collate(texts()))
    assert float(found.detach()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_kept_that_is_broken_without_it(kind: type[Stay], watch: Watch) -> None:
    def run(*limits: Stay) -> list[Step]:
        trails = moving("identity")
        goals = [Imitate(make_examples(16)), *limits]
        done = list(steps(model, trails, goals, steps=60, batch_size=8, lr=2e-2, progress=False))
        with tp.attach(model, trails):
            measured.append(float(kind(texts(), within=1.0).loss(model, trails, collate(texts())).detach()))
        return done

    model, measured = watch(model_for(kind)), list[float]()
    free = run()
    within = measured[0] / 5
    held = run(kind(texts(), within=within, gain=0.5, most=1e4, batch_size=6))
    assert measured[1] < 1.5 * within  # the weight still moves when the run ends
    assert held[-1].losses[0] < held[0].losses[0]  # and the task is learned all the same
    assert len(free[-1].losses) == 1


def test_inside_the_budget_it_costs_nothing() -> None:
    """At weight 0 the trails are trained as if the goal were not there."""
    trained: list[dict[str, Tensor]] = []
    for goals in ([], [Stay(texts(), within=1e6, weight=0.0)]):
        trails = moving("identity")
        done = list(steps(llama(), trails, [Imitate(make_examples()), *goals], steps=4, batch_size=4, progress=False))
        trained.append(state(trails))
    assert_equal(*trained)
    assert [step.weights for step in done] == [(1.0, 0.0)] * 4
    assert done[-1].losses[1] > 0  # and is still measured


def test_the_weight_rises_outside_the_budget_and_falls_inside() -> None:
    goal = Stay(texts(), within=0.1, gain=0.5, most=3.0)
    assert goal.reweigh(1.0, 0.2) == pytest.approx(1.5)
    assert goal.reweigh(1.0, 0.05) == pytest.approx(0.75)
    assert goal.reweigh(0.1, 0.0) == 0.0
    assert goal.reweigh(2.9, 10.0) == 3.0


def test_a_goal_of_every_third_step_with_its_own_batch(watch: Watch) -> None:
    goal = Stay(texts(6), every=3, batch_size=2)
    seen: list[int] = []
    inner = goal.loss
    goal.loss = lambda model, trails, batch: (seen.append(len(batch)), inner(model, trails, batch))[1]  # type: ignore[method-assign]
    done = list(
        steps(
            watch(llama()), moving(), [Imitate(make_examples()), goal], steps=7, batch_size=4, accumulate=2,
            progress=False,
        )
    )  # fmt: skip
    assert [math.isnan(step.losses[1]) for step in done] == [False, True, True, False, True, True, False]
    assert seen == [2, 2, 2]
    assert done[0].tokens > done[1].tokens
    assert all(math.isfinite(step.loss) for step in done)


def test_weights_go_on_where_a_resumed_run_had_them(tmp_path: Path) -> None:
    def run(count: int, resume: bool) -> list[Step]:
        goals = [Imitate(make_examples()), Stay(texts(), within=1e-3, gain=0.3)]
        iterator = steps(
            llama(), moving("identity"), goals, steps=6, batch_size=4, checkpoint=tmp_path, save_every=3, resume=resume,
            progress=False,
        )  # fmt: skip
        found = [step for step, _ in zip(iterator, range(count), strict=False)]
        iterator.close()
        return found

    run(4, resume=False)
    resumed = run(6, resume=True)
    whole = list(
        steps(
            llama(), moving("identity"), [Imitate(make_examples()), Stay(texts(), within=1e-3, gain=0.3)], steps=6,
            batch_size=4, progress=False,
        )
    )  # fmt: skip
    assert [step.weights for step in resumed] == [step.weights for step in whole[3:]]
    assert resumed[0].weights[1] != 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(within=0.0), "within=0.0 must be"),
        (dict(within=math.nan), "within=nan must be"),
        (dict(gain=-1.0), "gain=-1.0 must be"),
        (dict(every=0), "every=0 must be at least 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
    ],
)
def test_what_is_no_budget_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stay(texts(), **wrong)


def test_attention_that_is_not_shown_is_refused_with_the_remedy(watch: Watch) -> None:
    model, trails = watch(llama()), moving()
    with tp.attach(model, trails), pytest.raises(ValueError, match=r'set_attn_implementation\("eager"\)'):
        StayAttention(texts()).loss(model, trails, collate(texts()))


# --- the trust region -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "most"), [(kl, 1e-4), (displacement, 2e-3)])
def test_no_step_goes_further_than_it_may_on_the_probe(measure: Any, most: float, watch: Watch) -> None:
    model, trails, probe = watch(llama()), moving("identity"), texts(4)
    old: list[dict[str, Tensor]] = [state(trails)]
    went: list[float] = []
    region = TrustRegion(probe, most=most, measure=measure)
    cut = 0
    for step in steps(
        model, trails, [Imitate(make_examples())], steps=6, batch_size=4, lr=3e-2, trust=region, progress=False
    ):
        before = moving("identity")
        before.load_state_dict(old[-1])
        frozen = tp.measure_drift  # the distance between the trails before and after this step, read apart
        assert frozen is tp.measure_drift
        with torch.no_grad():
            batch = collate(probe)
            inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            after = model(**inputs).logits
            with trails.off(), tp.attach(model, before):
                earlier = model(**inputs).logits
        if measure is kl:
            p, q = (x[batch.attention_mask.bool()].double().log_softmax(-1) for x in (earlier, after))
            apart = float((p.exp() * (p - q)).sum(-1).mean())
            assert apart <= most * 1.01
            assert step.trust == pytest.approx(apart, rel=1e-2, abs=1e-7)
        assert step.trust is not None and step.trust <= most
        assert step.kept is not None and 0 <= step.kept <= 1
        cut += step.kept < 1
        went.append(step.trust)
        old.append(state(trails))
    assert cut >= 3  # otherwise nothing was tested
    assert max(went) > most / 20  # and steps are not cut to nothing


def test_dropout_of_the_trails_does_not_disturb_the_probe(watch: Watch) -> None:
    """At a learning rate of zero nothing moves, so nothing is measured."""
    model, trails = watch(llama()), make_trails(dropout=0.5)
    goals, region = [Imitate(make_examples())], TrustRegion(texts(3), most=1e-9)
    done = list(steps(model, trails, goals, steps=3, batch_size=4, lr=0.0, trust=region, progress=False))
    assert [(step.kept, step.trust) for step in done] == [(1.0, 0.0)] * 3


def test_a_bound_on_attention(watch: Watch) -> None:
    model, trails, most = watch(model_for(StayAttention)), moving("identity"), 1e-5
    region = TrustRegion(texts(3), most=most, attention=attention_js)
    done = list(
        steps(model, trails, [Imitate(make_examples())], steps=4, batch_size=4, lr=3e-2, trust=region, progress=False)
    )
    assert all(step.trust is not None and step.trust <= most for step in done)
    assert any(step.kept is not None and 0 < step.kept < 1 for step in done)
    with pytest.raises(ValueError, match="eager"):
        next(steps(llama(), trails, [Imitate(make_examples())], steps=1, trust=region, progress=False))


def test_a_cap_that_is_drawn_tighter_while_training_holds(watch: Watch) -> None:
    model, examples = watch(llama()), make_examples()
    trails = tp.TrailMap({tp.Site(0): tp.Capped(DiReFT(DIM, 2, init="paper"), 0.5)})
    (trail,) = (trail for _, trail in trails.items())
    for step in steps(model, trails, [Imitate(examples)], steps=4, batch_size=4, lr=3e-1, progress=False):
        trail.cap = 0.5 / 2**step.step
        (pair,) = read(*runs(model, trails), collate(examples[-1:]))
        moved = (pair[1].states["block 0"] - pair[0].states["block 0"]).norm(dim=-1)
        assert 0.5 * trail.cap < (moved / pair[0].states["block 0"].norm(dim=-1)).max() <= trail.cap * 1.0001


def test_a_wide_region_changes_nothing() -> None:
    trained: list[dict[str, Tensor]] = []
    for region in (None, TrustRegion(texts(), most=1e9)):
        trails = moving("identity")
        done = list(
            steps(llama(), trails, [Imitate(make_examples())], steps=4, batch_size=4, trust=region, progress=False)
        )
        trained.append(state(trails))
    assert_equal(*trained)
    assert [step.kept for step in done] == [1.0] * 4


def test_a_step_that_no_cut_brings_inside_is_not_taken() -> None:
    trails = moving("identity")
    start = state(trails)
    region = TrustRegion(texts(), most=1e-30, cuts=1)
    done = list(steps(llama(), trails, [Imitate(make_examples())], steps=2, batch_size=4, trust=region, progress=False))
    assert (done[1].kept, done[1].trust) == (0.0, 0.0)  # the first has a learning rate of zero
    assert_equal(state(trails), start)


def test_trust_regions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a probe"):
        TrustRegion([])
    with pytest.raises(ValueError, match="most=0.0 must be"):
        TrustRegion(texts(), most=0.0)
    with pytest.raises(ValueError, match="cuts=0 must be"):
        TrustRegion(texts(), cuts=0)
