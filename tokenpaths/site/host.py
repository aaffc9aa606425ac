"""A model, looked at once: its blocks, its output embedding, and the places of sites, found by structure."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

import torch
from torch import nn

from tokenpaths.checking import kind, quoted
from tokenpaths.site.site import Layers, Site, Stream
from tokenpaths.tokens import All, Rule


@dataclass(frozen=True)
class Place:
    """Where states go by: a module, a side of it, which columns of its last dimension (all if None), and how many."""

    module: nn.Module
    side: Literal["input", "output"]
    columns: slice | None = None
    width: int = 0


@dataclass(frozen=True, eq=False)
class Host:
    """A model, looked at once. What runs on the model holds its host and looks for nothing again.

    Args:
        model: the model as it was given, with its wrappers (PEFT, DDP, torch.compile).
        inner: the model inside the wrappers of DDP and torch.compile.
        blocks: the list of transformer blocks.
        path: the modules from `model` ("") down to the one that holds `blocks`, by their full names.
        head: the output embedding; None if the model has none.
        compiled: whether torch.compile has compiled a part of the model.
    """

    model: nn.Module
    inner: nn.Module
    blocks: nn.ModuleList
    path: Mapping[str, nn.Module]
    head: nn.Module | None
    compiled: bool

    @classmethod
    def of(cls, model: nn.Module, blocks: str | None = None) -> Host:
        """Look at a model, in one walk over its modules. `blocks` names the block list of a model that has several.

        Raises `ValueError` as `find_blocks` does.
        """
        check_model(model)
        modules = dict(model.named_modules())
        layers = _block_list(model, modules, blocks)
        parts = next(name for name, module in modules.items() if module is layers).split(".")
        path = {name: modules[name] for name in (".".join(parts[:depth]) for depth in range(len(parts)))}
        return cls(
            model=model,
            inner=unwrapped(model),
            blocks=layers,
            path=path,
            head=output_embedding(model),
            compiled=any(map(is_compiled_itself, modules.values())),
        )

    @property
    def device(self) -> torch.device:
        """The device that the model is given its tokens on: of its first parameter, or where accelerate brings that."""
        first = next(self.model.parameters()).device
        if first.type != "meta":
            return first
        hooks = [hook for module in self.model.modules() if (hook := vars(module).get("_hf_hook")) is not None]
        runs = [getattr(each, "execution_device", None) for hook in hooks for each in getattr(hook, "hooks", (hook,))]
        return torch.device(next((device for device in runs if device is not None), "cpu"))

    def locate(self, site: Site) -> tuple[Site, Place]:
        """The site with its layer counted from 0, and its place. Raises `ValueError` for a site that is not there."""
        found = replace(site, layer=_in_range(site.layer, len(self.blocks), site))
        block = self.blocks[found.layer]
        config = text_config(self.inner)
        dim = int(getattr(config, "hidden_size", 0))
        if not dim:
            raise ValueError(f"{found}: cannot tell the width of {_name(self.model)}: it has no config.hidden_size")
        several = max(getattr(config, name, None) or 1 for name in _RESIDUAL_STREAMS)
        if several > 1 and site.stream in ("embedding", "block"):
            raise ValueError(
                f"{found}: {_name(self.inner)} carries {several} residual streams side by side, so there is no one "
                'state of a token between its blocks: use stream "attention" or "mlp"'
            )
        if site.stream == "embedding":
            return found, Place(block, "input", None, dim)
        if site.stream == "block":
            return found, Place(block, "output", None, dim)
        if site.stream == "mlp":
            return found, Place(_mlp_output(block, dim, found), "output", None, dim)
        projection = _attention_projection(block, dim)
        if projection is None:
            raise ValueError(f"{found}: found no attention output projection in {_name(block)}, so use stream 'block'")
        if site.head is None:
            return found, Place(projection, "output", None, dim)
        entering = _features(projection)[0]
        size = _head_dim(block, config, entering)
        if not 0 <= site.head < entering // size:
            raise ValueError(f"{found}: head {site.head} is out of range; the layer has {entering // size} heads")
        return found, Place(projection, "input", slice(site.head * size, (site.head + 1) * size), size)

    def blocks_below(self, sites: Iterable[Site]) -> int:
        """The number of blocks, from the first, whose `forward` no trail at these sites can change; 0 without sites.

        A trail on a block's output acts after its `forward`; every other stream is inside the block, or enters it.
        """
        found = [(_in_range(site.layer, len(self.blocks), site), site.stream) for site in sites]
        return min((layer + (stream == "block") for layer, stream in found), default=0)


_RESIDUAL_STREAMS = ("altup_num_inputs", "hc_mult")  # Gemma 3n; hyper-connections, as of DeepSeek V4


def sites(
    model: nn.Module,
    layers: Layers = "all",
    tokens: Rule = All(),
    stream: Stream = "block",
    head: int | None = None,
    *,
    blocks: str | None = None,
) -> list[Site]:
    """One `Site` a layer, in order of depth: `sites(model, slice(15, None), Last(1))`.

    Args:
        model: a Hugging Face model.
        layers: a layer, a slice, a list of layers, or "all". A negative layer is counted from the last.
        tokens: the token rule of every site.
        stream: the stream of every site (see `tokenpaths.site`).
        head: one attention head, for the stream "attention".
        blocks: the name of the block list, in a model that has several.

    Raises:
        TypeError: `layers` is of another type.
        ValueError: a layer is out of range, or no layer is chosen.
    """
    count = len(find_blocks(model, blocks))
    if isinstance(layers, str) and layers == "all":
        layers = slice(None)
    try:
        if isinstance(layers, slice):
            chosen = list(range(count))[layers]
        else:
            chosen = [index(layer) for layer in ([layers] if isinstance(layers, int) else layers)]
    except TypeError:
        raise TypeError(f"layers is a layer, a slice, a list of layers or 'all', not {layers!r}") from None
    if not chosen:
        raise ValueError(f"layers={layers!r} holds none of the {count} layers")
    return sorted({Site(_in_range(layer, count), tokens, stream, head) for layer in chosen}, key=lambda s: s.layer)


def width(model: nn.Module, site: Site = Site(), *, blocks: str | None = None) -> int:
    """The dimension of the hidden states at a site: `LoReFT(width(model), rank=4)`.

    Raises `ValueError` for a site that the model does not have.
    """
    return Host.of(model, blocks).locate(site)[1].width


def find_blocks(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The list of transformer blocks: the one `ModuleList` with as many entries as the model has layers.

    `path` names it by hand (`"decoder.block"`). Any ending that is unique will do, so the name still holds inside a
    PEFT or DDP wrapper. Raises `ValueError` with the candidates when there is no single answer.
    """
    check_model(model)
    return _block_list(model, dict(model.named_modules()), path)


