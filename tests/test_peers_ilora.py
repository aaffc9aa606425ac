"""I-LoRA: the slow weights by their closed form, replay by its formula, and the reservoir."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import ids, logits, make, train
from scipy.stats import chisquare
from tiny import llama, make_examples, make_trails

import tokenpaths as tp
from tokenpaths import Imitate
from tokenpaths.data import collate
from tokenpaths.lab.peers import DualMemory, ReplayNear, Reservoir


def numbers(adapter: tp.trailmap.Adapter) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in adapter.parameters()])


def slow_numbers(memory: DualMemory) -> torch.Tensor:
    with memory.slow():
        return numbers(memory.trails)


def run(adapter: Any, memory: DualMemory, count: int) -> list[torch.Tensor]:
    """The fast weights after each step."""
    model = adapter.peft_model
    found: list[torch.Tensor] = []
    for _ in tp.steps(
        *(model, adapter, [Imitate(make_examples())]),
        **dict(steps=count, batch_size=4, lr=1e-2, warmup=0, progress=False),
    ):
        memory.update()
        found.append(numbers(adapter))
    return found


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_slow_weights_are_the_closed_form(decay: float) -> None:
    """l_n = lambda^n l_0 + (1 - lambda) sum_k lambda^(n - k) w_k."""
    _, adapter = make("LoRA")
    memory, first = DualMemory(adapter, decay), numbers(adapter).double()
    fast = run(adapter, memory, 4)
    wanted = decay**4 * first + sum((1 - decay) * decay ** (3 - k) * w.double() for k, w in enumerate(fast))
    assert torch.allclose(slow_numbers(memory).double(), wanted, atol=1e-6)
    assert (fast[-1] - first).abs().max() > 1e-3


def test_the_published_schedule() -> None:
    _, adapter = make("LoRA")
    memory = DualMemory(adapter, schedule="published-code")
    decays = []
    for _ in range(4):
        decays.append(memory.next_decay())
        memory.update()
    assert decays == [0.0, 0.25, 0.25, 0.25]  # min(1 - 1 / (k + 1), 0.25): 0, 1/2, 2/3 ...
    memory = DualMemory(adapter, schedule="published-code")
    first, *rest = run(adapter, memory, 3)
    wanted = first
    for w in rest:
        wanted = 0.25 * wanted + 0.75 * w
    assert torch.allclose(slow_numbers(memory), wanted, atol=1e-6)


def test_slow_gives_the_fast_weights_back() -> None:
    model, adapter = make("LoRA")
    memory = DualMemory(adapter)
    run(adapter, memory, 3)
    adapter.train()
    modes = [module.training for module in model.modules()]
    model.eval()
    fast = logits(model)
    adapter.train()
    storage = [p.data_ptr() for p in adapter.parameters()]
    with memory.slow():
        slow = logits(model)
        assert not any(module.training for module in adapter.modules())
        with memory.slow():
            assert torch.equal(logits(model), slow)
        assert torch.equal(logits(model), slow)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), memory.slow():
        raise KeyError
    assert [p.data_ptr() for p in adapter.parameters()] == storage
    adapter.eval()
    assert torch.equal(logits(model), fast)
    assert not torch.equal(slow, fast)
    with memory.slow(), pytest.raises(RuntimeError, match=r"update\(\) inside slow\(\)"):
        memory.update()


def test_of_trails() -> None:
    """Slow weights of trails: their rows are orthonormal, as those of any weights are."""
    model, trails = llama(), make_trails()
    memory = DualMemory(trails, 0.9)
    with tp.attach(model, trails):
        for _ in tp.steps(model, trails, [Imitate(make_examples())], steps=3, batch_size=4, lr=0.1, progress=False):
            memory.update()
        fast = logits(model)
        with memory.slow():
            slow = logits(model)
            assert tp.trailmap.notes.fault(trails) is None
        assert torch.equal(logits(model), fast)
    assert not torch.equal(slow, fast)


@pytest.mark.filterwarnings("ignore:DualMemory.*stay where they are:UserWarning")  # as they are meant to here
def test_replay_knows_no_light_cone() -> None:
    """Of trails too, which have one: rows are run whole, and the losses are the same."""
    losses: list[list[float]] = []
    for cone in (True, False):
        model, trails = llama(), make_trails()
        goals = [ReplayNear(make_examples(4), memory=DualMemory(trails, 0.0))]
        losses.append(train(model, trails, 3, goals=goals, cone=cone, lr=1e-3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] != losses[0][0]


@pytest.mark.parametrize("sides", ["both", "below"])
def test_replay_is_its_formula(sides: Any) -> None:
    model, adapter = make("LoRA")
    memory = DualMemory(adapter, 0.5)
    run(adapter, memory, 3)
    examples = make_examples(4)
    goal = ReplayNear(examples, memory=memory, gamma=0.7, sides=sides)
    found = goal.loss(model, adapter, collate(examples)).detach()
    total = 0.0
    with torch.no_grad():
        for example in examples:
            row = torch.tensor([example.ids])
            fast = model(row, output_hidden_states=True)
            with memory.slow():
                slow = model(row, output_hidden_states=True)
            log_probs = fast.logits[0].double().log_softmax(-1)
            answer = [i for i, on in enumerate(example.answer) if on]
            said = -sum(log_probs[i - 1, example.ids[i]] for i in answer) / len(answer)
            apart = [(x - y).double()[0] for x, y in zip(fast.hidden_states, slow.hidden_states, strict=True)]
            kept = [d if sides == "both" else torch.where(d < 0, d, 0) for d in apart[1:-1]]
            # what transformers gives last is behind the final norm: the last block is read by a hook
            last: list[torch.Tensor] = []
            hook = model.base_model.model.model.layers[-1].register_forward_hook(
                lambda m, a, o, into=last: into.append(o)
            )
            model(row)
            with memory.slow():
                model(row)
            hook.remove()
            d = (last[0] - last[1]).double()[0]
            kept.append(d if sides == "both" else torch.where(d < 0, d, 0))
            total += float(said + 0.7 * torch.stack([part.square().mean() for part in kept]).mean())
    assert float(found) == pytest.approx(total / 4, rel=1e-5)
    halves = [float(goal.loss(model, adapter, collate(part)).detach()) for part in (examples[:1], examples[1:])]
    assert float(found) == pytest.approx((halves[0] + 3 * halves[1]) / 4, rel=1e-5)  # however it is split
    assert goal.terms(examples) == 4


def test_the_distance_moves_fast_weights_only() -> None:
    model, adapter = make("LoRA")
    memory = DualMemory(adapter, 0.5)
    run(adapter, memory, 3)
    slow = slow_numbers(memory)
    for parameter in adapter.parameters():
        parameter.grad = None
    with_distance, without = (
        ReplayNear(make_examples(4), memory=memory, gamma=gamma).loss(model, adapter, collate(make_examples(4)))
        for gamma in (1.0, 0.0)
    )
    (with_distance - without).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert sum(float(p.grad.abs().sum()) for p in adapter.parameters() if p.grad is not None) > 0
    assert torch.equal(slow_numbers(memory), slow)
    assert not any(tensor.requires_grad for tensor in memory._slow.values())  # pyright: ignore[reportPrivateUsage]


def test_saved_and_restored(tmp_path: Path) -> None:
    _, adapter = make("LoRA")
    memory = DualMemory(adapter, 0.9)
    run(adapter, memory, 2)
    memory.save(tmp_path / "memory.safetensors")
    again = DualMemory(make("LoRA")[1], 0.9)
    again.restore(tmp_path / "memory.safetensors")
    assert again.updates == 2
    assert torch.equal(slow_numbers(again), slow_numbers(memory))
    make_trails().save(tmp_path / "trails.safetensors")
    with pytest.raises(tp.files.TrailFileError, match="is not a file of a DualMemory"):
        again.restore(tmp_path / "trails.safetensors")
    with pytest.raises(tp.files.TrailFileError, match="the file lacks tensors"):
        DualMemory(make_trails()).restore(tmp_path / "memory.safetensors")


def test_slow_weights_saved_for_use(tmp_path: Path) -> None:
    import peft

    model, adapter = make("LoRA")
    memory = DualMemory(adapter, 0.5)
    run(adapter, memory, 3)
    with memory.slow():
        slow = logits(model)
        adapter.save(tmp_path / "slow")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), str(tmp_path / "slow")).eval()), slow)


def test_refusals(unchecked: None) -> None:
    model, adapter = make("LoRA")
    memory = DualMemory(adapter)
    for arguments, message in (
        (dict(decay=1.0), "decay=1.0 must be at least 0 and below 1"),
        (dict(schedule="slow"), "schedule='slow' must be 'constant' or 'published-code'"),
    ):
        with pytest.raises(ValueError, match=message):
            DualMemory(adapter, **arguments)
    for arguments, message in (
        (dict(gamma=-1.0), "gamma=-1.0 must be a finite number, at least 0"),
        (dict(sides="above"), "sides='above' must be 'both' or 'below'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayNear(make_examples(), memory=memory, **arguments)
    with pytest.raises(ValueError, match="its memory is of another adapter than the one that is trained"):
        train(*make("LoRA"), goals=[ReplayNear(make_examples(), memory=memory)])
    adapter.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the adapter is frozen, so there is nothing to follow"):
        DualMemory(adapter)
    assert model(ids()).logits.isfinite().all()


# The reservoir


def numbered(count: int) -> list[tp.Example]:
    return [tp.Example((i + 1, 1), (False, True)) for i in range(count)]


def test_every_example_is_as_likely_to_be_kept() -> None:
    kept = torch.zeros(12)
    for seed in range(600):
        reservoir = Reservoir(3, seed)
        reservoir.extend(numbered(12))
        for example in reservoir:
            kept[example.ids[0] - 1] += 1
    assert kept.sum() == 1800
    assert chisquare(kept.numpy()).pvalue > 1e-3


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 2**31), st.integers(0, 20))
def test_a_saved_reservoir_goes_on(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, count: int, seed: int, cut: int
) -> None:
    examples = numbered(count)
    whole, part = Reservoir(capacity, seed), Reservoir(capacity, seed)
    whole.extend(examples)
    part.extend(examples[:cut])
    path = tmp_path_factory.mktemp("reservoir") / "kept.json"
    part.save(path)
    again = Reservoir.load(path)
    again.extend(examples[cut:])
    assert list(again) == list(whole)
    assert len(whole) == min(capacity, count)
    assert again.seen == count


def test_spans_are_kept(tmp_path: Path) -> None:
    reservoir = Reservoir(2)
    reservoir.add(tp.Example((1, 2, 3), (False, True, True), {"chain": (1, 3)}))
    reservoir.save(tmp_path / "kept.json")
    assert list(Reservoir.load(tmp_path / "kept.json")) == list(reservoir)


def test_reservoir_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        Reservoir(0)
    with pytest.raises(FileNotFoundError):
        Reservoir.load(tmp_path / "none.json")
    reservoir = Reservoir(2)
    reservoir.extend(numbered(5))
    reservoir.save(tmp_path / "kept.json")
    note = json.loads((tmp_path / "kept.json").read_text())
    for broken in (
        "[",
        "[]",
        json.dumps({**note, "kept": note["kept"][:1]}),
        json.dumps({**note, "kept": [{"ids": [1]}] * 2}),
        json.dumps({**note, "tokenpaths reservoir": 2}),
        json.dumps({**note, "kept": 3}),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"broken.json is not a whole file of a Reservoir"):
            Reservoir.load(tmp_path / "broken.json")


@pytest.mark.parametrize("followed", [True, False])
def test_slow_weights_that_are_never_updated_are_warned_of(followed: bool) -> None:
    model, adapter = make("LoRA")
    memory = DualMemory(adapter)
    goals = [Imitate(make_examples()), ReplayNear(make_examples(6), memory=memory, weight=0.5)]
    options: dict[str, Any] = dict(steps=4, batch_size=2, accumulate=3, lr=1e-3, progress=False)

    def train() -> None:
        for _ in tp.steps(model, adapter, goals, **options):
            if followed:
                memory.update()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train()
    assert [str(w.message).startswith("DualMemory: the adapter has been trained for two steps") for w in told] == (
        [] if followed else [True]
    )


def test_an_adapter_that_is_trained_inside_slow_is_an_error() -> None:
    _, adapter = make("LoRA")
    memory = DualMemory(adapter, 0.5)
    run(adapter, memory, 2)
    with pytest.raises(RuntimeError, match=r"trained inside slow\(\), so its slow weights were changed"), memory.slow():
        list(tp.steps(adapter.peft_model, adapter, [Imitate(make_examples())], steps=1, batch_size=4, progress=False))
    with memory.slow(), torch.no_grad():  # what only reads is free to
        adapter.peft_model(torch.arange(5, 9)[None])
