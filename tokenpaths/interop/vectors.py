"""Steering vectors of other libraries, as `Additive` trails: h + c v.

from_vectors("vec_layer_13.pt", model, layers=13, tokens=Answer())      # CAA: one vector
from_vectors(steering_vector, model)                                    # an object of steering-vectors, or of repeng
from_vectors({3: v, 4: w}, model)                                       # tensors by layer
from_vectors("DiffMean_weight.pt", model, layers=20, concept=7, scale=max_act * factor)    # AxBench
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenpaths.checking import as_number, as_whole, kind
from tokenpaths.files import TrailFileError
from tokenpaths.interop.foreign import tensors_in
from tokenpaths.interop.gguf import from_gguf
from tokenpaths.site import Host, Site
from tokenpaths.site.site import Stream
from tokenpaths.tokens import All, Rule
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.steering import Additive

STREAMS: Mapping[str, Stream] = {"decoder_block": "block", "self_attn": "attention", "mlp": "mlp"}


@torch.no_grad()
def from_vectors(
    source: Any,
    model: nn.Module,
    *,
    layers: int | Sequence[int] | None = None,
    tokens: Rule = All(),
    stream: Stream = "block",
    concept: int | None = None,
    scale: float | None = None,
    blocks: str | None = None,
) -> TrailMap:
    """An `Additive` trail for each vector, v = scale * vector.

    Args:
        source: a file of tensors (`.pt`, `.bin`, `.npy`, `.safetensors`) or a control vector (`.gguf`); a dict from
            layers to vectors; an object of steering-vectors (with `layer_activations` and `layer_type`) or of repeng
            (with `directions`). Nothing is unpickled.
        model: the model that they are for.
        layers: the layers, counted from 0, where the source does not tell them: one for a vector, one a row for a
            matrix. An array of `hidden_states` has the embedding in row 0, and block l in row l + 1.
        tokens: where they act. CAA steers `Answer()`; steering-vectors' `min_token_index=k` is `All() - First(k)`.
        stream: where they act, unless the source tells.
        concept: the row of a matrix whose rows are concepts, as AxBench has them. `scale` must be given then, for what
            was added there is max_act * factor * v, and max_act is in another file.
        scale: the factor; 1 unless given.
        blocks: the name of the block list of a model that has several.

    Raises:
        FileNotFoundError: there is no such file.
        TrailFileError: a file is damaged, holds anything but tensors, or does not fit the model. Nothing is executed.
        TypeError: the source is of no known kind.
        ValueError: the layers are not told, or are not as many as the vectors; or a vector does not fit the model.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".gguf":
        found = from_gguf(cast("str", source), model, blocks=blocks)
        given: dict[int, Tensor] = {site.layer: cast(Additive, trail).v for site, trail in found.items()}
    else:
        given, stream = _given(source, layers, concept, stream)
    if concept is not None and scale is None:
        raise ValueError(
            "concept= picks a row of AxBench, which added max_act * factor * v: give scale=max_act * factor"
        )
    factor = 1.0 if scale is None else as_number("from_vectors: scale", scale)
    host = Host.of(model, blocks)
    made: dict[Site, Trail] = {}
    for layer, vector in given.items():
        site, place = host.locate(Site(layer, tokens, stream))
        if vector.shape != (place.width,) or not bool(vector.isfinite().all()):
            error = TrailFileError if isinstance(source, (str, os.PathLike)) else ValueError
            raise error(
                f"from_vectors: the vector of layer {layer} has shape {list(vector.shape)}, or numbers that are not "
                f"finite; the states of the model have width {place.width}"
            )
        trail = made[site] = Additive(place.width)
        trail.v.copy_(factor * vector.float())
    if not made:
        raise ValueError("from_vectors: the source holds no vectors")
    return TrailMap(made, blocks=blocks)


def _given(source: Any, layers: Any, concept: int | None, stream: Stream) -> tuple[dict[int, Tensor], Stream]:
    """The vectors by layer, and the stream that the source tells."""
    if isinstance(source, (str, os.PathLike)):
        tensors = tensors_in(cast("str", source))
        return _by_layer(tensors[""] if set(tensors) == {""} else tensors, layers, concept), stream
    if hasattr(source, "layer_activations"):
        told = str(getattr(source, "layer_type", "decoder_block"))
        if told not in STREAMS:
            raise ValueError(f"from_vectors: layer_type={told!r} has no stream here; there are {', '.join(STREAMS)}")
        return _by_layer(source.layer_activations, layers, concept), STREAMS[told]
    if hasattr(source, "directions"):
        return _by_layer(source.directions, layers, concept), stream
    return _by_layer(source, layers, concept), stream


def _by_layer(given: Any, layers: Any, concept: int | None) -> dict[int, Tensor]:
    if isinstance(given, Mapping):
        vectors = {name: torch.as_tensor(vector) for name, vector in cast("Mapping[Any, Any]", given).items()}
        if layers is None:
            return {_layer(name): vector for name, vector in vectors.items()}
        if len(vectors) > 1:
            raise ValueError(
                f"layers={layers!r:.80}, but the source tells its layers: {', '.join(map(str, vectors)):.120}"
            )
        given = next(iter(vectors.values()), torch.zeros(0))
    try:
        matrix = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"from_vectors: {kind(given)} is none of a file, a dict from layers to vectors, a tensor, or an object of "
            "steering-vectors or repeng"
        ) from None
    if concept is not None:
        row = as_whole("from_vectors: concept", concept, 0)
        if matrix.ndim != 2 or row >= len(matrix):
            raise ValueError(f"concept={concept}: the source has shape {list(matrix.shape)}, and no such row")
        matrix = matrix[row]
    if layers is None:
        raise ValueError(f"the source has shape {list(matrix.shape)} and does not tell its layers: give layers=")
    chosen = [layers] if isinstance(layers, int) else list(layers)
    rows = matrix[None] if matrix.ndim == 1 else matrix
    if rows.ndim != 2 or len(rows) != len(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={layers!r:.80}, one for each vector, does not fit shape {list(matrix.shape)}")
    return dict(zip(chosen, rows, strict=True))


def _layer(name: Any) -> int:
    """A layer by its number, or by a name with one number in it, such as "layer.12"."""
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    numbers = re.findall(r"\d+", str(name))
    if len(numbers) != 1:
        raise ValueError(f"from_vectors: {name!r:.80} tells no layer: give a dict from layers to vectors")
    return int(numbers[0])
