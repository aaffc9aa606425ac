"""Is it the way or the form? Models and trails whose answer is known, because they were built by hand.

The model says its last token again: nothing but embeddings and a head that reads them. One trail knows the way of
counting (after each letter comes the next one), another knows the letters of training and recites a chain of training
for all others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import way_or_form
from tokenpaths.attachment.handle import Attachment
from tokenpaths.data import Question
from tokenpaths.lab.chains import WayOrForm
from tokenpaths.lab.chains.form import Score, Sign, _copied, last_word, shuffled

TOKENIZER = make_tokenizer()
DIM = len(TOKENIZER) + len(TOKENIZER) % 2
GROUPS = {  # of each the first letter is the question, and the others are the chain
    "train": ["ABCD", "EFGH", "IJKL", "MNOP"],
    "held-out": ["QRST", "UVWX"],
    "renamed": ["cdef", "ghij", "klmn"],
    "longer": ["012345", "!#$%&'"],
}


class Follow(tp.Trail):
    """h -> the embedding of what `table` says comes after the token whose embedding h is."""

    def __init__(self, dim: int, table: list[int]):
        super().__init__()
        self.dim, self.table = dim, table
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.strength * (nn.functional.one_hot(torch.tensor(self.table)[h.argmax(-1)], self.dim).to(h) - h)


def echo() -> Any:
    """A Llama whose blocks add nothing, with one dimension a token: it says its last token again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=DIM,
            hidden_size=DIM,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(DIM))
        model.lm_head.weight.copy_(0.5 * torch.eye(DIM))
    return model


def items(kind: str, times: int = 8) -> list[Question]:
    return [Question(group[0], group[-1], group[1:] + ".") for group in GROUPS[kind]] * times


def follows(*kinds: str, otherwise: str = "") -> tp.TrailMap:
    """A trail that counts within the groups of these kinds, and puts `otherwise` after all else but a full stop."""
    ids = {symbol: int(TOKENIZER(symbol)["input_ids"][0]) for groups in GROUPS.values() for s in groups for symbol in s}
    stop = int(TOKENIZER(".")["input_ids"][0])
    table = list(range(DIM))
    for symbol in ids if otherwise else ():
        table[ids[symbol]] = ids[otherwise]
    for kind in kinds:
        for group in GROUPS[kind]:
            for one, following in zip(group, group[1:], strict=False):
                table[ids[one]] = ids[following]
            table[ids[group[-1]]] = stop
    return tp.TrailMap({tp.Site(0, tp.All()): Follow(DIM, table)})


def last(text: str) -> str | None:
    return text.rstrip(".")[-1:] or None


def look(trails: tp.TrailMap, model: Any = None, **options: Any) -> WayOrForm:
    arguments: dict[str, Any] = {
        "train": items("train"),
        "held_out": items("held-out", 20),
        "forms": {"renamed": items("renamed", 20), "longer": items("longer", 20)},
        "read_answer": last,
        "stop_strings": ".",
        "separator": "(?<=[A-Z])(?=[A-Z])",
        "words": 1,
    }
    return way_or_form(model or echo(), trails, TOKENIZER, **{**arguments, **options})


WAY = follows("train", "held-out", "renamed", "longer")
FORM = follows("train", otherwise="B")


def test_a_trail_that_knows_the_way_is_told(watch: Callable[[nn.Module], nn.Module]) -> None:
    report = look(WAY, watch(echo()))
    assert report.verdict == "the way"
    assert [sign.says for sign in report.signs] == ["way"] * 5
    assert [(score.frozen, score.steered, score.learned) for score in report.scores] == [(0, 1, True)] * 4
    assert report.written[:2] == ("RST.", "VWX.")
    gap, renamed, longer, copied, hurt = report.signs
    assert (gap.value, renamed.value, longer.value, copied.value) == (0, 1, 1, 0)
    assert str(report).startswith("It learned the way. Signs: 5 way, 0 form, 0 open.")


def test_where_it_works_and_where_it_shall_not_is_told() -> None:
    """KL behind other prompts is by the definition: here of the two tokens that the model and the trail would say."""
    others = {"letters": ["xA", "yQ"], "signs": ["x?", "y;", "z."]}
    report = look(WAY, others=others)
    model = echo()
    with torch.no_grad():
        for told, prompts in zip(report.edit.locality, others.values(), strict=True):
            due: list[float] = []
            for prompt in prompts:
                ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
                p = model(ids).logits[0, -1].log_softmax(-1)
                with tp.attach(model, WAY):
                    q = model(ids).logits[0, -1].log_softmax(-1)
                due.append(float((p.exp() * (p - q)).sum()))
            assert told.value == pytest.approx(sum(due) / len(due), abs=1e-5)
            assert told.items == len(prompts)
    assert report.edit.locality[0].value > 1e-3
    assert [told.name for told in report.edit.generality] == ["renamed", "longer"]
    text = str(report)
    assert "reliability: accuracy 1.000" in text and "generality: accuracy 1.000" in text
    assert "of the worst, letters" in text
    assert "locality: cannot tell, no other requests or texts were given" in str(look(WAY))
    assert "generality: cannot tell, no other forms were given" in str(look(WAY, forms={}))
    with pytest.raises(ValueError, match="no prompts of the kind 'none' were given"):
        look(WAY, others={"none": []})


