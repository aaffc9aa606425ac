"""Behind a gate, a row is the frozen model's to the bit, or steered as without one: prompt and answer together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from laws import assert_close, padded
from subjects import MOVING
from tiny import llama, make_examples
from torch import nn

import tokenpaths as tp
from tokenpaths.data import collate
from tokenpaths.files import TrailFileError
from tokenpaths.lab.peers import CurLoraConfig, PeftAdapter
from tokenpaths.randomness import own_randomness
from tokenpaths.trailmap.gate import Gate

ROWS = [[5, 47, 31, 66, 8], [17, 4, 73, 29, 61, 12, 36, 90, 7], [33, 50], list(range(20, 34))]
LAYERS = [(1,), (0,), (0, 2)]
PROBES = ((7, 11), (20, 5, 9))
WRITERS = {name: family for name, family in FAMILIES.items() if family.kind == "decoder"}
NEW = 6


def gate_for(model: nn.Module, layers: Sequence[int], rows: Sequence[Sequence[int]] = ROWS, seed: int = 5) -> Gate:
    """A gate that reads random directions, and opens on half of the rows, with a wide margin to the others."""
    gate = Gate(layers, PROBES, 32)
    with own_randomness(seed):
        gate.weight.normal_()
    found = torch.stack([score_of(model, gate, row) for row in rows]).sort().values
    middle = len(found) // 2
    gate.bias -= (found[middle - 1] + found[middle]) / 2
    assert found[middle] - found[middle - 1] > 1e-2
    return gate


def score_of(model: nn.Module, gate: Gate, row: Sequence[int]) -> torch.Tensor:
    """The score of one prompt, from the states behind it and each probe."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out if torch.is_tensor(out) else out[0]))
        for i, block in enumerate(tp.site.find_blocks(model))
    ]
    read: list[torch.Tensor] = []
    for probe in gate.probes:
        with torch.no_grad():
            model(input_ids=torch.tensor([[*row, *probe]]))
        read += [seen[layer][0, -1].double() for layer in gate.layers]
    for hook in hooks:
        hook.remove()
    unit = torch.cat([state / state.square().mean().sqrt() for state in read])
    return (gate.weight.double() @ unit + gate.bias.double()).float()


def opened(model: nn.Module, gate: Gate, rows: Sequence[Sequence[int]] = ROWS) -> list[bool]:
    return [bool(score_of(model, gate, row) > 0) for row in rows]


def trails(layer: int = 0, name: str = "Additive") -> tp.TrailMap:
    with own_randomness(2):
        return tp.TrailMap(
            {tp.Site(layer, tp.Last(2) | tp.Answer()): MOVING[name](32), tp.Site(2): MOVING["Additive"](32)}
        )


def written(model: Any, rows: Sequence[Sequence[int]] = ROWS, **options: Any) -> Any:
    fixed = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    asked = dict(output_logits=True, return_dict_in_generate=True, suppress_tokens=[0])
    found = model.generate(**padded([list(row) for row in rows]), **{**fixed, **asked, **options})
    return found.sequences, torch.stack(found.logits, 1)


def assert_decided(opens: Sequence[bool], gated: Any, frozen: Any, steered: Any) -> None:
    """Row by row: to the bit as frozen, or as steered. And some of both, which differ."""
    assert len(set(opens)) == 2
    for row, is_open in enumerate(opens):
        if is_open:
            assert_close(gated[row], steered[row])
            assert not torch.equal(steered[row], frozen[row])
        else:
            assert torch.equal(gated[row], frozen[row])


@pytest.mark.parametrize("family", WRITERS.values(), ids=WRITERS)
def test_a_row_is_frozen_or_steered_as_a_whole(watch: Any, family: Any) -> None:
    model = watch(family.make())
    gate = gate_for(model, (1,))
    inputs = padded(ROWS, "right")
    with torch.no_grad():
        frozen = model(**inputs).logits
        with tp.attach(model, trails()):
            steered = model(**inputs).logits
        with tp.attach(model, trails(), when=gate):
            gated = model(**inputs).logits
    rows = [slice(0, len(row)) for row in ROWS]
    cut = [[part[i, row] for i, row in enumerate(rows)] for part in (gated, frozen, steered)]
    assert_decided(opened(model, gate), *cut)


