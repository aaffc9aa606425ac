"""The one reader of hidden states and attention maps: what goes by at some places of a model, in each forward.

    places = {site: host.locate(site)[1] for site in sites}
    with recording(places) as states:
        model(**inputs)
    states[sites[0]]                                # [batch, tokens, width], as the trails have moved it

A place is looked at after all trails that lie there. With `entering`, it is looked at before the trails that are
attached later: these are the states that enter them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Hook, Observer
from tokenpaths.attachment.moving import states_of
from tokenpaths.site.host import Host, Place, attentions
from tokenpaths.undo import Undo

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def observing(
    places: Mapping[Key, Place], see: Callable[[Key, Tensor], None], *, entering: bool = False
) -> Generator[None]:
    """Inside, `see(key, states)` is called for each place at each forward, with states [batch, tokens, width]."""
    kind = Hook if entering else Observer
    with Undo() as undo:
        for key, place in places.items():
            look = functools.partial(_look, see, key, place)
            if place.side == "input":
                before = kind(
                    lambda module, args, kwargs, look=look: look(args[0] if args else kwargs["hidden_states"])
                )
                undo.hook(place.module.register_forward_pre_hook, before, with_kwargs=True)
            else:
                after = kind(lambda module, args, out, look=look: look(states_of(module, out)))
                undo.hook(place.module.register_forward_hook, after)
        yield


@contextmanager
def recording(places: Mapping[Key, Place], *, entering: bool = False) -> Generator[dict[Key, Tensor]]:
    """The states of the last forward inside, by the key of their place."""
    states: dict[Key, Tensor] = {}
    with observing(places, states.__setitem__, entering=entering):
        yield states


def block_places(host: Host) -> dict[str, Place]:
    """What enters the first block ("embedding") and what leaves each ("block 0" ...): the residual stream by depth."""
    places = {f"block {number}": Place(block, "output") for number, block in enumerate(host.blocks)}
    return {"embedding": Place(host.blocks[0], "input"), **places}


@contextmanager
def recording_maps(
    host: Host, blocks: Collection[int] | None = None
) -> Generator[dict[int, Float[Tensor, "batch heads seq seq"]]]:
    """The self-attention maps of the last forward inside, by block. Blocks without attention are left out.

    `blocks` are those to look at; all unless given.

    Raises `ValueError` in the forward if an attention module gives no maps: they exist under eager attention only.
    """
    maps: dict[int, Tensor] = {}

    def see(number: int, module: nn.Module, args: Any, output: Any) -> None:
        maps[number] = attention_map(output, module, number)

    with Undo() as undo:
        for number in range(len(host.blocks)) if blocks is None else blocks:
            for module in attentions(host.blocks[number])[:1]:  # self-attention is defined before cross-attention
                undo.hook(module.register_forward_hook, Observer(functools.partial(see, number)))
        yield maps


def attention_map(output: Any, module: nn.Module, block: int) -> Float[Tensor, "batch heads seq seq"]:
    """The map among what the attention module of a block returned. Raises `ValueError` if there is none."""
    found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(found, Tensor) or found.ndim != 4:
        kind = getattr(getattr(module, "config", None), "_attn_implementation", "its")
        raise ValueError(
            f"block {block} ({type(module).__name__}) gives no attention maps, as {kind} attention makes none. "
            'Switch with model.set_attn_implementation("eager"), or load the model with attn_implementation="eager"'
        )
    return found


def _look(see: Callable[[Any, Tensor], None], key: Any, place: Place, states: Tensor) -> None:
    see(key, states if place.columns is None else states[..., place.columns])
