"""Objectives and `steps`: the loss is right, a run can be resumed and split, and nothing is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from tiny import DIM, VOCAB, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor, nn

from tokenpaths import (
    Additive,
    All,
    Answer,
    Example,
    First,
    Imitate,
    Last,
    LoReFT,
    Match,
    Objective,
    Prompt,
    Site,
    Span,
    Tokens,
    Trail,
    TrailMap,
    attach,
    steps,
)
from tokenpaths.attachment import is_attached
from tokenpaths.data import Batch, collate
from tokenpaths.engine import answer_logits
from tokenpaths.trails import RED
from tokenpaths.training import Step


def train(model: nn.Module, trails: TrailMap, goals: list[Any], **options: Any) -> list[Step]:
    options = {"steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, **options}
    return list(steps(model, trails, goals, **options))


# --- the loss ---------------------------------------------------------------------------------------------------------


def full_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy from the logits of all tokens, as transformers' own loss has it."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, prompt_mask=batch.prompt_mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize(("name", "side"), [*((name, "right") for name in families.DECODERS), ("llama", "left")])
def test_answer_logits_give_the_loss_and_gradient_of_full_logits(
    name: str, side: Any, watch: Callable[[nn.Module], nn.Module]
) -> None:
    family = families.DECODERS[name]
    model = watch(family.make().double() if family.float64 else family.make())
    tolerance = 1e-12 if family.float64 else 1e-4
    trails = TrailMap({Site(0, Last(1)): LoReFT(DIM, 2, init="paper"), Site(1, Answer()): Additive(DIM)})
    trails.to(next(model.parameters()).dtype)
    batch = collate(make_examples(5), side=side)
    seen: list[torch.Size] = []
    head = model.get_output_embeddings()
    watcher = head.register_forward_hook(lambda _, args, output: seen.append(args[0].shape))
    with attach(model, trails):
        expected = full_loss(model, batch)
        gradients = torch.autograd.grad(expected, list(trails.parameters()))
        loss = Imitate(make_examples(5)).loss(model, trails, batch)
        ours = torch.autograd.grad(loss, list(trails.parameters()))
    watcher.remove()
    assert seen[-1] == ((batch.labels != -100).sum(), seen[0][-1])  # only answers, in two dimensions
    assert (loss - expected).abs() < tolerance
    for mine, full in zip(ours, gradients, strict=True):
        assert (mine - full).abs().max() < tolerance
    assert max(gradient.abs().max() for gradient in gradients) > 100 * tolerance


def test_answer_logits_work_without_trails_and_without_an_output_embedding(
    monkeypatch: pytest.MonkeyPatch, watch: Callable[[nn.Module], nn.Module]
) -> None:
    model = watch(llama())
    batch = collate(make_examples(3))
    logits, targets = answer_logits(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "get_output_embeddings", lambda self: None)
        full, again = answer_logits(model, batch)
    assert torch.equal(targets, again)
    assert torch.allclose(logits, full, atol=1e-5)
    assert targets.tolist() == [i for e in make_examples(3) for i in e.ids[e.prompt_length :]]


def test_the_hook_on_the_head_goes_even_when_the_forward_fails(watch: Callable[[nn.Module], nn.Module]) -> None:
    model = watch(llama())
    batch = collate([Example((1, VOCAB + 5), (False, True))])
    with pytest.raises(IndexError):
        answer_logits(model, batch)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_imitate_refuses_models_that_do_not_write_left_to_right(name: str) -> None:
    model = families.FAMILIES[name].make()
    with pytest.raises(ValueError, match="needs a causal language model"):
        answer_logits(model, collate(make_examples(2)))


def test_the_loss_is_float32_on_a_bfloat16_model() -> None:
    model, trails = llama().bfloat16(), make_trails()
    with attach(model, trails):
        loss = Imitate(make_examples(4)).loss(model, trails, collate(make_examples(4)))
    assert loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on transformers 4.57
def test_answer_logits_work_on_a_peft_model_and_a_compiled_one(unchecked: None) -> None:
    from peft import LoraConfig, get_peft_model

    batch = collate(make_examples(4))
    expected, _ = answer_logits(llama(), batch)
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.allclose(answer_logits(lora, batch)[0], expected, atol=1e-5)
    compiled = torch.compile(llama(), backend="eager")
    for examples in (make_examples(4), make_examples(4, seed=1)):
        batch = collate(examples)
        assert torch.allclose(answer_logits(compiled, batch)[0], answer_logits(llama(), batch)[0], atol=1e-5)


def test_an_objective_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ValueError, match="Imitate has no examples"):
        Imitate([])
    with pytest.raises(ValueError, match="Imitate: example 1 has no answer"):
        Imitate([*make_examples(1), Example((1, 2), (False, False))])
    with pytest.raises(ValueError, match="Imitate: weight nan must be"):
        Imitate(make_examples(1), weight=float("nan"))
    with pytest.raises(NotImplementedError, match="Objective must define loss"):
        Objective(make_examples(1)).loss(llama(), make_trails(), collate(make_examples(1)))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_the_model_as_it_was(watch: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    watch(model)
    trails = make_trails().eval()
    taken = train(model, trails, [Imitate(make_examples(8))], steps=60, batch_size=8, lr=5e-2)
    assert [step.step for step in taken] == list(range(1, 61))
    assert taken[-1].loss < taken[0].loss / 2
    assert taken[0].losses == (taken[0].loss,)
    assert taken[0].tokens == sum(map(len, make_examples(8)))
    assert [step.lr for step in taken[:7]] == pytest.approx([5e-2 * k / 6 for k in range(1, 7)] + [5e-2])
    assert max(step.lr for step in taken) == 5e-2
    assert all(step.grad_norm > 0 and step.seconds > 0 and step.drift is None for step in taken)
    assert not is_attached(model, trails)
    assert not any(module.training for module in trails.modules())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *trails.parameters()])


def test_breaking_off_an_error_in_the_loop_and_an_error_inside_all_detach(
    watch: Callable[[nn.Module], nn.Module],
) -> None:
    model, trails = watch(llama()), make_trails()
    goal = Imitate(make_examples())
    for step in steps(model, trails, [goal], steps=5, progress=False):
        assert is_attached(model, trails)
        assert not any(p.requires_grad for p in model.parameters())
        if step.step == 2:
            break
    assert not is_attached(model, trails)

    with pytest.raises(KeyError), closing(steps(model, trails, [goal], steps=5, progress=False)) as run:  # noqa: PT012
        for _ in run:
            raise KeyError
    assert not is_attached(model, trails)

    @dataclass
    class Fails(Imitate):
        def loss(self, model: Any, trails: Any, batch: Any) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, trails, [Fails(make_examples())])
    assert not is_attached(model, trails)


def test_trails_that_are_attached_already_stay_as_they_are_attached() -> None:
    model, trails = llama(), make_trails()
    with attach(model, trails, strength=0.0):  # attached once more, they would move the model after all
        with pytest.warns(UserWarning, match="attached at strength 0, where no gradient reaches them"):
            (step,) = train(model, trails, [Imitate(make_examples())], steps=1)
        assert step.grad_norm == 0
        assert is_attached(model, trails)
    assert not is_attached(model, trails)


def test_frozen_parts_of_the_trails_stay_and_all_frozen_is_refused() -> None:
    model, trails = llama(), make_trails()
    trails[Site(0, Last(1))].requires_grad_(False)
    before = state(trails)
    train(model, trails, [Imitate(make_examples())], steps=3)
    after = state(trails)
    assert all(torch.equal(before[n], after[n]) == n.startswith("trails.0.") for n in before)
    with pytest.raises(ValueError, match="every parameter of the trails is frozen"):
        steps(model, trails.requires_grad_(False), [Imitate(make_examples())], steps=1)


def test_accumulating_is_the_same_as_a_larger_batch() -> None:
    results: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for batch_size, accumulate, seed in ((8, 1, 0), (4, 2, 0), (2, 4, 0), (8, 1, 1)):
        trails = make_trails().double()
        goals = [Imitate(make_examples())]
        taken = train(llama().double(), trails, goals, batch_size=batch_size, accumulate=accumulate, seed=seed)
        results.append(state(trails))
        losses.append([step.loss for step in taken])
    *alike, otherwise = results[1:]
    for other, loss in zip(alike, losses[1:], strict=False):
        assert_equal(other, results[0], 1e-9)
        assert loss == pytest.approx(losses[0], abs=1e-5)
    assert any((otherwise[n] - results[0][n]).abs().max() > 1e-6 for n in otherwise)  # a difference would be seen


def test_the_loss_of_a_split_batch_is_the_mean_over_all_its_answer_tokens() -> None:
    model, trails = llama(), make_trails()
    examples = make_examples(6)
    with attach(model, trails):
        whole = Imitate(examples).loss(model, trails, collate(examples)).item()
    (step,) = train(model, trails, [Imitate(examples)], steps=1, batch_size=2, accumulate=3)
    assert step.loss == pytest.approx(whole, abs=1e-5)


def test_goals_are_added_up_by_weight() -> None:
    @dataclass
    class Small(Objective):
        """The mean square of the trails' parameters."""

        def loss(self, model: nn.Module, trails: TrailMap, batch: Batch) -> Tensor:
            return torch.cat([p.flatten() for p in trails.parameters()]).square().mean()

    trails = make_trails()
    (step,) = train(
        llama(), trails, [Imitate(make_examples()), Small(make_examples(3), weight=10.0)], steps=1, accumulate=2
    )
    assert step.losses[1] == pytest.approx(
        Small(make_examples()).loss(llama(), make_trails(), collate(make_examples())).item()
    )
    assert step.loss == pytest.approx(step.losses[0] + 10 * step.losses[1])