def test_a_gate_scores_probe_after_probe_and_layer_after_layer() -> None:
    gate = Gate((0, 3), PROBES, 2)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([1.0, 0, 0, 10, 100, 0, 0, 1000]))
        gate.bias.fill_(0.5)
    states = [torch.tensor([pair]) for pair in ([3.0, 4.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 1.0])]
    assert gate.scores(states).item() == pytest.approx(3 / 12.5**0.5 + 10 * 2**0.5 + 100 + 1000 + 0.5)
    assert gate.opens([-state for state in states]).tolist() == [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 1)}, "it reads at least one layer, from the lowest"),
        ({"layers": ()}, "it reads at least one layer"),
        ({"probes": ()}, "behind at least one probe, each of some tokens"),
        ({"probes": ((7,), ())}, "each of some tokens"),
        ({"probes": ((7,), (7,))}, "at least one probe"),
    ],
)
def test_arguments_of_a_gate_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**{"layers": (1,), "probes": PROBES, "dim": 32, **options})


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}],
    ids=["cache", "no cache", "chunks", "static cache"],
)
def test_a_decision_holds_for_the_answer(watch: Any, layers: tuple[int, ...], options: dict[str, Any]) -> None:
    model = llama() if "cache_implementation" in options else watch(llama())  # transformers leaves a note of its own
    gate = gate_for(model, layers)
    frozen = written(model, **options)[1]
    with tp.attach(model, trails()):
        steered = written(model, **options)[1]
    with tp.attach(model, trails(), when=gate):
        gated = written(model, **options)[1]
    assert_decided(opened(model, gate), gated, frozen, steered)


def test_beams_of_a_prompt_go_together(watch: Any) -> None:
    model = watch(llama())
    gate = gate_for(model, LAYERS[2])
    frozen = written(model, num_beams=3)[0]
    with tp.attach(model, trails()):
        steered = written(model, num_beams=3)[0]
    with tp.attach(model, trails(), when=gate):
        gated = written(model, num_beams=3)[0]
    for row, is_open in enumerate(opened(model, gate)):
        assert torch.equal(gated[row], (steered if is_open else frozen)[row])


def test_company_changes_no_decision(watch: Any) -> None:
    model = watch(llama())
    gate = gate_for(model, LAYERS[2])
    with tp.attach(model, trails(), when=gate):
        together = written(model)[1]
        for row, ids in enumerate(ROWS):
            assert_close(written(model, [ids])[1][0], together[row])


def test_gates_of_several_maps_decide_each_for_its_own(watch: Any) -> None:
    model = watch(llama())
    one, two = gate_for(model, (1,)), gate_for(model, (2,), seed=6)
    first, second = trails(), trails(1, "DiReFT")
    choices = list(zip(opened(model, one), opened(model, two), strict=True))
    assert len(set(choices)) > 2
    found = {}
    for laid in ((), (first,), (second,), (first, second)):
        handles = [tp.attach(model, each) for each in laid]
        found[tuple(each in laid for each in (first, second))] = written(model)[1]
        for handle in handles:
            handle.remove()
    with tp.attach(model, first, when=one), tp.attach(model, second, when=two):
        gated = written(model)[1]
    for row, chosen in enumerate(choices):
        assert_close(gated[row], found[chosen][row])
        assert chosen != (False, False) or torch.equal(gated[row], found[chosen][row])


def test_of_maps_that_act_alone_a_request_gets_the_one_whose_gate_scores_highest_or_none(watch: Any) -> None:
    model = watch(llama())
    gates = gate_for(model, (1,)), gate_for(model, (2,), seed=6)
    maps = trails(), trails(1, "DiReFT")
    scores = torch.stack([torch.stack([score_of(model, gate, row) for row in ROWS]) for gate in gates])
    best = scores.argmax(0).where(scores.amax(0) > 0, -1).tolist()
    assert set(best) == {-1, 0, 1} and bool((scores > 0).all(0).any())
    found = [written(model)]
    for laid in maps:
        with tp.attach(model, laid):
            found.append(written(model))
    with tp.attach(model, maps[0], when=gates[0], alone=True), tp.attach(model, maps[1], when=gates[1], alone=True):
        gated = written(model)[1]
        beams = written(model, num_beams=2)[0]
        with maps[0].off():  # what is off stands in nobody's way
            second = written(model)[1]
    for row, chosen in enumerate(best):
        assert_close(gated[row], found[chosen + 1][1][row])
        assert chosen != -1 or torch.equal(gated[row], found[0][1][row])
        assert_close(second[row], found[2 if scores[1, row] > 0 else 0][1][row])
    for chosen, laid in ((0, maps[0]), (1, maps[1])):
        with tp.attach(model, laid):
            expected = written(model, num_beams=2)[0]
        assert all(torch.equal(beams[i], expected[i]) for i, one in enumerate(best) if one == chosen)


