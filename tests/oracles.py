"""Hand-written forward passes: what a model computes, one line an equation, with a place to edit every stream.

    logits = gpt2(model, ids, mask, edit)        # mask: batch x seq, 1 = real token, padding on either side
    logits = llama(model, ids, mask, edit)

They read the weights of the Hugging Face model and call none of its forwards, so a hook that sits in the wrong place,
or fires twice, cannot be wrong here in the same way. `edit(stream, layer, h) -> h'` is asked at:

    stream      layer   h                                                             shape
    embedding   0       the state entering block 0                                    batch seq dim
    head        l       what enters the output projection of attention, by heads      batch seq heads head_dim
    attention   l       the attention output, before it joins the residual stream     batch seq dim
    mlp         l       the MLP output, before it joins the residual stream           batch seq dim
    block       l       the residual stream after block l                             batch seq dim

Positions are counted from the mask, as `generate` counts them. Logits of padding tokens mean nothing: a left padding
token sees no key at all, and every attention implementation invents its own answer.

Two float32 roundings of transformers matter to a float64 Llama. Its RMSNorm rounds to float32, so two forwards that
differ by 1e-14 inside mostly give bit-equal logits, and an error below 1e-7 may not show in them: compare the states
of `block` for a finer test. Its eager attention rounds the softmax to float32, which the oracle does not: load the
model with `attn_implementation="sdpa"`.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Edit = Callable[[str, int, Tensor], Tensor]


def gpt2(
    model: nn.Module,
    ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"] | None = None,
    edit: Edit | None = None,
) -> Float[Tensor, "batch seq vocab"]:
    """GPT-2 (Radford et al. 2019): a = Attention(LN h), h += a, m = W gelu(V LN h), h += m; logits = LN(h) E^T."""
    config = model.config
    assert config.activation_function == "gelu_new"
    assert config.scale_attn_weights
    assert not config.scale_attn_by_inverse_layer_idx
    assert not model.training
    mask = torch.ones_like(ids) if mask is None else mask
    edit = edit or _leave
    heads = config.num_attention_heads
    body = model.transformer

    h = body.wte.weight[ids] + body.wpe.weight[positions(mask)]  # batch seq dim
    h = edit("embedding", 0, h)
    for layer, block in enumerate(body.h):
        x = layer_norm(h, block.ln_1)
        qkv = conv1d(x, block.attn.c_attn)  # batch seq 3*dim
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))  # batch seq heads head_dim
        z = edit("head", layer, attend(q, k, v, mask))  # batch seq heads head_dim
        a = edit("attention", layer, conv1d(z.flatten(-2), block.attn.c_proj))  # batch seq dim
        h = h + a

        u = conv1d(layer_norm(h, block.ln_2), block.mlp.c_fc)  # batch seq 4*dim
        m = edit("mlp", layer, conv1d(gelu(u), block.mlp.c_proj))  # batch seq dim
        h = edit("block", layer, h + m)
    return layer_norm(h, body.ln_f) @ model.lm_head.weight.T  # batch seq vocab


def llama(
    model: nn.Module,
    ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"] | None = None,
    edit: Edit | None = None,
) -> Float[Tensor, "batch seq vocab"]:
    """Llama (Touvron et al. 2023; Llama 2 for grouped queries): RMSNorm, rotary positions, SwiGLU, no biases needed.

    a = Attention(rope(q), rope(k), v) of RMS(h), h += a, m = D (silu(G x) * (U x)) of x = RMS(h), h += m.
    """
    config = model.config
    assert config.hidden_act == "silu"
    # transformers 4 has no rope_parameters
    rotary = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": config.rope_theta}
    assert rotary["rope_type"] == "default"
    assert not model.training
    mask = torch.ones_like(ids) if mask is None else mask
    edit = edit or _leave
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    body = model.model

    h = body.embed_tokens.weight[ids]  # batch seq dim
    h = edit("embedding", 0, h)
    for layer, block in enumerate(body.layers):
        x = rms_norm(h, block.input_layernorm, config.rms_norm_eps)
        q = linear(x, block.self_attn.q_proj).unflatten(-1, (heads, -1))  # batch seq heads head_dim
        k = linear(x, block.self_attn.k_proj).unflatten(-1, (kv_heads, -1))  # batch seq kv_heads head_dim
        v = linear(x, block.self_attn.v_proj).unflatten(-1, (kv_heads, -1))  # batch seq kv_heads head_dim
        q, k = (rope(part, positions(mask), rotary["rope_theta"]) for part in (q, k))
        k, v = (part.repeat_interleave(heads // kv_heads, dim=2) for part in (k, v))  # batch seq heads head_dim
        z = edit("head", layer, attend(q, k, v, mask))  # batch seq heads head_dim
        a = edit("attention", layer, linear(z.flatten(-2), block.self_attn.o_proj))  # batch seq dim
        h = h + a

        x = rms_norm(h, block.post_attention_layernorm, config.rms_norm_eps)
        gate, up = linear(x, block.mlp.gate_proj), linear(x, block.mlp.up_proj)  # batch seq inner, twice
        m = edit("mlp", layer, linear(gate * torch.sigmoid(gate) * up, block.mlp.down_proj))  # batch seq dim
        h = edit("block", layer, h + m)
    return rms_norm(h, body.norm, config.rms_norm_eps) @ model.lm_head.weight.T  # batch seq vocab


def positions(mask: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Index among the real tokens: cumsum(mask) - 1, and 0 in left padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def attend(
    q: Float[Tensor, "batch seq heads head_dim"],
    k: Float[Tensor, "batch seq heads head_dim"],
    v: Float[Tensor, "batch seq heads head_dim"],
    mask: Int[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over the real tokens not later than the query."""
    seq, head_dim = q.shape[1], q.shape[-1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    past = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()  # query key
    seen = past & mask.bool()[:, None, None, :]  # batch 1 query key
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)  # finite: a row that sees nothing is not NaN
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def rope(
    x: Float[Tensor, "batch seq heads head_dim"], position: Int[Tensor, "batch seq"], theta: float
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Turn the pair (x_i, x_{i + d/2}) by position * theta^(-2i/d) (Su et al. 2021, in Hugging Face's pairing).

    Angles, cosines and sines are float32 in transformers, whatever the model's dtype, and so they are here.
    """
    head_dim = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=x.device).float() / head_dim)  # head_dim/2
    angle = (position[..., None].float() * frequency)[:, :, None, :]  # batch seq 1 head_dim/2
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(h: Float[Tensor, "*shape dim"], norm: nn.Module, eps: float) -> Float[Tensor, "*shape dim"]:
    """w * h / sqrt(mean(h^2) + eps), the quotient in float32 as transformers has it, whatever the model's dtype."""
    x = h.float()
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def layer_norm(h: Float[Tensor, "*shape dim"], norm: nn.Module) -> Float[Tensor, "*shape dim"]:
    """w * (h - mean) / sqrt(var + eps) + b."""
    centred = h - h.mean(-1, keepdim=True)
    return norm.weight * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps) + norm.bias


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016), the one GPT-2 was trained with."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """x W^T + b, W stored out x in; b may be absent."""
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def conv1d(x: Tensor, layer: nn.Module) -> Tensor:
    """x W + b: GPT-2 stores W as in x out."""
    return x @ layer.weight + layer.bias


def _leave(stream: str, layer: int, h: Tensor) -> Tensor:
    """The edit that edits nothing."""
    return h