def test_every_epoch_uses_every_example_once_in_a_new_order() -> None:
    seen: list[int] = []

    @dataclass
    class Spy(Imitate):
        def loss(self, model: nn.Module, trails: TrailMap, batch: Batch) -> Tensor:
            seen.extend(batch.input_ids[:, 0].tolist())
            return super().loss(model, trails, batch)

    examples = [replace(e, ids=(3 + i, *e.ids[1:])) for i, e in enumerate(make_examples(10))]
    taken = train(llama(), make_trails(), [Spy(examples)], steps=None, epochs=2, batch_size=5, lr=0.0)
    assert len(taken) == 4
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(3, 13))
    assert seen[:10] != seen[10:]
    assert len(train(llama(), make_trails(), [Spy(examples)], steps=None, epochs=1, batch_size=4)) == 3


def test_the_random_state_of_the_user_is_left_alone_and_the_seed_decides() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trails = make_trails(0.5)
    torch.manual_seed(7)
    train(llama(), trails, [Imitate(make_examples())])
    torch.manual_seed(7)
    run = steps(llama(), make_trails(0.5), [Imitate(make_examples())], steps=3, progress=False)
    torch.manual_seed(7)
    next(run)
    assert torch.equal(torch.rand(3), expected)
    run.close()
    for seed, same in ((0, True), (1, False)):
        again = make_trails(0.5)
        train(llama(), again, [Imitate(make_examples())], seed=seed)
        assert (
            all(torch.equal(a, b) for a, b in zip(state(again).values(), state(trails).values(), strict=True)) == same
        )


