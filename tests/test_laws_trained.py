"""Law 13: what is trained is what was named, and something is; else an error or a warning says so. And law 11 of runs.

A new way to train nothing, to train something else, or to train two things at once is one line in a list.
"""

from __future__ import annotations

import gc
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, VOCAB, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor, nn

from tokenpaths import (
    All,
    Answer,
    First,
    Guarded,
    Imitate,
    Last,
    LoReFT,
    Prompt,
    Site,
    Tokens,
    TrailMap,
    attach,
    steps,
    trainable,
)
from tokenpaths.attachment import is_attached
from tokenpaths.attachment.runs import close_runs
from tokenpaths.files import TrailFileError
from tokenpaths.training import load_also

Watch = Callable[[nn.Module], nn.Module]
IDS = torch.arange(5, 13).view(2, 4)
PROMPTED = IDS.masked_fill(torch.arange(4) < 2, -100)


def run(model: nn.Module, trails: TrailMap, **options: Any) -> Any:
    return steps(model, trails, [Imitate(make_examples())], **{"steps": 3, "lr": 1e-2, "progress": False, **options})


def loop(
    model: nn.Module, parameters: Any = None, labels: Tensor = PROMPTED, count: int = 2, train: bool = True
) -> None:
    """A loop of another library, as short as it can be."""
    model.train(train)
    parameters = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(IDS, labels=labels).loss
        if loss.requires_grad:
            loss.backward()
        optimizer.step()


def at(rule: Any, **trail: Any) -> TrailMap:
    return TrailMap({Site(1, rule): LoReFT(DIM, 2, **trail)})


# --- something else is trained


@pytest.mark.parametrize("train", [True, False])
def test_an_optimizer_over_the_base_that_leaves_attached_trails_out_is_warned_of_once(train: bool) -> None:
    model, trails = llama(), make_trails()
    with (
        attach(model, trails),
        pytest.warns(UserWarning, match="SGD trains 30 parameters of the base LlamaForCausalLM") as told,
    ):
        loop(model, train=train)
    assert len(told) == 1
    assert all(words in str(told[0].message) for words in ("tp.trainable(model, trails)", "requires_grad_(False)"))