def test_rows_of_a_map_that_acts_alone_are_all_that_it_takes_from_others(watch: Any) -> None:
    model = watch(llama())
    gates = gate_for(model, (1,)), gate_for(model, (2,), seed=6)
    maps = trails(), trails(1, "DiReFT")
    scores = torch.stack([torch.stack([score_of(model, gate, row) for row in ROWS]) for gate in gates])
    both = [i for i in range(len(ROWS)) if scores[0, i] > scores[1, i] > 0]
    with tp.attach(model, maps[1], when=gates[1]):
        expected = written(model)[1]
    rows = [i for i in range(len(ROWS)) if i not in both]
    with (
        tp.attach(model, maps[0], when=gates[0], alone=True, rows=rows),
        tp.attach(model, maps[1], when=gates[1], alone=True),
    ):
        gated = written(model)[1]
    assert both
    assert_close(gated[both], expected[both])


def test_an_adapter_without_a_gate_cannot_act_alone() -> None:
    with pytest.raises(ValueError, match="alone=True picks among adapters by their gates, and this one has none"):
        tp.attach(llama(), trails(), alone=True)


def test_rows_narrow_what_a_gate_opens(watch: Any) -> None:
    model = watch(llama())
    gate = gate_for(model, LAYERS[0])
    opens = opened(model, gate)
    row = opens.index(True)
    frozen = written(model)[1]
    with tp.attach(model, trails(), when=gate, rows=[i for i in range(len(ROWS)) if i != row]):
        gated = written(model)[1]
    assert torch.equal(gated[row], frozen[row])


def test_trails_that_are_off_ask_no_gate(watch: Any) -> None:
    model, laid = watch(llama()), trails()
    frozen = written(model)[1]
    with tp.attach(model, laid, when=gate_for(model, LAYERS[0])), laid.off():
        assert torch.equal(written(model)[1], frozen)


@pytest.mark.filterwarnings("ignore:.*come from a cache")  # of the reference, which has no gate
def test_a_second_turn_is_decided_anew(watch: Any) -> None:
    """On its whole text, whatever its first turn was."""
    model = watch(llama())
    first, second = ROWS[1], [*ROWS[1], *ROWS[3]]

    def turns(opens: Sequence[bool], gate: Gate | None = None) -> torch.Tensor:
        cache, logits = None, []
        for is_open, ids, whole in zip(opens, (first, second[len(first) :]), (first, second), strict=True):
            with torch.no_grad(), tp.attach(model, trails(), when=gate) if is_open else nullcontext():
                inside = {"prompt_mask": torch.ones(1, len(whole))} if is_open else {}
                found = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, **inside)
                cache = found.past_key_values
                logits.append(found.logits[0])
        return torch.cat(logits)

    met: set[tuple[bool, ...]] = set()
    for seed in range(6):
        gate = gate_for(model, LAYERS[2], [second, *ROWS], seed=seed)
        choice = tuple(opened(model, gate, [first, second]))
        assert_close(turns((True, True), gate), turns(choice))
        met.add(choice)
    assert {(True, False), (False, True)} & met


def test_a_beginning_that_was_cached_without_the_gate_is_read_too(watch: Any) -> None:
    model = watch(llama())
    whole, start = ROWS[3], ROWS[3][:6]
    gate = gate_for(model, LAYERS[2])
    with torch.no_grad():
        cache = model(torch.tensor([start]), use_cache=True).past_key_values
        laid = tp.TrailMap({tp.Site(0, tp.Last(2)): MOVING["Additive"](32)})
        with tp.attach(model, laid, when=gate), pytest.raises(ValueError, match="run the whole prompt, as ids"):
            model(torch.tensor([whole[6:]]), past_key_values=cache, prompt_mask=torch.ones(1, len(whole)))


def test_threads_decide_for_themselves(watch: Any) -> None:
    model = watch(llama())
    gate = gate_for(model, LAYERS[2])
    with tp.attach(model, trails(), when=gate):
        alone = [written(model, [row])[1] for row in ROWS]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda row: written(model, [row])[1], ROWS * 8))
    for given, row in zip(found, range(len(ROWS) * 8), strict=True):
        assert torch.equal(given, alone[row % len(ROWS)])


def test_gradients_flow_in_the_rows_that_open(watch: Any) -> None:
    model = watch(llama())
    gate, laid = gate_for(model, LAYERS[0]), trails()
    is_open = torch.tensor(opened(model, gate))
    with tp.attach(model, laid, when=gate):
        logits = model(**padded(ROWS, "right")).logits
        (frozen,) = torch.autograd.grad(
            logits[~is_open].sum(), [next(laid.parameters())], retain_graph=True, allow_unused=True
        )
        (steered,) = torch.autograd.grad(logits[is_open].sum(), [next(laid.parameters())])
    assert frozen is None or not frozen.any()
    assert steered.any()


