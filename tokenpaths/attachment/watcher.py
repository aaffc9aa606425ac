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
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.attachment.hooks import Hook, shadow
from tokenpaths.attachment.moment import Listener, Moment, context_of, fit, merged
from tokenpaths.site.host import Host, is_compiled
from tokenpaths.tokens import Context


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


class Watcher:
    """Hooks a model, on the way from its root to its blocks, while it has listeners."""

    _all: ClassVar[WeakValueDictionary[int, Watcher]] = WeakValueDictionary()
    _caches: ClassVar[WeakKeyDictionary[Any, Moment]] = WeakKeyDictionary()

    @classmethod
    def of(cls, host: Host) -> Watcher:
        """The watcher of a block list; one, whether it is reached through a wrapper (PEFT, DDP) or from inside it."""
        found = cls._all.get(id(host.blocks))
        if found is None:
            found = cls._all[id(host.blocks)] = cls(host.path, id(host.blocks))
        return found

    @classmethod
    def known(cls, model: nn.Module) -> list[Watcher]:
        """The watchers at work inside a model."""
        return [cls._all[id(module)] for module in model.modules() if id(module) in cls._all]

    @classmethod
    def remember(cls, cache: Any, moment: Moment) -> None:
        """A cache was filled by someone else: what is known of its tokens."""
        cls._caches[cache] = moment

    def __init__(self, path: Mapping[str, nn.Module], key: int) -> None:
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

    def join(self, listener: Listener, *, compiled: bool) -> None:
        """Let a listener hear of each forward. `compiled` tells whether a part of the model is compiled."""
        if not self.listeners:
            self._install()
        self.listeners.append(listener)
        self._forget_graphs(compiled)

    def leave(self, listener: Listener) -> None:
        if listener in self.listeners:
            self.listeners.remove(listener)
            self._forget_graphs(is_compiled(self.root))
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

    def _forget_graphs(self, compiled: bool) -> None:
        """What torch.compile made of the model does not notice that hooks come and go: let it compile anew."""
        if self.compiled or compiled:
            torch.compiler.reset()
            self.compiled = False

    def takes(self, argument: str) -> bool:
        """Whether the model that reads tokens takes an argument of this name."""
        return argument in self.arguments[self.reader]

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
            known_ids = torch.cat([fit(earlier, past, -1), ids], 1)
        if step and self.generation and not self.decodes and "prompt_mask" not in self.given:
            whole = self.generation.prompt
        else:
            whole = self._prompt(real, past, length, before)
        spans = {name: fit(mask.bool(), real.shape[1], False) for name, mask in self.given.get("spans", {}).items()}
        given_rows = len(real) if self.generation is None else len(self.generation.prompt.real)
        repeats = len(real) // given_rows if len(real) % given_rows == 0 else 1
        written = whole.prompt.shape[1] <= past
        return Moment(merged(real, known_ids, whole, spans), past, length, repeats, written)

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
            return context_of(mask.bool(), mask.bool())
        if self.decodes:
            return context_of(real, torch.zeros_like(real))
        if not past:
            if self.writer is not None and labels is not None and labels.ndim == 2 and labels.shape[1] == length:
                return context_of(real, (labels != -100).cumsum(1) == 0)
            return context_of(real, real)
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
        return context_of(
            known.real[:, :past], known.prompt[:, :past], None if known.ids is None else known.ids[:, :past]
        )

    def _generate(
        self, original: Callable[..., Any], *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Stands before `generate`. Tokens that `prompt_mask` leaves out count as written already."""
        prompt = self._prompt_of(*args, **kwargs)
        if prompt_mask is not None:
            if prompt_mask.shape != prompt.real.shape:
                raise ValueError(
                    f"prompt_mask has shape {list(prompt_mask.shape)}, but generate was given "
                    f"{list(prompt.real.shape)} tokens: give one entry for each"
                )
            prompt = context_of(prompt.real, prompt_mask.bool(), prompt.ids)
        before, self.generation = self.generation, _Generation(prompt)
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
        return context_of(real, torch.ones_like(real), ids if ids is not None and ids.shape == real.shape else None)

    def _prepare(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = original(input_ids, *args, **kwargs)
        mask = kwargs.get("decoder_attention_mask" if self.decodes else "attention_mask")
        if self.generation is not None and (mask is None or mask.ndim == 2):
            self.generation.step = _Step(input_ids, mask)
        return prepared


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
