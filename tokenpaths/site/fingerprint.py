"""Which base a file was made for: a name, and a fingerprint that a change of dtype leaves alone.

    describe(model)      # {"name": "HuggingFaceTB/SmolLM2-135M", "fingerprint": "3b8f0895b51d34a7"}

It is for the warning that a file is of another base, and for nothing else: weights that differ by less than bfloat16
rounds, or some of which have changed places, may have one fingerprint. What is kept of what a model computes goes by
`identity.exact_key`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokenpaths.site.host import output_embedding, unwrapped
from tokenpaths.site.identity import base_modules, leaves, offloading, own_tensors
from tokenpaths.undo import tidy


def describe(model: nn.Module) -> dict[str, str]:
    """The name of a model, and the fingerprint of its weights."""
    inner = unwrapped(model)
    name = getattr(getattr(inner, "config", None), "name_or_path", "") or type(inner).__name__
    return {"name": str(name), "fingerprint": fingerprint(inner)}


@tidy
def fingerprint(model: nn.Module, without: Iterable[nn.Parameter] = ()) -> str:
    """A hash of a model's weights, by name, shape and value: the same in float32 as in bfloat16, offloaded or not.

    Of a weight it reads the sum of its bfloat16 bits and 64 of them in their order. Weights are the parameters, and the
    saved buffers of two dimensions or more, in which quantised layers keep theirs. Of a model on the meta device it
    reads names and shapes.

    Trails that lie among the model's modules are left out, as are the parameters `without`, and what PEFT has laid into
    the model while that is disabled: then it is that of the bare base. Weights that are sharded over processes
    (DTensor) are gathered, so all processes must call it.
    """
    digest = hashlib.sha256()
    left_out, hooks = {id(parameter) for parameter in without}, offloading(model)
    for name, local, module, tensor in _weights(model):
        if id(tensor) in left_out:
            continue
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for leaf in leaves(name, tensor, hooks.get(id(module), {}).get(local)):
            digest.update(_coarse(leaf.read()).encode())
    return digest.hexdigest()[:16]


def _weights(model: nn.Module) -> list[tuple[str, str, nn.Module, Tensor]]:
    """The weights by name, each once: its name in the base, its name in its module, that module, and itself."""
    seen: set[int] = set()
    found: list[tuple[str, str, nn.Module, Tensor]] = []
    for prefix, module in base_modules(model):
        saved = set(module._buffers) - module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        for local, tensor in own_tensors(module).items():
            is_weight = isinstance(tensor, nn.Parameter) or (local in saved and tensor.ndim > 1)
            if is_weight and id(tensor) not in seen and not _stands_for_the_embedding(model, module, tensor):
                seen.add(id(tensor))
                found.append((f"{prefix}.{local}".removeprefix("."), local, module, tensor))
    return sorted(found, key=lambda each: each[0])


def _stands_for_the_embedding(model: nn.Module, module: nn.Module, tensor: Tensor) -> bool:
    """Whether it is an offloaded output embedding that was the input embedding, and is another tensor only now."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and tensor.is_meta and module is output_embedding(model)


@torch.no_grad()
def _coarse(tensor: Tensor) -> str:
    """What a fingerprint reads of a tensor; nothing where there is nothing to read."""
    if tensor.is_meta:
        return ""
    flat = tensor.detach().flatten()
    if not flat.is_floating_point() and not isinstance(tensor, nn.Parameter):
        bits = flat.contiguous().view(torch.uint8)
    else:
        bits = flat.to(torch.bfloat16).view(torch.int16)
    sample = bits[:: max(1, len(bits) // 64)][:64]  # their order, which the sum does not see
    return f"{bits.sum(dtype=torch.int64)}{sample.tolist()}"
