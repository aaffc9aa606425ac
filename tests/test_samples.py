"""What the frozen model writes: drawn from its own distribution, no two alike, and kept through a kill."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, llama, make_tokenizer, make_trails
from torch import nn

import tokenpaths as tp
from tokenpaths import self_samples
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.training import chat_opening, load_samples
from tokenpaths.training import samples as room
from tokenpaths.training.samples import SampleFileError

Watch = Callable[[nn.Module], nn.Module]
TOKENIZER = make_tokenizer()
VOCAB = len(TOKENIZER)
OPENINGS = [[5, 6, 7], [9], [11, 12, 13, 14], [20, 21], [30, 31, 32, 33, 34], [40]]


def model(**settings: Any) -> Any:
    made = llama(VOCAB)
    made.generation_config.eos_token_id = 2
    for name, value in settings.items():
        setattr(made.generation_config, name, value)
    return made


def draw(count: int = 10, **options: Any) -> list[tp.Example]:
    given: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 4, **options}
    return self_samples(given.pop("model", None) or model(), TOKENIZER, count, **given)


def written(example: tp.Example) -> tuple[int, ...]:
    return example.ids[example.prompt_length :]


def test_samples_begin_as_told_and_mark_what_the_model_wrote(watch: Watch) -> None:
    before = torch.get_rng_state()
    found = draw(24, model=watch(model()), openings=OPENINGS)
    assert torch.equal(torch.get_rng_state(), before)
    for example in found:
        assert list(example.ids[: example.prompt_length]) in OPENINGS
        assert 1 <= len(written(example)) <= 12
        assert 2 not in written(example)[:-1]  # the end, where it was written, is the last
        assert len(written(example)) == 12 or written(example)[-1] == 2
        assert all(example.answer[example.prompt_length :])
    assert len({example.ids for example in found}) == 24


def test_openings_may_be_texts_and_are_the_begin_of_text_token_unless_told() -> None:
    assert {e.ids[: e.prompt_length] for e in draw(4)} == {(1,)}
    text = tuple(TOKENIZER("cows")["input_ids"])
    assert {e.ids[: e.prompt_length] for e in draw(4, openings=["cows"])} == {text}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_the_words_are_drawn_from_the_distribution_that_is_named(temperature: float, top_p: float) -> None:
    """The model's own settings, here a sharp temperature and two words only, do not count."""
    odd = model(temperature=0.1, top_k=2, repetition_penalty=5.0, do_sample=False)
    with torch.no_grad():
        logits = odd(torch.tensor([[9]])).logits[0, -1].double() / temperature
    likely = logits.softmax(-1)
    order = likely.argsort(descending=True)
    cut = order[(likely[order].cumsum(0) - likely[order] >= top_p)]
    likely[cut] = 0
    likely /= likely.sum()
    drawn: Counter[int] = Counter()
    settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 1, "ends": [2], "seed": 0}
    for number in range(8):
        drawn.update(written(e)[0] for e in room._write(odd, TOKENIZER, [(9,)] * 500, settings, number))
    total = sum(drawn.values())
    assert total == 4000
    apart = sum(abs(drawn[word] / total - float(p)) for word, p in enumerate(likely)) / 2
    assert apart < 0.07  # at 4000 draws from 258 words; 0.3 and more with the settings above
    assert all(likely[word] > 0 for word in drawn)


def test_attached_trails_are_off_and_on_again(watch: Watch) -> None:
    frozen, steered, trails = draw(openings=OPENINGS), watch(model()), make_trails()
    for parameter in trails.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[9, 8, 7]])
    with tp.attach(steered, trails):
        moved = steered(ids).logits
        assert draw(openings=OPENINGS, model=steered) == frozen
        assert torch.equal(steered(ids).logits, moved)
    assert not torch.equal(steered(ids).logits, moved)


def test_the_mode_and_the_generation_settings_are_put_back_also_after_a_failure(watch: Watch) -> None:
    made = model(temperature=0.3)
    made.train()
    watch(made)
    with pytest.raises(IndexError):  # a word that the model does not have
        draw(openings=[[VOCAB + 7]], model=made)
    assert made.training
    assert made.generation_config.temperature == 0.3


