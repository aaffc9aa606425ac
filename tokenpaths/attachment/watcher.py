"""Who listens to a model: each forward is looked at once, before the blocks run, for all attachments.

What is known of a forward belongs to the thread that runs it. So threads may run one model at once.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment import caches
from tokenpaths.attachment.deciding import Deciding, inputs_of, undecided
from tokenpaths.attachment.finding import PACKED, Generation, Step, moment_of, prompt_of
from tokenpaths.attachment.hooks import EveryThread, shadow
from tokenpaths.attachment.moment import Listener, Moment, context_of
from tokenpaths.data.examples import Batch
from tokenpaths.site.host import Host
from tokenpaths.trailmap.gate import Gate
from tokenpaths.undo import Undo, tidy

_OURS = ("prompt_mask", "spans")  # what no model takes
_TOLD = (*_OURS, "labels", "attention_mask", "input_ids", "logits_to_keep", *PACKED)


@dataclass(eq=False)
class _Call:
    """A module that is running: what it was given, and what was at work around it."""

    module: nn.Module
    frame: FrameType | None
    given: dict[str, Any]
    around: tuple[Moment | None, list[tuple[Listener, Any]]] | None = None


@dataclass(eq=False)
class _Thread(threading.local):
    """What one thread runs now."""

    given: dict[str, Any] = field(default_factory=dict[str, Any])
    calls: list[_Call] = field(default_factory=list[_Call])
    generation: Generation | None = None
    now: Moment | None = None
    asking: list[Listener] = field(default_factory=list[Listener])  # whose gates decide in the forward that begins


class Watcher:
    """Hooks a model, on the way from its root to its blocks, while it has listeners."""

    _all: ClassVar[WeakValueDictionary[int, Watcher]] = WeakValueDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def of(cls, host: Host) -> Watcher:
        """The watcher of a block list; one, whether it is reached through a wrapper (PEFT, DDP) or from inside it."""
        with cls._lock:
            found = cls._all.get(id(host.blocks))
            if found is None:
                found = cls._all[id(host.blocks)] = cls(host.path, host.blocks)
            return found

    @classmethod
    def beside(cls, host: Host) -> list[Watcher]:
        """Those of a block list, and of other lists of the same model."""
        return [found for found in list(cls._all.values()) if found.key == id(host.blocks) or found.root is host.model]

    @classmethod
    def known(cls, model: nn.Module) -> list[Watcher]:
        """The watchers at work inside a model."""
        return [found for module in model.modules() if (found := cls._all.get(id(module))) is not None]

    def __init__(self, path: Mapping[str, nn.Module], blocks: nn.ModuleList) -> None:
        self.key = id(blocks)
        self.blocks = blocks
        self.root = path[""]
        self.arguments = {module: list(inspect.signature(module.forward).parameters) for module in path.values()}
        takes_ids = [module for module, names in self.arguments.items() if "input_ids" in names]
        self.reads_tokens = bool(takes_ids)
        self.reader = takes_ids[-1] if takes_ids else self.root
        configs = [getattr(module, "config", None) for module in path.values()]
        two_sided = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self.decodes = two_sided and any("decoder" in name for name in path)
        # transformers 4 gives BERT the second, without the first
        methods = ("generate", "prepare_inputs_for_generation")
        writers = [module for module in path.values() if all(hasattr(type(module), name) for name in methods)]
        # an encoder neither writes nor reads labels
        self.writer = writers[-1] if writers and (self.decodes or not two_sided) else None
        encoders = ("attention_mask", "input_ids") if self.decodes else ()  # these are of the text that was encoded
        self._told = tuple(name for name in _TOLD if name not in encoders)
        self.listeners: tuple[Listener, ...] = ()
        self.here = _Thread()
        self._undo: Undo | None = None
        self._decides = False

    @property
    def now(self) -> Moment | None:
        """The forward that the running thread is inside of."""
        return self.here.now

    def join(self, listener: Listener) -> Watcher:
        """Let a listener hear of each forward. Gives the watcher to leave: another one may watch the model by now."""
        with self._lock:
            watcher = self._all.setdefault(self.key, self)
            if not watcher.listeners:
                watcher._undo = watcher._installed()
            watcher.listeners = (*watcher.listeners, listener)
            watcher._let_decide()
            _forget_graphs()
            return watcher

    def leave(self, listener: Listener) -> None:
        """Let it hear of none. Leaving twice does no harm."""
        with self._lock:
            self.listeners = tuple(other for other in self.listeners if other is not listener)
            _forget_graphs()
            if not self.listeners and self._undo is not None:
                self._undo.run()
                self._decides = False
                if self._all.get(self.key) is self:
                    del self._all[self.key]

    def _installed(self) -> Undo:
        undo = Undo()
        for module, names in self.arguments.items():
            take = EveryThread(functools.partial(self._take, names))
            undo.hook(module.register_forward_pre_hook, take, with_kwargs=True, prepend=True)
            if module is self.reader:
                before, after = (EveryThread(functools.partial(f, names)) for f in (self._before, self._after))
                undo.hook(module.register_forward_pre_hook, before, with_kwargs=True)
                undo.hook(module.register_forward_hook, after, with_kwargs=True, always_call=True)
            undo.hook(module.register_forward_hook, EveryThread(self._drop), always_call=True)
            if module is self.reader:
                break
        above = list(self.arguments)[: list(self.arguments).index(self.reader)]
        if not any(type(module).__module__.startswith("transformers.") for module in above):
            shadow(undo, self.reader, "forward", self._called)
        if self.writer is not None:
            shadow(undo, self.writer, "generate", self._generate)
            shadow(undo, self.writer, "prepare_inputs_for_generation", self._prepare)
            for name in dir(type(self.writer)):
                if name == "generate_batch" or "continuous_batching" in name and not name.startswith("_"):
                    shadow(undo, self.writer, name, functools.partial(_refuse, name))
        return undo

    def _let_decide(self) -> None:
        """Stand before the forward once there is a gate."""
        if self._undo is not None and not self._decides and any(each.gate is not None for each in self.listeners):
            shadow(self._undo, self.reader, "forward", self._forward)
            self._decides = True

    def takes(self, argument: str) -> bool:
        """Whether the model that reads tokens takes an argument of this name."""
        return argument in self.arguments[self.reader]

    def read_behind(self, batch: Batch, gate: Gate) -> list[Float[Tensor, "batch dim"]]:
        """What a gate reads of whole prompts, which are padded before: the states behind each probe at each layer."""
        takes = frozenset(self.arguments[self.reader])
        real = batch.attention_mask.bool()
        moment = Moment(context_of(real, real, batch.input_ids), 0, real.shape[1])
        deciding = Deciding(moment, {0: gate}, self.blocks, takes, others=False)
        deciding.run(lambda: self.reader(**inputs_of(batch, takes, use_cache=True)), {}, self.reader)
        return deciding.states[0]

    def checkpointing(self) -> bool:
        """Whether a backward computes blocks again."""
        return any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.root.modules())

    def acting(self) -> list[Listener]:
        """Those that hear of the forwards of the running thread."""
        return [listener for listener in self.listeners if listener.acts()]

    def _take(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take what is meant for the rules out of the arguments, and note what inner modules may not be told."""
        here, named = self.here, {**dict(zip(names, args, strict=False)), **kwargs}
        if not torch.compiler.is_compiling():
            if getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "nn.DataParallel runs copies of the model in threads, to each of which the token rules would mean "
                    "another batch: start one process for each device (accelerate launch, torchrun), or let the "
                    "process see one device (CUDA_VISIBLE_DEVICES=0)"
                )
            self._forget_interrupted()
            anew = not here.calls or self._is_outside(module, here.calls[-1].module)
            here.calls.append(_Call(module, _calling_frame(), here.given))
            here.given = {} if anew else dict(here.given)
        for name in self._told:
            value = named.get(name)
            if value is None or (name == "attention_mask" and not (isinstance(value, Tensor) and value.ndim == 2)):
                continue
            here.given[name] = value
        return args, {name: value for name, value in kwargs.items() if name not in _OURS}

    def _is_outside(self, module: nn.Module, other: nn.Module) -> bool:
        """Whether a module is not inside the one that was called before it: then it is called anew."""
        order = list(self.arguments)
        return order.index(module) <= order.index(other)

    def _forget_interrupted(self) -> None:
        """Drop the calls that a KeyboardInterrupt has ended: it runs no hooks."""
        here = self.here
        while here.calls and not _is_running(here.calls[-1].frame):
            self._close(here.calls.pop())

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        here = self.here
        if torch.compiler.is_compiling():
            here.given = {}
            return
        if not self._began(module):
            return
        while True:
            call = here.calls.pop()
            self._close(call)
            if call.module is module:
                break

    def _began(self, module: nn.Module) -> bool:
        """Whether a call began here that is ending now: another thread may have hooked the model in between."""
        return any(call.module is module for call in self.here.calls)

    def _close(self, call: _Call) -> None:
        self.here.given = call.given
        if call.around is not None:
            self.here.now, plans = call.around
            for listener, plan in plans:
                listener.end(plan)
            call.around = None

    def _before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here, acting = self.here, self.acting()
        if not torch.compiler.is_compiling():
            _check_meant(self.listeners, acting)
        if here.calls and not torch.compiler.is_compiling():
            here.calls[-1].around = here.now, [(listener, listener.plan) for listener in acting]
        if self.reads_tokens and any(listener.number for listener in acting):
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            writes = self.writer is not None
            here.now = moment_of(named, here.given, here.generation, decodes=self.decodes, writes=writes)
        else:
            here.now = None
        here.asking = []
        if here.now is not None and not torch.compiler.is_compiling():
            moment = here.now
            here.asking = [one for one in acting if one.gate is not None and undecided(moment, one.number)]
        for listener in acting:
            listener.begin(here.now, resting=bool(here.asking))  # until it is decided

    def _called(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands before a forward that PEFT, sentence-transformers and others run past hooks, as `model.forward`."""
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        self._forget_interrupted()
        return forward(*args, **kwargs) if self._began(self.reader) else self.reader(*args, **kwargs)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands before the forward of the module that reads tokens: lets gates decide on new prompts first."""
        here = self.here
        asking, here.asking = here.asking, []
        if not asking or here.now is None:
            return forward(*args, **kwargs)
        acting, names = self.acting(), self.arguments[self.reader]
        gates = {one.number: one.gate for one in asking}
        others = any(one.number and one.number not in gates for one in acting)
        alone = {one.number: one.rows for one in asking if one.alone}
        deciding = Deciding(here.now, gates, self.blocks, frozenset(names), others, alone)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        output = deciding.run(functools.partial(forward, *args, **kwargs), named, forward)
        here.now = deciding.decided()
        for listener in acting:
            listener.begin(here.now)
        return forward(*args, **kwargs) if output is None else output

    def _after(
        self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        here = self.here
        if torch.compiler.is_compiling():
            for listener in self.acting():
                listener.end(listener.plan)
            return
        if not self._began(module):
            return
        call = here.calls[-1]
        if output is not None:
            plans = [(listener, listener.plan) for listener in self.acting()]
            if here.now is not None:
                cache = caches.cache_in({**dict(zip(names, args, strict=False)), **kwargs})
                if cache is None and isinstance(output, Mapping):
                    cache = caches.cache_in(output)
                caches.remember(cache, _moved_by(here.now, plans))
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(functools.partial(_resume, plans))
        self._close(call)

    def _generate(
        self, original: Callable[..., Any], *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Stands before `generate`. Tokens that `prompt_mask` leaves out count as written already."""
        prompt = prompt_of(*args, defaults=getattr(self.writer, "generation_config", None), **kwargs)
        if prompt_mask is not None:
            if prompt_mask.shape != prompt.real.shape:
                raise ValueError(
                    f"prompt_mask has shape {list(prompt_mask.shape)}, but generate was given "
                    f"{list(prompt.real.shape)} tokens: give one entry for each"
                )
            prompt = context_of(prompt.real, prompt_mask.bool(), prompt.ids)
        embedded = prompt.ids is None and kwargs.get("inputs_embeds") is not None
        before, self.here.generation = self.here.generation, Generation(prompt, embedded)
        try:
            return tidy(original)(*args, **kwargs)
        finally:
            self.here.generation = before

    def _prepare(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = original(input_ids, *args, **kwargs)
        mask = kwargs.get("decoder_attention_mask" if self.decodes else "attention_mask")
        if self.here.generation is not None and (mask is None or mask.ndim == 2):
            self.here.generation.step = Step(input_ids, mask)
        return prepared


def _check_meant(listeners: tuple[Listener, ...], acting: list[Listener]) -> None:
    """Raise `RuntimeError` where a forward moves nothing, and it cannot be told whether that is meant."""
    if any(listener.number for listener in acting) or not any(listener.unclear for listener in listeners):
        return
    raise RuntimeError(
        "another thread has attached trails to this model, and it cannot be told whether they are meant for the "
        "forwards of this one: attach(..., everywhere=True) moves those of all threads, attach(..., everywhere=False) "
        "those of the attaching thread alone"
    )


def _moved_by(moment: Moment, plans: list[tuple[Listener, Any]]) -> Moment:
    """The moment, with those that moved its tokens among the movers of the cache."""
    numbers = {listener.number for listener, plan in plans if plan is not None}
    return replace(moment, movers=(moment.movers or frozenset()) | numbers, restarts=None)


def _resume(plans: list[tuple[Listener, Any]], grad: Tensor) -> None:
    """A backward begins: blocks that it computes again, for checkpointing, are moved as they were in their forward."""
    backward = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
    for listener, plan in plans:
        listener.resume(plan, backward)


def _refuse(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"{name} packs the tokens of many prompts into one row, in which token rules cannot tell them apart: take the "
        "trails away (tp.detach(model)), or use generate"
    )


def _forget_graphs() -> None:
    """What torch.compile made does not notice that hooks come and go, and may call the model from anywhere."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    compiled = getattr(frames, "input_codes", None)
    if frames is not None and (compiled is None or compiled.seen):
        torch.compiler.reset()


def _calling_frame() -> FrameType | None:
    """The frame in which torch runs the module whose hook is being called."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType | None) -> bool:
    """Whether the running thread is inside a call."""
    inner = inspect.currentframe()
    while inner is not None:
        if inner is frame:
            return True
        inner = inner.f_back
    return False


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
