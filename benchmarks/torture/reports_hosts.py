"""Reports about hosts and their ways to write: vision, shared keys and values, batching, caches, merges, budgets."""

from __future__ import annotations

import copy
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.torture.reports_models import (
    IDS,
    SMALL,
    close,
    examples,
    gemma_eyes,
    generated,
    llama,
    moving,
    rendering_tokenizer,
    scores,
)


def vision_without_a_prompt_mask() -> bool:
    model = gemma_eyes()
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7, 8]])
    told = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 8, 8))
    told["token_type_ids"] = (ids == 90).long()
    trails = moving(tp.Last(1), blocks="language_model.layers")
    with torch.no_grad(), tp.attach(model, trails):
        implied = model(**told).logits
        said = model(**told, prompt_mask=torch.ones_like(ids, dtype=torch.bool)).logits
    return close(implied, said) and not close(implied, model(**told).logits)


def vision_generates() -> bool:
    model = gemma_eyes()
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7, 8]])
    told = dict(attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 8, 8), do_sample=False)
    trails = moving(tp.Last(1) | tp.Answer(), blocks="language_model.layers")
    with tp.attach(model, trails):
        cached, whole = (
            model.generate(ids, **told, max_new_tokens=4, min_new_tokens=4, use_cache=cache) for cache in (True, False)
        )
    return torch.equal(cached, whole)


def shared_keys_and_values() -> bool:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    sizes = dict(num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, **sizes, vocab_size_per_layer_input=96, num_kv_shared_layers=2,
        layer_types=kinds, sliding_window=5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config).eval()
    return all(_generates_as_uncached(model, moving(tp.Last(1) | tp.Answer(), layer)) for layer in (1, 2, 3))


def _generates_as_uncached(model: Any, trails: tp.TrailMap) -> bool:
    with tp.attach(model, trails):
        return generated(model, IDS) == generated(model, IDS, use_cache=False)


def four_dimensional_states() -> bool:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 4, "intermediate_size": [64] * 4}, num_key_value_heads=2, head_dim=8,
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config).eval()
    with tp.attach(model, moving(tp.Last(1))):  # at attach, and not in the first forward
        return False


def hidden_states_and_drift() -> bool:
    model, trails = llama(), moving(tp.Last(1))
    with torch.no_grad(), tp.attach(model, trails):
        states = model(IDS, output_hidden_states=True).hidden_states
    plain = model(IDS, output_hidden_states=True).hidden_states
    return not close(states[2][:, -1], plain[2][:, -1]) and tp.measure_drift(model, trails, examples())["kl"].mean > 0


def states_while_writing() -> bool:
    model, trails = llama(), moving(tp.Answer())
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, output_hidden_states=True)
    with tp.attach(model, trails):
        told = model.generate(IDS, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True, **options)
        whole = model(told.sequences, prompt_mask=torch.arange(told.sequences.shape[1])[None] < IDS.shape[1])
        states = model(
            told.sequences, prompt_mask=torch.arange(told.sequences.shape[1])[None] < IDS.shape[1],
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    return whole is not None and close(told.hidden_states[1][2][:, -1], states[2][:, IDS.shape[1]])


def preference_loss() -> bool:
    """DPO at its first step: where the reference is the model as it is, the loss is log 2."""
    model, trails = llama(), tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    with torch.no_grad(), tp.attach(model, trails):
        steered = model(IDS).logits.log_softmax(-1)
        with trails.off():
            frozen = model(IDS).logits.log_softmax(-1)
    margin = (steered - frozen).sum()
    return abs(float(torch.nn.functional.softplus(-margin)) - 0.693147) < 1e-4


def continuous_batching() -> bool:
    from transformers import GenerationConfig

    model, trails = llama(), moving(tp.All())
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with tp.attach(model, trails):
        told = model.generate_batch([[5, 6, 7, 8], [9, 10, 11]], generation_config=config, progress_bar=False)
        found = [told[key].generated_tokens for key in told]
        return found == [generated(model, torch.tensor([p]), 4)[0][-4:] for p in ([5, 6, 7, 8], [9, 10, 11])]


def shared_layers() -> bool:
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = dict(embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    tp.attach(AlbertForMaskedLM(AlbertConfig(vocab_size=96, **sizes)).eval(), moving(tp.All()))
    return False


def encoder_and_decoder() -> bool:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sides = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None)
    widths = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.6)
    model = BartForConditionalGeneration(BartConfig(vocab_size=96, **sides, **widths, **ends)).eval()
    trails = moving(tp.Answer(), blocks="decoder.layers")
    return _generates_as_uncached(model, trails)


def rendered_prompt() -> bool:
    tokenizer = rendering_tokenizer()
    asked = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    found = [tp.encode([(text, " yo")], tokenizer)[0].ids, tp.encode_texts([text], tokenizer)[0].ids]
    return all(ids.count(tokenizer.bos_token_id) == 1 for ids in found)


