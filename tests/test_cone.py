"""The light cone: what is left out, what is kept, and that no result tells whether it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import unchanged
from families import FAMILIES
from tiny import DIM, VOCAB, assert_equal, llama, make_examples, make_trails, state
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from tokenpaths import Cone, Imitate, Stay, steps
from tokenpaths.engine import answer_logits
from tokenpaths.engine.cone import active_cone, common_prefix
from tokenpaths.engine.forwards import forward
from tokenpaths.training import StayStates
from tokenpaths.training.plan import plan

ALL = tp.All()


def laid(rule: tp.tokens.Rule = ALL, layers: Any = (1, 2), dropout: float = 0.0) -> tp.TrailMap:
    torch.manual_seed(1)
    return tp.TrailMap({tp.Site(layer, rule): tp.DiReFT(DIM, 2, init="paper", dropout=dropout) for layer in layers})


def texts(count: int = 6) -> list[tp.Example]:
    return [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(count, seed=3)]


def behind(front: int, count: int = 8) -> list[tp.Example]:
    """Examples that begin alike."""
    start = tuple(range(3, 3 + front))
    return [tp.Example((*start, *e.ids), (False,) * front + e.answer) for e in make_examples(count)]


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """How many tokens go through each block, and through the output embedding."""
    seen: Counter[str] = Counter()
    parts = {f"block {i}": layer.mlp for i, layer in enumerate(tp.site.find_blocks(model))} | {"head": model.lm_head}
    before = {name: part.forward for name, part in parts.items()}

    def count(name: str, states: Tensor) -> Tensor:
        seen[name] += states.shape[:-1].numel()
        return before[name](states)

    for name, part in parts.items():  # not a hook: those are seen
        part.forward = lambda states, name=name: count(name, states)
    yield seen
    for part in parts.values():
        del part.forward


def trained(
    examples: list[tp.Example], trails: tp.TrailMap, cone: Cone | bool, **options: Any
) -> list[tp.training.Step]:
    return list(trained_slowly(examples, trails, cone, **options))


def trained_slowly(examples: list[tp.Example], trails: tp.TrailMap, cone: Cone | bool, **options: Any) -> Any:
    settings: dict[str, Any] = dict(steps=6, batch_size=4, lr=0.01, progress=False)
    model = options.pop("model", None) or llama().double()
    goals = options.pop("goals", None) or [Imitate(examples)]
    return steps(model, trails.double(), goals, cone=cone, **{**settings, **options})


# --- what training does with it


@pytest.mark.parametrize("rule", [tp.All(), tp.Last(1) | tp.Answer(), tp.Prompt()], ids=str)
def test_trained_trails_are_those_without_a_cone(rule):
    examples = behind(12)
    results = []
    for cone in (False, True, Cone(budget=0), Cone(budget=5_000)):
        trails = laid(rule)
        losses = [
            step.losses
            for step in trained(
                examples,
                trails,
                cone,
                goals=[
                    Imitate(examples),
                    Stay(texts(), weight=0.5, gain=0.0),
                    StayStates(texts(), weight=0.5, gain=0.0, every=2),
                ],
            )
        ]
        results.append((losses, state(trails)))
    for losses, weights in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=0, atol=1e-10, equal_nan=True)
        for name, value in weights.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=0, atol=1e-10)


def test_a_kept_row_is_the_same_whoever_computed_it(tmp_path):
    """So a resumed run, and one that finds another's states, goes on bit for bit as if it had computed them itself."""
    examples = make_examples()
    alone, interrupted, second = laid(), laid(), laid()
    trained(examples, alone, Cone())
    running = steps(
        llama().double(),
        interrupted.double(),
        [Imitate(examples)],
        steps=6,
        batch_size=4,
        lr=0.01,
        progress=False,
        checkpoint=tmp_path,
        save_every=2,
        cone=Cone(),
    )
    for step in running:
        if step.step == 4:
            break
    running.close()
    resumed = laid()
    trained(examples, resumed, Cone(), checkpoint=tmp_path, resume=True)
    assert_equal(state(resumed), state(alone))
    shared = Cone()
    trained(list(reversed(examples)), laid(), shared, batch_size=3, seed=5)
    trained(examples, second, shared)
    assert_equal(state(second), state(alone))