# Adapters that lie in the weights


def lora_model(kind: str = "lora") -> tuple[Any, PeftAdapter]:
    with own_randomness(1):
        made = peft.LoraConfig if kind == "lora" else CurLoraConfig
        model: Any = peft.get_peft_model(llama(), made(r=2, target_modules=["q_proj", "down_proj"])).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    return model, PeftAdapter(model)


@pytest.mark.parametrize("kind", ["lora", "curlora"])
def test_what_peft_lays_is_gated_row_by_row(watch: Any, kind: str) -> None:
    model, lora = lora_model(kind)
    watch(model)
    with lora.off():
        frozen = written(model)[1]
        gate = gate_for(model, LAYERS[2])
        opens = opened(model, gate)
    steered = written(model)[1]
    with tp.attach(model, lora, when=gate):
        gated = written(model)[1]
    assert_decided(opens, gated, frozen, steered)
    assert torch.equal(written(model)[1], steered)


def test_rows_of_an_adapter(watch: Any) -> None:
    model, lora = lora_model()
    watch(model)
    steered = written(model)[1]
    with lora.off():
        frozen = written(model)[1]
    with tp.attach(model, lora, rows=[0, 3]):
        assert_decided([True, False, False, True], written(model)[1], frozen, steered)


def test_an_adapter_is_measured_behind_its_gate(watch: Any) -> None:
    model, lora = lora_model()
    watch(model)
    with lora.off():
        lora.gate = gate_for(model, LAYERS[0])
        opens = opened(model, lora.gate)
    texts = [tp.Example(tuple(row), (False,) * len(row)) for row in ROWS]
    for text, is_open in zip(texts, opens, strict=True):
        kl = tp.measure_drift(model, lora, [text])["kl"].mean
        assert (kl > 0) == is_open


def test_an_adapter_alone_is_refused() -> None:
    model, lora = lora_model()
    with pytest.raises(ValueError, match=r"lies in the model and is at work already: attach it behind a gate \(when="):
        tp.attach(model, lora)
    with pytest.raises(ValueError, match=r"strength=0\.5 is for trails, and means nothing to a PeftAdapter"):
        tp.attach(model, lora, rows=[0], strength=0.5)
    with pytest.raises(ValueError, match="spans are for trails"):
        tp.attach(model, lora, rows=[0], spans={"a": [(0, 1)]})
    with tp.attach(model, lora, rows=[0]) as handle, pytest.raises(ValueError, match=r"strength=2\.0 is for trails"):
        handle.strength = 2.0
    assert not tp.attached(model)


# Training, measuring, saving


def test_training_holds_the_gate_open(watch: Any) -> None:
    model = watch(llama())
    shut, free = trails(), trails()
    shut.gate = Gate((1,), PROBES, 32)
    shut.gate.bias -= 1
    for laid in (shut, free):
        for _ in tp.steps(model, laid, [tp.Imitate(make_examples(4))], steps=2, lr=0.01, progress=False):
            pass
    for one, other in zip(shut.parameters(), free.parameters(), strict=True):
        assert torch.equal(one, other)
    with tp.attach(model, shut), pytest.raises(ValueError, match="attached behind a gate, which would leave out"):
        next(tp.steps(model, shut, [tp.Imitate(make_examples(4))], steps=2, lr=0.01, progress=False))


def test_a_measurement_is_made_behind_the_gate(watch: Any) -> None:
    model, laid = watch(llama()), trails()
    laid.gate = gate_for(model, LAYERS[2])
    texts = [tp.Example(tuple(row), (False,) * len(row)) for row in ROWS]
    for text, is_open in zip(texts, opened(model, laid.gate), strict=True):
        for cone in (None, tp.Cone()):
            kl = tp.measure_drift(model, laid, [text], cone=cone)["kl"].mean
            assert (kl > 0) == is_open


