"""Law 3 over the ways to generate: however a text is cut into forwards, the same tokens are moved."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, PAD, V5
from laws import NEW, PROMPTS, Case, assert_close, generated, padded, positions
from rules import RULES
from subjects import MOVING
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, pipeline

from tokenpaths import Match, Site, TrailMap, attach
from tokenpaths.tokens import leaves

ALL_RULES = pytest.mark.parametrize("rule", RULES)
FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])


def laid(family: str, rule: str = "last", trail: str = "LoReFT"):
    case = Case(family, FAMILIES[family].blocks, trail, rule, "block")
    model = case.model()
    return case, model, case.trails(model, MOVING[trail])


def same(one, other):
    assert one.sequences.equal(other.sequences)
    for a, b in zip(one.logits, other.logits, strict=True):
        assert_close(a, b)


def on(model, mask, cached=0):
    """Keyword arguments of a forward over the columns behind the cached ones."""
    return dict(attention_mask=mask, position_ids=positions(mask)[:, cached:])


@ALL_RULES
def test_assisted(rule):
    case, model, trails = laid("llama", rule)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():  # agrees with the model on some tokens only
            weight += 0.05 * torch.randn_like(weight)
    one = padded(PROMPTS[:1])
    with case.attach(model, trails, range(1)):
        same(generated(model, one, assistant_model=other), generated(model, one))


@pytest.mark.parametrize("options", [dict(assistant_model="itself"), dict(prompt_lookup_num_tokens=2)])
@pytest.mark.parametrize("rule", ["last", "answer & match"])
@FAMILY
def test_other_guesses(family, rule, options):
    case, model, trails = laid(family, rule)
    one = padded([PROMPTS[0] * 2])
    with case.attach(model, trails, range(1)):
        guessing = {name: model if value == "itself" else value for name, value in options.items()}
        guessing["eos_token_id"] = PAD  # never written; to look up without one is an error in transformers 4
        same(generated(model, one, **guessing), generated(model, one))


@ALL_RULES
def test_a_cached_start_of_the_prompt(rule):
    """The forward that fills the cache must know the whole prompt, for what is last in it."""
    case, model, trails = laid("gpt2", rule)
    inputs = padded(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    needs_ids = any(isinstance(leaf, Match) for leaf in leaves(RULES[rule]))
    with case.attach(model, trails), torch.no_grad():
        whole = generated(model, inputs)
        start = dict(input_ids=ids[:, :4], use_cache=True, **on(model, mask[:, :4]))
        if needs_ids:
            with pytest.raises(ValueError, match="needs the ids of all"):
                model(**start, prompt_mask=mask)
            return
        cache = model(**start, prompt_mask=mask).past_key_values
        same(generated(model, inputs, past_key_values=cache), whole)


@pytest.mark.parametrize("rule", ["all", "first", "tokens", "answer"])
@FAMILY
def test_a_cached_start_that_needs_no_hint(family, rule):
    case, model, trails = laid(family, rule)
    inputs = padded([PROMPTS[0]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with case.attach(model, trails, range(1)), torch.no_grad():
        whole = generated(model, inputs)
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        same(generated(model, inputs, past_key_values=copy.deepcopy(cache)), whole)
        if not V5:
            return
        rest = dict(input_ids=ids[:, 4:], attention_mask=mask)  # transformers 5 takes the new tokens alone, too
        only_new = generated(model, rest, past_key_values=cache)
        for one, other in zip(only_new.logits, whole.logits, strict=True):
            assert_close(one, other)


@ALL_RULES
def test_by_hand(rule):
    """Prefill, then one token at a time, two texts in turns: each cache knows its own prompt."""
    case, model, trails = laid("gpt2", rule)
    batches = [padded(PROMPTS), padded([row[::-1] for row in PROMPTS])]
    with case.attach(model, trails), torch.no_grad():
        expected = [generated(model, batch) for batch in batches]
        caches, masks = [None, None], [batch["attention_mask"] for batch in batches]
        news = [batch["input_ids"] for batch in batches]
        for step in range(NEW):
            for i in range(2):
                cached = masks[i].shape[1] - news[i].shape[1]
                output = model(
                    input_ids=news[i], past_key_values=caches[i], use_cache=True, **on(model, masks[i], cached)
                )
                caches[i] = output.past_key_values
                assert_close(output.logits[:, -1], expected[i].logits[step])
                news[i] = expected[i].sequences[:, batches[i]["input_ids"].shape[1] + step][:, None]
                masks[i] = torch.cat([masks[i], torch.ones(3, 1, dtype=torch.long)], 1)


@ALL_RULES
def test_a_prompt_in_chunks_by_hand(rule):
    """The first chunk tells of the whole prompt; the next ones need not."""
    case, model, trails = laid("llama", rule)
    ids = padded([PROMPTS[0]])["input_ids"]
    if any(isinstance(leaf, Match) for leaf in leaves(RULES[rule])):
        return  # cannot know the text of tokens to come
    with case.attach(model, trails, range(1)), torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = DynamicCache()
        hint = dict(prompt_mask=torch.ones_like(ids))
        for start, stop in ((0, 2), (2, 4), (4, 6)):
            output = model(ids[:, start:stop], past_key_values=cache, **hint)
            assert_close(output.logits, whole.logits[:, start:stop])
            hint = {}


def test_a_cropped_cache():
    """What follows the crop is answer, and what was cropped is forgotten, of answer and of prompt."""
    case, model, trails = laid("llama", "answer")
    ids, new = torch.tensor([PROMPTS[0]]), torch.tensor([[7]])
    with case.attach(model, trails, range(1)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        once = model(new, past_key_values=cache).logits
        model(torch.tensor([[8]]), past_key_values=cache)
        cache.crop(-2)
        assert_close(model(new, past_key_values=cache).logits, once)
        short = model(ids[:, :4], use_cache=True).past_key_values
        cache.crop(-3)
        expected = model(new, past_key_values=short, prompt_mask=torch.tensor([[1, 1, 1, 1, 0]])).logits
        assert_close(model(new, past_key_values=cache).logits, expected)


@ALL_RULES
def test_beams_and_samples(rule):
    """The order of beams changes from step to step: each must bring its own past along."""
    case, model, trails = laid("gpt2", rule)
    inputs = padded(PROMPTS)
    with case.attach(model, trails):
        for options in (dict(num_beams=4, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)):
            options |= dict(max_new_tokens=6)
            same(generated(model, inputs, **options), generated(model, inputs, **options, use_cache=False))


@pytest.mark.parametrize("rule", ["last", "answer", "match", "span"])
def test_a_foreign_cache(rule):
    case, model, trails = laid("llama", rule)
    ids = torch.tensor([PROMPTS[0]])
    cache = model(ids, use_cache=True).past_key_values
    with case.attach(model, trails, range(1)):
        with pytest.raises(ValueError, match="cache was not filled by this model.*give prompt_mask"):
            model(torch.tensor([[7]]), past_key_values=cache)
        prompt = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
        if rule == "answer":
            model(torch.tensor([[7]]), past_key_values=cache, prompt_mask=prompt)
        elif rule != "match":  # what it chooses is in the cache, which nobody has moved
            with pytest.warns(UserWarning, match="among the first 6, which come from a cache.*were not moved"):
                model(torch.tensor([[7]]), past_key_values=cache, prompt_mask=prompt)


def test_a_cache_outlives_its_attachment():
    case, model, trails = laid("llama", "answer")
    ids, new = torch.tensor([PROMPTS[0]]), torch.tensor([[7]])
    with case.attach(model, trails, range(1)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(new, past_key_values=copy.deepcopy(cache), prompt_mask=torch.tensor([[1] * 6 + [0]])).logits
    with case.attach(model, trails, range(1)), torch.no_grad():
        assert_close(model(new, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3, num_return_sequences=2), dict(use_cache=False)])
@FAMILY
def test_rows(family, options):
    """A row that is not named is the frozen model's; a different map for each row, in one batch."""
    case, model, trails = laid(family, "all")
    other = case.trails(model, MOVING["RED"])
    inputs = padded([PROMPTS[0]] * 3)
    each = options.get("num_return_sequences", 1)
    frozen = generated(model, inputs, **options).sequences
    with attach(model, trails):
        first = generated(model, inputs, **options).sequences
    with attach(model, other):
        second = generated(model, inputs, **options).sequences
    with attach(model, trails, rows=[0]), attach(model, other, rows=[2]):
        mixed = generated(model, inputs, **options).sequences
    assert not first[:each].equal(frozen[:each])
    assert mixed.equal(torch.cat([first[:each], frozen[each : 2 * each], second[2 * each :]]))


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(use_cache=False)])
def test_rows_of_an_encoder_decoder(options):
    model = FAMILIES["t5"].make()
    ids = torch.tensor([PROMPTS[0]] * 2)
    kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    frozen = model.generate(ids, **kw, **options)
    for blocks in ("encoder.block", "decoder.block"):
        trails = TrailMap({Site(layer): MOVING["RED"](32) for layer in range(3)}, blocks=blocks)
        with attach(model, trails):
            moved = model.generate(ids, **kw, **options)
        assert not moved.equal(frozen)
        with attach(model, trails, rows=[1]):
            assert model.generate(ids, **kw, **options).equal(torch.stack([frozen[0], moved[1]]))


