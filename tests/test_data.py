"""Encoding and batching: no token across the border of prompt and answer, nothing cut unasked, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CHATML, make_tokenizer
from tokenizers import processors

from tokenpaths import Example, encode, encode_texts
from tokenpaths.data import Choice, Question, collate, encode_parts
from tokenpaths.data.tokenizing import around, tokenized
from tokenpaths.drift.texts import examples_of
from tokenpaths.engine.likelihood import encode_choices
from tokenpaths.lab.chains.answering import context
from tokenpaths.training.samples import _openings


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


def written(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode([i for i, a in zip(example.ids, example.answer, strict=True) if a])


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_no_token_crosses_the_border_of_prompt_and_answer(tokenizer: Any) -> None:
    (example,) = encode([("xa", "by")], tokenizer)
    assert tokenizer("xaby")["input_ids"] != list(example.ids[:-1])  # as one text it would merge "ab"
    assert example.ids[: example.prompt_length] == tuple(tokenizer("xa")["input_ids"])
    assert written(tokenizer, example) == "by</s>"
    assert example.prompt_length == 2


def test_a_question_is_its_prompt_and_its_chain_or_its_answer(tokenizer: Any) -> None:
    questions = [Question("xa", "by"), Question("xa", "y", chain="so by")]
    assert encode(questions, tokenizer) == encode([("xa", "by"), ("xa", "so by")], tokenizer)


def test_special_tokens_are_as_the_tokenizer_puts_them_on_a_prompt() -> None:
    tokenizer = make_tokenizer(bos=True)
    (example,) = encode([("x", "y")], tokenizer, eos=False)
    assert example.ids == (*tokenizer("x")["input_ids"], *tokenizer("y", add_special_tokens=False)["input_ids"])
    assert example.ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_is_the_template_and_every_assistant_turn_is_trained(tokenizer: Any) -> None:
    chat = say("hi", "ho", "ha", "he")
    (every,) = encode([chat], tokenizer)
    assert tokenizer.decode(every.ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert written(tokenizer, every) == "ho</s>he</s>"  # not the newline that the template puts after a turn
    (last,) = encode([chat], tokenizer, turns="last")
    assert written(tokenizer, last) == "he</s>"
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    assert list(last.ids[: last.prompt_length]) == prompt


def test_chats_of_smollm2_begin_as_generation_does(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    chat = say("What is 2 + 2?", "4", "And 3?", "7")
    for turns, trained, asked in (("all", "4<|im_end|>7<|im_end|>", 1), ("last", "7<|im_end|>", 3)):
        (example,) = encode([chat], tokenizer, turns=turns)  # type: ignore[arg-type]
        assert written(tokenizer, example) == trained
        prompt = tokenizer.apply_chat_template(chat[:asked], add_generation_prompt=True, return_dict=False)
        assert list(example.ids[: example.prompt_length]) == prompt


def test_text_behind_a_special_token_is_trained_and_white_space_behind_the_last_one_is_not() -> None:
    for ending, trained in (("<pad>!\n", "ho<pad>!\n"), ("<pad>\n", "ho<pad>"), ("\n", "ho\n")):
        tokenizer = make_tokenizer(template=CHATML.replace("</s>\n", ending))
        (example,) = encode([say("hi", "ho")], tokenizer)
        assert written(tokenizer, example) == trained


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_the_last_turn_is_enough() -> None:
    forgetful = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('#')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(template=forgetful)
    chat = say("hi", "think#ho", "ha", "think#he")
    with pytest.raises(ValueError, match=r"item 1: the chat template does not extend at message 3.*turns='last'"):
        encode([chat[:2], chat], tokenizer)
    (example,) = encode([chat], tokenizer, turns="last")
    assert written(tokenizer, example) == "think#he</s>"


def test_truncation_is_refused_by_name_or_cuts_the_prompt_only() -> None:
    tokenizer = make_tokenizer(bos=True)
    pairs = [("x", "y"), ("12345", "yz")]
    with pytest.raises(
        ValueError, match=r"item 1: 9 tokens \(6 of the prompt\) for a window of 6: .*truncation='left'"
    ):
        encode(pairs, tokenizer, max_length=6)
    short, cut = encode(pairs, tokenizer, max_length=6, truncation="left")
    assert tokenizer.decode(short.ids) == "<s>xy</s>"
    assert tokenizer.decode(cut.ids) == "<s>45yz</s>"
    assert written(tokenizer, cut) == "yz</s>"
    with pytest.raises(ValueError, match=r"item 1: .*the answer alone fills it, and an answer is never cut"):
        encode(pairs, tokenizer, max_length=4, truncation="left")


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "nothing to encode: the list of pairs is empty"),
        ([("x", "y"), ("", "y")], {}, "item 1: its prompt '' is empty"),
        ([("x", "")], {}, "item 0: its answer '' is empty"),
        ([[]], {}, "item 0: the chat is empty"),
        ([say("hi")], {}, "item 0: the chat has no message of role 'assistant'"),
        ([say("hi", "")], {}, "item 0: message 1, of the assistant, is empty"),
        ([say("", "ho")[1:]], {}, "item 0: the chat begins with the assistant"),
        ([say("hi", "ho", "ha")], {"turns": "last"}, "item 0: turns='last', but the chat ends with .* role 'user'"),
        (["xy"], {}, "item 0: neither a .prompt, answer. pair of strings nor a list of messages: 'xy'"),
        ([("x", 3)], {}, "item 0: neither"),
        ([("x", "y")], {"turns": "first"}, "turns must be 'all' or 'last'"),
        ([("x", "y")], {"truncation": "right"}, "truncation must be 'refuse' or 'left'"),
        ([("x", "y")], {"truncation": "left"}, "truncation='left' needs max_length="),
    ],
)
def test_bad_data_is_refused(
    tokenizer: Any, pairs: list[Any], options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(pairs, tokenizer, **options)


def test_a_missing_end_of_text_token_and_a_template_that_refuses_are_named(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token: pass eos=False"):
        encode([("x", "y")], tokenizer)
    assert len(encode([("x", "y")], tokenizer, eos=False)[0]) == 2
    strict = make_tokenizer(template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="item 0: the chat template refuses its first 1 messages: no system role"):
        encode([say("hi", "ho")], strict)


def test_an_example_is_a_prompt_and_its_answer() -> None:
    assert Example.of((1, 2), (3,), {"answer": (2, 3)}) == Example((1, 2, 3), (False, False, True), {"answer": (2, 3)})
    assert Example.of([4, 5]) == Example((4, 5), (False, False))


def test_an_example_must_be_whole() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Example((), ())
    with pytest.raises(ValueError, match="1 for 2 tokens"):
        Example((1, 2), (False,))
    with pytest.raises(ValueError, match="first token cannot be of the answer"):
        Example((1, 2), (True, True))
    with pytest.raises(ValueError, match=r"span 'steps' is \(1, 3\), outside the 2 tokens"):
        Example((1, 2), (False, True), {"steps": (1, 3)})


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_its_examples_whichever_side_is_padded(side: Any) -> None:
    examples = [
        Example((5, 6, 7, 8), (False, False, True, True), {"a": (1, 3)}),
        Example((9, 5), (False, True)),
        Example((1, 2, 3), (False, True, False)),  # a chat goes on after the answer
    ]
    batch = collate(examples, 0, side, spans=["b"])
    assert len(batch) == 3
    assert batch.to("cpu").input_ids.shape == (3, 4)
    assert sorted(batch.spans) == ["a", "b"]
    for row, example in enumerate(examples):
        real = batch.attention_mask[row].bool()
        assert real.sum() == len(example)
        assert bool(real[0 if side == "right" else -1])
        assert batch.input_ids[row][real].tolist() == list(example.ids)
        assert batch.labels[row][real].tolist() == [
            i if a else -100 for i, a in zip(example.ids, example.answer, strict=True)
        ]
        assert batch.prompt_mask[row][real].tolist() == [i < example.prompt_length for i in range(len(example))]
        assert batch.spans["a"][row][real].tolist() == [row == 0 and 1 <= i < 3 for i in range(len(example))]
        assert not torch.cat([batch.prompt_mask[row][~real], batch.spans["a"][row][~real]]).any()
        assert (batch.labels[row][~real] == -100).all()
    assert not batch.spans["b"].any()


def test_empty_batches_and_unknown_sides_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
    with pytest.raises(ValueError, match="side must be 'right' or 'left', not 'up'"):
        collate([Example((1,), (False,))], side="up")  # type: ignore[arg-type]


# What a tokenizer puts around a text; the special tokens that the text has itself are not put there again.
AROUND = {
    "nothing": "$A",
    "a beginning": "<s> $A",
    "an end": "$A </s>",
    "both": "<s> $A </s>",
    "two tokens before": "<pad> <s> $A",
    "one token at both ends, as OPT's": "</s> $A </s>",
}


def putting(form: str) -> Any:
    tokenizer = make_tokenizer()
    specials = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize("form", AROUND.values(), ids=AROUND)
def test_no_special_token_is_put_twice_around_a_text_that_has_it(form: str) -> None:
    tokenizer = putting(form)
    plain = tokenizer("xy")["input_ids"]
    before, after = (tokenizer.decode(ids) for ids in around(tokenizer))
    texts = ["xy", f"{before}xy", f"xy{after}", f"{before}xy{after}"]
    assert [list(e.ids) for e in encode_texts(texts, tokenizer)] == [plain] * 4
    twice = f"{before}{before}xy"  # what was written twice is kept
    assert tokenizer.decode(tokenized(tokenizer, twice)).count(before or "x") >= 1
    assert tokenized(tokenizer, "") == tokenizer("")["input_ids"]


@pytest.mark.parametrize("form", AROUND.values(), ids=AROUND)
def test_every_verb_reads_a_rendered_prompt_with_its_special_tokens_once(form: str) -> None:
    tokenizer = putting(form)
    before = tokenizer.decode(around(tokenizer)[0])
    rendered, text = f"{before}hi", "hi"
    for read in (
        lambda t: encode([(t, "y")], tokenizer)[0].ids,
        lambda t: encode_parts([(t, {"answer": "y"})], tokenizer)[0].ids,
        lambda t: encode_texts([t], tokenizer)[0].ids,
        lambda t: context(t, (), tokenizer).ids,
        lambda t: _openings(tokenizer, [t])[0],
        lambda t: encode_choices([Choice(("a", "y"), 0, t)], tokenizer)[0][0].ids,
        lambda t: encode_choices([Choice((f"{t} a", f"{t} y"), 0)], tokenizer)[0][0].ids,
        lambda t: examples_of([t], tokenizer, 256)[0].ids,
    ):
        assert read(rendered) == read(text)


def test_a_prompt_that_goes_on_has_no_end_of_text_token_and_an_answer_has_one() -> None:
    tokenizer = putting("<s> $A </s>")
    for answer in ("y", "y</s>"):
        (example,) = encode([("x", answer)], tokenizer)
        assert tokenizer.decode(example.ids) == "<s>xy</s>"
    (parts,) = encode_parts([("x", {"a": "y", "b": "z</s>"})], tokenizer)
    assert tokenizer.decode(parts.ids) == "<s>xyz</s>"
    assert tokenizer.decode(encode([("<s>x</s>", "y")], tokenizer, eos=False)[0].ids) == "<s>xy"


def test_an_answer_that_begins_as_a_text_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="item 0: its answer '<s>y' begins with the tokenizer's begin-of-text token"):
        encode([("x", "<s>y")], putting("<s> $A"))
    assert len(encode([("x", "<s>y")], putting("$A"))[0]) == 4  # where no text begins so, it is a token as any other


def test_cutting_a_prompt_keeps_what_the_tokenizer_puts_before_it() -> None:
    (cut,) = encode([("12345", "yz")], putting("<pad> <s> $A </s>"), max_length=7, truncation="left")
    assert putting("$A").decode(cut.ids) == "<pad><s>45yz</s>"
