"""Law 11: two at once, in threads or tasks of an event loop: each as if alone, or refused. Never a wrong number."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch
from families import FAMILIES
from interrupts import LORA_VERBS, VERBS, Subject, _comparable
from laws import padded
from rules import RULES
from subjects import MOVING
from torch import nn

import tokenpaths as tp
from tokenpaths.engine import answer_logits

PROMPTS = [[5, 47, 31, 66, 8], [17, 4, 73, 29, 61, 12, 36, 90, 7], [33, 50], list(range(20, 34))]
TEXTS = [tp.Example(tuple(row), (False,) * 2 + (True,) * (len(row) - 2)) for row in PROMPTS[:2]]


@pytest.fixture
def model(watch):
    return watch(FAMILIES["llama"].make().requires_grad_(False))


def laid(name="Additive", rule="last | answer", layer=1):
    return tp.TrailMap({tp.Site(layer, RULES.get(rule) or tp.Last(1) | tp.Answer()): MOVING[name](32)})


def generated(model: nn.Module, row: list[int]) -> Any:
    ids = torch.tensor([row])
    fixed = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    asked = dict(output_logits=True, return_dict_in_generate=True)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **asked)
    return found.sequences.tolist(), torch.stack(found.logits).tolist()


def forwarded(model: nn.Module, row: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([row])).logits.tolist()


def forwarded_with_a_prompt(model: nn.Module, row: list[int]) -> Any:
    mask = torch.arange(len(row))[None] < len(row) // 2
    with torch.no_grad():
        return model(torch.tensor([row]), prompt_mask=mask).logits.tolist()


def trained(model: nn.Module, row: list[int]) -> Any:
    """Gradients of the input embeddings, whose backward runs beside others."""
    states = model.get_input_embeddings()(torch.tensor([row])).detach().requires_grad_()
    model(inputs_embeds=states).logits.logsumexp(-1).sum().backward()
    return states.grad.tolist()


def answered(model: nn.Module, row: list[int]) -> Any:
    batch = tp.data.collate([tp.Example(tuple(row), (False,) + (True,) * (len(row) - 1))])
    with torch.no_grad():
        return answer_logits(model, batch)[0].tolist()


WORK: list[Callable[[nn.Module, list[int]], Any]] = [
    generated,
    forwarded,
    forwarded_with_a_prompt,
    trained,
    answered,
]
EACH = pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)


def crowd(jobs: list[Callable[[], Any]], times: int = 4) -> list[Any]:
    """What each job gave, run in a thread beside the others, `times` over."""
    with ThreadPoolExecutor(4) as pool:
        return [future.result() for future in [pool.submit(job) for _ in range(times) for job in jobs]]


@EACH
def test_threads_on_one_attached_model_are_as_if_alone(model, work):
    with tp.attach(model, laid()):
        jobs = [lambda row=row: work(model, row) for row in PROMPTS]
        alone = [job() for job in jobs]
        assert crowd(jobs) == alone * 4


@EACH
def test_a_thread_that_is_off_leaves_the_others_on(model, work):
    trails = laid()

    def off(row):
        with trails.off():
            return work(model, row)

    frozen = [work(model, row) for row in PROMPTS]
    with tp.attach(model, trails):
        alone = [work(model, row) for row in PROMPTS]
        jobs = [lambda row=row, do=do: do(row) for row in PROMPTS for do in (off, lambda row: work(model, row))]
        assert alone != frozen
        assert crowd(jobs) == [one for pair in zip(frozen, alone, strict=True) for one in pair] * 4


@EACH
@pytest.mark.parametrize("everywhere", [None, False])
def test_threads_with_trails_of_their_own(model, work, everywhere):
    def own(trails, row):
        with tp.attach(model, trails, everywhere=everywhere):
            return work(model, row)

    maps = [laid(), laid("LoReFT", "all", 0), laid("RED", "answer", 2), laid("Additive", "last", 2)]
    jobs = [lambda trails=trails, row=row: own(trails, row) for trails, row in zip(maps, PROMPTS, strict=True)]
    alone = [job() for job in jobs]
    assert crowd(jobs) == alone * 4


def test_a_thread_without_trails_beside_one_with_them_is_refused_unless_it_is_said_what_is_meant(model):
    frozen, inside, done = forwarded(model, PROMPTS[0]), threading.Event(), threading.Event()
    seen: dict[Any, Any] = {}

    def holds(everywhere):
        with tp.attach(model, laid(), everywhere=everywhere):
            seen[everywhere] = forwarded(model, PROMPTS[0])
            inside.set()
            done.wait(60)

    for everywhere in (None, True, False):
        inside.clear(), done.clear()
        thread = threading.Thread(target=holds, args=(everywhere,))
        thread.start()
        assert inside.wait(60)
        try:
            if everywhere is None:
                with pytest.raises(RuntimeError, match="another thread has attached trails.*everywhere=True.*=False"):
                    forwarded(model, PROMPTS[0])
            else:
                assert forwarded(model, PROMPTS[0]) == (seen[True] if everywhere else frozen)
        finally:
            done.set()
            thread.join()
    assert forwarded(model, PROMPTS[0]) == frozen


def test_a_thread_started_inside_off_is_refused_unless_it_takes_the_context_along(model):
    trails, frozen = laid(), forwarded(model, PROMPTS[0])
    with tp.attach(model, trails), ThreadPoolExecutor(1) as pool, trails.off():
        with pytest.raises(RuntimeError, match=r"main thread is inside trails.off\(\).*copy_context"):
            pool.submit(forwarded, model, PROMPTS[0]).result()
        context = contextvars.copy_context()
        assert pool.submit(context.run, forwarded, model, PROMPTS[0]).result() == frozen


def test_what_measures_in_one_thread_changes_nothing_in_another(model):
    """It attaches, records and stands before forwards, and none of it is seen by generation beside it."""
    trails = laid()
    frozen = [generated(model, row) for row in PROMPTS]
    alone = tp.measure_drift(model, trails, TEXTS)["kl"].mean
    stop, wrong = threading.Event(), []

    def serve():
        while not stop.is_set():
            wrong.extend(row for row, answer in zip(PROMPTS, frozen, strict=True) if generated(model, row) != answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        measured = [tp.measure_drift(model, trails, TEXTS)["kl"].mean for _ in range(4)]
    finally:
        stop.set()
        thread.join()
    assert not wrong and measured == [alone] * 4


def test_two_threads_that_measure_one_map(model):
    trails = laid()
    alone = tp.measure_drift(model, trails, TEXTS)["kl"].mean
    assert crowd([lambda: tp.measure_drift(model, trails, TEXTS)["kl"].mean] * 3, 2) == [alone] * 6


def test_tasks_of_an_event_loop_are_as_if_alone(model):
    trails, frozen = laid(), [generated(model, row) for row in PROMPTS]

    async def ask(row, off):
        if not off:
            return await asyncio.to_thread(generated, model, row)
        with trails.off():
            await asyncio.sleep(0)
            return await asyncio.to_thread(generated, model, row)

    async def both():
        return await asyncio.gather(*(ask(row, off) for row in PROMPTS for off in (True, False)))

    with tp.attach(model, trails):
        steered = [generated(model, row) for row in PROMPTS]
        assert asyncio.run(both()) == [one for pair in zip(frozen, steered, strict=True) for one in pair]


def test_tasks_with_trails_of_their_own_are_refused_or_keep_to_themselves(model):
    maps = [laid(), laid("LoReFT", "all", 0)]

    def alone(trails):
        with tp.attach(model, trails):
            return generated(model, PROMPTS[0])

    async def own(trails, everywhere):
        with tp.attach(model, trails, everywhere=everywhere):
            await asyncio.sleep(0)
            return await asyncio.to_thread(generated, model, PROMPTS[0])

    async def both(everywhere):
        return await asyncio.gather(*(own(trails, everywhere) for trails in maps))

    assert asyncio.run(both(False)) == [alone(trails) for trails in maps]
    with pytest.raises(RuntimeError, match="another task of the event loop has trails attached.*everywhere=False"):
        asyncio.run(both(None))
    assert not tp.attached(model)


def test_a_forward_inside_a_forward(model):
    """A hook of the user's own asks the frozen model, or another prompt, half way."""
    trails, row = laid(rule="last"), PROMPTS[1]
    with tp.attach(model, trails):
        expected, other = forwarded(model, row), forwarded(model, PROMPTS[0])
        seen: list[Any] = []

        def ask(module, args, output):
            if not seen:
                seen.append(None)
                seen[:] = [forwarded(model, PROMPTS[0])]
                with trails.off():
                    seen.append(forwarded(model, row))

        handle = model.model.layers[0].register_forward_hook(ask)
        assert forwarded(model, row) == expected
        handle.remove()
    assert seen == [other, forwarded(model, row)]


