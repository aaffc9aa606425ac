"""Law 12: an interruption at any moment of any verb leaves the model as it was, and the verb works afterwards.

Here a few moments of each verb; slow, 200. `benchmarks/torture/interrupts.py` takes an even sample of 2,000, and tells
the share.
"""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from interrupts import LORA_VERBS, VERBS, Subject, evenly

pytestmark = pytest.mark.usefixtures("unchecked")  # the check keeps the arguments of a call that was cut short


def dirty(subject: Subject, points: int) -> dict[int, list[str]]:
    """What is left by interruptions at an even sample of calls, by the number of the call."""
    left = {number: subject.leak(number) for number in evenly(subject.calls, points)}
    return {number: names for number, names in left.items() if names}


@pytest.mark.parametrize("verb", [*VERBS, *LORA_VERBS])
def test_an_interruption_leaves_the_model_as_it_was(verb: str, threads: list[str]) -> None:
    with closing(Subject(verb)) as subject:
        assert dirty(subject, 5) == {}
        assert subject.works()
    assert threads == []


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that are started. A pool that is interrupted while it is given work would wait for its own for ever."""
    started: list[str] = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        if thread.name != "tqdm_monitor":
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, *LORA_VERBS])
def test_an_interruption_at_any_of_200_moments_leaves_the_model_as_it_was(verb: str) -> None:
    with closing(Subject(verb)) as subject:
        assert dirty(subject, 200) == {}
        assert subject.works()


def test_the_harness_sees_a_hook_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_a_hook(place):
        handle = place.model.register_forward_hook(lambda *args: None)
        place.model(place.ids)
        handle.remove()

    monkeypatch.setitem(VERBS, "leaves a hook", leaves_a_hook)
    with closing(Subject("leaves a hook")) as subject:
        left = dirty(subject, 8)
    assert any("model  _forward_hooks" in names for names in left.values())