def check_model(model: object) -> None:
    """Raise `TypeError` for what is no model: its name, its class, a tokenizer, a pipeline."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, (str, os.PathLike)):
        instead = "load it first, AutoModelForCausalLM.from_pretrained(name)"
    elif isinstance(model, type):
        instead = "make or load one of it, as in from_pretrained(name)"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, or a Trainer
        instead = "give its .model"
    else:
        instead = "it comes first among the arguments"
    raise TypeError(f"a model is expected, a torch module, not {kind(model)} ({quoted(model)}): {instead}")


def vocabulary(model: nn.Module) -> int | None:
    """The number of tokens that the model has an embedding of; None for a model that does not tell."""
    try:
        found = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    count = getattr(found, "num_embeddings", None)
    return count if isinstance(count, int) else None


def _block_list(model: nn.Module, modules: Mapping[str, nn.Module], path: str | None) -> nn.ModuleList:
    lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)}
    if path is not None:
        if path in lists:
            return lists[path]
        named = {name: m for name, m in lists.items() if name.endswith("." + path)}
        if len(named) == 1:
            return next(iter(named.values()))
        raise ValueError(f"blocks={path!r} names {len(named)} block lists of {_name(model)}. {_candidates(lists)}")
    counts = _layer_counts(getattr(unwrapped(model), "config", None))
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    fitting = {n: m for n, m in outermost.items() if not counts or len(m) in counts}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise ValueError(
        f"cannot tell which modules are the blocks of {_name(model)}: {len(fitting)} module lists have as many entries "
        f"as its configuration has layers ({sorted(counts)}). {_candidates(fitting or lists)}"
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has compiled the model or a part of it. A compiled graph does not see hooks come and go."""
    return any(map(is_compiled_itself, model.modules()))


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether torch.compile has compiled this very module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of the last hidden states; None if the model has none."""
    return getattr(unwrapped(model), "get_output_embeddings", lambda: None)()


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part; None for a model that has no configuration."""
    return _text_part(getattr(unwrapped(model), "config", None))