def test_both_sides_of_an_encoder_decoder():
    model = FAMILIES["t5"].make()
    inputs = dict(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=torch.tensor([[PAD, 7, 9]]))
    maps = [TrailMap({Site(1): MOVING["RED"](32)}, blocks=f"{side}.block") for side in ("encoder", "decoder")]
    frozen = model(**inputs).logits
    with attach(model, maps[0]) as one, attach(model, maps[1]):
        both = model(**inputs).logits
        one.remove()
        decoder = model(**inputs).logits
    assert not torch.equal(both, decoder) and not torch.equal(decoder, frozen)
    assert torch.equal(model(**inputs).logits, frozen)


@FAMILY
def test_spans_of_a_forward_are_spans_of_attach(family):
    case, model, trails = laid(family, "span")
    inputs = case.batch(model=model)
    with case.attach(model, trails):
        expected = model(**inputs).logits
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 1:3] = mask[1, 2:4] = mask[2, 4] = True
    with attach(model, trails):
        assert torch.equal(model(**inputs, spans={"middle": mask}).logits, expected)


def test_a_pipeline():
    case, model, trails = laid("gpt2", "last")
    tokenizer = word_tokenizer()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    texts = ["w5 w47 w31", "w8 w9 w10 w11 w12"]
    frozen = writer(texts, **options)
    with attach(model, trails):
        moved = writer(texts, **options)
        ids = model.generate(torch.tensor([[5, 47, 31]]), max_new_tokens=6, do_sample=False)
    assert moved != frozen
    assert moved[0][0]["generated_text"].split() == tokenizer.decode(ids[0, 3:], skip_special_tokens=True).split()
    assert writer(texts, **options) == frozen


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("rule", ["last", "first", "answer", "prompt"])
def test_padding_without_a_mask(rule):
    """Without an attention mask transformers finds padding by its id, and so must the rules."""
    case, model, trails = laid("llama", rule)
    inputs = padded(PROMPTS)
    with attach(model, trails):
        same(generated(model, dict(input_ids=inputs["input_ids"])), generated(model, inputs))
        same(generated(model, dict(inputs=inputs["input_ids"]), use_cache=False), generated(model, inputs))