def test_blocks_below_run_once_for_each_example():
    model, cone, examples = llama().double(), Cone(), make_examples(8)
    tokens = sum(map(len, examples))
    for first in (True, False):
        with counted(model) as seen:
            trained(examples, laid(layers=[1]), cone, model=model, steps=4)
        extra = len(min(examples, key=len)) * 2  # each run looks once at how blocks hand on their states
        assert seen["block 1"] <= (tokens if first else 0) + extra + 8
        assert seen["block 0"] == seen["block 1"]
        assert seen["block 2"] >= 2 * tokens


def test_a_frozen_forward_costs_its_output_embedding():
    model, rehearsed = llama().double(), texts(4)
    tokens = sum(map(len, rehearsed))
    with counted(model) as seen:
        trained([], laid(layers=[0]), Cone(), model=model, goals=[Stay(rehearsed, gain=0.0)], steps=5)
    in_steps = seen["block 2"] - tokens  # the frozen states are computed once, the steered ones five times
    assert 5 * tokens <= in_steps <= 5 * 4 * max(map(len, rehearsed)) + tokens
    assert seen["head"] >= 5 * 2 * tokens


def test_tokens_before_the_first_moved_one_are_run_once():
    model, cone, examples = llama().double(), Cone(), behind(40)
    with counted(model) as seen:
        trained(examples, laid(tp.Last(1) | tp.Answer(), layers=[0, 1, 2]), cone, model=model, steps=1)
    whole = 4 * max(map(len, examples))
    assert seen["block 2"] < 3 * whole  # the first batch is tried both ways
    with counted(model) as seen:
        trained(examples, laid(tp.Last(1) | tp.Answer(), layers=[0, 1, 2]), cone, model=model, steps=4)
    answers = max(sum(e.answer) for e in examples)
    assert seen["block 2"] - 2 * whole <= 6 * 4 * (answers + 1) + 2 * max(map(len, examples))
    assert active_cone(model) is None


def test_a_shared_front_is_kept_once():
    front, sizes = 40, {}
    for count in (4, 8):
        cone = Cone()
        trained(behind(front, count), laid(tp.Answer(), layers=[0, 1, 2]), cone, steps=2)
        sizes[count] = cone.kept.used
    a_token = 2 * 2 * (DIM // 4) * 8  # keys and values of two heads in float64
    assert sizes[8] - sizes[4] < 4 * (6 * a_token + 8 * DIM) * 3
    assert sizes[4] > front * a_token * 3


def test_families_that_cannot_are_run_in_full_and_say_so_once():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = dict(vocab_size=VOCAB, hidden_size=DIM, state_size=4, num_hidden_layers=3, initializer_range=0.6)
    model = MambaForCausalLM(MambaConfig(**config)).eval()
    results = []
    for cone in (False, True):
        trails = laid(tp.Answer())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            list(steps(model, trails, [Imitate(behind(12))], steps=4, batch_size=4, progress=False, cone=cone))
        results.append((state(trails), [str(w.message) for w in said if "in full" in str(w.message)]))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=0, atol=1e-5)
    assert results[0][1] == [] and len(results[1][1]) <= 2 and len(set(results[1][1])) == len(results[1][1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mpt", "gemma2", "gpt_oss", "deepseek_v3"])
def test_every_kind_of_position_and_attention_is_narrowed(family):
    """Rotary, learned and ALiBi positions, sliding windows, grouped and latent keys: none falls back in silence."""
    facts = FAMILIES[family]
    model = facts.make().requires_grad_(False)
    trails = tp.TrailMap(
        {
            s: tp.DiReFT(tp.width(model, s, blocks=facts.blocks), 2, init="paper")
            for s in tp.sites(model, [1], tp.Answer(), blocks=facts.blocks)
        },
        blocks=facts.blocks,
    )
    batch = tp.data.collate(behind(12, 3))
    with warnings.catch_warnings(), tp.attach(model, trails), torch.no_grad():
        warnings.simplefilter("error")
        whole = answer_logits(model, batch)[0]
        with Cone().over(model, facts.blocks) as worker:
            again = answer_logits(model, batch)[0]
    assert worker is not None and worker.narrows
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_runs_that_share_a_cone_try_the_cache_once():
    """The first batch is run both ways, by the first of the runs over one base; not by one over another base."""
    model, trails, cone = llama(), laid(tp.Answer()), Cone()
    batch, seen = tp.data.collate(behind(12, 3)), []
    other = llama().double()
    for base in (model, model, other):
        with tp.attach(base, trails), torch.no_grad(), counted(base) as tokens, cone.over(base):
            answer_logits(base, batch)
        seen.append(tokens["block 2"])
    assert seen[1] < batch.attention_mask.sum() / 2 < seen[0] == seen[2]


def test_a_cache_that_gives_other_states_is_found_out():
    """A model whose attention is wrong behind a cache: its rows are run whole, and the loss stays right."""
    model, trails, batch = llama(), laid(tp.Answer()), tp.data.collate(behind(12, 3))
    attention = tp.site.find_blocks(model)[2].self_attn
    right = attention.forward

    def wrong(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = right(*args, past_key_values=past_key_values, **kwargs)
        return (output[0] * (0.5 if past_key_values is not None else 1.0), *output[1:])

    attention.forward = wrong
    with tp.attach(model, trails), torch.no_grad():
        whole = answer_logits(model, batch)[0]
        with (
            Cone().over(model) as worker,
            pytest.warns(UserWarning, match="behind a cache .* its hidden states differ"),
        ):
            assert torch.allclose(answer_logits(model, batch)[0], whole, atol=1e-4)
        assert worker is not None and worker.narrows is False


# --- when there is no room


@pytest.mark.parametrize(
    ("rule", "layers"), [(tp.All(), [2]), (tp.Last(1) | tp.Answer(), [0, 1, 2]), (tp.Answer(), [1, 2])], ids=str
)
def test_a_cone_without_room_runs_what_none_would_run(rule, layers):
    """Through each block the same tokens, in as many forwards; but for one short look, where there is a budget."""
    found = []
    for cone in (False, Cone(budget=0), Cone(budget=600)):
        model = llama().double()
        goals = [Imitate(behind(40)), Stay(texts(), gain=0.0, weight=0.5)]
        with counted(model) as seen:
            trained([], laid(rule, layers), cone, model=model, goals=goals)
        found.append(seen)
    assert found[0] == found[1]
    for part, tokens in found[2].items():
        assert tokens <= found[0][part] + 2, part


def test_half_the_room_saves_half_of_what_all_of_it_does():
    examples, tokens = behind(12, 16), []
    for budget in (0, 16 * DIM * 8 * sum(map(len, examples)) // 32, 1 << 20):
        model, cone = llama().double(), Cone(budget)
        with counted(model) as seen:
            trained(examples, laid(layers=[2]), cone, model=model, steps=24, batch_size=8)
        tokens.append(seen["block 0"])
        assert cone.kept.used <= budget
    none, half, everything = tokens
    assert everything < 0.25 * none < 0.4 * none < half < 0.8 * none


def test_a_resumed_run_keeps_the_same_rows_where_not_all_fit(tmp_path):
    """Else it would go on with the rounding of rows that are run in company where they were run alone, or the other way
    about."""
    examples, budget = make_examples(), DIM * 8 * sum(map(len, make_examples())) // 2
    alone, interrupted, resumed = laid(), laid(), laid()
    trained(examples, alone, Cone(budget))
    saved = dict(checkpoint=tmp_path, save_every=2)
    running = trained_slowly(examples, interrupted, Cone(budget), **saved)
    for step in running:
        if step.step == 4:
            break
    running.close()
    trained(examples, resumed, Cone(budget), **saved, resume=True)
    assert_equal(state(resumed), state(alone))


def test_where_prefixes_do_not_fit_the_front_they_share_is_kept(capsys):
    front, examples = 40, behind(40, 16)
    a_token = 2 * 2 * (DIM // 4) * 8 * 3  # keys and values of two heads in three blocks, in float64
    model, cone = llama().double(), Cone(budget=(front + 40) * a_token)
    with counted(model) as seen:
        trained(examples, laid(tp.Answer(), [0, 1, 2]), cone, model=model, steps=4, explain=True)
    whole = 4 * max(map(len, examples))
    alone = sum(len(example) - front for example in examples)  # whose states enter the blocks that are run
    assert seen["block 2"] <= whole + 2 * front + alone + 6 * (whole - 4 * front)  # one batch is tried both ways
    assert 0 < cone.kept.used <= cone.budget
    words = capsys.readouterr().out
    assert "512 B of keys and values a token, 256 B a hidden state" in words


# --- when it must not be used


def test_dropout_in_the_base_is_drawn_in_every_step():
    from transformers import GPT2Config, GPT2LMHeadModel

    results = []
    for cone in (False, True):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=DIM, n_layer=3, n_head=4))
        trails = laid(tp.Answer())
        taken = list(
            steps(model.train(), trails, [Imitate(behind(12))], steps=4, batch_size=4, progress=False, cone=cone)
        )
        results.append((state(trails), [step.loss for step in taken]))
    assert results[0][1] == results[1][1]
    assert_equal(*(weights for weights, _ in results))


def test_dropout_of_trails_is_drawn_for_the_same_rows():
    results = []
    for cone in (False, True):
        trails = laid(tp.Answer(), dropout=0.5)
        trained(behind(12), trails, cone)
        results.append(state(trails))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-10)


def test_a_hook_that_steers_below_is_heeded():
    model, trails, batch = llama(), laid(), tp.data.collate(texts(3))
    plain = forward(model, batch).logits
    with tp.attach(model, trails), torch.no_grad(), Cone().over(model):
        before = forward(model, batch).logits
        handle = tp.site.find_blocks(model)[0].register_forward_hook(lambda module, args, output: output + 1)
        steered = forward(model, batch).logits
        handle.remove()
        assert torch.allclose(forward(model, batch).logits, before, atol=1e-5)
    with tp.attach(model, trails), torch.no_grad():
        handle = tp.site.find_blocks(model)[0].register_forward_hook(lambda module, args, output: output + 1)
        assert torch.equal(forward(model, batch).logits, steered)
        handle.remove()
    assert not torch.allclose(before, steered, atol=1e-2)
    assert torch.equal(forward(model, batch).logits, plain)


def test_users_hooks_see_every_state_once():
    """Inside a block that could be left out, on one, and above."""
    model, trails, batch = llama(), laid(), tp.data.collate(texts(3))
    with tp.attach(model, trails), torch.no_grad(), Cone().over(model):
        for module in (model.model.layers[0].mlp, model.model.layers[0], model.model.layers[2], model.model.norm):
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output))
            forward(model, batch)
            forward(model, batch)
            handle.remove()
            assert len(seen) == 2 and torch.equal(seen[0], seen[1])
            assert seen[0].shape[:2] == batch.input_ids.shape