def test_replicas_of_data_parallel_are_refused(model):
    with tp.attach(model, laid()):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="nn.DataParallel runs copies.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
            replica(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_backwards_of_checkpointed_forwards_in_any_order_and_thread(reentrant):
    """Blocks that a backward computes again are moved as in their own forward, not as in the latest one."""
    model = FAMILIES["llama"].make().requires_grad_(False).train()
    trails = tp.TrailMap({site: MOVING["LoReFT"](32) for site in tp.sites(model, "all", RULES["last"], "mlp")})

    def forward(row):
        return model(**padded([row]), use_cache=False).logits.logsumexp(-1).sum()

    def gradients(loss):
        return torch.autograd.grad(loss, list(trails.parameters()))

    with tp.attach(model, trails):
        expected = [gradients(forward(row)) for row in PROMPTS]
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        losses = [forward(row) for row in PROMPTS]
        if reentrant:  # knows no autograd.grad
            found = []
            for loss in reversed(losses):
                trails.zero_grad()
                loss.backward()
                found.insert(0, [p.grad.clone() for p in trails.parameters()])
        else:
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(gradients, losses))
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_threads_that_run_one_compiled_model(traceable):
    trails = laid("Additive", "all")
    compiled = torch.compile(FAMILIES["llama"].make().requires_grad_(False), backend="eager")
    with tp.attach(compiled, trails):
        jobs = [lambda row=row: forwarded(compiled, row) for row in PROMPTS]
        alone = [job() for job in jobs]
        assert crowd(jobs) == alone * 4


@pytest.mark.usefixtures("unchecked")  # the check is slow, and has state of its own
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*VERBS, *LORA_VERBS])
def test_a_verb_in_two_threads_is_as_if_alone_or_refused(name, tmp_path):
    """Law 12's list of verbs, each twice at once on one model and one map, writing in folders of their own."""
    start = threading.Barrier(2)

    def one(number):
        place = copy.copy(subject.place)
        place.folder = tmp_path / str(number)
        place.folder.mkdir()
        start.wait(60)
        try:
            return _comparable(subject.verb(place))
        except RuntimeError as refused:
            return str(refused)

    with closing(Subject(name)) as subject:
        before = subject.state()
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(one, range(2)))
        assert subject.answer in found
        for answer in found:
            assert answer == subject.answer or "on top of each other" in answer or "another thread" in answer, answer
        assert {key for key, value in subject.state().items() if value != before.get(key, ...)} == set()