def test_every_step_has_random_numbers_of_its_own() -> None:
    @dataclass
    class Draw(Imitate):
        def loss(self, model: nn.Module, trails: TrailMap, batch: Batch) -> Tensor:
            drawn.append(torch.rand(()).item())
            return super().loss(model, trails, batch)

    drawn: list[float] = []
    for _ in range(2):
        train(llama(), make_trails(), [Draw(make_examples())], steps=4)
    assert len(set(drawn)) == 4
    assert drawn[:4] == drawn[4:]


class Slowing(torch.optim.SGD):
    """Keeps a plain number for each parameter, and takes smaller and smaller steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            taken = self.state[parameter]["taken"] = self.state[parameter].get("taken", 0) + 1
            parameter.data -= 0.1 * parameter.grad / taken


OPTIMIZERS: dict[str, Any] = {
    "adamw": None,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "groups": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 1e-2}, {"params": p[2:]}], lr=1e-3, amsgrad=True),
    "numbers": Slowing,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    goals = [Imitate(make_examples()), Imitate(make_examples(5, seed=3), weight=0.5)]
    options: dict[str, Any] = dict(optimizer=OPTIMIZERS[name], lr=None, steps=8, schedule="cosine", save_every=3)
    whole = make_trails(0.3)
    taken = train(llama(), whole, goals, checkpoint=tmp_path / "whole", **options)

    begun = make_trails(0.3)
    for step in steps(llama(), begun, goals, batch_size=4, progress=False, checkpoint=tmp_path / "parts", **options):
        if step.step == 4:  # one step after the checkpoint
            break
    resumed = make_trails(0.3)  # as a new process has them
    torch.manual_seed(99)
    rest = train(llama(), resumed, goals, checkpoint=tmp_path / "parts", resume=True, **options)
    assert [step.step for step in rest] == [4, 5, 6, 7, 8]
    assert [replace(s, seconds=0.0) for s in rest] == [replace(s, seconds=0.0) for s in taken[3:]]
    assert_equal(state(resumed), state(whole))

    saved = tmp_path / "parts" / "step-00000008"
    assert sorted(path.name for path in saved.iterdir()) == ["optimizer.safetensors", "run.json", "trails.safetensors"]
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == [f"step-0000000{n}" for n in (3, 6, 8)]
    assert_equal(state(TrailMap.from_pretrained(saved)), state(whole))
    assert train(llama(), resumed, goals, checkpoint=tmp_path / "parts", resume=True, **options) == []


def test_resuming_another_run_is_refused_by_name(tmp_path: Path) -> None:
    goals, options = [Imitate(make_examples())], dict(checkpoint=tmp_path, steps=3)
    train(llama(), make_trails(), goals, **options)
    with pytest.raises(ValueError, match="step-00000003 is of an earlier run: pass resume=True"):
        train(llama(), make_trails(), goals, **options)
    for changed, named in (
        (dict(goals=[Imitate(make_examples(11))]), r"goals was .*12 \(.* is .*11 \("),
        (dict(goals=[Imitate(make_examples(), weight=2.0)]), "goals was .*'weight': 1.0.* is .*'weight': 2.0"),
        (dict(seed=1), "seed was 0, is 1$"),
        (dict(lr=1.0), "optimizer was .*'lr': 0.01.*, is .*'lr': 1.0"),
        (dict(trails=TrailMap({Site(0): RED(DIM)})), "trails was .*LoReFT.* is .*RED"),
        (dict(steps=4, batch_size=3), "steps was 3, is 4; batch_size was 4, is 3"),
        (dict(model=families.FAMILIES["qwen2"].make()), "model was '.*', is '"),
    ):
        given = {"model": llama(), "trails": make_trails(), "goals": goals, **options, **changed}
        before = state(given["trails"])
        with pytest.raises(ValueError, match=named):
            train(**given, resume=True)
        assert_equal(state(given["trails"]), before)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere to resume from"):
        train(llama(), make_trails(), goals, checkpoint=tmp_path / "nowhere", resume=True)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)  # of the last file of a checkpoint
    with pytest.raises(OSError, match="No space left"):
        train(llama(), make_trails(), [Imitate(make_examples())], steps=1, checkpoint=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("step")] == []


def test_an_optimizer_that_needs_pickle_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["history"] = [1, 2]

    with pytest.raises(TypeError, match="state of Odd cannot be saved without pickle: its 'history' is a list"):
        train(llama(), make_trails(), [Imitate(make_examples())], steps=1, lr=None, optimizer=Odd, checkpoint=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_trails_keep_their_last_good_values() -> None:
    model, trails = llama(), make_trails()
    good: list[dict[str, Tensor]] = []

    @dataclass
    class Breaks(Imitate):
        calls: int = 0

        def loss(self, model: nn.Module, trails: TrailMap, batch: Batch) -> Tensor:
            self.calls += 1
            return super().loss(model, trails, batch) * (float("inf") if self.calls == 3 else 1)

    goals = [Imitate(make_examples()), Breaks(make_examples())]
    run = steps(model, trails, goals, steps=5, lr=1e-2, progress=False)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss of goal 1 \(Breaks\) is inf"):
        good.extend(state(trails) for _ in run)
    assert_equal(state(trails), good[1])
    assert not is_attached(model, trails)
    assert all(parameter.grad is None for parameter in trails.parameters())


@pytest.mark.parametrize("length", [dict(steps=1), dict(steps=None, epochs=1), dict(steps=4, warmup=100)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_the_first_step_trains_however_short_the_run(schedule: str, length: dict[str, Any]) -> None:
    trails = make_trails()
    before = state(trails)
    first = train(llama(), trails, [Imitate(make_examples())], batch_size=12, schedule=schedule, **length)[0]
    share = 1 / 100 if "warmup" in length and schedule != "constant" else 1
    assert first.lr == pytest.approx(1e-2 * share)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(trails).items())


def test_clipping_bites() -> None:
    before = state(make_trails())

    def moved(clip: float | None) -> float:
        trails = make_trails()
        optimizer = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
        (step,) = train(
            llama(), trails, [Imitate(make_examples())], steps=1, lr=None, optimizer=optimizer, clip=clip, warmup=0
        )
        assert step.grad_norm > 0.1
        return sum(float((a - before[n]).square().sum()) for n, a in state(trails).items()) ** 0.5

    assert moved(0.1) == pytest.approx(0.1, rel=1e-3)
    assert moved(None) > 0.11


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Also where the first trail lies inside a block, whose input asks for no gradient."""

    def make() -> TrailMap:
        torch.manual_seed(1)
        return TrailMap({Site(1, All(), "mlp"): LoReFT(DIM, 2), Site(2, Last(1)): LoReFT(DIM, 2)})

    plain, checkpointed, start = make(), make(), state(make())
    train(llama(), plain, [Imitate(make_examples())])
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(model, checkpointed, [Imitate(make_examples())])
    assert_equal(state(checkpointed), state(plain), 1e-6)
    assert all((tensor - start[name]).abs().max() > 1e-3 for name, tensor in state(plain).items())


