"""The contract of a trail: how a hidden state is moved."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn, no_grad

from tokenpaths.checking import as_whole, kind, quoted


class Trail(nn.Module):
    """A learned displacement of hidden states: `h` becomes `h + trail(h)` at the chosen tokens.

    To write your own, define `__init__` and `forward` and keep four promises. `tokenpaths.testing.check_trail` checks
    them:

    1. `forward(h)` returns the **displacement**, of the same shape and dtype as `h`.
    2. Each token is moved on its own, whatever the tokens beside it are.
    3. A fresh trail moves nothing. A class whose formula cannot promise it sets `starts_at_identity = False`.
    4. Every argument of `__init__` is kept as an attribute of its own name, for `repr`, saving and loading.

    A trail does not deal with masks, casts, strength, devices or hooks: `attach` does.
    """

    starts_at_identity: bool = True
    """Whether a fresh trail moves nothing."""

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """The displacement of each state, of the shape and dtype of `h`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(h) and return the displacement of h")

    def __repr__(self) -> str:
        try:
            given = ", ".join(f"{name}={value!r}" for name, value in arguments(self).items())
        except TypeError as error:  # a broken promise is told where the trail is checked or saved, and not here
            given = f"...: {error}"
        return f"{type(self).__name__}({given})"


def arguments(trail: Trail) -> dict[str, Any]:
    """The constructor arguments of a trail, read back from its attributes.

    Raises `TypeError` for an argument that is not kept as an attribute, and for `*args` and `**kwargs`.
    """
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(trail).__init__).parameters.items():
        if name == "self":
            continue
        if stars := {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind):
            taken = f"{type(trail).__name__}.__init__ takes {stars}{name}"
            raise TypeError(f"{taken}: name each argument, so that it can be saved")
        if not hasattr(trail, name):
            raise TypeError(
                f"{type(trail).__name__} does not keep its argument {name!r}: write `self.{name} = {name}` in "
                "__init__, so that the trail can be shown, saved and rebuilt"
            )
        found[name] = getattr(trail, name)
    return found


def width_of(name: str, dim: Any) -> int:
    """The width of the states, checked: a whole number from 1 up. Raises `TypeError` and `ValueError`."""
    try:
        return as_whole(f"{name}: dim", dim)
    except TypeError as error:
        raise TypeError(f"{error}: give the width of the states, tokenpaths.width(model)") from None


def check_trail_given(what: str, given: Any) -> None:
    """Raise `TypeError` for what is no trail, with what to give instead."""
    if not isinstance(given, Trail):
        raise TypeError(f"{what} must be a Trail, not {kind(given)} ({quoted(given)}). {instead_of(given)}")


def instead_of(given: Any) -> str:
    """What to give instead of something that is no trail."""
    if isinstance(given, type):
        return f"Make one of the class, as in {given.__name__}(dim, rank=4)"
    if type(given).__module__.partition(".")[0] in ("pyreft", "pyvene"):
        return "Its like here has another name, see the table in docs/trails.md: LoreftIntervention is LoReFT"
    if isinstance(given, nn.Module):
        return "Let its class inherit from tokenpaths.Trail, and return the displacement of h"
    return "Give one such as LoReFT(dim, rank=4)"


@no_grad()
def returns_the_moved_state(trail: Trail, h: Tensor) -> bool:
    """Whether what a trail returns for states is much nearer to the states than to zero: h + d, and not d."""
    d = copy.deepcopy(trail).eval()(h)
    return d.shape == h.shape and bool((d - h).norm() < 0.25 * d.norm())
