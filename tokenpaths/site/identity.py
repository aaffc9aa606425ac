"""Exactly which function a model is: a key that changes with any bit of it, for whatever is kept of what it computes.

    exact_key(model)       # "5f0c..."; the same in another process, on another machine or device, offloaded or not

The key is a SHA-256 of

    tensors    every parameter and buffer (also such as are not saved), the inner tensors of quantised and sharded ones,
               and tensors that a module or a parameter holds as plain attributes: name, dtype, shape and all bytes
    modules    their classes, and their plain attributes: an epsilon, a scaling, the active adapters of PEFT
    config     its fields, but for names, labels, dropout, and what a forward is asked to return

and of nothing else: the code of a class, and hooks, are not in it. Offloaded weights are read from where they lie.

All bytes are read, each time: 1.8 GB a second on a core with SHA instructions.
What may be remembered safely? Nothing from one use to the next: a write through `.data` or NumPy leaves no mark. Within
one use (`Identity`) what torch counts is trusted, the version of a tensor and where its data lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenpaths.site.host import unwrapped
from tokenpaths.trails.base import Trail
from tokenpaths.undo import tidy


@tidy
def exact_key(model: nn.Module, without: Iterable[nn.Parameter] = ()) -> str:
    """A hash of all that a model's function follows from, 32 hexadecimal digits.

    Trails that lie among the model's modules are left out, as are the parameters `without`, and what PEFT has laid into
    the model while that is disabled: then it is the key of the bare base. Weights that are sharded over processes
    (DTensor) are gathered, so all processes must call it.

    Raises:
        ValueError: a weight is on the meta device, and nothing says where its numbers are.
    """
    return Identity(model, without).key()


class Identity:
    """The exact key of a model that may change while it is used; what has not changed is not read again.

    A write to a parameter or buffer, an exchanged tensor or module, and another state of the configuration or of PEFT's
    layers are noticed. A write through `.data` is not: make a new `Identity` where that may have been.
    """

    def __init__(self, model: nn.Module, without: Iterable[nn.Parameter] = ()) -> None:
        self._model = unwrapped(model)
        self._without = {id(parameter): parameter for parameter in without}
        self._known: dict[
            tuple[str, int], tuple[Held, str]
        ] = {}  # it holds the tensors, so that ids are not used again
        self._modules: list[nn.Module] = []
        self._marks: object = None
        self._key = ""

    def key(self) -> str:
        """The key of the model as it stands."""
        if self._marks is None or self._marks != self._seen():
            self._modules = list(self._model.modules())
            self._key = self._read()
            self._marks = self._seen()
        return self._key

    def _seen(self) -> object:
        """What is looked at to tell whether to read again, in about a millisecond."""
        children = [id(child) for module in self._modules for child in module.children()]
        tensors = [_mark(tensor) for module in self._modules for tensor in own_tensors(module).values()]
        states = [_peft_state(module) for module in self._modules if hasattr(type(module), "disable_adapters")]
        configs = {id(c): c for module in self._modules if (c := vars(module).get("config")) is not None}
        values = [{k: v for k, v in vars(c).items() if type(v) in _SIMPLE} for c in configs.values()]
        return children, tensors, states, values

    def _read(self) -> str:
        held, lines = contents(self._model, self._without)
        places = [(each.name, id(each.by)) for each in held]
        new = [each for place, each in zip(places, held, strict=True) if self._changed(place, each)]
        # in this thread alone: a pool that is interrupted while it is given work waits for itself for ever
        known = {**self._known, **{(each.name, id(each.by)): (each, _digest(each)) for each in new}}
        self._known = {place: known[place] for place in places}
        lines += [f"{name} {self._known[name, by][1]}" for name, by in places]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]

    def _changed(self, place: tuple[str, int], held: Held) -> bool:
        return place not in self._known or self._known[place][0].mark != held.mark


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that a model holds: its name in the base, what has it, how to read it, and a mark that changes with it.

    `by` is the tensor itself, or the map of an offloaded one.
    """

    name: str
    by: object
    read: Callable[[], Tensor]
    mark: object


