"""What a cone keeps of a run when its budget does not hold everything.

A hidden state costs `width` numbers a token and saves the blocks below. Keys and values of a prefix cost 2 x
`heads * size` numbers a token *and block* (131 kB in a model of 8 billion weights, where the state costs 8 kB), and
serve a batch only if all of its rows have them. So of several goals

1. the tokens that all prompts of a goal begin with come first: they are kept once;
2. then the states that enter the first moved block: if they do not fit, those of a share of the rows;
3. then keys and values, of a goal whose rows all fit, and of no other.

Which rows make the share follows from their tokens, and not from who came first: a resumed run keeps the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenpaths.site import Host
from tokenpaths.site.host import text_config


@dataclass(frozen=True)
class Room:
    """What there is room for, of the rows of one goal.

    Args:
        share: of the rows whose states are kept.
        prefixes: whether keys and values of the rows' own prefixes are kept; if not, those of the shared front are.
    """

    share: float = 1.0
    prefixes: bool = True

    def keeps(self, key: str) -> bool:
        """Whether the row of this key is among those whose states are kept."""
        return int(key[:8], 16) < self.share * 2**32


@dataclass(frozen=True)
class Need:
    """What the rows of a goal would take, in bytes.

    Args:
        states: of the hidden states of whole rows.
        narrowed: of keys and values, and of the states of what is run behind them; None where rows are run whole.
    """

    states: float
    narrowed: float | None = None


def rooms(needs: Sequence[Need], budget: int) -> list[Room]:
    """The room of each goal in a budget."""
    states = sum(need.states for need in needs)
    share = min(1.0, budget / states) if states else 1.0
    left = budget - states
    found: list[Room] = []
    for need in needs:
        more = None if need.narrowed is None else need.narrowed - need.states
        fits = more is not None and more <= left
        left -= more if fits and more is not None else 0
        found.append(Room(1.0 if fits else share, prefixes=fits))
    return found


def need_of(host: Host, count: float, tokens: float, below: int, seen: int, before: float | None, shared: int) -> Need:
    """What the rows of a goal would take.

    Args:
        host: the model.
        count: the number of different rows.
        tokens: the mean length of a row.
        below: the blocks below the first moved state.
        seen: how many times the states of a row are kept: after the blocks below, after all blocks.
        before: the tokens of a row before the first that is moved or wanted; None where rows are run whole.
        shared: the tokens that all rows begin with.
    """
    state, pair = token_bytes(host)
    states = count * tokens * state * seen
    if not before or pair is None:
        return Need(states)
    kept = count * max(before - shared, 0) * pair * (len(host.blocks) - below) + shared * pair * len(host.blocks)
    return Need(states, kept + count * (tokens - before) * state * bool(below))


def token_bytes(host: Host) -> tuple[int, int | None]:
    """The bytes of a hidden state, and of a token's key and value in one block: None where that is not known."""
    config: Any = text_config(host.inner)
    item = next(host.model.parameters()).element_size()
    width = int(getattr(config, "hidden_size", 0))
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return width * item, None
    size = getattr(config, "head_dim", None) or width // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return width * item, 2 * int(pairs) * int(size) * item