@pytest.mark.parametrize(("frozen", "trains"), [(False, "30 parameters of the base"), (True, "nothing and none of")])
def test_a_trainer_without_trainable_is_warned_of(frozen: bool, trains: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, trails = llama().requires_grad_(not frozen), make_trails()
    options: dict[str, Any] = dict(report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", **options)
    rows = [dict(input_ids=row, labels=label) for row, label in zip(IDS.tolist(), PROMPTED.tolist(), strict=True)]
    with attach(model, trails), pytest.warns(UserWarning, match=f"AdamW trains {trains}"):
        Trainer(model, arguments, train_dataset=rows).train()


def _own_optimizer(model: Any, trails: TrailMap) -> None:
    with attach(model, trails):
        loop(model, trails.parameters())


def _both(model: Any, trails: TrailMap) -> None:
    with attach(model, trails):
        loop(model, [*trails.parameters(), *model.parameters()])


def _fixed_trails(model: Any, trails: TrailMap) -> None:
    with attach(model, trails.requires_grad_(False)):
        loop(model)


def _named(model: Any, trails: TrailMap) -> None:
    with trainable(model, trails):
        loop(model)


def _by_steps(model: Any, trails: TrailMap) -> None:
    with attach(model, trails):
        list(run(model, make_trails()))


def _detached(model: Any, trails: TrailMap) -> None:
    attach(model, trails).remove()
    loop(model)


def _read_only(model: Any, trails: TrailMap) -> None:
    with attach(model, trails):
        model.train()(IDS, labels=PROMPTED).loss.backward()


ON_PURPOSE = [_own_optimizer, _both, _fixed_trails, _named, _by_steps, _detached, _read_only]


@pytest.mark.parametrize("use", ON_PURPOSE)
def test_what_was_meant_is_not_warned_of(use: Callable[[Any, TrailMap], None]) -> None:
    model, trails = llama(), TrailMap({Site(1, Last(1)): LoReFT(DIM, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model, trails)


def test_lora_trained_by_steps_around_attached_trails_is_not_warned_of() -> None:
    from peft import LoraConfig, get_peft_model

    from tokenpaths.lab.peers import PeftAdapter

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with attach(model, make_trails()):
        list(run(model, PeftAdapter(model)))


# --- nothing is trained


def shut() -> Guarded:
    """A trail behind a gate that opens on no state."""
    trail = Guarded(LoReFT(DIM, 2), DIM)
    trail.b.fill_(-1.0)
    return trail


@pytest.mark.parametrize("count", [2, 12])
def test_a_run_that_no_gradient_reaches_says_so(count: int) -> None:
    with pytest.warns(UserWarning, match="no gradient has reached the trails") as told:
        list(run(llama(), TrailMap({Site(1, All()): shut()}), steps=count))
    assert len(told) == 1
    assert ("in 10 steps" if count > 10 else "in any step") in str(told[0].message)


def test_a_strength_that_is_turned_up_later_is_told_of_once() -> None:
    model, trails = llama(), at(All())
    with attach(model, trails, strength=0.0) as handle:
        with pytest.warns(UserWarning, match="attached at strength 0"):
            begun = next(made := run(model, trails, steps=12))
        handle.strength = 0.1
        assert begun.grad_norm == 0
        assert all(step.grad_norm > 0 for step in made)


def test_a_trail_that_learns_nothing_beside_one_that_does_is_named() -> None:
    trails = TrailMap({Site(0, All()): LoReFT(DIM, 2), Site(2, Last(1)): shut()})
    with pytest.warns(UserWarning, match=r"reached the trail at Site\(layer=2, tokens=Last\(n=1\).*\) in 4 steps"):
        list(run(llama(), trails, steps=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(strength=0.0), "attached at strength 0"), (dict(rows=()), r"attached with rows=\(\)")],
)
def test_trails_that_cannot_learn_as_they_are_attached_are_refused(
    options: dict[str, Any], message: str, watch: Watch
) -> None:
    model = watch(llama())
    with pytest.raises(ValueError, match=message), trainable(model, make_trails(), **options):
        pass
    trails = make_trails()
    with attach(model, trails, **options), pytest.warns(UserWarning, match=message):
        list(run(model, trails, steps=1))


@pytest.mark.parametrize("rule", [Last(1), First(2), Prompt(), First(1) | Last(1), Prompt() - First(1)])
def test_labels_on_every_token_are_refused_under_rules_that_need_a_prompt(rule: Any) -> None:
    model = llama()
    with trainable(model, at(rule)), pytest.raises(ValueError, match="no row of the batch has a prompt, .*-100"):
        loop(model, labels=IDS)


@pytest.mark.parametrize("rule", [All(), Answer(), Last(1) | Answer(), ~Prompt()])
def test_labels_on_every_token_train_under_other_rules(rule: Any) -> None:
    model, trails = llama(), at(rule)
    before = state(trails)
    with trainable(model, trails):
        loop(model, labels=IDS)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(trails).items())


def test_a_batch_without_a_label_is_warned_of_once() -> None:
    model = llama()
    with warnings.catch_warnings(record=True) as told, trainable(model, at(All())):
        warnings.simplefilter("always")
        loop(model, labels=torch.full_like(IDS, -100))
    said = [str(warning.message) for warning in told]
    assert [words.startswith("every label of a batch is -100") for words in said] == [True, False]


UNREACHED: dict[str, Any] = {
    "tokens that no batch has": at(Tokens([1])),
    "rules that share no token": at(Prompt() & Answer()),
    "a gate that is shut": TrailMap({Site(1, All()): shut()}),
    "trails that are off": at(All()),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_trails_that_no_gradient_reaches_in_another_loop_are_told_of_at_its_end(name: str) -> None:
    model, trails = llama(), UNREACHED[name]
    trails.enabled = "off" not in name
    with pytest.warns(UserWarning, match="no gradient has reached the trails in any step"), trainable(model, trails):
        loop(model)
    with pytest.warns(UserWarning, match="in 10 steps no gradient has reached"), trainable(model, trails):
        loop(model, count=11)
    trails.enabled = True


def test_an_error_inside_is_not_followed_by_advice() -> None:
    model = llama()
    with warnings.catch_warnings(), pytest.raises(KeyError), trainable(model, at(Tokens([1]))):  # noqa: PT012
        warnings.simplefilter("error")
        loop(model)
        raise KeyError


def test_a_last_step_that_breaks_the_trails_is_taken_back(watch: Watch) -> None:
    model, trails = watch(llama()), make_trails()
    good: list[dict[str, Tensor]] = []
    with pytest.raises(FloatingPointError, match="step 1: the optimizer made the trails infinite or NaN. .*lower lr"):
        list(run(model, trails, steps=1, lr=float("inf")))
    assert_equal(state(trails), state(make_trails()))

    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            if len(good) == 2:
                self.param_groups[0]["params"][-1].data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="step 3: the optimizer made the trails"):
        good.extend(state(trails) for _ in run(model, trails, lr=None, optimizer=lambda p: Breaks(p, lr=0.1)))
    assert_equal(state(trails), good[-1])
    assert not is_attached(model, trails)


# --- a run that nobody takes, and two at once


def test_a_run_that_nobody_iterates_over_says_so(watch: Watch) -> None:
    model = watch(llama())
    with pytest.warns(UserWarning, match=r"steps\(steps=3\) was never iterated over, so nothing was trained"):
        run(model, make_trails())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun = run(model, make_trails())
        assert "not begun: iterate over it" in repr(begun)
        next(begun)
        assert repr(begun) == "<steps(steps=3), begun>"
        begun.close()
        assert list(begun) == []
        run(model, make_trails()).close()  # an end that was asked for
        del begun
        gc.collect()


def test_a_run_is_a_generator() -> None:
    from collections.abc import Generator

    model, trails = llama(), make_trails()
    made = run(model, trails)
    assert isinstance(made, Generator)
    assert made.send(None).step == 1
    with pytest.raises(KeyError):
        made.throw(KeyError("mine"))
    assert not is_attached(model, trails)


def _steps(model: Any, trails: TrailMap) -> Iterator[object]:
    return run(model, trails)


def _trainable(model: Any, trails: TrailMap) -> Iterator[object]:
    with trainable(model, trails):
        yield None


BEGINNINGS = {"steps": _steps, "trainable": _trainable}


@pytest.mark.parametrize("shared", ["these trails", "this model"])
@pytest.mark.parametrize("second", BEGINNINGS)
@pytest.mark.parametrize("first", BEGINNINGS)
def test_two_runs_at_once_are_refused(first: str, second: str, shared: str, watch: Watch) -> None:
    model, trails = llama(), make_trails()
    flags = [p.requires_grad for p in model.parameters()]
    other = (llama(), trails) if shared == "these trails" else (model, make_trails())
    begun = BEGINNINGS[first](model, trails)
    next(begun)
    before = state(other[1])
    refused = "has an attribute 'trails' already" if shared == "this model" and first == second == "trainable" else None
    with pytest.raises(
        (RuntimeError, ValueError),
        match=refused or rf"{second}\(.*\): {first}\(.*\) over {shared} is still open, .*tp.detach\(model\)",
    ):
        next(BEGINNINGS[second](*other))
    assert_equal(state(other[1]), before)
    assert is_attached(model, trails)
    assert is_attached(*other) == (other == (model, trails))
    close_runs(model)  # what tp.detach(model) does
    assert not is_attached(model, trails)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(StopIteration):
        next(begun)
    list(run(*other))


def test_runs_that_are_zipped_leave_nothing(watch: Watch) -> None:
    model, first, second = watch(llama()), make_trails(), make_trails()
    with pytest.raises(RuntimeError, match="over this model is still open"):
        list(zip(run(model, first), run(model, second), strict=True))
    assert not is_attached(model, first)
    assert_equal(state(second), state(make_trails()))


def test_runs_over_models_of_their_own_may_be_mixed() -> None:
    together, alone = [make_trails(0.5), make_trails(0.5)], [make_trails(0.5), make_trails(0.5)]
    list(zip(run(llama(), together[0]), run(llama(), together[1], seed=1), strict=True))
    for seed, trails in enumerate(alone):
        list(run(llama(), trails, seed=seed))
    for one, other in zip(together, alone, strict=True):
        assert_equal(state(one), state(other))


def test_a_run_through_a_wrapper_of_the_same_model_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    from tokenpaths.lab.peers import PeftAdapter

    inner = llama()
    begun = run(inner, make_trails())
    next(begun)
    wrapped = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="over this model is still open"):
        list(run(wrapped, PeftAdapter(wrapped)))
    begun.close()


def test_runs_in_threads_are_those_of_one_thread_and_the_users_random_numbers_stay() -> None:
    def train(seed: int, results: dict[int, Any]) -> None:
        trails = make_trails(0.5)
        list(run(llama(), trails, steps=6, seed=seed))
        results[seed] = state(trails)

    alone: dict[int, Any] = {}
    for seed in range(3):
        train(seed, alone)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    made = [(llama(), make_trails(0.5)) for _ in range(3)]  # fork_rng of the fixtures knows no threads
    together: dict[int, Any] = {}

    def go(seed: int) -> None:
        model, trails = made[seed]
        list(run(model, trails, steps=6, seed=seed))
        together[seed] = state(trails)

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.rand(3), expected)
    for seed in range(3):
        assert_equal(together[seed], alone[seed])


