"""Where a trail lies: a layer, a stream and a token rule, found by structure in any Hugging Face model.

A transformer block adds to the residual stream twice. The streams of a `Site` are::

    embedding   the residual stream as it enters the first block
    attention   what attention adds: the output of its output projection
                (with head=i: the state of one head, as it enters that projection)
    mlp         what the feed-forward part adds: the output of its last projection, or of a mixture of experts
    block       the residual stream as it leaves the block (the default)

Where a family puts a norm or a dropout between a projection and the residual stream, the site lies before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from tokenpaths.tokens import All, Rule

Stream: TypeAlias = Literal["embedding", "block", "attention", "mlp"]
Layers: TypeAlias = int | slice | Sequence[int] | Literal["all"]


@dataclass(frozen=True)
class Site:
    """One place to lay a trail. `layer` may be negative, counted from the last; `sites` makes many at once."""

    layer: int = 0
    tokens: Rule = All()
    stream: Stream = "block"
    head: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self}: layer is one whole number; for several use sites(model, {self.layer!r})")
        if not isinstance(self.tokens, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self}: tokens is a token rule such as Last(1) or All(), not {self.tokens!r}")
        if self.stream not in get_args(Stream):
            raise ValueError(f"{self}: unknown stream {self.stream!r}; the streams are {', '.join(get_args(Stream))}")
        if self.head is not None and (isinstance(self.head, bool) or not isinstance(self.head, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self}: head is the number of one attention head, or None")
        if self.head is not None and self.stream != "attention":
            raise ValueError(f"{self}: a head is part of stream 'attention', not of {self.stream!r}")
        if self.stream == "embedding" and self.layer != 0:
            raise ValueError(f"{self}: stream 'embedding' enters layer 0, so its layer is 0")


@dataclass(frozen=True)
class Place:
    """A site found in a model: the module, which side of it, and which columns of its last dimension (all if None)."""

    module: nn.Module
    side: Literal["input", "output"]
    columns: slice | None
    width: int


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

    Raises `ValueError` for a layer out of range and for a choice that holds no layer.
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


def find_blocks(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The list of transformer blocks, found as the one `ModuleList` with as many entries as the model has layers.

    `path` names it by hand (`"decoder.block"`; any ending that is unique will do, so it still holds inside a PEFT or
    DDP wrapper). Raises `ValueError` with the candidates when there is no single answer.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
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


def locate(model: nn.Module, site: Site, blocks: str | None = None) -> tuple[Site, Place]:
    """The site with its layer counted from 0, and its place in the model."""
    layers = find_blocks(model, blocks)
    layer = _in_range(site.layer, len(layers), site)
    found = Site(layer, site.tokens, site.stream, site.head)
    block = layers[layer]
    config = _text_config(getattr(unwrapped(model), "config", None))
    dim = int(getattr(config, "hidden_size", 0))
    if not dim:
        raise ValueError(f"{found}: cannot tell the width of {_name(model)}: it has no config.hidden_size")
    projection = _attention_projection(block, dim)
    if site.stream == "embedding":
        return found, Place(block, "input", None, dim)
    if site.stream == "block":
        return found, Place(block, "output", None, dim)
    if site.stream == "mlp":
        return found, Place(_mlp_output(block, dim, found), "output", None, dim)
    if projection is None:
        raise ValueError(f"{found}: found no attention output projection in {_name(block)}, so use stream 'block'")
    if site.head is None:
        return found, Place(projection, "output", None, dim)
    entering = _features(projection)[0]
    size = _head_dim(block, config, entering)
    if not 0 <= site.head < entering // size:
        raise ValueError(f"{found}: head {site.head} is out of range; the layer has {entering // size} heads")
    return found, Place(projection, "input", slice(site.head * size, (site.head + 1) * size), size)


def width(model: nn.Module, site: Site = Site(), *, blocks: str | None = None) -> int:
    """The dimension of the hidden states at a site: `LoReFT(width(model), rank=4)`."""
    return locate(model, site, blocks)[1].width


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as torch.compile's and DDP, which keep it as `_orig_mod` and `module`."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and (name == "_orig_mod" or not hasattr(model, "config")):
            return unwrapped(inner)
    return model


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


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_counts(config: Any) -> set[int]:
    """The numbers of layers that a configuration names, encoder and decoder."""
    names = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    counts = [getattr(c, name, None) for c in (config, _text_config(config)) for name in names]
    return {count for count in counts if isinstance(count, int)}


def _candidates(lists: dict[str, nn.ModuleList]) -> str:
    named = "; ".join(f"{name!r} ({len(m)} x {_name(m[0])})" for name, m in lists.items()) or "none"
    return f"Name the block list with blocks=..., one of: {named}"


def _name(module: nn.Module) -> str:
    return type(module).__name__