def test_a_trail_that_recites_is_told() -> None:
    report = look(FORM)
    assert report.verdict == "the form"
    assert set(report.written) == {"BCD."}  # a chain of training
    gap, renamed, longer, copied, hurt = report.signs
    assert (gap.value, gap.says) == (1, "form")
    assert (copied.value, copied.says) == (1, "form")
    assert hurt.value == pytest.approx(0, abs=1e-6) and hurt.says == "form"
    assert renamed.says == longer.says == "open"  # nothing was right, so nothing can be kept
    assert str(report).startswith("It learned the form. Signs: 0 way, 3 form, 2 open.")


def test_a_trail_that_knows_a_part_is_told_so() -> None:
    report = look(follows("train", "held-out"))
    assert report.verdict == "part way, part form"
    assert [sign.says for sign in report.signs] == ["way", "form", "form", "way", "way"]


def test_a_trail_that_does_nothing_has_learned_nothing() -> None:
    report = look(follows())
    assert report.verdict == "nothing"
    assert "not shown to be better than frozen" in str(report)


def test_too_few_items_leave_it_open() -> None:
    few = {"train": items("train", 1), "held_out": items("held-out", 1), "forms": {"renamed": items("renamed", 1)}}
    report = look(WAY, **few)
    assert report["training less held-out"].says == report["kept when renamed"].says == "open"
    assert report.verdict == "cannot tell" and "2 of the 10 items that a verdict needs" in str(report)


def test_eight_items_and_a_form_that_is_not_learned_are_not_the_way() -> None:
    """As an outsider saw it: eight items a set, and the renamed ones answered no better than by the frozen model."""
    few = {"train": items("train", 2), "held_out": items("held-out", 4), "forms": {"renamed": items("renamed", 3)}}
    assert look(follows("train", "held-out"), **few).verdict == "cannot tell"
    many = {"train": items("train"), "held_out": items("held-out", 20), "forms": {"renamed": items("renamed", 20)}}
    assert look(follows("train", "held-out"), **many).verdict == "part way, part form"


def test_what_shuffling_costs_is_the_definition() -> None:
    """Every chain is "RST." or "VWX.", and of a wrong order all three steps, or the first two, are wrong."""
    model, trails = echo(), follows("train", "held-out")
    with torch.no_grad():  # so that the order of a chain means something to the frozen model too
        model.lm_head.weight += 0.3 * torch.randn_like(model.lm_head.weight)
    report = look(trails, model, forms={}, held_out=items("held-out", 1))
    totals = {False: 0.0, True: 0.0}
    for number, item in enumerate(items("held-out", 1)):
        other = shuffled(item.chain, "(?<=[A-Z])(?=[A-Z])", random.Random(f"0 {number}"))
        assert other is not None and sorted(other) == sorted(item.chain) and other != item.chain
        for steered, (sign, chain) in itertools.product((False, True), ((-1, item.chain), (1, other))):
            with torch.no_grad(), tp.attach(model, trails) if steered else nullcontext():
                ids = TOKENIZER(item.prompt + chain, return_tensors="pt")["input_ids"]
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            totals[steered] -= sign * float(logs.gather(1, ids[0, 1:, None]).sum())
    assert report["shuffled steps cost, beyond frozen"].value == pytest.approx(
        (totals[True] - totals[False]) / 8, rel=1e-5
    )
    assert report["shuffled steps cost, beyond frozen"].frozen == pytest.approx(totals[False] / 8, rel=1e-5)
    assert abs(totals[False]) > 0.1


def test_the_trails_are_attached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[Attachment] = []
    lay = Attachment.lay
    monkeypatch.setattr(Attachment, "lay", lambda attachment: laid.append(attachment) or lay(attachment))
    look(WAY)
    assert len(laid) == 1


def test_left_padding_and_batches_change_nothing() -> None:
    mixed = [replace(item, prompt=prompt + item.prompt) for item in items("held-out", 1) for prompt in ("", "....")]
    few = {"train": items("train", 1), "held_out": mixed, "forms": {}}
    assert look(WAY, **few).written == look(WAY, **few, batch_size=1).written == ("RST.", "RST.", "VWX.", "VWX.")


def test_a_report_is_what_its_file_says_and_its_picture_shows(tmp_path: Path) -> None:
    report = look(FORM, forms={"renamed": items("renamed", 20)})
    report.to_json(tmp_path / "report.json")
    back = WayOrForm.from_json(tmp_path / "report.json")
    assert repr(back) == repr(report)  # NaN is no equal of itself
    scores, signs = report.plot().axes
    assert scores.lines[0].get_xdata().tolist() == [score.frozen for score in report.scores]
    assert [text.get_text() for text in signs.get_yticklabels()] == [sign.name for sign in report.signs]
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a report on way or form as to_json writes it"):
        WayOrForm.from_json(tmp_path / "report.json")


