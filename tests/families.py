"""Tiny random models, one line a family: every law is run over all of them.

Each model is seeded, float32, in eval mode, 3 layers of width 32 with 4 heads and 96 words, and made in milliseconds.
`initializer_range` is 0.6, or a random model this small says the same word everywhere. The booleans are facts about
transformers, measured on the frozen models, that a law must know before it blames tokenpaths.

A family that the installed transformers lacks is in MISSING, with the reason, and not in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers import PreTrainedModel

from tokenpaths.randomness import own_randomness

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision"]
V5 = int(transformers.__version__.split(".")[0]) >= 5
VOCAB, DIM, HEADS, LAYERS, PAD, BOS, EOS = 96, 32, 4, 3, 0, 1, 2


@dataclass(frozen=True)
class Family:
    name: str
    kind: Kind
    make: Callable[[], PreTrainedModel]
    blocks: str  # dotted path of the block list, from the model that `make` returns
    notes: str = ""
    # Facts about the frozen model, measured; on transformers 5.23 and 4.57.6.
    left_pad_needs_position_ids: bool = False  # in a plain forward; generate() makes them itself
    float64: bool = True  # `.double()` computes in float64 throughout; else use float32 and tolerance 1e-4
    static_cache: bool = True  # generate(cache_implementation="static") = generate(use_cache=False)
    chunked_static: bool = V5  # the same with prefill_chunk_size as well
    chunked_prefill: bool = V5  # generate(prefill_chunk_size=3), left-padded; wrong in every family before 5.0


KNOWN = frozenset(dir(transformers))  # a quarter of a second each time
FAMILIES: dict[str, Family] = {}
MISSING: dict[str, str] = {}
FACTS = {"notes", "left_pad_needs_position_ids", "float64", "static_cache", "chunked_static", "chunked_prefill"}

TOKENS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
LLAMA = dict(  # the names that most configs since Llama share
    **TOKENS,
    hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS // 2,
    max_position_embeddings=128,
    initializer_range=0.6,
    attention_dropout=0.0,
    tie_word_embeddings=False,
)
GPT2 = dict(  # the older names
    **TOKENS,
    n_embd=DIM,
    n_layer=LAYERS,
    n_head=HEADS,
    n_positions=128,
    initializer_range=0.6,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    tie_word_embeddings=False,
)
BERT = dict(
    **TOKENS,
    hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=128,
    initializer_range=0.6,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=DIM)


def build(architecture: str, seed: int, arguments: dict[str, Any]) -> PreTrainedModel:
    cls = getattr(transformers, architecture)
    with own_randomness(seed):
        model = cls(cls.config_class(**arguments)).eval()
    if "experts" in str(model) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return model


def family(
    name: str, kind: Kind, architecture: str, blocks: str, base: dict[str, Any], *, seed: int = 0, **changes: Any
) -> None:
    """Adds one family. A change to None takes an argument of `base` out; one named in FACTS is a field of Family."""
    if architecture not in KNOWN:
        MISSING[name] = f"transformers {transformers.__version__} has no {architecture}"
        return
    facts = {key: changes.pop(key) for key in FACTS & changes.keys()}
    arguments = {key: value for key, value in {**base, **changes}.items() if value is not None}
    FAMILIES[name] = Family(name, kind, lambda: build(architecture, seed, arguments), blocks, **facts)


def llama(name: str, architecture: str, blocks: str = "model.layers", **more: Any) -> None:
    family(name, "decoder", architecture, blocks, LLAMA, **more)


def gpt2(name: str, architecture: str, blocks: str = "transformer.h", **more: Any) -> None:
    family(name, "decoder", architecture, blocks, GPT2, **more)


GLOBAL_LAST = ["sliding_attention", "sliding_attention", "full_attention"]

llama("llama", "LlamaForCausalLM")
llama("mistral", "MistralForCausalLM", sliding_window=5, head_dim=8)
llama("qwen2", "Qwen2ForCausalLM")
llama("qwen3", "Qwen3ForCausalLM", head_dim=16, seed=2)
llama("gemma", "GemmaForCausalLM", head_dim=16)
llama("gemma2", "Gemma2ForCausalLM", head_dim=16, sliding_window=5, query_pre_attn_scalar=16, seed=8, float64=False)
llama(
    "gemma3",
    "Gemma3ForCausalLM",
    head_dim=16,
    sliding_window=5,
    query_pre_attn_scalar=16,
    layer_types=GLOBAL_LAST,
    seed=8,
)
llama("phi", "PhiForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0)
llama("phi3", "Phi3ForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0, sliding_window=5)
llama("stablelm", "StableLmForCausalLM", hidden_dropout=0.0)
llama("olmo", "OlmoForCausalLM")
llama("olmo2", "Olmo2ForCausalLM")
llama("olmo3", "Olmo3ForCausalLM", sliding_window=5, layer_types=GLOBAL_LAST)
llama("cohere", "CohereForCausalLM", logit_scale=0.5)
llama("cohere2", "Cohere2ForCausalLM", logit_scale=0.5, sliding_window=5, layer_types=GLOBAL_LAST)
llama("granite", "GraniteForCausalLM", embedding_multiplier=2.0, residual_multiplier=0.7, attention_multiplier=0.4)
llama("smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=2)
llama("glm", "GlmForCausalLM", head_dim=8)
llama("nemotron", "NemotronForCausalLM")
llama("starcoder2", "Starcoder2ForCausalLM", sliding_window=5, residual_dropout=0.0, embedding_dropout=0.0)
llama("ernie4_5", "Ernie4_5ForCausalLM", head_dim=8)
llama("helium", "HeliumForCausalLM", head_dim=8)
llama("exaone4", "Exaone4ForCausalLM", sliding_window=5, layer_types=GLOBAL_LAST)
llama("arcee", "ArceeForCausalLM")
llama("persimmon", "PersimmonForCausalLM", hidden_dropout=0.0, seed=5, chunked_static=False)
llama("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
llama("qwen2_moe", "Qwen2MoeForCausalLM", **MOE, shared_expert_intermediate_size=DIM)
llama("qwen3_moe", "Qwen3MoeForCausalLM", **MOE, head_dim=16)
llama("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2, static_cache=V5)
llama(
    "gpt_oss",
    "GptOssForCausalLM",
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
    sliding_window=5,
    layer_types=GLOBAL_LAST,
    notes="the mlp module returns a tuple",
)
llama(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    num_key_value_heads=HEADS,
    moe_intermediate_size=DIM,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=12,
    float64=V5,
)
gpt2("gpt2", "GPT2LMHeadModel", left_pad_needs_position_ids=True)
gpt2("gptj", "GPTJForCausalLM", rotary_dim=4, float64=False, notes="block returns a tuple")
gpt2("codegen", "CodeGenForCausalLM", rotary_dim=4, float64=False, notes="block returns a tuple")
gpt2("gpt_bigcode", "GPTBigCodeForCausalLM", left_pad_needs_position_ids=True)
family(
    "gpt_neo",
    "decoder",
    "GPTNeoForCausalLM",
    "transformer.h",
    TOKENS,
    hidden_size=DIM,
    num_layers=LAYERS,
    num_heads=HEADS,
    max_position_embeddings=128,
    attention_types=[[["global", "local", "global"], 1]],
    window_size=5,
    initializer_range=0.6,
    tie_word_embeddings=False,
    seed=7,
    left_pad_needs_position_ids=True,
    float64=False,
    static_cache=False,
    chunked_static=False,
    notes="block returns a tuple",
)
llama("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers", num_key_value_heads=None, hidden_dropout=0.0)
family(
    "opt",
    "decoder",
    "OPTForCausalLM",
    "model.decoder.layers",
    TOKENS,
    hidden_size=DIM,
    ffn_dim=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=128,
    word_embed_proj_dim=DIM,
    init_std=0.6,
    dropout=0.0,
    tie_word_embeddings=False,
    seed=2,
    notes="mlp.fc2 sees (tokens, dim): batch and time are flattened",
)
family(
    "opt_350m",
    "decoder",
    "OPTForCausalLM",
    "model.decoder.layers",
    TOKENS,
    hidden_size=DIM,
    ffn_dim=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=128,
    word_embed_proj_dim=DIM // 2,
    do_layer_norm_before=False,
    init_std=0.2,
    dropout=0.0,
    tie_word_embeddings=False,
    seed=9,
)
family(
    "bloom",
    "decoder",
    "BloomForCausalLM",
    "transformer.h",
    TOKENS,
    hidden_size=DIM,
    n_layer=LAYERS,
    n_head=HEADS,
    initializer_range=0.6,
    tie_word_embeddings=False,
    seed=11,
    float64=False,
    notes="block returns a tuple; static cache keeps a 2-D mask, longer than the row",
)
FALCON = dict(
    TOKENS,
    hidden_size=DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    initializer_range=0.6,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
family(
    "falcon",
    "decoder",
    "FalconForCausalLM",
    "transformer.h",
    FALCON,
    chunked_static=False,
    notes="block returns a tuple",
)
family(
    "falcon_40b",
    "decoder",
    "FalconForCausalLM",
    "transformer.h",
    FALCON,
    new_decoder_architecture=True,
    num_kv_heads=2,
    seed=3,
)
family(
    "falcon_rw",
    "decoder",
    "FalconForCausalLM",
    "transformer.h",
    FALCON,
    parallel_attn=False,
    multi_query=False,
    alibi=True,
    bias=True,
    seed=7,
    static_cache=False,
    chunked_static=False,
)
family(
    "mpt",
    "decoder",
    "MptForCausalLM",
    "transformer.blocks",
    TOKENS,
    d_model=DIM,
    n_heads=HEADS,
    n_layers=LAYERS,
    max_seq_len=128,
    initializer_range=0.6,
    use_cache=True,
    tie_word_embeddings=False,
    seed=3,
    float64=False,
    static_cache=V5,
    notes="block returns a tuple",
)
family(
    "biogpt",
    "decoder",
    "BioGptForCausalLM",
    "biogpt.layers",
    BERT,
    tie_word_embeddings=False,
    seed=9,
    left_pad_needs_position_ids=True,
)
family(
    "xglm",
    "decoder",
    "XGLMForCausalLM",
    "model.layers",
    TOKENS,
    d_model=DIM,
    ffn_dim=2 * DIM,
    num_layers=LAYERS,
    attention_heads=HEADS,
    dropout=0.0,
    attention_dropout=0.0,
    init_std=0.6,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    left_pad_needs_position_ids=True,
    float64=False,
    static_cache=V5,
)
if not V5:
    del FAMILIES["xglm"]
    MISSING["xglm"] = "XGLM of transformers 4 adds to the position_ids that it is given, so no forward can be repeated"

family("bert", "encoder", "BertForMaskedLM", "bert.encoder.layer", BERT)
family("roberta", "encoder", "RobertaForMaskedLM", "roberta.encoder.layer", BERT)
family(
    "modernbert",
    "encoder",
    "ModernBertForMaskedLM",
    "model.layers",
    BERT,
    local_attention=8,
    cls_token_id=BOS,
    sep_token_id=EOS,
    global_attn_every_n_layers=2,
)
family(
    "t5",
    "encoder-decoder",
    "T5ForConditionalGeneration",
    "decoder.block",
    TOKENS,
    d_model=DIM,
    d_kv=8,
    d_ff=2 * DIM,
    num_layers=LAYERS,
    num_heads=HEADS,
    dropout_rate=0.0,
    decoder_start_token_id=PAD,
    initializer_factor=1.0,
    tie_word_embeddings=False,
)
family(
    "vit",
    "vision",
    "ViTForImageClassification",
    "vit.layers" if V5 else "vit.encoder.layer",
    BERT,
    vocab_size=None,
    image_size=16,
    patch_size=4,
    num_channels=3,
    num_labels=5,
)

DECODERS = {name: f for name, f in FAMILIES.items() if f.kind == "decoder"}
ENCODERS = {name: f for name, f in FAMILIES.items() if f.kind == "encoder"}