def forgetful_template() -> bool:
    tokenizer = rendering_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}"
    )
    said = [("user", "hi"), ("assistant", "yo"), ("user", "hi"), ("assistant", "yo")]
    chat = [{"role": role, "content": content} for role, content in said]
    last = tp.encode([chat], tokenizer, turns="last")
    tp.encode([chat], tokenizer)  # refused
    return not last


def behind_a_frozen_cache() -> bool:
    from transformers import DynamicCache

    model = llama()
    options = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=1, do_sample=False)
    for rule in (tp.Last(1), tp.First(2), tp.All()):
        filled = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS[:, :4], past_key_values=filled)
        with tp.attach(model, moving(rule)):
            told = [
                model.generate(IDS, **options, **more, return_dict_in_generate=True, output_logits=True).logits[0]
                for more in ({}, {"past_key_values": filled})
            ]
        if not close(*told):
            return False
    return True


def second_turn_on_a_kept_cache() -> bool:
    model, trails = llama(), moving(tp.Last(1))
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    with tp.attach(model, trails):
        first = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
        asked = torch.cat([first.sequences, torch.tensor([[9, 8]])], 1)
        given = torch.ones_like(asked)
        kept = model.generate(asked, attention_mask=given, past_key_values=first.past_key_values, **options)
        # inherent: what was moved in the first turn stays moved in the cache
        return kept.sequences.shape[1] == asked.shape[1] + 3


def thinking_budget() -> bool:
    from tokenpaths.lab.reasoning import BudgetForcing

    model, tokenizer = llama(), rendering_tokenizer()
    budget = BudgetForcing(tokenizer, IDS, end="bot", answer=" yo", max_tokens=4)
    with tp.attach(model, moving(tp.Last(1))):
        told = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), logits_processor=[budget], max_new_tokens=10, do_sample=False
        )
    return all(row.tokens <= 4 for row in budget.counts(told))


def trails_keep_their_dtype() -> bool:
    model, trails = llama(), tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    with tp.trainable(model, trails):
        model.to(torch.bfloat16)  # what a Trainer's bf16_full_eval does before it evaluates
    return {p.dtype for p in trails.parameters()} == {torch.float32}


def one_token_of_ragged_rows() -> bool:
    model, moved = llama(), list[int]()
    trails = moving(tp.Last(1))
    trails.trails[0].register_forward_hook(lambda trail, args, out: moved.append(args[0].numel() // 32))
    ids = torch.cat([IDS, IDS])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with torch.no_grad(), tp.attach(model, trails):
        model(ids, attention_mask=mask)
    return sum(moved) == 2


def merged_while_attached() -> bool:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(llama(), config)
    for stream in ("block", "mlp", "attention"):
        mine, trails = copy.deepcopy(wrapped), moving(tp.All(), stream=stream)
        handle = tp.attach(mine, trails)
        try:
            with torch.no_grad():
                before = mine(IDS).logits
                merged = mine.merge_and_unload()
                if not close(merged(IDS).logits, before, 1e-3):
                    return False
        finally:
            handle.remove()
    return True


def a_reward_head_runs() -> bool:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1))
    trails = tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    with tp.trainable(model, trails):
        chosen, rejected = (model(ids, attention_mask=torch.ones_like(ids)).logits for ids in (IDS, IDS.flip(1)))
        torch.nn.functional.softplus(rejected - chosen).mean().backward()
    return all(p.grad is not None for p in trails.parameters())


def drift_without_a_cone() -> bool:
    model, trails = llama(), moving(tp.All())
    found = [tp.measure_drift(model, trails, examples(), **more)["kl"].mean for more in ({}, {"cone": False})]
    return found[0] == found[1]


def guidance_and_lookup() -> bool:
    model, trails = llama(), moving(tp.Last(1) | tp.Answer())
    guided: dict[str, Any] = {"guidance_scale": 1.5}
    for more, like in ((guided, {**guided, "use_cache": False}), ({"prompt_lookup_num_tokens": 2}, {})):
        with tp.attach(model, trails):
            if generated(model, IDS, **more) != generated(model, IDS, **like):
                return False
    clone = copy.deepcopy(model)
    return close(scores(clone, trails), scores(model, trails))


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    common = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, pad_token_id=0)
    return MambaForCausalLM(MambaConfig(**common, state_size=8)).eval()


def _mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, n_groups=1)
    return Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, chunk_size=4, pad_token_id=0)).eval()


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def _rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, context_length=64)).eval()


FAMILIES = {"llama": llama, "gpt2": _gpt2, "mamba": _mamba, "mamba2": _mamba2, "rwkv": _rwkv}
