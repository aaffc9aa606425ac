"""Token rules against a slow reference written from their docstrings; the pieces of text that Match reads."""

from __future__ import annotations

import re
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenpaths import All, Answer, AnswerFirst, First, Last, Match, Prompt, Span, Tokens, demo, matching, tokens
from tokenpaths.tokens import Both, Context, Either, Not, Rule, Without, leaves, token_pieces

# Id i is this text; the two halves of a two-byte character have no text of their own, and the character is the last's.
WORDS = [b"a", b"b", b" ", b"1", b"22", b"ab", b"\n", b"a1 ", b"\xc3", b"\xa9", "é!".encode(), b""]


class ByteTokenizer:
    """Decodes as byte-level tokenizers do: bytes that are no character become U+FFFD."""

    def decode(self, ids: tuple[int, ...], **_: bool) -> str:
        return b"".join(WORDS[i] for i in ids).decode(errors="replace")


class StrippingTokenizer(ByteTokenizer):
    """As those of Llama 2, which drop a space at the beginning of what they decode."""

    def decode(self, ids: tuple[int, ...], **_: bool) -> str:
        return super().decode(ids).removeprefix(" ")


PIECES = token_pieces(ByteTokenizer())

# ----------------------------------------------------------------------------- the reference


Row = tuple[list[int], list[int], dict[str, tuple[int, int]]]  # prompt ids, answer ids, spans


def reference(rule: Rule, row: Row) -> list[bool]:
    """Which tokens of a row, without padding, a rule chooses."""
    prompt, answer, spans = row
    ids, places = prompt + answer, range(len(prompt + answer))
    match rule:
        case All():
            return [True for _ in places]
        case Prompt():
            return [i < len(prompt) for i in places]
        case AnswerFirst(n):
            return [len(prompt) <= i < len(prompt) + n for i in places]
        case Answer():
            return [i >= len(prompt) for i in places]
        case First(n):
            return [i < len(prompt) and i < n for i in places]
        case Last(n):
            return [i < len(prompt) and len(prompt) - i <= n for i in places]
        case Tokens(chosen):
            return [token in chosen for token in ids]
        case Span(name):
            start, stop = spans[name]
            return [start <= i < stop for i in places]
        case Match(pattern):
            return [matched(pattern, ids, i, max(i + 1, len(prompt))) for i in places]
        case Either(left, right):
            return [a or b for a, b in zip(reference(left, row), reference(right, row), strict=True)]
        case Both(left, right):
            return [a and b for a, b in zip(reference(left, row), reference(right, row), strict=True)]
        case Without(left, right):
            return [a and not b for a, b in zip(reference(left, row), reference(right, row), strict=True)]
        case Not(inner):
            return [not a for a in reference(inner, row)]
        case _:
            raise AssertionError(rule)


def matched(pattern: str, ids: list[int], i: int, known: int) -> bool:
    """Whether a character of token `i` lies in a match of the text of the first `known` tokens."""
    text, owners, waiting = "", [], b""
    for token, word in enumerate(WORDS[j] for j in ids[:known]):
        waiting += word
        decoded = waiting.decode(errors="replace")
        if not decoded.endswith("\ufffd"):
            text, waiting = text + decoded, b""
            owners += [token] * len(decoded)
    return any(i in owners[m.start() : m.end()] for m in re.finditer(pattern, text))


def laid_out(rows: list[Row], side: str, gap: int = 0) -> Context:
    """Rows as one batch, padded on a side with `gap` columns more than needed."""
    total = max(len(prompt) + len(answer) for prompt, answer, _ in rows) + gap
    real, given, ids = (torch.zeros(len(rows), total, dtype=d) for d in (torch.bool, torch.bool, torch.int64))
    spans = {name: torch.zeros(len(rows), total, dtype=torch.bool) for name in ("s", "t")}
    for i, (prompt, answer, named) in enumerate(rows):
        length = len(prompt) + len(answer)
        start = total - length if side == "left" else 0
        real[i, start : start + length] = True
        given[i, : start + len(prompt)] = True  # generate() and labels call the padding before a prompt prompt as well
        ids[i, start : start + length] = torch.tensor(prompt + answer, dtype=torch.int64)
        for name, (first, stop) in named.items():
            position = torch.arange(total) - start
            spans[name][i] = (position >= first) & (position < stop)
    return Context(real=real, prompt=given, ids=ids, spans=spans, pieces=PIECES)