def test_a_gate_is_saved_with_its_trails(tmp_path: Path) -> None:
    model, laid = llama(), trails()
    laid.gate = gate_for(model, LAYERS[2])
    laid.save(tmp_path / "t.safetensors", model)
    back = tp.TrailMap.load(tmp_path / "t.safetensors", model=model)
    assert back.gate is not None and back.gate.note() == laid.gate.note()
    with tp.attach(model, laid):
        expected = written(model)[1]
    with tp.attach(model, back) as handle:
        assert torch.equal(written(model)[1], expected)
        assert "behind a gate" in repr(handle)
    laid.gate.save(tmp_path / "g.safetensors")
    assert torch.equal(Gate.load(tmp_path / "g.safetensors").weight, laid.gate.weight)
    trails().save(tmp_path / "plain.safetensors")
    with pytest.raises(TrailFileError, match="the note of its gate is None"):
        Gate.load(tmp_path / "plain.safetensors")


def test_an_adapters_gate_is_saved_in_its_folder(tmp_path: Path) -> None:
    model, lora = lora_model()
    lora.gate = Gate((1,), PROBES, 32)
    lora.gate.weight.normal_()
    lora.save(tmp_path / "lora")
    again = lora_model()[1]
    again.restore(tmp_path / "lora")
    assert again.gate is not None and torch.equal(again.gate.weight, lora.gate.weight)


def kept_trails(folder: Path) -> tuple[Any, Path]:
    return trails(), folder / "trails.safetensors"


def kept_lora(folder: Path) -> tuple[Any, Path]:
    return lora_model()[1], folder / "lora"


@pytest.mark.parametrize("make", [kept_trails, kept_lora])
def test_restoring_takes_the_gate_of_the_file_or_refuses_it(tmp_path: Path, make: Any) -> None:
    laid, path = make(tmp_path)
    laid.gate = Gate((1,), PROBES, 32)
    laid.gate.weight.normal_()
    laid.save(path)
    bare, like, other = (make(tmp_path)[0] for _ in range(3))
    bare.restore(path)
    assert bare.gate is not None and torch.equal(bare.gate.weight, laid.gate.weight)
    like.gate = asked = Gate((1,), PROBES, 32)
    like.restore(path)
    assert like.gate is asked and torch.equal(asked.weight, laid.gate.weight)
    other.gate = Gate((2,), PROBES, 32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        TrailFileError, match=r"has Gate\(layers=\(1,\).*this adapter Gate\(layers=\(2,\).*take the gate away"
    ):
        other.restore(path)
    laid.gate = None
    laid.save(path)
    with pytest.raises(TrailFileError, match="has no gate, and this adapter"):
        other.restore(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_cast_leaves_a_gate_as_it_is() -> None:
    laid = trails()
    laid.gate = Gate((0,), PROBES, 32)
    laid.gate.weight.normal_()
    before = laid.gate.weight.clone()
    laid.to(torch.bfloat16)
    assert laid.gate.weight.dtype is torch.float32 and torch.equal(laid.gate.weight, before)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ("gate", TypeError, "when='gate' is str, but must be a Gate"),
        (Gate((7,), PROBES, 32), ValueError, "at layer 7, but the model has 3 layers of width 32"),
        (Gate((0,), PROBES, 64), ValueError, "reads states of width 64"),
        (Gate((0,), ((7,), (7, 1000)), 32), ValueError, "reads behind token 1000, but the model has 96 tokens"),
    ],
)
def test_gates_of_another_kind_are_refused(
    unchecked: None, watch: Any, gate: Any, error: type[Exception], message: str
) -> None:
    model = watch(llama())
    with pytest.raises(error, match=message):
        tp.attach(model, trails(), when=gate)


def test_a_cache_that_others_filled_is_refused_while_decoding(watch: Any) -> None:
    model = watch(llama())
    with torch.no_grad():
        gate = gate_for(model, LAYERS[0])
        with tp.attach(model, tp.TrailMap({tp.Site(2, tp.Last(1)): MOVING["Additive"](32)})):
            cache = model(torch.tensor([ROWS[0]]), use_cache=True).past_key_values
            with tp.attach(model, trails(), when=gate), pytest.raises(ValueError, match="filled without this gate"):
                model(torch.tensor([[5]]), past_key_values=cache)


def test_a_batch_of_the_library_is_decided_by_its_prompt(watch: Any) -> None:
    """In teacher forcing as in writing: the answer is not read."""
    model = watch(llama())
    gate = gate_for(model, LAYERS[2])
    examples = [tp.Example((*row, 9, 11), (False,) * len(row) + (True, True)) for row in ROWS]
    batch = collate(examples)
    with torch.no_grad():
        frozen = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        with tp.attach(model, trails(), when=gate):
            gated = tp.engine.forwards.forward(model, batch).logits
    for row, is_open in enumerate(opened(model, gate)):
        real = batch.attention_mask[row].bool()
        assert torch.equal(gated[row][real], frozen[row][real]) == (not is_open)
