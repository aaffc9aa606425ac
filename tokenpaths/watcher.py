"""Which tokens a forward is about: found once per forward, before the blocks run, for all attachments of a model.

A forward shows its new tokens and little else. The rest is put together from what came before it:

    padding   the attention mask
    prompt    `prompt_mask` if given; else the running `generate` call; else labels (the prompt ends at the first one);
              else the forward that filled the cache; else, with an empty cache, everything
    ids       the tokens of this forward, behind those of the forwards that filled the cache

To an encoder everything is prompt; to the decoder of an encoder-decoder nothing is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.sites import find_blocks
from tokenpaths.tokens import Context


@dataclass(frozen=True, eq=False)
class Moment:
    """One forward, over columns `past` to `past + length` of the sequences that `context` knows.

    `repeats` rows of the batch stand for one row that the user gave: beams, or several returned sequences.
    All columns of a `written` forward are known, by their place, to lie behind the prompt: it decodes.
    """

    context: Context
    past: int
    length: int
    repeats: int = 1
    written: bool = False


@runtime_checkable
class Listener(Protocol):
    """An attachment, as the watcher sees it. A moment of None: the model reads no tokens, but images for instance."""

    plan: Any

    def begin(self, moment: Moment | None) -> None: ...

    def end(self) -> None: ...

    def resume(self, plan: Any) -> None: ...


@dataclass
class _Generation:
    """A running `generate` call: the prompt it was given, and what it has prepared for the next forward."""

    prompt: Context
    step: _Step | None = None


@dataclass(frozen=True, eq=False)
class _Step:
    """The tokens of a step of `generate`, cached ones included, and its attention mask: none if it has no padding."""

    ids: Tensor
    mask: Tensor | None


class Hook:
    """A hook that stays behind when its model is copied or pickled: the copy is the frozen model.

    While it is not `awake` it does nothing, in the least time.
    """

    awake: bool = True

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.awake else None

    def __reduce__(self) -> Any:
        return _inert, ()


class Observer(Hook):
    """A hook that looks and changes nothing."""


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None: ...


class Watcher:
    """Hooks a model, on the way from its root to its blocks, while it has listeners."""

    _all: ClassVar[WeakValueDictionary[int, Watcher]] = WeakValueDictionary()
    _caches: ClassVar[WeakKeyDictionary[Any, Moment]] = WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module, blocks: str | None) -> Watcher:
        """The watcher of a block list; one, whether it is reached through a wrapper (PEFT, DDP) or from inside it."""
        layers = find_blocks(model, blocks)
        found = cls._all.get(id(layers))
        if found is None:
            found = cls._all[id(layers)] = cls(_path_to(model, layers), id(layers))
        return found

    @classmethod
    def known(cls, model: nn.Module) -> list[Watcher]:
        """The watchers at work inside a model."""
        return [cls._all[id(module)] for module in model.modules() if id(module) in cls._all]

    @classmethod
    def remember(cls, cache: Any, moment: Moment) -> None:
        """A cache was filled by someone else: what is known of its tokens."""
        cls._caches[cache] = moment

    def __init__(self, path: dict[str, nn.Module], key: int) -> None:
        self.key = key
        self.root = path[""]
        self.compiled = False
        self.arguments = {module: list(inspect.signature(module.forward).parameters) for module in path.values()}
        takes_ids = [module for module, names in self.arguments.items() if "input_ids" in names]
        self.reads_tokens = bool(takes_ids)
        self.reader = takes_ids[-1] if takes_ids else self.root
        configs = [getattr(module, "config", None) for module in path.values()]
        two_sided = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self.decodes = two_sided and any("decoder" in name for name in path)
        methods = (
            "generate",
            "prepare_inputs_for_generation",
        )  # transformers 4 gives BERT the second, without the first
        writers = [module for module in path.values() if all(hasattr(type(module), name) for name in methods)]
        # an encoder neither writes nor reads labels
        self.writer = writers[-1] if writers and (self.decodes or not two_sided) else None
        self.listeners: list[Listener] = []
        self.given: dict[str, Any] = {}
        self.generation: _Generation | None = None
        self.now: Moment | None = None
        self.undo: list[Callable[[], None]] = []

    def join(self, listener: Listener) -> None:
        if not self.listeners:
            self._install()
        self.listeners.append(listener)
        self._forget_graphs()

    def leave(self, listener: Listener) -> None:
        if listener in self.listeners:
            self.listeners.remove(listener)
            self._forget_graphs()
        if not self.listeners and self.undo:
            for undo in self.undo:
                undo()
            self.undo.clear()
            del self._all[self.key]

    def _install(self) -> None:
        handles: list[RemovableHandle] = []
        for module, names in self.arguments.items():
            take = Hook(functools.partial(self._take, names))
            handles.append(module.register_forward_pre_hook(take, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(Hook(self._drop), always_call=True))
            if module is self.reader:
                before, after = (Hook(functools.partial(f, names)) for f in (self._before, self._after))
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
                break
        self.undo += [handle.remove for handle in handles]
        if self.writer is not None:
            self.undo.append(shadow(self.writer, "generate", self._generate))
            self.undo.append(shadow(self.writer, "prepare_inputs_for_generation", self._prepare))

    def _forget_graphs(self) -> None:
        """What torch.compile made of the model does not notice that hooks come and go: let it compile anew."""
        marks = ("_compiled_call_impl", "_orig_mod")
        if self.compiled or any(getattr(m, mark, None) is not None for m in self.root.modules() for mark in marks):
            torch.compiler.reset()
            self.compiled = False

    def checkpointing(self) -> bool:
        """Whether a backward computes blocks again."""
        return any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.root.modules())

    def _take(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take what is meant for the rules out of the arguments, and note the labels."""
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("prompt_mask", "spans", "labels"):
            if named.get(name) is not None:
                self.given[name] = named[name]
        return args, {name: value for name, value in kwargs.items() if name not in ("prompt_mask", "spans")}

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given = {}

    def _before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now = self._moment({**dict(zip(names, args, strict=False)), **kwargs}) if self.reads_tokens else None
        for listener in self.listeners:
            listener.begin(self.now)

    def _after(
        self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        for listener in self.listeners:
            listener.end()
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        if output is None:
            return
        cache = {**dict(zip(names, args, strict=False)), **kwargs}.get("past_key_values")
        if cache is None and isinstance(output, Mapping):
            cache = output.get("past_key_values")
        if self.now is not None and hasattr(cache, "get_seq_length"):
            self.remember(cache, self.now)
        if torch.is_grad_enabled():
            plans = [(listener, listener.plan) for listener in self.listeners]
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(_resume, plans))

    def _moment(self, named: dict[str, Any]) -> Moment:
        ids, cache = named.get("input_ids"), named.get("past_key_values")
        new = ids if ids is not None else named.get("inputs_embeds")
        if new is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds")
        length = new.shape[1]
        step = None
        if self.generation is not None:
            step, self.generation.step = self.generation.step, None
        if step is not None and step.mask is not None:
            past, real = step.mask.shape[1] - length, step.mask.bool()
        else:
            past = 0 if cache is None else int(cache.get_seq_length())
            real = self._real(None if step else named.get("attention_mask"), new, past)
        before = self._cached(cache, past, len(new))
        known_ids = step.ids if step is not None and step.ids.shape == real.shape else None
        if known_ids is None and ids is not None:  # not so in `generate` when the start of the prompt was cached before
            earlier = ids[:, :0] if before is None or before.ids is None else before.ids
            known_ids = torch.cat([_fit(earlier, past, -1), ids], 1)
        if step and self.generation and not self.decodes and "prompt_mask" not in self.given:
            whole = self.generation.prompt
        else:
            whole = self._prompt(real, past, length, before)
        spans = {name: _fit(mask.bool(), real.shape[1], False) for name, mask in self.given.get("spans", {}).items()}
        given_rows = len(real) if self.generation is None else len(self.generation.prompt.real)
        repeats = len(real) // given_rows if len(real) % given_rows == 0 else 1
        written = whole.prompt.shape[1] <= past
        return Moment(_merged(real, known_ids, whole, spans), past, length, repeats, written)

    def _real(self, mask: Any, new: Tensor, past: int) -> Tensor:
        """The tokens that are not padding, cached ones first."""
        total = past + new.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[1] < total:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, but there are {past} cached and {new.shape[1]} new "
                    "tokens: token rules need the mask of all of them"
                )
            return mask[:, :total].bool()
        if mask is not None and "prompt_mask" not in self.given:
            raise ValueError(
                "token rules need a 2-D attention_mask (batch x tokens); with a mask of another form, give prompt_mask "
                "(batch x tokens, True for the prompt) as well"
            )
        return torch.ones(len(new), total, dtype=torch.bool, device=new.device)

    def _prompt(self, real: Tensor, past: int, length: int, before: Context | None) -> Context:
        """The prompt outside `generate`: as wide as it is known, which may be wider than this forward."""
        mask, labels = self.given.get("prompt_mask"), self.given.get("labels")
        if mask is not None:
            if mask.ndim != 2 or len(mask) != len(real) or mask.shape[1] < real.shape[1]:
                raise ValueError(
                    f"prompt_mask has shape {list(mask.shape)}, but must be {len(real)} x at least {real.shape[1]} "
                    "tokens, cached ones included"
                )
            return _context(mask.bool(), mask.bool())
        if self.decodes:
            return _context(real, torch.zeros_like(real))
        if not past:
            if self.writer is not None and labels is not None and labels.ndim == 2 and labels.shape[1] == length:
                return _context(real, (labels != -100).cumsum(1) == 0)
            return _context(real, real)
        if before is None:
            raise ValueError(
                "the cache was not filled by this model with trails attached, so the prompt is not known: give "
                "prompt_mask (batch x tokens, cached ones included, True for the prompt)"
            )
        return before

    def _cached(self, cache: Any, past: int, batch: int) -> Context | None:
        """What is known of a cache's tokens; of the rest of the prompt too, if the cache holds its beginning."""
        if not past or cache is None or torch.compiler.is_compiling():
            return None
        filled = self._caches.get(cache)
        if filled is None or len(filled.context.real) != batch:
            return None
        known = filled.context
        if filled.past + filled.length == past:
            return known
        return _context(
            known.real[:, :past], known.prompt[:, :past], None if known.ids is None else known.ids[:, :past]
        )

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self.generation = self.generation, _Generation(self._prompt_of(*args, **kwargs))
        try:
            return original(*args, **kwargs)
        finally:
            self.generation = before

    def _prompt_of(
        self, inputs: Tensor | None = None, generation_config: Any = None, *_: Any, **kwargs: Any
    ) -> Context:
        """The prompt that a `generate` call is given."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if mask is not None and mask.ndim == 2:
            real = mask.bool()
        elif ids is not None and ids.ndim == 2:
            # as transformers infers it: padding counts as such unless it is an end-of-text token too
            sources = [
                kwargs,
                *(vars(c) for c in (generation_config, getattr(self.writer, "generation_config", None)) if c),
            ]
            settings = ChainMap(*({name: v for name, v in source.items() if v is not None} for source in sources))
            pad, end = settings.get("pad_token_id"), settings.get("eos_token_id", [])
            no_padding = pad is None or pad in torch.atleast_1d(torch.as_tensor(end)).tolist()
            real = torch.ones_like(ids, dtype=torch.bool) if no_padding else ids != pad
        else:
            shown = ids if ids is not None else embeds
            real = torch.ones((1, 1) if shown is None else shown.shape[:2], dtype=torch.bool)
        return _context(real, torch.ones_like(real), ids if ids is not None and ids.shape == real.shape else None)

    def _prepare(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = original(input_ids, *args, **kwargs)
        mask = kwargs.get("decoder_attention_mask" if self.decodes else "attention_mask")
        if self.generation is not None and (mask is None or mask.ndim == 2):
            self.generation.step = _Step(input_ids, mask)
        return prepared


def _context(real: Tensor, prompt: Tensor, ids: Tensor | None = None) -> Context:
    return Context(real, prompt, ids, spans={})  # torch.compile cannot trace the default of `spans`


def _merged(real: Tensor, ids: Tensor | None, whole: Context, spans: dict[str, Tensor]) -> Context:
    """What a forward shows, and beyond its columns what is known of the rest of the prompt."""
    repeats, width = len(real) // len(whole.real), max(real.shape[1], whole.prompt.shape[1])
    rest_real, prompt, rest_ids = (
        None if part is None else part.to(real.device).repeat_interleave(repeats, 0)
        for part in (whole.real, whole.prompt, whole.ids)
    )
    assert rest_real is not None and prompt is not None
    if ids is not None:
        ids = torch.cat([ids, ids[:, :0] if rest_ids is None else rest_ids[:, ids.shape[1] :]], 1)
        ids = _fit(ids, width, -1)
    return Context(
        real=torch.cat([real, rest_real[:, real.shape[1] :]], 1),
        prompt=_fit(prompt, width, False),
        ids=ids,
        spans={name: _fit(mask, width, False) for name, mask in spans.items()},
    )


def _fit(values: Tensor, width: int, filler: bool | int) -> Tensor:
    """Widen to `width` columns, or cut."""
    if values.shape[1] >= width:
        return values[:, :width]
    return torch.cat([values, values.new_full((len(values), width - values.shape[1]), filler)], 1)


def _resume(plans: list[tuple[Listener, Any]], grad: Tensor) -> None:
    """A backward begins: blocks that it computes again, for checkpointing, are moved as they were in their forward."""
    for listener, plan in plans:
        listener.resume(plan)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _path_to(model: nn.Module, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """The modules from the model down to what holds its block list, by their full names."""
    parts = next(name for name, module in model.named_modules() if module is layers).split(".")
    return {name: model.get_submodule(name) for name in (".".join(parts[:depth]) for depth in range(len(parts)))}


def shadow(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Let a bound method, set on the instance, stand before a method of its class; returns what undoes it.

    A deep copy of the model takes it along: there it does nothing.
    """
    before, method = vars(module).get(name), getattr(type(module), name)

    @functools.wraps(method)
    def standing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(method, self) if before is None else before
        return replacement(original, *args, **kwargs) if self is module else original(*args, **kwargs)

    setattr(module, name, types.MethodType(standing, module))

    def undo() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return undo
