"""A tiny Llama with its tokenizer, examples and trails: what the tests of training train. Quick to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from tokenpaths import Answer, Example, First, Last, LoReFT, Objective, Site, TrailMap, attach
from tokenpaths.data import collate
from tokenpaths.randomness import own_randomness
from tokenpaths.trails import RED

DIM, VOCAB, WINDOW = 32, 96, 128
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama(vocab_size: int = VOCAB) -> Any:
    """Always the same random weights, large enough for a frozen head to learn by; in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with own_randomness(0):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=DIM,
                intermediate_size=2 * DIM,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=WINDOW,
                initializer_range=0.6,
                tie_word_embeddings=False,
                pad_token_id=0,
            )
        ).eval()


def make_tokenizer(*, bos: bool = False, template: str = CHATML) -> Any:
    """One token a character, but "ab" is merged into one: what must not happen across a border."""
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", *sorted(set(pre_tokenizers.ByteLevel.alphabet()))]
    vocabulary = {token: i for i, token in enumerate([*letters, "ab"])}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds the token types of BERT
    )


def make_examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Prompts of 2 to 7 tokens, answers of 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    examples: list[Example] = []
    for i in range(count):
        prompt, answer = 2 + i % 6, 1 + i % 3
        ids = torch.randint(3, VOCAB, (prompt + answer,), generator=generator).tolist()
        examples.append(Example(tuple(ids), (False,) * prompt + (True,) * answer))
    return examples


def make_trails(dropout: float = 0.0) -> TrailMap:
    """Always the same: two streams, three layers, rules that count from both ends of the prompt."""
    with own_randomness(1):
        return TrailMap(
            {
                Site(0, Last(1)): LoReFT(DIM, rank=2, dropout=dropout),
                Site(1, First(2) | Last(1)): LoReFT(DIM, rank=2),
                Site(2, Answer(), "mlp"): RED(DIM),
            }
        )


def state(trails: TrailMap) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trails.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def assert_slopes(model: nn.Module, trails: TrailMap, goal: Objective, examples: Sequence[Example]) -> None:
    """The gradient of a goal against central differences, in float64, along a random way in each parameter."""
    batch = collate(examples)
    with attach(model, trails):
        goal.loss(model, trails, batch).backward()
        for parameter in trails.parameters():
            assert parameter.grad is not None
            way, size = torch.randn_like(parameter), 1e-3
            values: list[float] = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * size * way
                    values.append(float(goal.loss(model, trails, batch)))
                    parameter -= sign * size * way
            slope = (values[0] - values[1]) / (2 * size)
            assert slope == pytest.approx(float((parameter.grad * way).sum()), rel=2e-2, abs=1e-4)