@pytest.mark.parametrize("rule", ["all", "last", "first", "answer", "span"])
def test_embeddings_instead_of_ids(rule):
    case, model, trails = laid("llama", rule)
    inputs = padded(PROMPTS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with case.attach(model, trails):
        by_ids = generated(model, inputs)
        by_embeds = generated(model, dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]))
    for one, other in zip(by_embeds.logits, by_ids.logits, strict=True):
        assert_close(one, other)


def test_from_nothing():
    case, model, trails = laid("llama", "answer")
    with attach(model, trails):
        cached, plain = generated(model, {}), generated(model, {}, use_cache=False)
        same(cached, plain)
        same(generated(model, dict(input_ids=torch.tensor([[1]]))), cached)


@pytest.mark.parametrize("rule", ["all", "first", "last", "answer"])
def test_guidance(rule):
    """Classifier-free guidance runs a second text, the last token and what follows, between two steps of the first."""
    case, model, trails = laid("llama", rule)
    ids = torch.tensor([PROMPTS[0]])
    with attach(model, trails), torch.no_grad():
        guided = generated(model, dict(input_ids=ids), guidance_scale=2.0, suppress_tokens=None, output_scores=True)
        prompt = torch.arange(guided.sequences.shape[1]) < ids.shape[1]
        one = model(guided.sequences, prompt_mask=prompt[None]).logits[:, 5:-1].log_softmax(-1)
        two = model(guided.sequences[:, 5:], prompt_mask=prompt[None, 5:]).logits[:, :-1].log_softmax(-1)
        assert_close(torch.stack(guided.scores, 1), two + 2.0 * (one - two))


def test_a_failed_generation_leaves_no_prompt_behind():
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("stop")

    case, model, trails = laid("llama", "last")
    ids = torch.tensor([PROMPTS[0]])
    with attach(model, trails):
        before = model(ids).logits
        with pytest.raises(KeyError):
            model.generate(
                torch.tensor([PROMPTS[1]]), max_new_tokens=2, logits_processor=LogitsProcessorList([Fails()])
            )
        assert torch.equal(model(ids).logits, before)


@FAMILY
def test_a_conversation(family):
    """A second turn over the first turn's cache = the whole conversation anew, for a rule that moves every token."""
    case, model, trails = laid(family, "all")
    with attach(model, trails):
        first = generated(model, dict(input_ids=torch.tensor([PROMPTS[0]])))
        text = torch.cat([first.sequences, torch.tensor([PROMPTS[1]])], 1)
        anew = generated(model, dict(input_ids=text))
        same(generated(model, dict(input_ids=text), past_key_values=first.past_key_values), anew)