def test_gradient_checkpointing_in_eval_mode_is_warned_of() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.warns(UserWarning, match="gradient checkpointing is on, but .* call model.train()"):
        train(model, make_trails(), [Imitate(make_examples())], steps=1)


def test_bf16_autocast_trains_and_another_precision_may_follow() -> None:
    losses = {}
    for precision in ("no", "bf16", None):
        trails = make_trails()
        taken = train(llama(), trails, [Imitate(make_examples())], mixed_precision=precision)
        assert all(p.dtype == torch.float32 for p in trails.parameters())
        losses[precision] = taken[-1].loss
    assert losses["no"] == losses[None]
    assert 0 < abs(losses["bf16"] - losses["no"]) < 0.3


def test_drift_is_measured_now_and_then_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    taken = train(llama(), make_trails(), [Imitate(make_examples())], drift=lambda: 0.25, drift_every=4, progress=True)
    assert [step.drift for step in taken] == [None, None, None, 0.25, None, 0.25]
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "drift 0.25" in shown
    assert f"loss {taken[-1].loss:.4g}" in shown


# --- what is refused before the first step ----------------------------------------------------------------------------


def at(rule: Any) -> TrailMap:
    return TrailMap({Site(1, rule): Additive(DIM)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(goals=[]), r"goals must be a list of Objectives, such as \[Imitate"),
        (dict(goals=[make_examples()]), "goals must be a list of Objectives"),
        (dict(goals=Imitate(make_examples())), r"goals must be a list of Objectives.*, not Imitate\("),
        (dict(steps=None), "give either steps= or epochs="),
        (dict(epochs=1.0), "give either steps= or epochs="),
        (dict(steps=None, epochs=0), "give either steps= or epochs=, more than 0"),
        (dict(steps=0), "steps=0 must be at least 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(accumulate=-1), "accumulate=-1 must be at least 1"),
        (dict(optimizer=torch.optim.Adagrad), "leave lr= out"),
        (dict(clip=0.0), "clip=0.0 must be above 0, or None"),
        (dict(save_every=2), "need checkpoint="),
        (dict(resume=True), "need checkpoint="),
        (dict(mixed_precision="fp16"), "for fp16 pass accelerator="),
        (dict(schedule="reduce_lr_on_plateau"), "depends on more than the step"),
        (
            dict(goals=[Imitate([*make_examples(2), Example((3,) * 129, (False,) * 128 + (True,))])]),
            r"goal 0 \(Imitate\), example 2 has 129 tokens, more than the model's window of 128",
        ),
        (dict(trails=at(Tokens([1]))), r"Tokens\(ids=\(1,\)\) chooses no token anywhere in the 12 training examples"),
        (dict(trails=at(All() - Tokens([1]) & Tokens([2]))), r"Site\(.*Tokens\(ids=\(2,\)\) chooses no token"),
        (dict(trails=at(First(1) | Tokens([1]))), r"Tokens\(ids=\(1,\)\) chooses no token"),
        (dict(trails=at(Prompt() & Answer())), r"\(Prompt\(\) & Answer\(\)\) chooses no token"),
        (dict(trails=at(Span("steps"))), r"Span\(name='steps'\) chooses no token"),
        (dict(trails=at(Match("x"))), "Match.* reads the decoded text: give steps"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_touched(
    changed: dict[str, Any], message: str, watch: Callable[[nn.Module], nn.Module], unchecked: None
) -> None:
    model = watch(llama())
    given = {"model": model, "trails": make_trails(), "goals": [Imitate(make_examples())], "steps": 2, "lr": 1e-3}
    with pytest.raises(ValueError, match=message):
        steps(**{**given, **changed})


def test_an_accelerator_that_accumulates_is_refused() -> None:
    from accelerate import Accelerator

    with pytest.raises(ValueError, match=r"give steps\(accumulate=...\)"):
        train(
            llama(), make_trails(), [Imitate(make_examples())], accelerator=Accelerator(gradient_accumulation_steps=2)
        )


def test_a_loss_that_the_trails_cannot_change_is_refused() -> None:
    trails = make_trails()
    with trails.off(), pytest.raises(ValueError, match=r"loss of goal 0 \(Imitate\) does not depend on the trails"):
        train(llama(), trails, [Imitate(make_examples())])


def test_rules_that_are_likely_a_mistake_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"Last\(n=4\): 4 of 12 prompts have fewer than 4 tokens"):
        train(llama(), at(Last(4)), [Imitate(make_examples())], steps=1)
    with pytest.warns(UserWarning, match=r"Tokens\(ids=\(1,\)\) takes nothing away anywhere"):
        train(llama(), at(Answer() - Tokens([1])), [Imitate(make_examples())], steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(llama(), at(Last(2)), [Imitate(make_examples())], steps=1)


def test_spans_and_matches_choose_tokens_in_training() -> None:
    """Only half of the examples have the span: a batch without it moves nothing."""
    examples = [replace(e, spans={"hint": (0, 1)} if i % 2 else {}) for i, e in enumerate(make_examples())]
    trails = TrailMap({Site(1, Span("hint")): Additive(DIM)})
    taken = train(
        llama(), trails, [Imitate(examples)], batch_size=1, steps=12, clip=None, warmup=0, schedule="constant"
    )
    assert {step.grad_norm > 0 for step in taken} == {True, False}

    class Letters:
        """Decodes id 3 as "a", 4 as "b" and so on."""

        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(94 + i) for i in ids)

    letter = chr(94 + examples[0].ids[0])
    trails = TrailMap({Site(1, Match(letter)): Additive(DIM)})
    taken = train(llama(), trails, [Imitate(examples)], tokenizer=Letters(), steps=3)
    assert max(step.grad_norm for step in taken) > 0


def test_a_trail_of_your_own_and_an_untied_frozen_model_train(watch: Callable[[nn.Module], nn.Module]) -> None:
    class Mine(Trail):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim = dim
            self.scale = nn.Parameter(torch.zeros(dim))

        def forward(self, h: Tensor) -> Tensor:
            return self.scale * h

    model = watch(families.FAMILIES["gpt2"].make())
    trails = TrailMap({Site(1, All()): Mine(DIM)})
    taken = train(model, trails, [Imitate(make_examples())], steps=30, batch_size=12)
    assert taken[-1].loss < taken[0].loss