# --- no two alike -----------------------------------------------------------------------------------------------------


def test_texts_that_hold_little_new_are_left_out() -> None:
    found = draw(60, temperature=0.35, batch_size=16, max_new_tokens=16, seed=1)
    seen: set[Any] = set()
    for example in found:
        grams = room._runs(example)
        assert len(grams & seen) < 0.5 * len(grams)
        seen |= grams
    strict = draw(60, temperature=0.35, batch_size=16, max_new_tokens=16, seed=1, near=1.0)
    assert strict != found
    assert len({written(e) for e in strict}) == 60


def test_a_text_is_known_by_its_runs_of_eight() -> None:
    def grams(ids: range) -> set[tuple[int, ...]]:
        return room._runs(tp.Example((1, *ids), (False,) + (True,) * len(ids)))

    assert grams(range(10, 20)) == {tuple(range(a, a + 8)) for a in (10, 11, 12)}
    assert grams(range(10, 18)) == {tuple(range(10, 18))}
    assert grams(range(10, 13)) == {(10, 11, 12)}  # a shorter one is one run


def test_when_there_is_nothing_new_to_come_it_says_what_to_do(tmp_path: Path) -> None:
    kept = tmp_path / "few.jsonl"
    with pytest.raises(ValueError, match=r"texts were drawn and \d+ of them differ.*raise temperature, top_p or near"):
        draw(50, temperature=1e-4, path=kept)
    assert load_samples(kept)  # what there is, is kept


def test_every_batch_and_every_seed_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    found = draw(12, path=path)
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0])["alike"] == 0
    assert found != draw(12, seed=1)


# --- openings of all lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("many", "size"), [(6, 4), (1, 4), (300, 4)])
def test_each_opening_is_taken_equally_often_and_like_lengths_together(many: int, size: int) -> None:
    prompts = [(i,) * (1 + i % 17) for i in range(many)]
    batches = [room._batch(prompts, number, size, seed=0) for number in range(room.BUCKETS * 6)]
    assert all(len(batch) == size for batch in batches)
    taken = Counter(prompt for batch in batches for prompt in batch)
    assert max(taken.values()) - min([*taken.values(), 0 if len(taken) < many else 10**9]) <= 1
    assert room._batch(prompts, 11, size, seed=0) == batches[11]
    if many > 1:
        assert [room._batch(prompts, number, size, seed=1) for number in range(len(batches))] != batches
        padded = sum(size * max(map(len, b)) - sum(map(len, b)) for b in batches)
        in_turn = [prompts[(i * size + j) % many] for i in range(len(batches)) for j in range(size)]
        rows = [in_turn[i : i + size] for i in range(0, len(in_turn), size)]
        assert padded < 0.6 * sum(size * max(map(len, b)) - sum(map(len, b)) for b in rows)


def test_wherever_it_stops_long_openings_are_not_left_to_the_end() -> None:
    prompts = [(1,) * length for length in range(1, 65)]
    first = [len(room._batch(prompts, 0, 8, seed)[0]) for seed in range(40)]
    assert min(first) < 10
    assert max(first) > 40