# --- the mode of trails


def spread(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(IDS).logits - model(IDS).logits).abs().max())


@pytest.mark.parametrize("made", ["fresh", "trained", "loaded", "train()"])
def test_dropout_of_trails_follows_the_model(made: str, tmp_path: Path) -> None:
    model = llama()
    trails = TrailMap({Site(1, All()): LoReFT(DIM, 4, init="paper", dropout=0.5)})
    if made == "trained":
        list(run(model, trails))
    elif made == "loaded":
        trails.save(tmp_path / "x.safetensors")
        trails = TrailMap.load(tmp_path / "x.safetensors")
    elif made == "train()":
        trails.train()
    with attach(model, trails):
        assert spread(model) == 0
        model.train()
        assert spread(model) > 0
        model.eval()
        assert spread(model) == 0


def test_dropout_is_on_in_steps_and_off_between_them() -> None:
    model = llama()
    trails = TrailMap({Site(1, All()): LoReFT(DIM, 4, init="paper", dropout=0.5)})
    modes: list[bool] = []

    @dataclass
    class Look(Imitate):
        def loss(self, model: Any, trails: Any, batch: Any) -> Tensor:
            loss = super().loss(model, trails, batch)
            modes.extend(module.training for module in trails.modules())
            return loss

    for _ in steps(
        model, trails, [Look(make_examples())], steps=2, progress=False, drift=lambda: spread(model), drift_every=1
    ):
        assert _.drift == 0
        assert spread(model) == 0
        assert not model.training
    assert modes and all(modes)


