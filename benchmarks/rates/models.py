"""The demo's models, and copies of them whose residual stream is longer or shorter and whose function is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokenpaths.demo import GEMMA, demo_model, fast_dtype

NAMES = {"smollm2": None, "gemma": GEMMA}


def load(name: str, scale: float) -> tuple[Any, Any]:
    """A model with its residual stream scaled, and its tokenizer."""
    model, tokenizer = demo_model(NAMES[name], dtype=fast_dtype())
    return scaled(model, scale), tokenizer


@torch.no_grad()
def scaled(model: Any, scale: float) -> Any:
    """Every state of the residual stream becomes `scale` times what it was, and the logits stay: pre-norm models only.

    What is written to the stream is scaled: the embedding, and the last map of attention and of the feed-forward layer;
    in Gemma, whose blocks norm what they write, the weights (1 + w) of these norms. The norms that read the stream
    divide the scale out again, with an epsilon of scale^2 times theirs.
    """
    if scale == 1:
        return model
    if model.config.tie_word_embeddings:  # the head reads normed states, and stays as it is
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.clone())
    model.get_input_embeddings().weight.mul_(scale)
    reading: list[Any] = [model.model.norm]
    for block in model.model.layers:
        if hasattr(block, "post_feedforward_layernorm"):
            for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                # in float32: in bfloat16, scale * (1 + w) - 1 near -1 would lose w
                norm.weight = nn.Parameter(scale * (1 + norm.weight.float()) - 1)
            reading += [block.input_layernorm, block.pre_feedforward_layernorm]
        else:
            block.self_attn.o_proj.weight.mul_(scale)
            block.mlp.down_proj.weight.mul_(scale)
            reading += [block.input_layernorm, block.post_attention_layernorm]
    for norm in reading:
        epsilon = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, epsilon, getattr(norm, epsilon) * scale**2)
    return model
