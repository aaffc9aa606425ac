"""The one way to write: which settings of the model hold, and what counts as written already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import llama, make_tokenizer, make_trails, state

import tokenpaths as tp
from tokenpaths.data.items import Question
from tokenpaths.engine.generate import generate
from tokenpaths.training import sample_chains

TOKENIZER = make_tokenizer()
PROMPTS = [tp.Example(ids, (False,) * len(ids)) for ids in ((5, 6, 7, 8), (9, 10), (11, 12, 13))]


def model(**settings: Any) -> Any:
    made = llama(300)
    made.generation_config.eos_token_id = 2
    for name, value in settings.items():
        setattr(made.generation_config, name, value)
    return made


def moved() -> tp.TrailMap:
    trails = make_trails()
    with torch.no_grad():
        for parameter in trails.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return trails


def likeliest(made: Any, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """By definition: the likeliest token, one after another, without a cache."""
    written: list[int] = []
    while len(written) < count and 2 not in written:
        with torch.no_grad():
            written.append(int(made(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].argmax()))
    return tuple(written)


EVERY = list(range(3, 300))
ODD = [
    {},
    dict(repetition_penalty=5.0),
    dict(encoder_repetition_penalty=5.0),
    dict(no_repeat_ngram_size=1),
    dict(do_sample=True, temperature=9.0),
    dict(do_sample=True, top_k=2, top_p=0.1, min_p=0.9, typical_p=0.1, top_h=0.1, epsilon_cutoff=0.1, eta_cutoff=0.1),
    dict(bad_words_ids=[[5], [6], [7]]),
    dict(suppress_tokens=EVERY[:150], begin_suppress_tokens=EVERY[150:]),
    dict(sequence_bias=[[[i], 50.0] for i in (5, 6)]),
    dict(min_new_tokens=6, min_length=12),
    dict(forced_eos_token_id=9, forced_bos_token_id=9),
    dict(exponential_decay_length_penalty=(1, 9.0)),
    dict(num_beams=3, length_penalty=9.0, early_stopping=True),
    dict(num_return_sequences=2, num_beams=2),
    dict(guidance_scale=5.0),
    dict(penalty_alpha=0.9, dola_layers="high", prompt_lookup_num_tokens=2, token_healing=True),
    dict(max_length=1, max_new_tokens=1, max_time=0.0, stop_strings=["a"]),
    dict(return_dict_in_generate=True, output_scores=True, output_logits=True),
    dict(use_cache=False, cache_implementation="static", renormalize_logits=True, remove_invalid_values=True),
]


@pytest.mark.parametrize("settings", ODD, ids=lambda settings: ", ".join(settings) or "none")
def test_of_the_models_settings_only_the_end_of_text_holds(settings: dict[str, Any]) -> None:
    made = model(**settings)
    before = made.generation_config
    for prompt, one in zip(PROMPTS, generate(made, PROMPTS, TOKENIZER, max_new_tokens=6), strict=True):
        assert one.ids == likeliest(made, prompt.ids, 6)
        assert one.text == TOKENIZER.decode(list(one.ids), skip_special_tokens=True)
    assert made.generation_config is before
    assert all(getattr(before, name) == value for name, value in settings.items())


class Unread:
    """Settings of a model, of which nothing may be read but the end of text: so it is in versions to come."""

    eos_token_id = 2

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the model's own {name} was read")


def test_nothing_else_of_the_models_settings_is_even_read() -> None:
    plain, made = model(), model()
    made.generation_config = Unread()
    with pytest.raises(AssertionError, match="was read"):
        made.generate(torch.tensor([[5, 6]]), max_new_tokens=1)
    for how in (dict[str, Any](), dict[str, Any](sample=True, seed=0)):
        with tp.attach(made, moved()), tp.attach(plain, moved()):
            told = [generate(m, PROMPTS, TOKENIZER, max_new_tokens=4, **how) for m in (made, plain)]
        assert told[0] == told[1]
    assert isinstance(made.generation_config, Unread)


def test_all_verbs_keep_the_same_settings() -> None:
    plain, odd = model(), model(repetition_penalty=5.0, top_k=2, temperature=0.01, no_repeat_ngram_size=1, num_beams=2)
    for write in (
        lambda m: [e.ids for e in tp.self_samples(m, TOKENIZER, 6, openings=[[5, 6]], max_new_tokens=5)],
        lambda m: [
            chain.ids
            for attempts in sample_chains(
                m, [Question("ab", "x")], TOKENIZER, 6, read_answer=lambda text: "x", max_new_tokens=5
            ).questions
            for chain in attempts.right
        ],
    ):
        assert write(plain) == write(odd)


def test_an_answer_counts_as_written_to_every_rule() -> None:
    made, trails = model(), moved()
    with tp.attach(made, trails):
        whole = generate(made, PROMPTS, TOKENIZER, max_new_tokens=6)
        for begun in range(1, 4):
            contexts = [
                tp.Example((*p.ids, *w.ids[:begun]), (False,) * len(p) + (True,) * len(w.ids[:begun]))
                for p, w in zip(PROMPTS, whole, strict=True)
            ]
            rest = generate(made, contexts, TOKENIZER, max_new_tokens=6 - begun)
            assert [one.ids for one in rest] == [one.ids[begun:] for one in whole]
        other = generate(made, [tp.Example(c.ids, (False,) * len(c)) for c in contexts], TOKENIZER, max_new_tokens=3)
    assert [one.ids for one in other] != [one.ids for one in rest], "the trails do not tell a prompt from an answer"
    frozen = generate(made, PROMPTS, TOKENIZER, max_new_tokens=6)
    assert [one.ids for one in frozen] != [one.ids for one in whole]


@pytest.mark.parametrize("how", [dict(batch_size=1), dict(batch_size=3), dict(max_batch_tokens=20)], ids=str)
def test_batches_change_nothing(how: dict[str, int]) -> None:
    made, trails = model(), moved()
    with tp.attach(made, trails):
        one = generate(made, PROMPTS, TOKENIZER, max_new_tokens=5, batch_size=2)
        assert generate(made, PROMPTS, TOKENIZER, max_new_tokens=5, **how) == one


def test_a_stop_string_ends_text_and_ids() -> None:
    made = model()
    (whole,) = generate(made, PROMPTS[:1], TOKENIZER, max_new_tokens=8)
    stop = whole.text[2]
    (cut,) = generate(made, PROMPTS[:1], TOKENIZER, max_new_tokens=8, stop_strings=stop)
    assert cut.text == whole.text[: whole.text.index(stop) + 1]
    assert cut.ids == whole.ids[: len(cut.ids)] and stop not in TOKENIZER.decode(list(cut.ids[:-1]))


def always(token: int, **settings: Any) -> Any:
    """A model that writes one token again and again."""
    made = model(**settings)
    best = torch.nn.functional.one_hot(torch.tensor(token), 300).float()
    made.lm_head.register_forward_hook(lambda module, args, output: best.expand_as(output))
    return made


def test_a_stop_string_that_begins_in_the_prompt_ends_nothing() -> None:
    a, z = TOKENIZER("a")["input_ids"], TOKENIZER("z")["input_ids"]
    prompts = [tp.Example(tuple(z + last), (False, False)) for last in (a, z)]
    for one in generate(always(*a), prompts, TOKENIZER, max_new_tokens=5, stop_strings="aa"):
        assert (one.ids, one.text) == ((*a, *a), "aa")


def test_no_end_of_text_token_is_in_the_text() -> None:
    (a,) = TOKENIZER("a")["input_ids"]
    made = always(a, eos_token_id=a)  # which is no special token
    assert {(one.ids, one.text) for one in generate(made, PROMPTS, TOKENIZER, max_new_tokens=3)} == {((a,), "")}


def test_the_tokenizers_end_of_text_holds_beside_the_models() -> None:
    """It is what `encode` ends answers with."""
    end = TOKENIZER.eos_token_id
    (one,) = generate(always(end, eos_token_id=9), PROMPTS[:1], TOKENIZER, max_new_tokens=4)
    assert (one.ids, one.text) == ((end,), "")


def test_a_seed_leaves_torchs_random_state_alone_and_repeats() -> None:
    made = model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        generate(made, PROMPTS, TOKENIZER, max_new_tokens=6, sample=True, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other


def test_a_prompt_mask_of_another_shape_is_refused() -> None:
    made, trails = model(), moved()
    before = state(trails)
    ids = torch.tensor([[5, 6, 7]])
    with tp.attach(made, trails), pytest.raises(ValueError, match=r"prompt_mask has shape \[1, 2\].*\[1, 3\] tokens"):
        made.generate(ids, attention_mask=torch.ones_like(ids), prompt_mask=torch.ones(1, 2), max_new_tokens=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in trails.state_dict().items())