def test_a_checkpointed_backward_draws_the_dropout_of_its_forward() -> None:
    """The model is in eval mode meanwhile, as when something is written between the two."""
    gradients = []
    for checkpointing in (False, True):
        model = llama().train()
        trails = TrailMap({Site(1, All(), "mlp"): LoReFT(DIM, 4, init="paper", dropout=0.5)})
        trails.load_state_dict(gradients[0][1] if gradients else trails.state_dict())
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with attach(model, trails):
            torch.manual_seed(3)
            loss = model(IDS, labels=PROMPTED).loss
            assert spread(model.eval()) == 0
            model.train()
            loss.backward()
        gradients.append(([p.grad for p in trails.parameters()], trails.state_dict()))
    for one, other in zip(gradients[0][0], gradients[1][0], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_cast_of_the_model_leaves_the_dtype_of_its_trails(cast: str) -> None:
    model, trails = llama(), make_trails()
    before = state(trails)
    with trainable(model, trails):
        model.to(device="cpu", dtype=torch.bfloat16) if cast == "to" else getattr(model, cast)()
        assert next(model.parameters()).dtype != torch.float32
        assert_equal(state(trails), before)
        assert {p.dtype for p in trails.parameters()} == {torch.float32}
        loop(model, count=1)
        model.to("meta")
        assert all(p.is_meta for p in trails.parameters())


# --- what is trained beside the trails


def classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(hidden_size=DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=VOCAB, pad_token_id=0, num_labels=2, initializer_range=0.6, **sizes)
        ).eval()


def classify(model: Any, folder: Path, resume: str | None = None) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [
        dict(input_ids=list(e.ids[:3]), attention_mask=[1] * 3, labels=i % 2) for i, e in enumerate(make_examples())
    ]
    options: dict[str, Any] = dict(report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=4, **options
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*")
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)


ALSO: dict[str, Callable[[Any], Any]] = {
    "module": lambda model: model.score,
    "parameter": lambda model: model.score.weight,
    "list": lambda model: [model.score, model.model.norm.weight],
}


