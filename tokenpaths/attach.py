"""Put trails to work in a model, and take them away.

`attach` hooks a model in place; it stays the same object, and `model(...)`, `model.generate(...)`, a Trainer or a
pipeline remain the user's own calls. While attached, each forward runs in three steps:

1. the **watcher** of the model learns which tokens there are: padding from the attention mask, the prompt from labels,
   from `prompt_mask`, from the running `generate` call, or from the prefill that filled the cache;
2. each attachment turns its token rules into masks over the tokens of this forward;
3. at each place, `h` becomes `h + trail(h)` where the mask is set, and stays bit for bit what it was elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.sites import Place, Site, find_blocks, locate
from tokenpaths.tokens import Context, Match, Rule, leaves, token_pieces
from tokenpaths.trailmap import TrailMap
from tokenpaths.trails import OrthonormalRows, Trail
from tokenpaths.trails.stiefel import prepare, release

Spans = Mapping[str, Sequence[tuple[int, int]]]


def attach(
    model: nn.Module,
    trails: TrailMap,
    *,
    strength: float = 1.0,
    rows: Sequence[int] | None = None,
    spans: Spans | None = None,
    tokenizer: Any = None,
) -> Attachment:
    """Lay trails in a model, in place, until the returned handle is removed or its `with` block ends.

    `strength` multiplies every displacement and may be changed at run time (`handle.strength = 0.5`). `rows` are the
    rows of the batch that are moved (default all): attach several maps with different rows for a different trail per
    row. `spans` gives `Span` rules their (start, stop) per row, counted in real tokens. `tokenizer` is for `Match`.

    A model may carry several attachments; a later one reads the states as the earlier ones have moved them. Nothing is
    changed when a site does not exist in the model (`ValueError`).
    """
    return Attachment(model, trails, strength, rows, spans, tokenizer)


class Attachment:
    """A handle on attached trails, and a context manager that removes them at its end."""

    def __init__(
        self,
        model: nn.Module,
        trails: TrailMap,
        strength: float,
        rows: Sequence[int] | None,
        spans: Spans | None,
        tokenizer: Any,
    ) -> None:
        if not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"attach takes a TrailMap, not {type(trails).__name__}: wrap a dict as TrailMap({{...}})")
        self.trails = trails
        self.strength = strength
        self.rows = None if rows is None else tuple(rows)
        self.spans = spans or {}
        self._pieces = None if tokenizer is None else token_pieces(tokenizer)
        self._rules = list(dict.fromkeys(site.tokens for site in trails.sites))
        self._masks: list[Tensor] | None = None
        self._rotations = [module for module in trails.modules() if isinstance(module, OrthonormalRows)]
        self._handles: list[RemovableHandle] = []
        places = self._locate(model)  # refuses before anything is changed
        self._watcher = _Watcher.of(model, trails.blocks)
        self._watcher.join(self)
        for place, parts in places:
            self._handles.append(_hook(place, self._mover(parts)))

    def remove(self) -> None:
        """Take the trails away and leave the model as it was. Removing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watcher.leave(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "removed"
        return f"<{state}: {len(self.trails)} sites, strength {self.strength}>"

    def begin(self, context: Context, past: int, length: int, repeats: int) -> None:
        """A forward begins over columns `past` to `past + length`: choose its tokens."""
        context = replace(context, pieces=self._pieces, spans={**context.spans, **self._span_masks(context, repeats)})
        chosen = [rule.mask(context)[:, past : past + length] for rule in self._rules]
        if self.rows is not None:
            moved = torch.zeros(len(context.real) // repeats, dtype=torch.bool, device=context.real.device)
            if any(not 0 <= row < len(moved) for row in self.rows):
                raise ValueError(f"rows={self.rows} names a row that the batch of {len(moved)} does not have")
            moved[list(self.rows)] = True
            chosen = [mask & moved.repeat_interleave(repeats)[:, None] for mask in chosen]
        self._masks = chosen
        prepare(self._rotations)

    def end(self) -> None:
        """The forward is over, or has failed."""
        release(self._rotations)
        if self._watcher.reader is None:
            self._masks = None  # the next batch of images may have another shape

    def _locate(self, model: nn.Module) -> list[tuple[Place, list[_Part]]]:
        """The places of all sites, with what moves there. Sites at one place read the same state."""
        grouped: dict[tuple[nn.Module, str, int | None], tuple[Place, list[_Part]]] = {}
        seen: dict[Site, Site] = {}
        for site, trail in self.trails.items():
            found, place = locate(model, site, self.trails.blocks)
            if found in seen:
                raise ValueError(f"{site} and {seen[found]} are the same place in this model: a site named twice")
            seen[found] = site
            dim = getattr(trail, "dim", place.width)
            if dim != place.width:
                raise ValueError(f"{found}: {trail} is for width {dim}, but the states there have width {place.width}")
            for name, tensor in trail.state_dict().items():
                if not tensor.is_meta and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{found}: parameter {name!r} of its trail holds NaN or infinity")
            if self._pieces is None and any(isinstance(rule, Match) for rule in leaves(site.tokens)):
                raise ValueError(f"{found} reads the decoded text: give attach(..., tokenizer=your_tokenizer)")
            key = (place.module, place.side, found.head)
            grouped.setdefault(key, (place, []))[1].append(_Part(found, trail, self._rules.index(site.tokens)))
        return list(grouped.values())

    def _mover(self, parts: list[_Part]) -> Callable[[Tensor], Tensor]:
        def move(h: Tensor) -> Tensor:
            if not self.trails.enabled:
                return h
            if self._masks is None:  # a model without token ids, as for images: every position is real and given
                real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
                self.begin(Context(real=real, prompt=real), 0, h.shape[1], 1)
                assert self._masks is not None
            masks = [self._masks[part.rule].to(h.device).reshape(h.shape[:-1]) for part in parts]
            with torch.autocast(h.device.type, enabled=False):
                total = self.strength * _displacement(parts, masks, h)
                moved = (h.to(total.dtype) + total).to(h.dtype)
            # where, not a product with the mask: unmoved tokens stay bit-equal, and cannot catch a NaN
            return torch.where(functools.reduce(torch.logical_or, masks).unsqueeze(-1), moved, h)

        return move

    def _span_masks(self, context: Context, repeats: int) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, pairs in self.spans.items():
            if len(pairs) * repeats != len(context.real):
                raise ValueError(f"spans[{name!r}] has {len(pairs)} rows, the batch {len(context.real) // repeats}")
            bounds = torch.tensor(list(pairs), device=context.real.device).repeat_interleave(repeats, 0)
            position = context.real.cumsum(1) - 1
            masks[name] = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
        return masks


@dataclass(frozen=True)
class _Part:
    """One trail at a place, and the number of its rule among the attachment's rules."""

    site: Site
    trail: Trail
    rule: int


def _displacement(parts: list[_Part], masks: list[Tensor], h: Tensor) -> Tensor:
    """The sum of the displacements at one place, in the trails' own dtype."""
    total: Tensor | None = None
    for part, mask in zip(parts, masks, strict=True):
        weight = next(part.trail.parameters(), h.new_zeros((), dtype=torch.float32))
        d = part.trail(h.to(weight.device, weight.dtype))
        if d.shape != h.shape:
            raise ValueError(f"{part.site}: {part.trail} returned shape {list(d.shape)} for states of {list(h.shape)}")
        d = d.to(h.device)
        if len(parts) > 1:
            d = torch.where(mask.unsqueeze(-1), d, 0)
        total = d if total is None else total + d
    assert total is not None
    return total


def _hook(place: Place, move: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def change(h: Tensor) -> Tensor:
        if place.columns is None:
            return move(h)
        changed = h.clone()
        changed[..., place.columns] = move(h[..., place.columns])
        return changed

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if place.side == "output":
        return place.module.register_forward_hook(after)
    return place.module.register_forward_pre_hook(before, with_kwargs=True)


@dataclass
class _Generation:
    """A running `generate` call: its prompt, and what the last `prepare_inputs_for_generation` was told."""

    ids: Tensor | None
    real: Tensor
    step_ids: Tensor | None = None
    step_real: Tensor | None = None


class _Watcher:
    """Learns, once for all attachments of a model, which tokens a forward is about."""

    _all: WeakKeyDictionary[nn.Module, _Watcher] = WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module, blocks: str | None) -> _Watcher:
        watcher = cls._all.get(model)
        if watcher is None:
            watcher = cls._all[model] = cls(model, blocks)
        elif find_blocks(model, watcher.blocks) is not find_blocks(model, blocks):
            raise ValueError(f"trails are attached to blocks {watcher.blocks!r} already; attach {blocks!r} on its own")
        return watcher

    def __init__(self, model: nn.Module, blocks: str | None) -> None:
        self.blocks = blocks
        self.attachments: list[Attachment] = []
        path = _path_to(model, find_blocks(model, blocks))
        takes_ids = [m for m in path if "input_ids" in inspect.signature(m.forward).parameters]
        self.reader = takes_ids[-1] if takes_ids else None
        self.arguments = list(inspect.signature(self.reader.forward).parameters) if self.reader is not None else []
        two_sided = bool(getattr(getattr(path[-1], "config", None), "is_encoder_decoder", False)) or any(
            bool(getattr(getattr(m, "config", None), "is_encoder_decoder", False)) for m in path
        )
        self.decodes = two_sided and any("decoder" in name for name in _names(model, find_blocks(model, blocks)))
        writers = [m for m in path if hasattr(type(m), "prepare_inputs_for_generation")]
        self.writer = writers[-1] if writers and not two_sided else None
        self.given: dict[str, Any] = {}
        self.generation: _Generation | None = None
        self.caches: WeakKeyDictionary[Any, tuple[Tensor, Tensor | None]] = WeakKeyDictionary()
        self.now: tuple[Tensor, Tensor | None] | None = None
        self.model = model
        self.undo: list[Callable[[], None]] = []

    def join(self, attachment: Attachment) -> None:
        if not self.attachments:
            self._install()
        self.attachments.append(attachment)

    def leave(self, attachment: Attachment) -> None:
        if attachment in self.attachments:
            self.attachments.remove(attachment)
            if not self.attachments:
                for undo in self.undo:
                    undo()
                self.undo.clear()
                del self._all[self.model]

    def _install(self) -> None:
        root = self.model
        self.undo.append(root.register_forward_pre_hook(self._at_root, with_kwargs=True, prepend=True).remove)
        self.undo.append(root.register_forward_hook(self._after_root, always_call=True).remove)
        if self.reader is not None:
            self.undo.append(self.reader.register_forward_pre_hook(self._at_reader, with_kwargs=True).remove)
            self.undo.append(self.reader.register_forward_hook(self._after_reader).remove)
        if self.writer is not None:
            self.undo.append(_shadow(self.writer, "generate", self._generate))
            self.undo.append(_shadow(self.writer, "prepare_inputs_for_generation", self._prepare))

    def _at_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = ("prompt_mask", "spans")
        self.given = {name: kwargs[name] for name in (*own, "labels") if kwargs.get(name) is not None}
        return args, {name: value for name, value in kwargs.items() if name not in own}

    def _after_root(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given = {}
        for attachment in self.attachments:
            attachment.end()

    def _at_reader(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        context, past, length = self._context(named)
        repeats = 1
        if self.generation is not None and len(context.real) % len(self.generation.real) == 0:
            repeats = len(context.real) // len(self.generation.real)
        self.now = (context.prompt, context.ids)
        for attachment in self.attachments:
            attachment.begin(context, past, length, repeats)

    def _after_reader(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.now is None:
            return
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if cache is not None and hasattr(cache, "get_seq_length"):
            self.caches[cache] = self.now

    def _context(self, named: dict[str, Any]) -> tuple[Context, int, int]:
        """What is known of the tokens of this forward, the number of cached columns, and the number of new ones."""
        ids, cache, given_mask = named.get("input_ids"), named.get("past_key_values"), named.get("attention_mask")
        like = ids if ids is not None else named.get("inputs_embeds")
        if like is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds")
        batch, length = like.shape[:2]
        running = self.generation if self.generation is not None and self.generation.step_real is not None else None
        past = int(cache.get_seq_length()) if running is None and hasattr(cache, "get_seq_length") else 0
        if running is not None:
            assert running.step_real is not None
            real, past = running.step_real.bool(), running.step_real.shape[1] - length
        elif given_mask is None:
            real = torch.ones(batch, past + length, dtype=torch.bool, device=like.device)
        elif isinstance(given_mask, Tensor) and given_mask.ndim == 2 and given_mask.shape[1] >= past + length:
            real = given_mask[:, : past + length].bool()
        elif isinstance(given_mask, Tensor) and given_mask.ndim == 2:
            raise ValueError(
                f"attention_mask has {given_mask.shape[1]} columns, but there are {past} cached and {length} new tokens: "
                "token rules need the mask of all of them"
            )
        elif "prompt_mask" in self.given:
            real = torch.ones(batch, past + length, dtype=torch.bool, device=like.device)
        else:
            raise ValueError(
                "token rules need a 2-D attention_mask (batch x tokens); with a mask of another form, give prompt_mask "
                "(batch x tokens, True for the prompt) as well"
            )
        known = self.caches.get(cache) if cache is not None and past and not torch.compiler.is_compiling() else None
        all_ids = _join_ids(ids, past, running.step_ids if running else None, known[1] if known else None)
        prompt, real, all_ids = self._prompt(real, all_ids, past, length, known[0] if known else None)
        spans = {name: _fit(mask.bool(), real.shape[1]) for name, mask in self.given.get("spans", {}).items()}
        return Context(real=real, prompt=prompt, ids=all_ids, spans=spans), past, length

    def _prompt(
        self, real: Tensor, ids: Tensor | None, past: int, length: int, known: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which tokens are given: real, ids and the prompt, widened to the whole prompt where that is known."""
        labels, mask = self.given.get("labels"), self.given.get("prompt_mask")
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != len(real) or mask.shape[1] < past + length:
                shape = f"batch x at least {past + length} tokens"
                raise ValueError(f"prompt_mask has shape {list(mask.shape)}, but must be {shape}, cached ones included")
            wide = mask.shape[1] - real.shape[1]
            return mask.bool(), _fit(real, mask.shape[1], True) if wide else real, _fit_ids(ids, mask.shape[1])
        if self.decodes:
            return torch.zeros_like(real), real, ids
        if self.writer is None:
            return real, real, ids
        if self.generation is not None:
            whole, repeats = self.generation.real.to(real.device), len(real) // len(self.generation.real)
            whole = whole.repeat_interleave(repeats, 0)
            if whole.shape[1] > real.shape[1]:  # a chunk of the prompt: the rest is known from the call
                given_ids = self.generation.ids
                return whole, whole, None if given_ids is None else given_ids.repeat_interleave(repeats, 0)
            columns = torch.arange(real.shape[1], device=real.device) < whole.shape[1]
            return columns.expand_as(real), real, ids
        if labels is not None and labels.ndim == 2 and not past and labels.shape[1] == length:
            return (labels != -100).cumsum(1) == 0, real, ids
        if not past:
            return real, real, ids
        if known is None:
            raise ValueError(
                "the cache was not filled by this model with trails attached, so the prompt is not known: give "
                "prompt_mask (batch x tokens, cached ones included, True for the prompt)"
            )
        return _fit(known, real.shape[1]), real, ids

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self.generation = self.generation, self._prompt_of(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self.generation = before

    def _prompt_of(self, inputs: Tensor | None = None, generation_config: Any = None, *_: Any, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if mask is not None:
            return _Generation(ids if ids is not None and ids.shape == mask.shape else None, mask.bool())
        if ids is None:
            return None if embeds is None else _Generation(None, embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        # as transformers infers it: padding counts as such unless it is also an end-of-text token
        config = generation_config or getattr(self.writer, "generation_config", None)
        pad, end = (kwargs.get(n, getattr(config, n, None)) for n in ("pad_token_id", "eos_token_id"))
        ends = torch.atleast_1d(torch.as_tensor([] if end is None else end)).tolist()
        real = torch.ones_like(ids, dtype=torch.bool) if pad is None or pad in ends else ids != pad
        return _Generation(ids, real)

    def _prepare(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = original(input_ids, *args, **kwargs)
        running, mask = self.generation, kwargs.get("attention_mask")
        if running is not None:
            whole = torch.ones_like(input_ids) if mask is None else mask
            running.step_real = whole if whole.ndim == 2 else None
            running.step_ids = input_ids
            if whole.shape[1] != input_ids.shape[1]:  # a chunk of the prompt, or a prompt whose start was cached before
                chunk = running.ids is not None and running.ids.shape[1] >= whole.shape[1]
                running.step_ids = running.ids[:, : whole.shape[1]] if chunk and running.ids is not None else None
        return prepared


def _path_to(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules from the model down to its block list."""
    path = [model]
    for name in _names(model, blocks)[:-1]:
        path.append(getattr(path[-1], name))
    return path


def _names(model: nn.Module, blocks: nn.ModuleList) -> list[str]:
    return next(name for name, module in model.named_modules() if module is blocks).split(".")


def _shadow(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Let an instance attribute stand before a method; returns what undoes it.

    The shadow is a bound method, so that a deep copy of the model calls itself and not the original.
    """
    before = vars(module).get(name)
    method = getattr(type(module), name)

    @functools.wraps(method)
    def shadow(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(method, self) if before is None else before
        return replacement(original, *args, **kwargs)

    setattr(module, name, types.MethodType(shadow, module))

    def undo() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return undo


def _join_ids(ids: Tensor | None, past: int, step: Tensor | None, known: Tensor | None) -> Tensor | None:
    """The ids of cached and new tokens; -1 where they are not known."""
    if ids is None:
        return None
    total = past + ids.shape[1]
    if step is not None and step.shape == (len(ids), total):
        return step.to(ids.device)
    if not past:
        return ids
    earlier = known[:, :past] if known is not None and known.shape[1] >= past else ids.new_full((len(ids), past), -1)
    return torch.cat([earlier, ids], 1)


def _fit(mask: Tensor, total: int, value: bool = False) -> Tensor:
    """Widen a mask to `total` columns, or cut it."""
    if mask.shape[1] >= total:
        return mask[:, :total]
    return torch.cat([mask, mask.new_full((len(mask), total - mask.shape[1]), value)], 1)


def _fit_ids(ids: Tensor | None, total: int) -> Tensor | None:
    if ids is None or ids.shape[1] == total:
        return ids
    return torch.cat([ids, ids.new_full((len(ids), total - ids.shape[1]), -1)], 1)