def contents(model: nn.Module, without: Collection[int] = ()) -> tuple[list[Held], list[str]]:
    """All tensors of a model, none of them read, and the rest of what its function follows from, a line each."""
    held: list[Held] = []
    lines = [f"config {_json(_config(getattr(model, 'config', None)))}"]
    hooks = offloading(model)
    for name, module in base_modules(model):
        kind = type(module).__qualname__.removeprefix("FSDP")
        lines.append(f"{name}: {kind} {_json(_attributes(module))}")
        for local, tensor in _tensors(module):
            if id(tensor) not in without:
                held += leaves(f"{name}.{local}", tensor, hooks.get(id(module), {}).get(local))
    return held, lines


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base with their names: no trails, and of PEFT's layers that are disabled what they wrap.

    A layer that is disabled while an adapter is merged into what it wraps is there: its forward undoes the merge.
    """
    idle = any(map(is_idle, model.modules()))
    wrapped = idle and "base_model" in model._modules and hasattr(model, "peft_config")  # pyright: ignore[reportPrivateUsage]
    skipped = set(_trails(model))
    for name, module in model.named_modules():
        if is_idle(module):
            skipped |= {part for child in laid_beside(module) for part in child.modules()}
        if module in skipped or (wrapped and name in _ROOTS):
            continue
        if not is_idle(module) or getattr(module, "merged_adapters", ()):
            yield bare(name) if idle else name, module


def _trails(model: nn.Module) -> list[nn.Module]:
    """Trails that lie among the modules of a model, and what holds nothing but trails."""
    trails = [module for module in model.modules() if isinstance(module, Trail)]
    theirs = {id(t) for trail in trails for part in trail.modules() for t in own_tensors(part).values()}
    found = [part for trail in trails for part in trail.modules()]
    if trails:
        for module in model.modules():
            held = {id(t) for part in module.modules() for t in own_tensors(part).values()}
            found += [module] if held and held <= theirs else []
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself."""
    held = {**module._parameters, **module._buffers}  # pyright: ignore[reportPrivateUsage]
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def is_idle(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT's, and disabled."""
    return bool(vars(module).get("_disable_adapters"))


def laid_beside(module: nn.Module) -> list[nn.Module]:
    """What PEFT has put beside the module that one of its layers wraps."""
    return [child for name, child in module.named_children() if name not in _WRAPPED]


_WRAPPED = ("base_layer", "original_module")  # what PEFT names the module that it has put one of its own around
_ROOTS = ("", "base_model")  # the model around all, and the tuner


def bare(name: str) -> str:
    """The name of a module or parameter in the base that PEFT has wrapped."""
    for wrapped in _WRAPPED:
        name = f"{name}.".replace(f".{wrapped}.", ".").removesuffix(".")
    return f"{name}.".removeprefix("base_model.model.").removesuffix(".")


def offloading(model: nn.Module) -> dict[int, dict[str, tuple[Any, str]]]:
    """Where accelerate keeps offloaded weights: for each module, by local name, the map that has it, and its key there.

    A hook may be of a module or, for all modules below it, of one above.
    """
    found: dict[int, dict[str, tuple[Any, str]]] = {}
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            kept = getattr(each, "weights_map", None)
            if kept is None:
                continue
            for path, part in module.named_modules() if getattr(each, "place_submodules", False) else (("", module),):
                for local in own_tensors(part):
                    found.setdefault(id(part), {})[local] = (kept, f"{path}.{local}".removeprefix("."))
    return found


def leaves(name: str, tensor: Tensor, kept: tuple[Any, str] | None) -> Iterator[Held]:
    """The plain tensors that a tensor is made of; one for a plain tensor."""
    if hasattr(tensor, "full_tensor"):  # sharded
        yield Held(name, tensor, cast("Any", tensor).full_tensor, _mark(tensor))
    elif is_traceable_wrapper_subclass(tensor):  # quantised
        parts, context = tensor.__tensor_flatten__()
        for part in parts:
            yield from leaves(f"{name}.{part}", getattr(tensor, part), None)
        yield Held(f"{name} {type(tensor).__name__} {_json(_plain(context))}", tensor, _empty, 0)
    elif tensor.is_quantized:  # by torch.ao
        yield Held(f"{name} {_scales(tensor)}", tensor, tensor.int_repr, _mark(tensor))
    elif tensor.is_meta and kept is not None:
        places, key = kept
        yield Held(name, places, lambda: places[key], key)
    else:
        yield Held(name, tensor, lambda: tensor, _mark(tensor))


def _scales(tensor: Tensor) -> str:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return f"{tensor.q_scale()!r} {tensor.q_zero_point()}"
    return f"{tensor.q_per_channel_scales().tolist()} {tensor.q_per_channel_zero_points().tolist()}"


def _empty() -> Tensor:
    return torch.empty(0)


def _peft_state(module: nn.Module) -> list[str]:
    """Which adapters a layer of PEFT's applies, and how strongly."""
    return [f"{k} {v}" for k, v in vars(module).items() if k.endswith(("adapter", "adapters", "scaling"))]


def _mark(tensor: Tensor) -> object:
    """What torch counts of a tensor: it changes with each write that torch sees."""
    if is_traceable_wrapper_subclass(tensor):
        return id(tensor), tuple(_mark(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    version = None if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
    return id(tensor), version, tensor.data_ptr()


@torch.no_grad()
def _digest(held: Held) -> str:
    """The hash of a tensor's dtype, shape and bytes."""
    tensor = held.read().detach()
    if tensor.is_meta:
        raise ValueError(
            f"{held.name} is on the meta device, and no hook of accelerate's says where its numbers are: what a model "
            "computes can be kept only if its weights can be read"
        )
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(cast("Any", flat.view(torch.uint8).numpy()) if len(flat) else b"")
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module itself: parameters, buffers, plain attributes, what these carry, and its extra state."""
    own = own_tensors(module)
    for name, tensor in own.items():
        yield name, tensor
        if not is_traceable_wrapper_subclass(tensor):
            yield from _inside(name, {key: part for key, part in vars(tensor).items() if "grad" not in key})
    yield from _inside("", {name: value for name, value in vars(module).items() if not name.startswith("_")})
    extra: dict[str, Any] = {}
    if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:  # pyright: ignore[reportPrivateUsage]
        module._save_to_state_dict(extra, "", True)  # pyright: ignore[reportPrivateUsage]
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        extra["extra state"] = module.get_extra_state()
    yield from _inside("saved", {name: value for name, value in extra.items() if value is not own.get(name)})


def _inside(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Tensors in lists, dicts and small objects that hold some, such as the state of a quantised weight."""
    if isinstance(value, Tensor):
        yield name.strip("."), value
    elif isinstance(value, (bytes, bytearray)):
        yield name.strip("."), torch.tensor(list(value), dtype=torch.uint8)
    elif depth and isinstance(value, Mapping):
        for key, part in cast("Mapping[Any, Any]", value).items():
            yield from _inside(f"{name}.{key}", part, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for number, part in enumerate(cast("list[Any]", value)):
            yield from _inside(f"{name}.{number}", part, depth - 1)
    elif depth and not isinstance(value, (nn.Module, type)):
        held: dict[str, Any] = getattr(value, "__dict__", {})
        if any(isinstance(part, Tensor) for part in held.values()):
            yield from _inside(name, held, depth)


_NOT_OF_THE_FUNCTION = {  # attributes of modules: who trains it, where it lies, what it is called, what it has seen
    *("training", "gradient_checkpointing", "name_or_path", "hf_device_map", "warnings_issued"),
    *("max_seq_len_cached", "inference_mode"),
}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module was given; of a whole pretrained model, which libraries write to, numbers only."""
    whole = hasattr(module, "get_input_embeddings") and hasattr(module, "config")
    hidden = hasattr(type(module), "disable_adapters")  # PEFT's layers keep their state in such
    found = {
        name: _plain(bool(value) if name == "_disable_adapters" else value)
        for name, value in vars(module).items()
        if (hidden or name[0] != "_")
        and not (name in _NOT_OF_THE_FUNCTION or "drop" in name)
        and not (callable(value) and hasattr(type(module), name))  # a method that somebody stands before
    }
    numbers = {name: value for name, value in found.items() if type(value) in (int, float)}
    return numbers if whole else {name: value for name, value in found.items() if value is not None}


def _plain(value: Any, depth: int = 4) -> Any:
    """A value as JSON has it, without what is not plain; None for what is not at all."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.Size, Enum)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "to_dict"):  # no whole configuration
        return {"is": type(value).__qualname__, **_plain(vars(value), depth)}
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value.__qualname__
    if depth and isinstance(value, Mapping):
        parts = {str(key): _plain(part, depth - 1) for key, part in cast("Mapping[Any, Any]", value).items()}
        return {key: part for key, part in parts.items() if part is not None}
    if depth and isinstance(value, (list, tuple)):
        return [_plain(part, depth - 1) for part in cast("list[Any]", value)]
    if depth and isinstance(value, (set, frozenset)):
        return sorted(str(_plain(part, depth - 1)) for part in cast("set[Any]", value))
    return None


_SIMPLE = (bool, int, float, str, type(None))
_SAYS_NOTHING = {  # fields of a configuration that no hidden state follows from
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "id2label"),
    *("label2id", "use_cache", "output_hidden_states", "output_attentions", "return_dict", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    *("gradient_checkpointing", "tie_word_embeddings", "problem_type", "task_specific_params"),
}


def _config(config: Any) -> Any:
    """The fields of a configuration that a function follows from. The dtype is that of the tensors."""
    fields: Any = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    return _speaking(_plain(fields, 6))


def _speaking(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    items = cast("dict[str, Any]", fields).items()
    return {k: _speaking(v) for k, v in items if k not in _SAYS_NOTHING and "drop" not in k.replace("pdrop", "drop")}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