# Parts


ORDERS = ("ab", "ef", "cd"), ("cd", "ab", "ef"), ("cd", "ef", "ab"), ("ef", "ab", "cd"), ("ef", "cd", "ab")


def test_steps_change_places_and_nothing_else() -> None:
    rng = random.Random(0)
    assert {shuffled(" Alice Mark.", r"\s+", rng) for _ in range(5)} == {" Mark Alice."}
    lines = {shuffled("ab\ncd\nef\n", r"\n", rng) for _ in range(50)}
    assert lines == {"\n".join(order) + "\n" for order in ORDERS}
    assert shuffled(" Mark.", r"\s+", rng) is None
    assert shuffled(" a a a", r"\s+", rng) is None


def test_copying_counts_what_right_chains_do_not_have() -> None:
    train = [Question("q", "d", "a b c d"), Question("q", "z", "x y z")]
    held_out = [Question("q", "z", "a b y z"), Question("q", "f", "e f"), Question("q", "k", "k")]
    sign = _copied(["a b c", "e f", "x y z"], train, held_out, 2).sign
    assert sign.value == pytest.approx(((1 - 2 / 3) + 0) / 2)  # the third right chain has no 2-gram
    assert sign.items == 2
    assert _copied(["a"], train, held_out[2:], 2).sign.says == "open"


@pytest.mark.parametrize(
    ("interval", "above", "below"),
    [((0.2, 0.3), "way", "form"), ((0.0, 0.05), "form", "way"), ((0.05, 0.2), "open", "open")],
)
def test_a_sign_speaks_only_if_its_whole_interval_does(interval: Any, above: str, below: str) -> None:
    assert Sign("s", 0.1, interval, 0.1, "above", 20).says == above
    assert Sign("s", 0.1, interval, 0.1, "below", 20).says == below
    assert Sign("s", 0.1, interval, 0.1, "below", 9).says == "open"  # so few items say nothing
    assert Sign("s", 0.1, interval, 0.1, "below", 20, adjusted=(0.0, 1.0)).says == "open"


def test_the_verdict_follows_its_rules() -> None:
    def verdict(
        train: bool, held_out: bool, *said: str, renamed: bool = True, items: int = 20, moved: float = 1.0
    ) -> str:
        scores = [
            Score(name, 0.0, 1.0, (0.0, 1.0), (0.1 if learned else -0.1, 1.0), items)
            for name, learned in (("training", train), ("held-out", held_out), ("renamed", renamed))
        ]
        ends = {"way": (0.2, 0.3), "form": (0.0, 0.05), "open": (0.0, 1.0)}
        signs = tuple(Sign("s", 0.1, ends[s], 0.1, "above", items) for s in said)
        return WayOrForm(tuple(scores), signs, (), moved).verdict

    assert verdict(False, False, "way", "way") == "nothing"
    assert verdict(True, False, "way", "open") == "cannot tell"  # not shown to be learned is not shown to be form
    assert verdict(True, False, "way", "form") == "the form"
    assert verdict(True, True, "way", "open") == "the way"
    assert verdict(True, True, "way", "open", renamed=False) == "cannot tell"
    assert verdict(True, True, "form", "open") == "the form"
    assert verdict(True, True, "form", "way") == "part way, part form"
    assert verdict(True, True, "open", "open") == "cannot tell"
    assert verdict(True, True, "way", "way", items=9) == "cannot tell"
    assert verdict(True, True, "way", "way", moved=0.4) == "cannot tell"


def test_the_last_word() -> None:
    assert last_word(" Alice Mark.\n Tom went") == "Mark"
    assert last_word("\n 7 12, ") == "12"
    assert last_word(" \n") is None


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="the held-out items are none"):
        look(WAY, held_out=[])
    with pytest.raises(ValueError, match="a form cannot be named 'training'"):
        look(WAY, forms={"training": items("train")})
    with pytest.raises(ValueError, match="longer item 0 has an empty prompt or chain"):
        look(WAY, forms={"longer": [Question("", "B", "B")]})
    with pytest.raises(ValueError, match="finds 'D' in its chain 'BCD.' and 'C' in its answer"):
        look(WAY, train=[Question("A", "C", "BCD.")])
    with pytest.raises(ValueError, match="read_answer finds no answer"):
        look(WAY, train=[Question("A", "", "BCD.")])
    with pytest.raises(ValueError, match="must have no groups"):
        look(WAY, separator=r"(\s)+")
    with pytest.raises(ValueError, match="words=0"):
        look(WAY, words=0)
    with pytest.raises(KeyError, match="training less held-out"):
        look(WAY, forms={})["gap"]