@pytest.mark.parametrize("name", ALSO)
def test_a_head_that_is_named_is_trained_saved_loaded_and_resumed(name: str, tmp_path: Path, watch: Watch) -> None:
    model, trails = classifier(), at(Last(1), dropout=0.3)
    named = ALSO[name](model)
    learning = {id(p) for part in (named if name == "list" else [named]) for p in _parameters(part)}
    names = sorted(n for n, p in model.named_parameters() if id(p) in learning)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with trainable(model, trails, also=named):
        asking = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("trails.")}
        assert asking == set(names)
        classify(model, tmp_path)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == [
        n for n, _ in model.named_parameters() if n in names
    ]

    fresh = classifier()
    assert load_also(tmp_path / "checkpoint-4", fresh) == names
    loaded = TrailMap.from_pretrained(tmp_path / "checkpoint-4", model=fresh)  # does not warn of another base
    assert_equal(state(loaded), state(trails))
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in fresh.named_parameters())

    resumed, again = at(Last(1), dropout=0.3), classifier()
    with trainable(again, resumed, also=ALSO[name](again)):
        classify(again, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    assert_equal(state(resumed), state(trails))
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in again.named_parameters())


def _parameters(part: Any) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def test_what_is_named_keeps_its_buffers_and_the_flags_it_had(tmp_path: Path, watch: Watch) -> None:
    model = classifier()
    model.score = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 2))
    model.score.requires_grad_(False)
    watch(model)
    with trainable(model, make_trails(), also=model.score):
        assert model.score[1].weight.requires_grad
        model.save_pretrained(tmp_path)
    other = classifier()
    other.score = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 2))
    other.score[0].running_mean.fill_(3.0)
    assert "score.0.running_mean" in load_also(tmp_path, other)
    assert torch.equal(other.score[0].running_mean, model.score[0].running_mean)


def test_a_parameter_that_was_not_named_is_warned_of_and_not_saved(tmp_path: Path) -> None:
    model = classifier()
    with trainable(model, make_trails()):
        model.score.requires_grad_(True)
        with pytest.warns(
            UserWarning, match=r"1 parameters of the base ask .* the first of them score.weight: .*also="
        ):
            model.train()(IDS, labels=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"not saved: .*score.weight.*also=model.score"):
            model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": (lambda model, trails: "score", TypeError, "also= takes a module or a parameter"),
    "a list of names": (lambda model, trails: ["score"], TypeError, "not str"),
    "a module of another model": (lambda model, trails: classifier().score, ValueError, "is no part of this Llama"),
    "a module without parameters": (lambda model, trails: model.model.rotary_emb, ValueError, "has no parameters"),
    "the trails": (lambda model, trails: trails, ValueError, "holds parameters of the trails"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_named_is_refused(name: str, watch: Watch, unchecked: None) -> None:
    model, trails = watch(classifier()), make_trails()
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message), trainable(model, trails, also=make(model, trails)):
        pass


def test_a_head_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    model = classifier()
    with trainable(model, make_trails(), also=[model.score, model.model.norm]):
        model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing was trained beside the trails there"):
        load_also(tmp_path / "nowhere", model)
    smaller = classifier()
    smaller.score = nn.Linear(DIM, 3, bias=False)
    smaller.model.norm.weight.data.fill_(9.0)
    with pytest.raises(ValueError, match=r"holds score.weight of shape \[2, 32\]; this Llama.* has it of shape \[3"):
        load_also(tmp_path, smaller)
    assert bool((smaller.model.norm.weight == 9).all())
    with pytest.raises(ValueError, match="holds score.weight .* does not have it"):
        load_also(tmp_path, llama())
    (tmp_path / "also.safetensors").write_bytes((tmp_path / "trails.safetensors").read_bytes())
    with pytest.raises(TrailFileError, match="is not a file of what trainable"):
        load_also(tmp_path, model)
    model.score.weight.data[0] = float("nan")
    with (
        trainable(model, make_trails(), also=model.score),
        pytest.raises(ValueError, match="not saved: score.weight holds NaN"),
    ):
        model.save_pretrained(tmp_path)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An Accelerator in float16, whose loss scale lets the first gradients overflow. (Its own wants a GPU.)"""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True, raising=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    return accelerator


def test_a_loss_scale_that_overflows_skips_the_step_and_the_run_goes_on(scaled: Any) -> None:
    trails = make_trails()
    before = state(trails)
    norms, changed = [], []
    for step in run(llama(), trails, steps=12, accelerator=scaled, mixed_precision="no"):
        norms.append(step.grad_norm)
        changed.append(any(not torch.equal(tensor, before[name]) for name, tensor in state(trails).items()))
    assert not math.isfinite(norms[0])
    assert not changed[0]
    assert changed[-1]
    assert 0 < norms[-1] < 100
    assert scaled.scaler.get_scale() < 2.0**127