# --- kept -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_kill_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = draw(20, openings=OPENINGS)
    path = tmp_path / "deep" / "samples.jsonl"
    cut, calls = model(), [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 30:  # in the middle of the third batch
            raise KeyboardInterrupt

    handle = cut.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        draw(20, openings=OPENINGS, model=cut, path=path)
    handle.remove()
    assert [p.name for p in path.parent.iterdir()] == ["samples.jsonl"]
    begun = load_samples(path)
    assert 0 < len(begun) < 20
    assert whole[: len(begun)] == begun
    assert draw(20, openings=OPENINGS, path=path) == whole
    assert load_samples(path)[:20] == whole


def test_a_file_is_read_and_not_written_again_and_grows_when_more_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    few = draw(5, path=path)
    content = path.read_bytes()
    silent = model()
    handle = silent.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked again"))
    assert draw(5, path=path, model=silent) == few
    handle.remove()
    assert path.read_bytes() == content
    assert draw(14, path=path) == draw(14)


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    draw(6, path=path, temperature=0.9, openings=OPENINGS)
    note, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    assert note["settings"]["model"] == fingerprint(model())
    assert note["settings"]["temperature"] == 0.9
    assert set(note["versions"]) == {"tokenpaths", "torch", "transformers"}
    assert note["kept"] == len(lines) == note["drawn"] - note["alike"] - note["empty"]
    assert lines[0]["text"] == TOKENIZER.decode(lines[0]["written"])


def test_settings_and_models_are_told_apart_by_name(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    draw(4, path=path)
    with pytest.raises(ValueError, match="temperature was 1.0, is 0.7.*give another path"):
        draw(4, path=path, temperature=0.7)
    other = model()
    torch.nn.init.zeros_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="model was"):
        draw(4, path=path, model=other)
    with pytest.warns(UserWarning, match="not of its own distribution"):
        load_samples(path, model=other)
    assert len(load_samples(path, model=model())) >= 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "\n".join(text.split("\n")[:-2]) + "\n",  # a line less
        lambda text: "",
        lambda text: "{}\n",
        lambda text: "[1]\n",
        lambda text: text.replace('"tokenpaths samples": 1', '"tokenpaths samples": 2'),
        lambda text: text.replace('"written"', '"writ"'),
        lambda text: text.replace('"written"', '"written": [1], "written"', 1),
        lambda text: text.replace('"settings": {', '"settings": [{').replace("}, \"batches\"", "}], \"batches\""),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    draw(4, path=path)
    text = path.read_text(encoding="utf-8")
    assert damage(text) != text
    path.write_text(damage(text), encoding="utf-8")
    with pytest.raises(SampleFileError, match="is not a whole file of self_samples"):
        load_samples(path)


def test_text_with_odd_line_ends_is_kept(tmp_path: Path) -> None:
    class Odd:
        def decode(self, ids: Any) -> str:
            return "a\u2028b\x85c\r\n\ud800"

    found = draw(3)
    how = {"name": "x", "settings": {}, "dtype": "float32", "versions": {}}
    settings = {**how, **dict.fromkeys(("batches", "drawn", "alike", "empty"), 0)}
    room._save(tmp_path / "odd.jsonl", settings, found, Odd())
    assert load_samples(tmp_path / "odd.jsonl") == found


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_samples(tmp_path / "none.jsonl")


# --- chats, and what samples are for ----------------------------------------------------------------------------------


def test_a_chat_opens_where_the_user_speaks() -> None:
    assert TOKENIZER.decode(chat_opening(TOKENIZER)) == "<|user|>"
    deaf = make_tokenizer(template="{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}")
    with pytest.raises(ValueError, match="give openings of your own"):
        chat_opening(deaf)


def test_samples_are_rehearsal_data_and_measure_drift() -> None:
    found, made = draw(8), model()
    trails = tp.TrailMap({tp.Site(1, tp.Answer()): tp.LoReFT(DIM, rank=2)})
    assert tp.measure_drift(made, trails, found)["kl"].mean == pytest.approx(0, abs=1e-9)
    (step,) = tp.steps(made, trails, [tp.Imitate(found), tp.Stay(found)], steps=1, batch_size=4, progress=False)
    assert step.losses[1] == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"count": 0}, "count=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"near": 1.5}, "near=1.5 must be above 0 and at most 1"),
        ({"openings": []}, "openings must be a list of texts or of token ids, at least one"),
        ({"openings": "cows"}, "openings must be a list"),
        ({"openings": [[3], []]}, "opening 1 has no token"),
        ({"max_new_tokens": 128}, "the longest opening has 1 tokens, and with max_new_tokens=128 more.*window of 128"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**options)
    nameless = make_tokenizer()
    nameless.bos_token = None
    with pytest.raises(ValueError, match="has no begin-of-text token: say what the texts begin with"):
        self_samples(model(), nameless, 3)
    with pytest.raises(ValueError, match="Sequential does not write texts"):
        self_samples(nn.Sequential(nn.Linear(2, 2)), TOKENIZER, 3)
