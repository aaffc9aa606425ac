"""Changes are taken back, wherever the block that made them is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from torch import nn

from tokenpaths.undo import Undo, unhook

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
CHECKERS = ("jaxtyping", "beartype")  # they stand between calls in tests only


def interrupted(work: Callable[[], object]) -> Iterator[int]:
    """Does the work again and again, each time interrupted one call or return later; until one is not interrupted."""
    left = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        if any(name in frame.f_code.co_filename for name in CHECKERS):
            return
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    for number in range(10_000):
        left = number
        try:
            sys.setprofile(count)
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        yield number
        if left >= 0:
            return
    raise AssertionError("it never ended")


def look(*args: Any) -> None: ...


def state(module: nn.Module) -> Any:
    return module.training, *(dict(vars(module)[table]) for table in HOOK_TABLES)


def change(module: nn.Module, undo: Undo) -> None:
    undo.set(module, "training", False)
    undo.hook(module.register_forward_hook, look, with_kwargs=True, always_call=True)
    undo.hook(module.register_forward_pre_hook, look, with_kwargs=True, prepend=True)
    assert not module.training and len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


@contextmanager
def changed(module: nn.Module) -> Generator[None]:
    with Undo() as undo:
        change(module, undo)
        yield


def in_a_block(module: nn.Module) -> None:
    with Undo() as undo:
        change(module, undo)


def in_a_generator(module: nn.Module) -> None:
    with changed(module), changed(nn.Linear(1, 1)):
        pass


@pytest.mark.usefixtures("unchecked")  # the check keeps the arguments of a call that was cut short
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where a finaliser is interrupted
@pytest.mark.parametrize("work", [in_a_block, in_a_generator])
def test_an_interruption_at_any_call_leaves_nothing_behind(work: Callable[[nn.Module], None]) -> None:
    module = nn.Linear(2, 2)
    before = state(module)
    points = 0
    for number in interrupted(lambda: work(module)):
        assert state(module) == before, f"interrupted at call {number}"
        points = number
    assert points > 30


def test_it_goes_back_last_first_and_once() -> None:
    seen: list[int] = []
    with Undo() as undo:
        for number in range(3):
            undo.add(seen.append, number)
    undo.run()
    assert seen == [2, 1, 0]


def test_what_is_cut_short_is_called_again_and_the_rest_still_runs() -> None:
    calls: list[str] = []

    def cut_short() -> None:
        calls.append("cut short")
        if calls.count("cut short") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        undo.add(calls.append, "first")
        undo.add(cut_short)
        undo.add(calls.append, "last")
    assert calls == ["last", "cut short", "cut short", "first"]


def test_a_failing_one_is_told_and_the_rest_still_runs() -> None:
    rest: list[str] = []
    with pytest.raises(ZeroDivisionError), Undo() as undo:
        undo.add(rest.append, "done")
        undo.add(lambda: 1 / 0)
    assert rest == ["done"]


def test_an_error_inside_is_handed_on() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="inside"), Undo() as undo:
        undo.set(module, "training", False)
        raise ValueError("inside")
    assert module.training


def test_only_the_hook_named_is_taken_off() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *args: None, with_kwargs=True)
    before = state(module)
    module.register_forward_hook(look, with_kwargs=True, always_call=True)
    unhook(module, look)
    unhook(module, look)
    assert state(module) == before