def window(model: nn.Module) -> int | None:
    """The most tokens that a text may have; None for a model that counts no positions."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def two_sided(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as torch.compile's and DDP, which keep it as `_orig_mod` and `module`."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and (name == "_orig_mod" or not hasattr(model, "config")):
            return unwrapped(inner)
    return model


def forward_arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the forward of the model can be told, by name, inside its wrappers; PEFT hands all arguments on."""
    inner: Any = unwrapped(model)
    return inspect.signature((inner.get_base_model() if hasattr(inner, "get_base_model") else inner).forward).parameters


def _in_range(layer: int, count: int, site: Site | None = None) -> int:
    if not -count <= layer < count:
        where = f"{site}: " if site else ""
        raise ValueError(f"{where}layer {layer} is out of range; the model has {count} layers, 0 to {count - 1}")
    return layer % count


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear-like module, (0, 0) of any other; quantised and LoRA layers keep the names."""
    for first, second in (("in_features", "out_features"), ("nx", "nf")):
        features = getattr(module, first, None), getattr(module, second, None)
        if isinstance(features[0], int) and isinstance(features[1], int):
            return features[0], features[1]
    return 0, 0


def _linears(module: nn.Module, leave_out: tuple[nn.Module, ...] = ()) -> Iterator[nn.Module]:
    """Linear-like modules below `module`, in order of definition, not looking inside one: a LoRA layer holds others."""
    for child in module.children():
        if child in leave_out:
            continue
        if _features(child)[1]:
            yield child
        else:
            yield from _linears(child, leave_out)


def attentions(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a block, outermost first; self-attention is defined before cross-attention."""
    found: list[nn.Module] = []
    for child in block.children():
        if "attention" in type(child).__name__.lower():
            found.append(child)
        else:
            found.extend(attentions(child))
    return found


def _attention_projection(block: nn.Module, dim: int) -> nn.Module | None:
    """The output projection of self-attention: the last linear map defined in it that ends in the residual stream."""
    found = attentions(block)
    maps = [m for m in _linears(found[0]) if _features(m)[1] == dim] if found else []
    return maps[-1] if maps else None


def _mlp_output(block: nn.Module, dim: int, site: Site) -> nn.Module:
    """The last linear map outside attention that ends in the residual stream; a mixture of experts as a whole."""
    for child in block.children():
        if any(name.split(".")[-1] == "experts" for name, _ in child.named_modules()):
            return child
    found = tuple(attentions(block))
    maps = [m for m in _linears(block, found) if _features(m)[1] == dim]
    mixes_only = not found and sum(any(_linears(nn.ModuleList([child]))) for child in block.children()) < 2
    if not maps or mixes_only:  # the one part of a state-space block is its mixer
        raise ValueError(f"{site}: found no feed-forward projection of width {dim} in {_name(block)}")
    return maps[-1]


def _head_dim(block: nn.Module, config: Any, entering: int) -> int:
    for name in ("v_head_dim", "head_dim"):  # what enters the projection is made of values
        for holder in [m for a in attentions(block) for m in a.modules()] + [config]:
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0 and entering % size == 0:
                return size
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or entering % heads:
        raise ValueError(f"cannot tell the size of one attention head of {_name(block)}")
    return entering // heads


def _text_part(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_counts(config: Any) -> set[int]:
    """The numbers of layers that a configuration names, encoder and decoder."""
    names = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    counts = [getattr(c, name, None) for c in (config, _text_part(config)) for name in names]
    return {count for count in counts if isinstance(count, int)}


def _candidates(lists: dict[str, nn.ModuleList]) -> str:
    named = "; ".join(f"{name!r} ({len(m)} x {_name(m[0])})" for name, m in lists.items()) or "none"
    return f"Name the block list with blocks=..., one of: {named}"


def _name(module: nn.Module) -> str:
    return type(module).__name__
