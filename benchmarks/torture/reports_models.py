"""The tiny random models, trails and data that the reports are tried with."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import tokenpaths as tp

SMALL: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
)
IDS = torch.tensor([[17, 45, 8, 71, 33, 90, 26]])


def llama() -> Any:
    """Always the same, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.6)).eval()


def gemma_eyes() -> Any:
    """A Gemma 3 that sees images of four tokens; 90 stands for one of them."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = SiglipVisionConfig(**eyes, image_size=8, patch_size=4)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=90, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()


def moving(
    rule: tp.tokens.Rule, layer: int = 1, *, width: int = 32, stream: Any = "block", blocks: str | None = None
) -> tp.TrailMap:
    """A trail that moves states far, always the same way."""
    trails = tp.TrailMap({tp.Site(layer, rule, stream): tp.Additive(width)}, blocks=blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nn.init.normal_(next(iter(trails.parameters())), std=3)
    return trails


def examples() -> list[tp.Example]:
    return [tp.Example(tuple(range(5 + i, 11 + i)), (False,) * 4 + (True,) * 2) for i in range(4)]


def base(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def scores(model: Any, trails: tp.TrailMap, ids: Tensor = IDS) -> Tensor:
    with tp.attach(model, trails):
        return base(model, ids)


def generated(model: Any, ids: Tensor, count: int = 6, **options: Any) -> list[list[int]]:
    ends = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **ends, **options).tolist()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=tolerance, rtol=1e-4))


def train(model: Any, trails: tp.TrailMap, rows: list[Any], folder: str | None = None, learns: Any = None) -> None:
    """A few steps of a Trainer inside `trainable`, with a part of the model that learns beside the trails."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        folder or tempfile.mkdtemp(), max_steps=4, report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
        save_strategy="steps" if folder else "no", save_steps=4, dataloader_pin_memory=False,
    )  # fmt: skip
    with tp.trainable(model, trails):
        if learns is not None:
            learns.requires_grad_(True)
        Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()


def rendering_tokenizer() -> Any:
    """A tokenizer that begins a text with <s>, and whose chat template does so too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<s>", "</s>", "hi", "yo", "user", "bot", "assistant", "Wait"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    template = (
        "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %} assistant {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )
