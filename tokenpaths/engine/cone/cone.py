"""The light cone: what trails cannot change is computed once, kept, and given back.

A trail at layer l and token t changes nothing below l and nothing before t. Two things follow for a forward of known
tokens, and neither trails nor objectives see anything of it:

1. **layers**: the hidden states that enter the first moved layer are the same in every epoch, for every learning rate,
   seed and arm of a comparison. The blocks below are run once for each text; afterwards they hand on what was kept.
   With the trails off nothing moves, so all blocks are below: a frozen forward costs its output embedding.
2. **tokens**: the keys and values of a row's unmoved prefix are the same too, and what follows is run behind them as it
   is in generation (prefix.py).

What is kept is keyed by the tokens of a row, its place among the padding, the weights of the base, and how it computes
(dtype, autocast, kind of attention): a tokenizer need not be known. Nothing is kept, and all is run as ever, where a
forward is random (dropout in the base), is given more than tokens and a mask, fills a cache, is compiled or
checkpointed, or where somebody's hooks look inside the blocks that would be left out.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    plain_call,
    plain_values,
    solid,
    unseen,
)
from tokenpaths.engine.cone.kept import InFolder, InMemory, Kept
from tokenpaths.site import Host
from tokenpaths.site.fingerprint import fingerprint


class Cone:
    """Room for what trails cannot change: `steps(..., cone=Cone())`, `measure_drift(..., cone=cone)`.

    Share one between runs over the same base model (seeds, learning rates, arms of a comparison) and what the first
    has computed the others find. Another base or another dtype finds nothing that is not its own.

    Args:
        budget: bytes to keep at most; what has no room is computed each time.
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

    @contextmanager
    def over(self, model: nn.Module, blocks: str | None = None) -> Generator[ActiveCone | None]:
        """Inside, forwards of the model leave out what is known. The base must not be trained meanwhile.

        `blocks` names the block list of a model that has several. Gives None for a model that is always run in full.
        """
        if active_cone(model) is not None or always_in_full(model) is not None:
            yield None
            return
        active = ActiveCone(self, Host.of(model, blocks))
        try:
            with active.installed():
                yield active
        finally:
            self.kept.flush()


def active_cone(model: nn.Module) -> ActiveCone | None:
    """The cone that a model is inside of; None outside of any."""
    found = [listener for watcher in Watcher.known(model) for listener in watcher.listeners]
    return next((listener for listener in found if isinstance(listener, ActiveCone)), None)


