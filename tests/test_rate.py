"""A run that is given no learning rate finds one that suits its model, and a run that diverges says so."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from families import FAMILIES
from subjects import TRAILS
from tiny import DIM, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor, nn

from benchmarks.rates.models import scaled
from tokenpaths import (
    Additive,
    All,
    Answer,
    Imitate,
    Last,
    LoReFT,
    Objective,
    Site,
    Stay,
    TrailMap,
    attach,
    sites,
    steps,
)
from tokenpaths.data import Batch, collate
from tokenpaths.training import Step
from tokenpaths.training.rate import FALLBACK, FAR, find_rate


def train(model: nn.Module, trails: Any, **options: Any) -> list[Step]:
    options = {"steps": 1, "batch_size": 4, "warmup": 0, "progress": False, **options}
    return list(steps(model, trails, options.pop("goals", [Imitate(make_examples())]), **options))


def everywhere(make: Any = lambda: LoReFT(DIM, 4), model: Any = None) -> TrailMap:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TrailMap({site: make() for site in sites(model or llama(), slice(None), Last(1) | Answer())})


def states_of(model: Any, batch: Batch, **more: Any) -> Tensor:
    """What leaves each block, of all real tokens."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)[:, batch.attention_mask.bool()]


# --- the rate that is found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_the_first_step_moves_states_by_the_share_that_is_promised(scale: float) -> None:
    model, trails = scaled(llama(), scale), everywhere()
    examples = make_examples(4)
    run = steps(model, trails, [Imitate(examples)], steps=2, batch_size=4, warmup=0, progress=False)
    next(iter(run))
    run.close()
    batch = collate(examples)
    frozen = states_of(model, batch)
    with attach(model, trails):
        moved = states_of(model, batch, prompt_mask=batch.prompt_mask)
    share = (moved - frozen).norm(dim=-1) / frozen.norm(dim=-1)
    assert max(float(block[block > 0].mean()) for block in share) == pytest.approx(FAR, rel=0.11)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_scaled_copy_is_the_same_model_and_learns_the_same(family: str, scale: float) -> None:
    model, copy = FAMILIES[family].make(), scaled(FAMILIES[family].make(), scale)
    ids = collate(make_examples(4)).input_ids
    with torch.no_grad():
        torch.testing.assert_close(copy(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    for same in (model, copy):
        taken = train(same, everywhere(model=same), steps=12)
        assert taken[-1].loss < 0.7 * taken[0].loss


@pytest.mark.parametrize("name", TRAILS)
def test_every_trail_learns_without_a_rate(name: str) -> None:
    taken = train(llama(), everywhere(lambda: TRAILS[name](DIM)), steps=6, batch_size=12)
    assert taken[-1].loss < taken[0].loss


@pytest.mark.parametrize("method", peers.METHODS)
def test_an_adapter_of_peft_learns_without_a_rate(method: str) -> None:
    model, adapter = peers.make(method)
    taken = train(model, adapter, steps=4, batch_size=12)
    assert taken[-1].loss < taken[0].loss
    assert taken[0].lr != FALLBACK


def test_a_vector_has_a_rate_in_the_unit_of_the_states() -> None:
    rates = [train(scaled(llama(), s), everywhere(lambda: Additive(DIM)))[0].lr for s in (0.01, 1.0, 100.0)]
    assert rates[1] / rates[0] == pytest.approx(100, rel=0.2)
    assert rates[2] / rates[1] == pytest.approx(100, rel=0.2)


def test_a_rate_that_is_given_is_taken_and_an_optimizer_is_left_alone() -> None:
    assert train(llama(), make_trails(), lr=0.0123)[0].lr == 0.0123
    assert train(llama(), make_trails(), optimizer=lambda p: torch.optim.SGD(p, lr=0.321))[0].lr == 0.321


def test_the_search_changes_nothing_but_the_rate() -> None:
    found, given = make_trails(dropout=0.2), make_trails(dropout=0.2)
    before = torch.get_rng_state()
    taken = train(llama(), found, steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    train(llama(), given, steps=5, lr=max(step.lr for step in taken))
    assert_equal(state(found), state(given))


def test_the_rate_does_not_depend_on_how_a_step_is_split() -> None:
    rates = [train(llama(), make_trails(), batch_size=size, accumulate=8 // size)[0].lr for size in (8, 4, 1)]
    assert rates[1:] == pytest.approx(rates[:1] * 2, rel=1e-4)


def test_all_goals_have_a_say_in_the_direction_and_a_later_rate_follows_the_schedule() -> None:
    goals = [Imitate(make_examples()), Stay(make_examples(seed=1))]
    taken = train(llama(), make_trails(), goals=goals, steps=4, warmup=2)
    full = taken[1].lr
    assert [step.lr / full for step in taken] == pytest.approx([1 / 2, 1, 1, 1 / 2])


@dataclass
class FrozenLast(Imitate):
    """A goal that runs the frozen model too, before and after the one with trails."""

    def loss(self, model: nn.Module, trails: Any, batch: Batch) -> Tensor:
        with trails.off(), torch.no_grad():
            model(input_ids=batch.input_ids)
        loss = super().loss(model, trails, batch)
        with trails.off(), torch.no_grad():
            model(input_ids=batch.input_ids)
        return loss


def test_a_goal_may_run_the_model_as_it_likes() -> None:
    (step,) = train(llama(), make_trails(), goals=[FrozenLast(make_examples())])
    assert step.lr == pytest.approx(train(llama(), make_trails())[0].lr)


@dataclass
class Translate(Objective):
    """A goal of a model that reads and writes, whose forward needs more than the ids."""

    def loss(self, model: nn.Module, trails: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids).loss


def test_a_model_that_reads_and_writes_has_a_rate() -> None:
    model = FAMILIES["t5"].make()
    trails = TrailMap({Site(1, All()): LoReFT(DIM, 4)}, blocks="encoder.block")
    (step,) = train(model, trails, goals=[Translate(make_examples())])
    assert step.lr != FALLBACK


def test_it_is_said_why(capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = train(llama(), make_trails(), explain=True)
    said = capsys.readouterr().out
    assert f"Learning rate {step.lr:.3g}: the first step at this rate moves the states by 0." in said
    assert "wanted: 0.3; tried: 0.001: " in said
    train(llama(), make_trails(), explain=True, lr=1e-3)
    assert "Learning rate" not in capsys.readouterr().out


def test_without_a_gradient_there_is_nothing_to_go_by(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="no gradient has reached"):
        (step,) = train(llama(), make_trails(), goals=[Nothing(make_examples())], explain=True)
    assert step.lr == FALLBACK
    assert "Learning rate 0.001: the first step moves nothing to go by" in capsys.readouterr().out


def test_a_goal_of_the_parameters_alone_has_nothing_to_go_by() -> None:
    assert train(llama(), vectors(), goals=[Small(make_examples())])[0].lr == FALLBACK


# --- stop and go on ---------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_keeps_the_rate_that_was_found(tmp_path: Path) -> None:
    whole = make_trails()
    rates = [step.lr for step in train(llama(), whole, steps=6, warmup=0.5)]
    run: dict[str, Any] = dict(steps=6, warmup=0.5, checkpoint=tmp_path, save_every=2)
    for step in steps(llama(), make_trails(), [Imitate(make_examples())], batch_size=4, progress=False, **run):
        if step.step == 3:
            break
    resumed = make_trails()
    assert [step.lr for step in train(llama(), resumed, resume=True, **run)] == rates[2:]
    assert_equal(state(resumed), state(whole))


def test_a_run_with_a_rate_does_not_go_on_with_one_that_was_found(tmp_path: Path) -> None:
    (step,) = train(llama(), make_trails(), checkpoint=tmp_path)
    assert json.loads((tmp_path / "step-00000001" / "run.json").read_text())["rates"] == [step.lr]
    with pytest.raises(ValueError, match="optimizer was .*'lr': 'found'.*, is .*'lr': 0.001"):
        train(llama(), make_trails(), checkpoint=tmp_path, resume=True, lr=1e-3)


# --- how it is found --------------------------------------------------------------------------------------------------


def found(far: Any) -> Any:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, -2.0, 0.0])
    return find_rate([parameter], lambda: far(float(parameter.detach().abs().max())))


@pytest.mark.parametrize("unit", [1e-7, 1e-3, 1.0, 1e4])
def test_the_rate_is_found_whatever_its_size(unit: float) -> None:
    assert found(lambda lr: lr / unit).lr == pytest.approx(FAR * unit, rel=0.1)
    assert len(found(lambda lr: lr / 1e-3).tried) <= 3


def test_states_that_overflow_or_do_not_move_yet_are_steps_on_the_way() -> None:
    assert found(lambda lr: math.inf if lr > 3e-5 else lr * 2e4).lr == pytest.approx(1.5e-5, rel=0.1)
    assert found(lambda lr: lr if lr > 0.01 else 0.0).lr == pytest.approx(FAR, rel=0.1)


def test_what_is_capped_is_not_driven_further_and_further() -> None:
    assert found(lambda lr: 0.1 * math.tanh(lr / 1e-3) * (1 + 1e-3 * math.log(1 + lr))).lr < 0.05  # hardly further


def test_states_that_never_move_give_no_rate() -> None:
    assert found(lambda lr: 0.0).lr is None
    assert found(lambda lr: math.inf).lr is None


# --- a run that diverges ----------------------------------------------------------------------------------------------


@dataclass
class Nothing(Objective):
    """A loss whose gradient is zero."""

    def loss(self, model: nn.Module, trails: Any, batch: Batch) -> Tensor:
        return 0 * torch.stack([p.sum() for p in trails.parameters()]).sum()


@dataclass
class Small(Objective):
    """The mean square of the parameters, far from its minimum after a large step."""

    def loss(self, model: nn.Module, trails: Any, batch: Batch) -> Tensor:
        return torch.stack([p.square().mean() for p in trails.parameters()]).mean()


def vectors(value: float = 0.1) -> TrailMap:
    trails = TrailMap({Site(1, All()): Additive(DIM)})
    with torch.no_grad():
        next(trails.parameters()).fill_(value)
    return trails


def test_a_run_that_diverges_says_so_and_what_to_do() -> None:
    goals = [Small(make_examples())]
    with pytest.warns(
        UserWarning, match=r"step 2: the loss of its examples is .*, and with the trails as they were"
    ) as said:
        train(llama(), vectors(), goals=goals, steps=5, lr=10.0)
    assert len(said) == 1
    assert str(said[0].message).endswith(
        "The run diverges at lr=10: leave lr= out, and one is found that suits the model, or give a lower one, such as "
        "lr=2"
    )
    with pytest.warns(UserWarning, match="The run diverges with this optimizer: lower its learning rate"):
        train(llama(), vectors(), goals=goals, steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=1e4))


def test_a_run_that_does_not_diverge_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(llama(), vectors(), goals=[Small(make_examples())], steps=5, lr=1e-2)
        train(llama(), make_trails(), steps=8, batch_size=1, lr=1e-2)  # examples differ in loss, and none is worse off
        train(llama(), vectors(1e-4), goals=[Small(make_examples())], steps=5, lr=1e-2)  # next to nothing, many times


def test_smollm2_diverges_at_a_rate_that_is_far_too_high(smollm2: Any) -> None:
    import tokenpaths as tp

    model, tokenizer = smollm2
    pairs = [("The colour of grass is", " green."), ("The colour of snow is", " white.")]
    trails = tp.TrailMap(
        {site: LoReFT(tp.width(model), 4) for site in tp.sites(model, slice(8, 30, 4), Last(1) | Answer())}
    )
    goals = [Imitate(tp.encode(pairs, tokenizer))]
    with pytest.warns(UserWarning, match=r"step [2345]: .* The run diverges at lr=0.3: leave lr= out"):
        train(model, trails, goals=goals, batch_size=2, steps=5, lr=0.3)
