"""What a model keeps of the tokens before: keys and values, or the states of a recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenpaths.attachment.moment import Moment

_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "layer_past", "past_key_value")
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_NOTE = "tokenpaths_moment"  # kept on the cache itself: a deep copy of it, as for a shared beginning, takes it along


def remember(cache: Any, moment: Moment) -> None:
    """A cache holds the tokens up to the end of a forward."""
    if (bearer := _bearer(cache)) is not None:
        setattr(bearer, _NOTE, moment)


def filled(cache: Any) -> Moment | None:
    """The forward that was the last to fill a cache; None where it is not known."""
    return getattr(_bearer(cache), _NOTE, None)


def _bearer(cache: Any) -> Any:
    """What can keep a note: the cache, or the first tensor of a list of them, as RWKV has."""
    while isinstance(cache, (list, tuple)):
        cache = next((part for part in cache if part is not None), None)
    return cache if hasattr(cache, "__dict__") else None


def filled_up(cache: Any, past: int) -> Moment | None:
    """The forward that was the last to fill a cache; None where it is not known, or someone else filled it up."""
    known = filled(cache)
    return known if known is not None and known.past + known.length >= past else None


def grows(cache: Any) -> bool:
    """Whether a cache gets new tensors for every token, so that the old ones can be put back; True for no cache."""
    layers = getattr(cache, "layers", None)
    return cache is None or (isinstance(layers, list) and all(type(layer).__name__ in _GROWING for layer in layers))


def going_back(cache: Any) -> Callable[[], None]:
    """What makes a cache that `grows` again what it is now. It may be called after a forward that was not finished."""
    if cache is None:
        return lambda: None
    layers = list(cache.layers)
    before = [dict(vars(layer)) for layer in layers]

    def back() -> None:
        cache.layers[:] = layers
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)

    return back


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or in its output; None if there is none."""
    return next((named[name] for name in _NAMES if named.get(name) is not None), None)


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None if that cannot be told."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError):  # a recurrence does not count its tokens
        pass
    known = filled(cache)
    if known is not None:
        return known.past + known.length
    return 0 if _is_fresh(cache) else None


def _is_fresh(cache: Any) -> bool:
    try:
        return not cache.has_previous_state()
    except (AttributeError, TypeError, ValueError):
        return False