def chosen(rule: Rule, context: Context) -> list[list[bool]]:
    """For each row, whether each real token is chosen; asserts that padding is not."""
    mask = rule.mask(context)
    assert not (mask & ~context.real).any()
    return [row[real].tolist() for row, real in zip(mask, context.real, strict=True)]


# ----------------------------------------------------------------------------- the strategies

PATTERNS = ["a", r"\d+", "ab", r"b\s", "a.*1", "^a", "é", "$", "(?=b)", "x*", "a|é!", "(?s).+", r"(?<=a)\d", "[^a]", ""]
SIMPLE = st.one_of(
    st.sampled_from(["All()", "Prompt()", "Answer()", "Span('s')", "Span('t')"]),
    st.integers(1, 7).map("First({})".format),
    st.integers(1, 7).map("Last({})".format),
    st.integers(1, 7).map("AnswerFirst({})".format),
    st.lists(st.integers(0, len(WORDS)), min_size=1, max_size=3).map("Tokens({})".format),
    st.sampled_from(PATTERNS).map("Match({!r})".format),
)
RULES = st.recursive(  # as Python, which `rule_of` evaluates
    SIMPLE,
    lambda rules: st.one_of(
        st.tuples(rules, st.sampled_from("|&-"), rules).map(" ".join).map("({})".format), rules.map("~{}".format)
    ),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, len(WORDS) - 1), max_size=6)
BOUNDS = st.tuples(st.integers(0, 8), st.integers(0, 13))
ROWS = st.tuples(IDS, IDS, st.fixed_dictionaries({"s": BOUNDS, "t": BOUNDS}))


def rule_of(text: str) -> Rule:
    return eval(text, vars(tokens).copy())


# ----------------------------------------------------------------------------- the laws


@settings(max_examples=2000)
@given(RULES, st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.integers(0, 2))
def test_a_rule_is_its_docstring_whatever_the_padding_and_however_far_the_answer_is_written(text, rows, side, gap):
    rule = rule_of(text)
    # every row also cut after each token of its answer: what is chosen must not depend on the tokens to come
    cuts = [[(prompt, answer[:t], spans) for t in range(len(answer) + 1)] for prompt, answer, spans in rows]
    expected = [reference(rule, row) for row in rows]
    got = iter(chosen(rule, laid_out([cut for row in cuts for cut in row], side, gap)))
    for row_cuts, whole in zip(cuts, expected, strict=True):
        for prompt, answer, _ in row_cuts:
            assert next(got) == whole[: len(prompt) + len(answer)]
    unpadded = [row for row in rows if row[0] + row[1]][:1]
    for row in unpadded:
        assert chosen(rule, laid_out([row], "left")) == [reference(rule, row)]


@settings(max_examples=150)
@given(RULES, RULES, st.lists(ROWS, min_size=1, max_size=2))
def test_rules_obey_set_algebra(a, b, rows):
    a, b, context = rule_of(a), rule_of(b), laid_out(rows, "left", 1)

    def same(one: Rule, other: Rule) -> bool:
        return torch.equal(one.mask(context), other.mask(context))

    assert same(~(a | b), ~a & ~b)
    assert same(a - b, a & ~b)
    assert same(~~a, a)
    assert same(a | ~a, All())


