"""Changes that are taken back, whatever happens in between.

    with Undo() as undo:
        undo.set(module, "training", False)
        undo.hook(module.register_forward_hook, look)
        undo.add(counter.pop, key, None)               # first what takes the change back,
        counter[key] = 1                               # then the change

KeyboardInterrupt may strike between any two calls: after a change and before its `try`, inside `__exit__`, inside what
takes the change back. So that is noted before the change; it does no harm where nothing was changed, nor when it is
called again; and it is called again where it was cut short. A log that Python dropped without leaving its `with` block,
as it does with one whose `__enter__` or `__exit__` was interrupted, takes its changes back as it goes.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

Made = TypeVar("Made")
Given = ParamSpec("Given")


class Undo:
    """What takes changes back, in the order of its noting: it is called last first when the `with` block ends."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def add(self, call: Callable[..., object], *args: Any) -> None:
        """Note what takes a change back, before the change. It may be called where there was none, and twice."""
        self._calls.append(functools.partial(call, *args))

    def set(self, thing: object, name: str, value: object) -> None:
        """Set an attribute until the end."""
        self.add(setattr, thing, name, getattr(thing, name))
        setattr(thing, name, value)

    def hook(self, register: Callable[..., Made], hook: Callable[..., Any], **options: Any) -> Made:
        """Hook a module until the end: `undo.hook(module.register_forward_hook, hook, with_kwargs=True)`."""
        self.add(unhook, register.__self__, hook)  # pyright: ignore[reportFunctionMemberAccess]
        return register(hook, **options)

    def forget(self) -> None:
        """Let all changes stay."""
        self._calls.clear()

    def run(self) -> None:
        """Take everything back, also where some of it fails: the first error is raised at the end."""
        first: BaseException | None = None
        again = True
        while self._calls:
            try:
                self._calls[-1]()
            except BaseException as error:
                first = first or error
                if again:  # it may have been cut short
                    again = False
                    continue
            self._calls.pop()
            again = True
        if first is not None:
            raise first

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.run()
        except BaseException:
            self.run()  # what is left, if the interruption struck between two of them
            raise

    def __del__(self) -> None:
        if vars(self):  # else `__init__` was interrupted
            self.run()


def unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take a hook off a module, where it is there, in all of torch's tables."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks"):
        hooks: dict[int, Any] = vars(module)[kind]
        for key in [key for key, there in list(hooks.items()) if there is hook]:
            for table in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                vars(module).get(table, {}).pop(key, None)
            hooks.pop(key, None)  # last: it is by this one that the hook is found again


def tidy(verb: Callable[Given, Made]) -> Callable[Given, Made]:
    """A verb after whose interruption torch computes as it did before.

    torch's own contexts, such as `no_grad` and `autocast`, stay in force when they are interrupted on their way in or
    out. And a traceback that is kept, as notebooks keep the last one, would keep contexts open that wait to be dropped.
    """

    @functools.wraps(verb)
    def tidied(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        before = _Ambient()
        try:
            return verb(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                traceback.clear_frames(error.__traceback__)
            before.restore()
            raise

    return tidied


class _Ambient:
    """How torch computes in this thread: with gradients or without, at which precision, on which device."""

    def __init__(self) -> None:
        self.learning = torch.is_grad_enabled()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self.casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.depth = _autocast_depth()
        self.modes = torch._C._len_torch_function_stack()  # pyright: ignore[reportPrivateUsage]

    def restore(self) -> None:
        torch.set_grad_enabled(self.learning)
        for kind, enabled, dtype in self.casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        while _autocast_depth() > self.depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()  # else later weights would be cast as these were
        while torch._C._len_torch_function_stack() > self.modes:  # pyright: ignore[reportPrivateUsage]
            torch._C._pop_torch_function_stack()  # pyright: ignore[reportPrivateUsage]


def _autocast_depth() -> int:
    *_, depth = map(functools.partial.__call__, _UP_AND_DOWN)  # all in C, so that nothing can strike between the two
    return depth


_UP_AND_DOWN = functools.partial(torch.autocast_increment_nesting), functools.partial(torch.autocast_decrement_nesting)
