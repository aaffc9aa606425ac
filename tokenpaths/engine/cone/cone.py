"""The light cone: what trails cannot change is computed once, kept, and given back.

A trail at layer l and token t changes nothing below l and nothing before t. Two things follow for a forward of known
tokens, and neither trails nor objectives see anything of it:

1. **layers**: the hidden states that enter the first moved layer are the same in every epoch, for every learning rate,
   seed and arm of a comparison. The blocks below are run once for each text; afterwards they hand on what was kept.
   With the trails off nothing moves, so all blocks are below: a frozen forward costs its output embedding.
2. **tokens**: the keys and values of a row's unmoved prefix are the same too, and what follows is run behind them as it
   is in generation (prefix.py).

What is kept is keyed by the tokens of a row, its place among the padding, every bit of the base (`exact_key`), and how
it computes (keys.py): a tokenizer need not be known. Nothing is kept, and all is run as ever, where a forward is random
(dropout in the base), is given more than tokens and a mask, fills a cache, is compiled or checkpointed, or where
somebody's hooks look inside the blocks that would be left out.

A row is computed by itself if it is kept, and with the others of its batch if it is not, as it would be without a cone:
where there is no room, nothing is slower (room.py says what is kept then).
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenpaths.attachment.handle import Attachment
from tokenpaths.attachment.hooks import Hook, Observer, forwards
from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.engine.cone.conditions import (
    always_in_full,
    draws,
    foreign_hooks,
    hooked,
    independent_length,
    others_at_work,
    plain_call,
    plain_values,
    solid,
    unseen,
)
from tokenpaths.engine.cone.kept import InFolder, InMemory, Kept
from tokenpaths.engine.cone.keys import Computing
from tokenpaths.engine.cone.room import Room
from tokenpaths.site import Host
from tokenpaths.undo import Undo


class Cone:
    """Room for what trails cannot change: `steps(..., cone=Cone())`, `measure_drift(..., cone=cone)`.

    Share one between runs over the same base model (seeds, learning rates, arms of a comparison) and what the first
    has computed the others find. Another base or another dtype finds nothing that is not its own.

    Args:
        budget: bytes to keep at most; what has no room is run each time, as without a cone. At 8 billion weights in
            bfloat16 a token's keys and values are 131 kB, its hidden state 8 kB: 2 GiB hold 16 thousand tokens of the
            one, 262 thousand of the other.
        folder: keep it in safetensors files here, which outlive the process, and not in memory. Their checksums are
            checked whenever they are read. A folder that cannot be written is a warning.
        dtype: to keep states in; exactly as they are, unless told. bfloat16 halves those of a float32 model, which are
            then no longer exact.
    """

    def __init__(
        self, budget: int = 2 << 30, *, folder: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if budget < 0:
            raise ValueError(f"Cone: budget={budget} bytes must be at least 0")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Cone: dtype={dtype} must be a floating-point dtype, or None for exact states")
        self.budget = budget
        self.folder = None if folder is None else Path(folder)
        self.dtype = dtype
        self.kept: Kept = InMemory(budget) if folder is None else InFolder(folder, budget)
        self.narrows: set[str] = set()  # what has been found to give the same states behind a cache as in full

    def __repr__(self) -> str:
        where = "" if self.folder is None else f", folder={str(self.folder)!r}"
        how = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"<Cone({self.budget}{where}{how}): {self.kept.used} bytes kept>"

    @classmethod
    def of(cls, asked: Cone | bool | None) -> Cone | None:
        """What an argument `cone=` asks for: a new cone for True, none for False and None; else `TypeError`."""
        if not (asked is None or isinstance(asked, (Cone, bool))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"cone={asked!r:.80} must be a Cone, True or False")
        return cls() if asked is True else asked or None

    @contextmanager
    def over(self, model: nn.Module, blocks: str | None = None) -> Generator[ActiveCone | None]:
        """Inside, forwards of the model leave out what is known.

        A base that is written to meanwhile is another base from then on. A write through `.data` is not noticed: leave
        the cone and enter it again. `blocks` names the block list of a model that has several. Gives None for a model
        that is always run in full.
        """
        if active_cone(model) is not None or always_in_full(model) is not None:
            yield None
            return
        active = ActiveCone(self, Host.of(model, blocks))
        try:
            with active._installed():  # pyright: ignore[reportPrivateUsage]
                yield active
        finally:
            self.kept.flush()


def active_cone(model: nn.Module) -> ActiveCone | None:
    """The cone that a model is inside of; None outside of any."""
    found = [listener for watcher in Watcher.known(model) for listener in watcher.acting()]
    return next((listener for listener in found if isinstance(listener, ActiveCone)), None)


class ActiveCone:
    """A cone in a model: it is first to see a forward, and stands before the `forward` of each block."""

    def __init__(self, cone: Cone, host: Host) -> None:
        self.cone = cone
        self.host = host
        self.model = host.model
        self.layers = host.blocks
        self.number = 0  # it moves nothing
        self.unclear = self.alone = self._resting = False  # the last: while gates decide
        self.gate = self.rows = self.plan = None
        self._thread = threading.get_ident()
        self.shared: Sequence[tuple[int, ...]] = ()  # tokens that many prompts begin with
        self.narrows: bool | None = None  # whether rows may be run behind a cache; None while that is not known
        self.given: Mapping[int, Tensor] | None = None  # outputs of the blocks below, for a forward behind a prefix
        self.skips = True  # whether blocks may be left out
        self.rests = False  # for a while: rows that come too seldom are not kept
        self.said: set[str] = set()
        self.watcher = Watcher.of(host)
        self.room = Room()  # for the rows of the goal whose loss is computed
        self.how = ""  # what computes the states, as it stood when the running forward began
        self._computing = Computing(host)
        self._independent = independent_length(self.model)
        self._random = [module for module in self.model.modules() if draws(module)]
        self._below: dict[Attachment, int] = {}
        self._in_the_way: dict[int, list[nn.Module]] = {}  # modules on which a hook is in the way of leaving blocks out
        self._outputs: Mapping[int, Tensor] | None = None  # in a forward that leaves out blocks: what these return
        self._look: _Look | None = None  # in a forward that computes what is to be kept
        self._state_bytes = 0  # of a token, as it is kept
        self._beside: dict[int, int | None] = {}  # by block: what it returns beside its states, counted; None: no tuple

    @contextmanager
    def _installed(self) -> Generator[None]:
        """Inside, it hears of each forward first, and stands before each block."""
        with Undo() as undo:
            undo.add(lambda: self.watcher.leave(self))
            self.watcher = self.watcher.join(self)
            first = Hook(self._ahead)
            undo.hook(self.watcher.root.register_forward_pre_hook, first, with_kwargs=True, prepend=True)
            with forwards(self.layers, self._block):
                yield

    def acts(self) -> bool:
        """Whether the running thread is the one that is inside the cone."""
        return threading.get_ident() == self._thread

    def begin(self, moment: Moment | None, resting: bool = False) -> None:
        self._resting = resting  # gates read prompts with probes behind them, of which nothing is kept

    def end(self, before: None) -> None:
        self._outputs, self._resting = None, False

    def resume(self, plan: None, backward: int) -> None: ...

    def attached(self) -> list[Attachment]:
        """The attachments that move something now."""
        return [a for a in self.watcher.acting() if isinstance(a, Attachment) and a.trails.enabled]

    def below(self) -> int:
        """The number of blocks, from the first, that no attached trail can change."""
        if not self.skips:
            return 0
        for attachment in (attached := self.attached()):
            if attachment not in self._below:
                self._below[attachment] = self.host.blocks_below(attachment.trails.sites)
        return min([self._below[a] for a in attached], default=len(self.layers))

    def whole_rows(self) -> str | None:
        """Why rows must be run whole, or None where they may be run behind their unmoved prefix."""
        if self._is_random():
            return "the base drops at random"
        if any(module.training and draws(module) for a in self.attached() for module in a.trails.modules()):
            return "the trails' dropout is drawn for whole rows"
        if self.watcher.checkpointing():
            return "gradient checkpointing runs without a cache"
        if not self.watcher.takes("past_key_values"):
            return "the model takes no cache of keys and values"
        if self.below() == len(self.layers):
            return "no block can be changed"
        if any(map(hooked, self.model.modules())):
            return "hooks look at the states of whole rows"
        return None

    def steady(self, tokens: int) -> bool:
        """Whether the states of rows of a batch of so many columns follow from their tokens; takes note of the base."""
        if self._is_random() or self.watcher.checkpointing() or others_at_work(self.model, self.watcher):
            return False
        if self._independent is not None and tokens > self._independent:
            return False
        self.how = self._computing.how
        return True

    def _is_random(self) -> bool:
        """Whether the base draws random numbers in a forward."""
        return any(module.training for module in self._random)

    def keys(self, ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]) -> list[str]:
        """A name for each row: its tokens, where they begin, and what computes its states."""
        how = f"{self.how} {self.cone.dtype}".encode()
        rows = zip(ids.cpu(), real.cpu(), strict=True)
        return [
            hashlib.blake2b(
                how + f" {int(mask.long().argmax())} ".encode() + row[mask].numpy().tobytes(), digest_size=16
            ).hexdigest()
            for row, mask in rows
        ]

    def run_in_full(self, reason: str) -> None:
        """Say once why nothing is left out."""
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"{type(self.host.inner).__name__} is run in full: {reason}", stacklevel=2)

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Inside, a forward is the frozen model's, and nobody looks at it."""
        observers = [
            hook
            for layer in self.layers
            for some in foreign_hooks(layer)
            for hook in some
            if isinstance(hook, Observer) and hook.is_here()
        ]
        with ExitStack() as stack:
            for attachment in self.attached():
                stack.enter_context(attachment.trails.switched(False))
            stack.enter_context(torch.no_grad())
            undo = stack.enter_context(Undo())
            for hook in observers:
                undo.set(hook, "awake", False)
            yield

    def _ahead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward is about to begin: find out what it can leave out, and compute what is not known yet."""
        if self._look is not None:
            return
        self._outputs = self.given
        if self.given is not None or not self.skips or self.rests or not self.cone.budget:
            return
        below = self.below()
        named = {**dict(zip(self.watcher.arguments[module], args, strict=False)), **kwargs}
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        config = getattr(self.host.inner, "config", None)
        wanted = self._wanted(below)
        if not below or wanted is None or not plain_call(named, config):
            return
        assert isinstance(ids, Tensor)
        if not self.steady(ids.shape[1]) or not self.learn():
            return
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if bool(solid(real)) and (rows := self._rows(ids, real, wanted)) is not None:
            self._outputs = {count: _together([row[count] for row in rows], real) for count in wanted}

    def _rows(self, ids: Tensor, real: Tensor, wanted: frozenset[int]) -> list[Mapping[int, Tensor]] | None:
        """The states of each row, by the number of blocks before them; None where no row is kept or has room.

        A row that is kept is computed by itself, so that what is kept does not depend on its company: a run that is
        resumed, or that finds what another run kept, goes on bit for bit alike. The others are computed together.
        """
        found: dict[int, Mapping[int, Tensor]] = {}
        for row, (key, there) in enumerate(zip(self.keys(ids, real), real.tolist(), strict=True)):
            groups = {count: self.cone.kept.get(f"{key}.{count}") for count in wanted}
            known = {count: group["states"] for count, group in groups.items() if group is not None}
            if len(known) == len(wanted):
                found[row] = known
            elif self._has_room(key, sum(there), len(wanted)):
                until = len(there) - there[::-1].index(True)
                one = slice(row, row + 1)
                found[row] = self._compute(ids[one, :until], real[one, :until], wanted)[0]
                for count, states in found[row].items():
                    self.cone.kept.put(f"{key}.{count}", {"states": states})
        if not found:
            return None
        others = [row for row in range(len(ids)) if row not in found]
        found |= dict(zip(others, self._compute(ids[others], real[others], wanted) if others else (), strict=True))
        return [found[row] for row in range(len(ids))]

    def _has_room(self, key: str, tokens: int, count: int) -> bool:
        """Whether the states of a row of so many tokens, after `count` of the blocks, are to be kept and can be."""
        return self.room.keeps(key) and self.cone.kept.fits(tokens * self._state_bytes * count, count)

    def _compute(self, ids: Tensor, real: Tensor, wanted: frozenset[int]) -> list[Mapping[int, Tensor]]:
        """The states of rows as the frozen model makes them, by the number of blocks before them, without padding."""
        look = _Look(wanted)
        with Undo() as undo, suppress(_Seen):
            undo.set(self, "_look", look)
            with self.frozen():
                self.watcher.reader(input_ids=ids, attention_mask=real.long(), use_cache=False)
        states = {count: tensor.to("cpu", self.cone.dtype or tensor.dtype) for count, tensor in look.states.items()}
        return [{count: tensor[row, there] for count, tensor in states.items()} for row, there in enumerate(real.cpu())]

    def learn(self) -> bool:
        """Whether blocks hand on hidden states and nothing else: seen once, in a short forward that no one looks at."""
        if self._beside:
            return self.skips
        look = _Look(frozenset())
        with Undo() as undo:
            undo.set(self, "_look", look)
            with self.frozen(), unseen(self.watcher.reader):
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.host.device)
                self.watcher.reader(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        if look.more or len(self._beside) != len(self.layers):
            self.skips = False
            self.run_in_full("its blocks hand on more than a hidden state")
        return self.skips

    def _block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands before the `forward` of a block."""
        if self._look is not None:
            return self._seen(self._look, number, forward, args, kwargs)
        if self._outputs is None or self._resting or number >= max(self._outputs, default=0):
            return forward(*args, **kwargs)
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if (output := self._outputs.get(number + 1)) is not None:  # where it is not kept, nobody looks at it
            states = output.to(states.device, states.dtype)
        beside = self._beside[number]
        return states if beside is None else (states, *[None] * beside)

    def _seen(self, look: _Look, number: int, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        result = forward(*args, **kwargs)
        states, *rest = result if isinstance(result, tuple) else (result,)
        given = (*args, *kwargs.values())
        look.more |= not isinstance(states, Tensor) or not plain_values(given)
        look.more |= any(x is y for x in given for y in look.handed)
        if isinstance(states, Tensor):
            self._state_bytes = states.shape[-1] * (self.cone.dtype or states.dtype).itemsize
        look.handed += [thing for thing in rest if isinstance(thing, Tensor)]
        self._beside[number] = len(rest) if isinstance(result, tuple) else None
        if number + 1 in look.wanted:
            look.states[number + 1] = states
            if len(look.states) == len(look.wanted):
                raise _Seen
        return result

    def _wanted(self, below: int) -> frozenset[int] | None:
        """After how many blocks states are asked for, of those below; None if a hook looks further inside."""
        if below not in self._in_the_way:
            above = {id(m) for layer in self.layers[below:] for m in layer.modules()}
            blocks = {id(layer) for layer in self.layers[:below]} | {id(self.host.head)}
            self._in_the_way[below] = [m for m in self.model.modules() if id(m) not in above | blocks]
        wanted = {below}
        if any(hooked(module) for module in self._in_the_way[below]):
            return None
        for number in range(below):
            after, before = foreign_hooks(self.layers[number])
            if not all(isinstance(hook, Observer) for hook in after + before):
                return None
            wanted |= {number + 1} if after else set()
            wanted |= {number} if before and number else set()
        return frozenset(wanted)


@dataclass(eq=False)
class _Look:
    """A forward of one row. It is run to see states, by the number of blocks before them, and no further.

    `handed` is what blocks returned beside them; `more` says whether a later block was given any of it, or something
    that it may write to.
    """

    wanted: frozenset[int]
    states: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    handed: list[Tensor] = field(default_factory=list[Tensor])
    more: bool = False


class _Seen(Exception):
    """Ends a forward of which all that is wanted was seen."""


def _together(rows: Sequence[Tensor], real: Bool[Tensor, "batch seq"]) -> Tensor:
    """The states of rows as one tensor, with zeros for padding."""
    states = rows[0].new_zeros(*real.shape, rows[0].shape[-1])
    states[real.cpu()] = torch.cat(list(rows))
    return states