@settings(max_examples=300)
@given(RULES)
def test_equality_hash_and_repr(text):
    rule = rule_of(text)
    again = rule_of(repr(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    assert repr(again) == repr(rule)
    assert rule != ~rule
    assert all(leaf == rule_of(repr(leaf)) for leaf in leaves(rule))


def test_rules_that_differ_are_not_equal(unchecked):
    rules = [First(1), First(2), Last(1), All(), Prompt(), Answer(), Tokens([1]), Match("1"), Span("1")]
    rules += [First(1) | Last(1), Last(1) | First(1), First(1) & Last(1), First(1) - Last(1), ~First(1)]
    assert len(set(rules)) == len(rules)
    assert all((a == b) == (a is b) for a in rules for b in rules)
    assert Tokens([3, 1, 3]) == Tokens((1, 3)) == Tokens({1, 3}) == Tokens(torch.tensor([1, 3]))
    assert repr(First(2) | ~Last(1) - Tokens([5])) == "(First(n=2) | (~Last(n=1) - Tokens(ids=(5,))))"
    assert list(leaves((First(2) | ~Last(1)) & All())) == [First(2), Last(1), All()]


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: First(0), ValueError, "First(n=0) must choose at least one token: n is a whole number from 1 up"),
        (lambda: Last(-2), ValueError, "Last(n=-2) must choose at least one token"),
        (lambda: First(True), ValueError, "First(n=True) must choose at least one token"),
        (lambda: First(1.0), ValueError, "First(n=1.0) must choose at least one token"),
        (lambda: First(2**63), ValueError, "n is a whole number"),
        (lambda: Tokens([]), ValueError, "Tokens([]) would choose nothing: give at least one token id"),
        (lambda: Tokens(5), TypeError, "Tokens takes a sequence of token ids, as in Tokens([198, 13]), not 5"),
        (lambda: Tokens("198"), TypeError, "Tokens takes a sequence of token ids, as in Tokens([198, 13]), not '198'"),
        (lambda: Tokens([1.5]), TypeError, "not [1.5]"),
        (lambda: Tokens([True, False]), TypeError, "not [True, False]"),
        (lambda: Tokens([3, -1]), ValueError, "Tokens(ids=[3, -1]): token ids are whole numbers from 0 up"),
        (lambda: Tokens([2**63]), ValueError, "token ids are whole numbers from 0 up"),
        (lambda: Match("("), ValueError, "Match('(') is not a regular expression: missing ), unterminated subpattern"),
        (lambda: Match("(" * 5000 + ")" * 5000), ValueError, "is not a regular expression"),
        (lambda: Match(b"a"), TypeError, "Match takes a regular expression as a string, not b'a'"),
        (lambda: Match(re.compile("a")), TypeError, "Match takes a regular expression as a string"),
        (lambda: Span(3), TypeError, "Span takes the name of a span as a string, not 3"),
        (lambda: First(2) | Last, TypeError, "both sides must be token rules, as in First(2) | Last(1)"),
        (lambda: First(2) - 1, TypeError, "(First(n=2) - 1): both sides must be token rules, as in First(2) - Last(1)"),
        (lambda: Not("x"), TypeError, "Not takes a token rule, not 'x'"),
        (lambda: Rule(), TypeError, "abstract"),
    ],
)
def test_a_bad_rule_is_refused_with_a_message(unchecked, make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_a_rule_that_lacks_what_it_reads_says_what_to_give():
    real = torch.ones(2, 3, dtype=torch.bool)
    blind = Context(real=real, prompt=real)
    with pytest.raises(ValueError, match=re.escape("Tokens(ids=(1,)) reads token ids, but the model was")):
        Tokens([1]).mask(blind)
    ids = torch.tensor([[1, 2, 3], [-1, 2, 3]])
    with pytest.raises(ValueError, match=re.escape("Match(pattern='a') reads the decoded text: give attach(")):
        Match("a").mask(Context(real=real, prompt=real, ids=ids))
    with pytest.raises(ValueError, match="needs the ids of all earlier tokens, but the cache was filled before attach"):
        Match("a").mask(Context(real=real, prompt=real, ids=ids, pieces=PIECES))
    with pytest.raises(ValueError, match=re.escape("Span(name='u') needs a span of that name for each example")):
        Span("u").mask(blind)
    with pytest.raises(ValueError, match="the spans given are: s, t"):
        (All() - Span("u")).mask(Context(real=real, prompt=real, spans={"t": real, "s": real}))


def test_unknown_ids_are_never_one_of_tokens_and_unknown_padding_does_not_disturb_match():
    real = torch.tensor([[True, True, True], [False, True, True]])
    ids = torch.tensor([[-1, 0, 1], [-1, 0, 1]])
    assert Tokens([0]).mask(Context(real=real, prompt=real, ids=ids)).tolist() == [[False, True, False]] * 2
    alone = Context(real=real[1:], prompt=real[1:], ids=ids[1:], pieces=PIECES)
    assert Match("ab").mask(alone).tolist() == [[False, True, True]]


def test_a_rule_of_ones_own_is_a_frozen_dataclass_with_choose():
    class Even(Rule):
        def choose(self, context: Context) -> Tensor:
            return context.real & (context.real.cumsum(1) % 2 == 1)

    mask = (Even() - First(1)).mask(laid_out([([0, 1, 2], [3, 4], {})], "left", 2))
    assert mask.int().tolist() == [[0, 0, 0, 0, 1, 0, 1]]
    assert Even() == Even()


def test_a_batch_without_tokens():
    for rule in [All(), First(1), Match("a"), Tokens([1]), ~Last(2)]:
        assert rule.mask(laid_out([([], [], {})], "left")).shape == (1, 0)
        assert not rule.mask(laid_out([([], [], {})], "left", 2)).any()


# ----------------------------------------------------------------------------- pieces of text

TEXTS = [
    "17 + 25 - 8 = 34\n\n  don't   <|im_start|>user\nnaïve café<|im_end|>\n",
    "日本語のテキスト、中文字符。 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 a🙂b \U0001f9ff\u0301 é e\u0301",
    "   leading and trailing   ",
    "broken \ufffd\ufffd character \ufffd",
    "3.14159 1,000,000 0x1F ½ ²",
    "\t\r\n \u00a0\u200b end",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's, without the model."""
    try:
        return transformers.AutoTokenizer.from_pretrained(demo._converted(demo._packaged_gguf()))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def check_pieces(tokenizer, ids: list[int]) -> None:
    split = token_pieces(tokenizer)
    pieces = split(ids)
    assert len(pieces) == len(ids)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text.startswith("".join(pieces))
    assert not text[len("".join(pieces)) :].strip("\ufffd")  # nothing is left out but an unfinished end
    for cut in range(len(ids)):
        assert split(ids[:cut]) == pieces[:cut]


@settings(max_examples=300)
@given(st.lists(st.integers(0, len(WORDS) - 2), max_size=12))
def test_pieces_join_to_the_text_and_depend_on_no_later_token(ids):
    check_pieces(ByteTokenizer(), ids)
    check_pieces(StrippingTokenizer(), ids)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_real_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    check_pieces(tokenizer, ids)
    if not text.endswith("\ufffd"):
        assert "".join(token_pieces(tokenizer)(ids)) == text


def test_pieces_of_any_ids_of_a_real_tokenizer(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        check_pieces(tokenizer, torch.randint(0, len(tokenizer), (24,), generator=generator).tolist())


def test_match_finds_words_and_characters_of_several_tokens(tokenizer):
    ids = torch.tensor([tokenizer("Add 17 to 250, 🙂 said Zoë. 🙂")["input_ids"]])
    real = torch.ones_like(ids, dtype=torch.bool)
    context = Context(real=real, prompt=real, ids=ids, pieces=token_pieces(tokenizer))

    def text(pattern: str) -> str:
        return tokenizer.decode(ids[Match(pattern).mask(context)])

    assert text(r"\d+") == "17250"
    assert text("Zo") + text("ë") == " Zoë"
    pieces = token_pieces(tokenizer)(ids[0].tolist())
    for character in "🙂ë":  # its last token, and no other
        assert [piece for piece, hit in zip(pieces, Match(character).mask(context)[0], strict=True) if hit] == [
            piece for piece in pieces if character in piece
        ]


# ----------------------------------------------------------------------------- matches in text that grows

PARTS = ["a", "b", "ab", " ", "1", "\n", "A", "é", "a1 ", ""]
GROWING = [
    *PATTERNS,
    *["(?i)a+b?", "(?i:A)b", "a+?b*", "(a)\\1", "(?=a.)a", "(?<!a)b", r"\ba\b", "(?m)^b", "a$", r"\Aa|b\Z", "[^\\n]+"],
    *["(?s)a.*b", "(a|ab)(1|b)", "(?:ab){2,}", r"\w+\s", "(?>a+)b" if sys.version_info >= (3, 11) else "ab"],
]


def sought_from_the_beginning(pattern: str, texts: list[str], given: list[bool]) -> list[bool]:
    """What `matched` must give: every match is sought in the whole text up to each token."""
    text, ends = "".join(texts), list(accumulate(map(len, texts)))
    bounds = list(zip([0, *ends], ends, strict=False))
    prompt_end = max((end for (_, end), prompt in zip(bounds, given, strict=True) if prompt), default=0)
    return [
        any(max(a, start) < min(b, end) for a, b in (m.span() for m in re.finditer(pattern, text[:known])))
        for (start, end), prompt in zip(bounds, given, strict=True)
        for known in [prompt_end if prompt else end]
    ]


@settings(max_examples=150)
@given(
    st.sampled_from(GROWING),
    st.lists(st.sampled_from(PARTS), max_size=30),
    st.integers(0, 12),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_matches_in_a_text_that_grows_are_those_of_the_whole_text(pattern, texts, prompt, odd, sizes):
    mixed = odd[: len(texts)] if prompt == 0 else [i < prompt for i in range(len(texts))]
    for size in [*sizes, len(texts)]:  # in steps of any length, back and forth
        expected = sought_from_the_beginning(pattern, texts[:size], mixed[:size])
        assert list(matching.matched(pattern, texts[:size], mixed[:size])) == expected


@pytest.mark.parametrize("pattern", [r"\d+", "(?i)ab", "a.*1"])
def test_the_cost_of_match_grows_with_the_text_and_not_with_its_square(pattern, monkeypatch):
    """A thousand tokens, at once and then one by one: each character is searched a few times."""
    searched: list[int] = []

    finditer = matching.patterns.finditer

    def counting(pattern: str, text: str, seconds: float, *, start: int, end: int) -> list[Any]:
        searched.append(end - start)
        return finditer(pattern, text, seconds, start=start, end=end)

    monkeypatch.setattr(matching.patterns, "finditer", counting)
    texts = ["ab", " ", "12", "\n"] * 250
    given = [i < 4 for i in range(1000)]
    whole = matching.matched(pattern, texts, given)
    assert sum(searched) < 10 * len("".join(texts))
    searched.clear()
    for size in range(1, 1001):
        grown = matching.matched(pattern, texts[:size], given[:size])
    assert grown == whole
    assert sum(searched) < 10 * len("".join(texts))


def test_decoding_token_by_token_decodes_each_token_once():
    decoded: list[int] = []

    class Slow(ByteTokenizer):
        def decode(self, ids: tuple[int, ...], **_: bool) -> str:
            decoded.append(len(ids))
            return super().decode(ids)

    split, ids = token_pieces(Slow()), [i % 7 for i in range(300)]
    for size in range(1, 301):
        split(ids[:size])
    assert len(decoded) < 4 * 300
    assert split(ids) == token_pieces(ByteTokenizer())(ids)