class ActiveCone:
    """A cone in a model: it is first to see a forward, and stands before the `forward` of each block."""

    def __init__(self, cone: Cone, host: Host) -> None:
        self.cone = cone
        self.host = host
        self.model = host.model
        self.layers = host.blocks
        self.plan: None = None
        self.shared: Sequence[tuple[int, ...]] = ()  # tokens that many prompts begin with
        self.narrows: bool | None = None  # whether rows may be run behind a cache; None while that is not known
        self.given: Mapping[int, Tensor] | None = None  # outputs of the blocks below, for a forward behind a prefix
        self.skips = True  # whether blocks may be left out
        self.rests = False  # for a while: rows that come too seldom are not kept
        self.said: set[str] = set()
        self.watcher = Watcher.of(host)
        config: Any = getattr(host.inner, "config", None)
        settings = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
        self._base = fingerprint(self.model) + settings
        self._random = [module for module in self.model.modules() if draws(module)]
        self._below: dict[Attachment, int] = {}
        self._in_the_way: dict[int, list[nn.Module]] = {}  # modules on which a hook is in the way of leaving blocks out
        self._outputs: Mapping[int, Tensor] | None = None  # in a forward that leaves out blocks: what these return
        self._look: _Look | None = None  # in a forward that computes what is to be kept
        self._beside: dict[int, int | None] = {}  # by block: what it returns beside its states, counted; None: no tuple

    @contextmanager
    def installed(self) -> Generator[None]:
        """Inside, it hears of each forward first, and stands before each block."""
        self.watcher.join(self, compiled=self.host.compiled)
        first = Hook(self._ahead)
        handle = self.watcher.root.register_forward_pre_hook(first, with_kwargs=True, prepend=True)
        try:
            with forwards(self.layers, self._block):
                yield
        finally:
            handle.remove()
            self.watcher.leave(self)

    def begin(self, moment: Moment | None) -> None: ...

    def end(self) -> None:
        self._outputs = None

    def resume(self, plan: None) -> None: ...

    def attached(self) -> list[Attachment]:
        """The attachments that move something now."""
        return [a for a in self.watcher.listeners if isinstance(a, Attachment) and a.trails.enabled]

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

    def _is_random(self) -> bool:
        """Whether the base draws random numbers in a forward."""
        return any(module.training for module in self._random)

    def keys(self, ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]) -> list[str]:
        """A name for each row: its tokens, where they begin, and what computes its states."""
        how = f"{self.computes()} {self.cone.dtype}".encode()
        rows = zip(ids.cpu(), real.cpu(), strict=True)
        return [
            hashlib.blake2b(
                how + f" {int(mask.long().argmax())} ".encode() + row[mask].numpy().tobytes(), digest_size=16
            ).hexdigest()
            for row, mask in rows
        ]

    def computes(self) -> str:
        """What computes the states: the weights, and how it goes about it."""
        first = next(self.model.parameters())
        kind = first.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        attention = getattr(getattr(self.host.inner, "config", None), "_attn_implementation", None)
        return f"{self._base} {first.dtype} {cast} {attention}"

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
            if isinstance(hook, Observer)
        ]
        with ExitStack() as stack:
            for attachment in self.attached():
                stack.enter_context(attachment.trails.off())
            stack.enter_context(torch.no_grad())
            for hook in observers:
                hook.awake = False
                stack.callback(setattr, hook, "awake", True)
            yield

    def _ahead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward is about to begin: find out what it can leave out, and compute what is not known yet.

        Rows are computed one by one, so that what is kept of a row does not depend on its company: a run that is
        resumed, or that finds what another run kept, goes on bit for bit alike.
        """
        if self._look is not None:
            return
        self._outputs = self.given
        if self.given is not None or not self.skips or self.rests:
            return
        below = self.below()
        named = {**dict(zip(self.watcher.arguments[module], args, strict=False)), **kwargs}
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        config = getattr(self.host.inner, "config", None)
        wanted = self._wanted(below)
        if not below or wanted is None or not plain_call(named, config):
            return
        if self._is_random() or self.watcher.checkpointing():
            return
        assert isinstance(ids, Tensor)
        if not self.learn():
            return
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(solid(real)):
            return
        rows: list[Mapping[int, Tensor]] = []
        for row, (key, there) in enumerate(zip(self.keys(ids, real), real.tolist(), strict=True)):
            until = len(there) - there[::-1].index(True)
            rows.append(self._states(key, ids[row : row + 1, :until], real[row : row + 1, :until], wanted))
        self._outputs = {count: _together([row[count] for row in rows], real) for count in wanted}

    def _states(self, key: str, ids: Tensor, real: Tensor, wanted: frozenset[int]) -> Mapping[int, Tensor]:
        """The states of a row, by the number of blocks before them: kept, or computed now and kept if there is room."""
        found = {count: self.cone.kept.get(f"{key}.{count}") for count in wanted}
        states = {count: group["states"] for count, group in found.items() if group is not None}
        if len(states) == len(wanted):
            return states
        look = self._look = _Look(wanted)
        try:
            with self.frozen():
                self.watcher.reader(input_ids=ids, attention_mask=real.long(), use_cache=False)
        except _Seen:
            pass
        finally:
            self._look = None
        states = {count: tensor[0, real[0].to(tensor.device)] for count, tensor in look.states.items()}
        states = {count: tensor.to("cpu", self.cone.dtype or tensor.dtype) for count, tensor in states.items()}
        for count, tensor in states.items():
            self.cone.kept.put(f"{key}.{count}", {"states": tensor})
        return states

    def learn(self) -> bool:
        """Whether blocks hand on hidden states and nothing else: seen once, in a short forward that no one looks at."""
        if self._beside:
            return self.skips
        look = self._look = _Look(frozenset())
        try:
            with self.frozen(), unseen(self.watcher.reader):
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.host.device)
                self.watcher.reader(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            self._look = None
        if look.more or len(self._beside) != len(self.layers):
            self.skips = False
            self.run_in_full("its blocks hand on more than a hidden state")
        return self.skips

    def _block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands before the `forward` of a block."""
        if self._look is not None:
            return self._seen(self._look, number, forward, args, kwargs)
        if self._outputs is None or number >= max(self._outputs, default=0):
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