def test_what_a_forward_is_given_beside_tokens_is_heeded():
    model, trails, batch = llama(), laid(), tp.data.collate(texts(3))
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    embeds = model.get_input_embeddings()(batch.input_ids)
    calls: list[dict[str, Any]] = [
        dict(inputs, output_hidden_states=True),
        dict(inputs, position_ids=torch.arange(batch.input_ids.shape[1])[None] + 3),
        dict(attention_mask=batch.attention_mask, inputs_embeds=embeds + 0.1),
        dict(inputs),  # fills a cache
        dict(inputs, use_cache=False),
    ]
    real = batch.attention_mask.bool()  # what stands at padding means nothing
    with tp.attach(model, trails), torch.no_grad():
        expected = [model(**call) for call in calls]
        with Cone().over(model):
            for _ in range(2):
                for call, output in zip(calls, expected, strict=True):
                    again = model(**call)
                    torch.testing.assert_close(again.logits[real], output.logits[real], rtol=0, atol=1e-4)
                    assert (again.past_key_values is None) == (output.past_key_values is None)
                    for one, two in zip(again.hidden_states or (), output.hidden_states or (), strict=True):
                        torch.testing.assert_close(one[real], two[real], rtol=0, atol=1e-4)
            cached = model.generate(batch.input_ids[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, model.generate(batch.input_ids[:1], max_new_tokens=4, do_sample=False))


def test_trails_laid_later_move_the_cone():
    model, batch = llama(), tp.data.collate(texts(3))
    upper, lower = laid(layers=[2]), laid(layers=[0])
    with torch.no_grad(), tp.attach(model, upper), Cone().over(model):
        forward(model, batch)
        with tp.attach(model, lower):
            both = forward(model, batch).logits
        one = forward(model, batch).logits
        handle = tp.attach(model, lower)
        with lower.off():
            assert torch.equal(forward(model, batch).logits, one)
        handle.remove()
    with torch.no_grad(), tp.attach(model, upper), tp.attach(model, lower):
        real = batch.attention_mask.bool()
        torch.testing.assert_close(forward(model, batch).logits[real], both[real], rtol=0, atol=1e-4)
    assert not torch.allclose(one[real], both[real], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    model, trails = llama().double(), laid().double()
    alone, batch = tp.data.collate(texts(6)[5:]), tp.data.collate(texts(6), side=side)
    with torch.no_grad(), tp.attach(model, trails), Cone().over(model):
        forward(model, alone)
        for _ in range(2):
            logits = forward(model, batch).logits[batch.attention_mask.bool()]
    with torch.no_grad(), tp.attach(model, trails):
        torch.testing.assert_close(forward(model, batch).logits[batch.attention_mask.bool()], logits, rtol=0, atol=1e-9)


def test_an_error_leaves_nothing_behind():
    model, trails = llama(), laid()
    with unchanged(model):
        running = steps(model, trails, [Imitate(make_examples())], steps=3, batch_size=4, progress=False)
        next(running)
        running.close()
        with pytest.raises(ZeroDivisionError), tp.attach(model, trails), Cone().over(model):
            1 / 0  # noqa: B018
        with tp.attach(model, trails), Cone().over(model) as worker:
            broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                forward(model, tp.data.collate(texts(2)))
            broken.remove()
            assert torch.isfinite(forward(model, tp.data.collate(texts(2))).logits).all()
            assert worker is not None and active_cone(model) is worker
        assert active_cone(model) is None


# --- what is kept, and where


def test_what_is_kept_belongs_to_one_base():
    cone, batch, trails = Cone(), tp.data.collate(texts(3)), laid()
    model, other = llama(), llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    half = llama().to(torch.bfloat16)
    for subject in (model, other, half, model):
        with torch.no_grad(), tp.attach(subject, trails):
            expected = forward(subject, batch).logits
            with cone.over(subject):
                again = forward(subject, batch).logits
        tolerance = 0.3 if subject is half else 1e-4
        real = batch.attention_mask.bool()
        torch.testing.assert_close(again[real], expected[real], rtol=0, atol=tolerance)
    used = cone.kept.used
    with torch.no_grad(), tp.attach(model, trails), cone.over(model), torch.autocast("cpu", torch.bfloat16):
        forward(model, batch)
    assert cone.kept.used > used  # states under autocast are others


def test_a_folder_outlives_the_process(tmp_path):
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_cone import counted, laid, llama, make_examples, state, trained
from tokenpaths.engine.cone import Cone
model, cone, trails = llama().double(), Cone(folder={str(tmp_path)!r}), laid()
with counted(model) as seen:
    trained(make_examples(), trails, cone, model=model)
print(json.dumps([seen["block 0"], float(sum(p.abs().sum() for p in trails.parameters())), cone.kept.used]))
"""
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (computed, weights, used), (again, same, still) = found
    assert again < computed / 4
    assert same == weights and still == used > 0
    (file,) = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    (tmp_path / file).write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(tp.files.TrailFileError, match=f"{file} is not a whole safetensors file .* delete it"):
        Cone(folder=tmp_path)


def test_the_budget_is_kept(tmp_path):
    for cone in (Cone(budget=3000), Cone(budget=20_000, folder=tmp_path)):
        trained(make_examples(), laid(), cone)
        assert 0 < cone.kept.used <= cone.budget


def test_a_coarser_dtype_is_asked_for_and_close():
    results = []
    for cone in (Cone(), Cone(dtype=torch.bfloat16)):
        trails = laid()
        results.append([step.loss for step in trained(make_examples(), trails, cone)])
        results.append(cone.kept.used)
    exact, size, coarse, small = results
    assert small * 4 == size
    assert coarse == pytest.approx(exact, rel=0.1) and coarse != exact


def test_drift_read_again_runs_nothing_of_the_frozen_model():
    model, cone = llama(), Cone()
    expected = tp.measure_drift(model, laid(layers=[0]), texts())
    tp.measure_drift(model, laid(layers=[1]), texts(), cone=cone)
    with counted(model) as seen:
        found = tp.measure_drift(model, laid(layers=[0]), texts(), cone=cone)
    tokens = sum(map(len, texts()))
    assert found["kl"].mean == pytest.approx(expected["kl"].mean, rel=1e-4)
    for layer in found["displacement"].layers:
        moved, known = (reading["displacement"][layer].mean for reading in (found, expected))
        assert moved == pytest.approx(known, rel=1e-4, abs=1e-7)
    assert seen["block 0"] <= len(texts()[0]) + 8 and tokens <= seen["block 1"]


# --- what is said


def test_the_plan_is_what_happens(capsys):
    """FLOPs as torch counts them, with eager attention, whose matrix products it sees."""
    model = llama()
    model.set_attn_implementation("eager")
    examples = [tp.Example(e.ids[:50] + e.ids[-3:], (False,) * 50 + (True,) * 3) for e in behind(60)]
    for rule, layers in ((tp.All(), [1]), (tp.Answer(), [0, 1, 2])):
        for cone in (False, Cone()):
            counts = []
            running = steps(
                model,
                laid(rule, layers),
                [Imitate(examples)],
                steps=5,
                batch_size=8,
                lr=1e-3,
                progress=False,
                cone=cone,
                explain=True,
            )
            while True:
                with FlopCounterMode(display=False) as counter:
                    if next(running, None) is None:
                        break
                counts.append(counter.get_total_flops())
            said = capsys.readouterr().out
            if not cone:
                assert "off, everything is run in every step" in said
                in_full = counts[-1]
                continue
            promised, without = (float(part) for part in said.split("a step: ")[1].split() if _is_number(part))
            assert promised * 1e9 == pytest.approx(counts[-1], rel=0.15)
            assert without * 1e9 == pytest.approx(in_full, rel=0.15)
            assert counts[-1] < 0.75 * in_full


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("e-", "").isdigit()


@pytest.mark.parametrize(("count", "often"), [(1, False), (40, True)])
def test_a_run_keeps_what_comes_often_enough(capsys, count, often):
    """16 examples of some 17 tokens, in batches of 16: in one step each comes once, in forty it is worth keeping."""
    model, examples = llama(), behind(12, 16)
    with counted(model) as tokens:
        list(
            steps(
                model,
                laid(layers=[2]),
                [Imitate(examples)],
                steps=count,
                batch_size=16,
                lr=1e-3,
                progress=False,
                explain=True,
            )
        )
    all_tokens = sum(map(len, examples))
    assert ("each comes too seldom for keeping to pay" in capsys.readouterr().out) == (not often)
    if often:  # once for each row, and a short look
        assert tokens["block 0"] < 2 * all_tokens
    else:  # in one batch, padding included
        assert tokens["block 0"] == 16 * max(map(len, examples))


def test_the_plan_says_why_rows_are_run_whole(capsys):
    model = llama()
    trails, cone = laid(tp.Answer(), dropout=0.1), Cone()
    list(steps(model, trails, [Imitate(behind(12))], steps=1, progress=False, explain=True, cone=cone))
    assert "rows are run whole: the trails' dropout is drawn for whole rows" in capsys.readouterr().out
    with tp.attach(model, trails := make_trails()), Cone().over(model):
        words = str(plan(model, trails, [Imitate(make_examples()), Stay(texts())], [4, 4], Cone(), [True, True]))
    assert "goal 1, Stay" in words and "1 blocks lie below" in words


def test_common_prefix():
    assert common_prefix(behind(12)) == tuple(range(3, 15))
    assert common_prefix(behind(12)[:1]) == ()
    assert common_prefix([tp.Example((1, 2, 3), (False, False, True)), tp.Example((1, 2, 3), (False, True, True))]) == (
        1,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Cone(budget=-1), "budget=-1 bytes must be at least 0"),
        (lambda: Cone(dtype=torch.int8), "dtype=torch.int8 must be a floating-point dtype"),
        (lambda: steps(llama(), laid(), [Imitate(make_examples())], steps=1, cone="yes"), "cone='yes' must be a Cone"),
    ],
)
def test_refusals(wrong, message, unchecked):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()
