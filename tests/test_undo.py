"""Changes are taken back, wherever the block that made them is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from interrupts import calls, struck
from torch import nn

from tokenpaths.randomness import own_randomness
from tokenpaths.undo import Undo, unhook

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


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


def fails_in_a_block(module: nn.Module) -> None:
    with Undo() as undo:
        change(module, undo)
        raise ValueError("inside")


OTHER = nn.Linear(1, 1)


def in_a_generator(module: nn.Module) -> None:
    with changed(module), changed(OTHER):
        pass


@pytest.mark.usefixtures("unchecked")  # the check keeps the arguments of a call that was cut short
@pytest.mark.parametrize("work", [in_a_block, in_a_generator])
def test_an_interruption_at_any_call_leaves_nothing_behind(work: Callable[[nn.Module], None]) -> None:
    module = nn.Linear(2, 2)
    before = state(module)
    points = calls(lambda: work(module))
    assert points > 50
    for number in range(points):
        assert struck(lambda: work(module), number)
        assert state(module) == before, f"interrupted at call {number}"


def test_it_goes_back_last_first_and_once() -> None:
    seen: list[int] = []
    with Undo() as undo:
        for number in range(3):
            undo.add(seen.append, number)
    undo.run()
    assert seen == [2, 1, 0]


def test_what_is_cut_short_is_called_again_and_the_rest_still_runs() -> None:
    seen: list[str] = []

    def cut_short() -> None:
        seen.append("cut short")
        if seen.count("cut short") == 1:
            raise KeyboardInterrupt

    undo = Undo()
    undo.add(seen.append, "first")
    undo.add(cut_short)
    undo.add(seen.append, "last")
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    assert seen == ["last", "cut short", "cut short", "first"]


def test_a_failing_one_is_told_and_the_rest_still_runs() -> None:
    rest: list[str] = []
    undo = Undo()
    undo.add(rest.append, "done")
    undo.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        undo.run()
    assert rest == ["done"]


def test_an_error_inside_is_handed_on() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="inside"):
        fails_in_a_block(module)
    assert state(module) == state(nn.Linear(2, 2))


def test_only_the_hook_named_is_taken_off() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *args: None, with_kwargs=True)
    before = state(module)
    module.register_forward_hook(look, with_kwargs=True, always_call=True)
    unhook(module, look)
    unhook(module, look)
    assert state(module) == before


def test_changes_stay_that_are_to_stay() -> None:
    module = nn.Linear(2, 2)
    with Undo() as undo:
        undo.set(module, "training", False)
        undo.forget()
    assert not module.training


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    with own_randomness(seed=2):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(2), inside)
