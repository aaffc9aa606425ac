"""Texts that the frozen model itself writes: something to rehearse where there is no original data.

    samples = self_samples(model, tokenizer, 500, path="samples.jsonl")       # from its begin-of-text token
    goals = [Imitate(task), Stay(samples, within=0.01)]
    measure_drift(model, trails, held_out_samples)["kl"].mean                 # nats a token, on its own distribution

At temperature 1 and top-p 1 the samples are drawn from the model's own distribution p, so that the mean of KL(p || q)
over them is an unbiased estimate of how far a steered model q is from it, and no text of anyone else's is needed. Other
settings sharpen the samples, and the estimate is then of what the model says most.

A sample is an `Example` whose prompt is the opening and whose answer is what the model wrote after it, its end-of-text
token included. It holds the very ids, since a text that is tokenised again may have others.

Chats come in two rounds: first the user's words, then the answers to them (as in Magpie, Xu et al. 2024, arXiv
2406.08464):

    asked = self_samples(model, tokenizer, 100, openings=[chat_opening(tokenizer)])
    words = [tokenizer.decode(e.ids[e.prompt_length :], skip_special_tokens=True) for e in asked]
    chats = [[{"role": "user", "content": text}] for text in words]
    openings = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    answers = self_samples(model, tokenizer, 100, openings=openings)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tokenpaths import files
from tokenpaths.checking import as_number, as_whole
from tokenpaths.data.contamination import GRAM, grams
from tokenpaths.data.examples import Example
from tokenpaths.data.tokenizing import check_tokenizer, inner, tokenized
from tokenpaths.engine.batches import bar
from tokenpaths.engine.generate import end_tokens, generate
from tokenpaths.engine.readings import frozen
from tokenpaths.site import host
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.site.host import check_model
from tokenpaths.site.identity import exact_key
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.checkpoints import differences
from tokenpaths.undo import tidy

BUCKETS = 8
"""The openings of `BUCKETS` batches are drawn together, and those of like length are put into one batch."""
BARREN = 10
"""Drawing ends after this many batches in a row that bring nothing new."""


class SampleFileError(files.TrailFileError):
    """A file that is not a whole file of samples."""


@tidy
def self_samples(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    *,
    openings: Sequence[str] | Sequence[Sequence[int]] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    near: float = 0.5,
    batch_size: int = 16,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    trails: Adapter | None = None,
) -> list[Example]:
    """Let the frozen model write `count` texts, no two of them alike. Attached trails are off while it writes.

    A text is left out if at least `near` of its 8-token runs stand in texts that came before it. (A text of fewer than
    8 tokens is one run.) The same text twice is thus always left out, and so is a text that is empty but for its end.

    Args:
        model: a Hugging Face causal language model, on any device, in any dtype. Its mode, its generation settings and
            torch's random state are afterwards as before.
        tokenizer: its tokenizer.
        count: the number of samples.
        openings: what the texts begin with, each taken equally often: strings, tokenised as a prompt is, or token ids.
            Unless given, the begin-of-text token.
        temperature: p is proportional to p^(1/temperature).
        top_p: the words drawn from are the likeliest, of this probability together; 1 for all words.
        max_new_tokens: the most tokens that are written of a text.
        near: in (0, 1]. At 1, only texts are left out that hold nothing new at all.
        batch_size: texts in one batch.
        seed: the same seed gives the same samples on one machine. Batch k follows from the seed and k alone.
        path: a file to keep them in, written whole after each batch. What it holds already, of the same model and
            settings, is not written again: a run goes on after a kill, and a larger `count` adds to a smaller one.
        progress: show a progress bar.
        trails: an adapter that lies in the model without being attached, as PEFT's do. It is off meanwhile.

    Raises:
        ValueError: a setting is out of range, an opening has no token or is too long for the model, the file is of
            another model or of other settings (the error names them), or the texts are so alike that there are no
            `count` different ones.
        SampleFileError: the file holds something else.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    prompts = _openings(tokenizer, openings)
    for name, value in (("temperature", temperature), ("top_p", top_p), ("near", near)):
        as_number(name, value)
    ends = end_tokens(model, tokenizer)
    settings: dict[str, Any] = {
        **dict(temperature=float(temperature), top_p=float(top_p), max_new_tokens=max_new_tokens, near=float(near)),
        **dict(batch_size=batch_size, seed=seed, ends=ends),
    }
    _check(model, max(map(len, prompts)), count, settings)
    with frozen(model, trails), bar("self-samples", progress, total=count) as shown:
        asked = f"{len(prompts)} ({hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]})"
        whose = {"model": fingerprint(model), "key": exact_key(model)}
        kept, note = _begin(path, {**whose, "openings": asked, **settings}, model)
        seen = {run for example in kept for run in _runs(example)}
        barren = 0
        while len(kept) < count:
            shown.update(len(kept) - shown.n)
            before, batch = len(kept), _batch(prompts, note["batches"], batch_size, seed)
            for example in _write(model, tokenizer, batch, settings, note["batches"]):
                runs = _runs(example)
                empty = not (set(example.ids[example.prompt_length :]) - set(ends))
                alike = not empty and sum(run in seen for run in runs) >= near * len(runs)
                note["drawn"] += 1
                note["empty"] += empty
                note["alike"] += alike
                if not empty and not alike:
                    seen |= runs
                    kept.append(example)
            note["batches"] += 1
            if path is not None:
                _save(Path(path), note, kept, tokenizer)
            barren = 0 if len(kept) > before else barren + 1
            if barren == BARREN:
                raise ValueError(
                    f"{note['drawn']} texts were drawn and {len(kept)} of them differ, the last {BARREN} batches "
                    f"bringing no new one: {note['alike']} were like others, {note['empty']} empty. For {count}, raise "
                    "temperature, top_p or near, or give more openings"
                )
        shown.update(count - shown.n)
    return kept[:count]


def load_samples(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> list[Example]:
    """The samples of a file of `self_samples`.

    Args:
        path: the file.
        model: warn if another model wrote them.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        SampleFileError: it is not a whole file of samples, or was changed since it was written.
    """
    kept, note = _read(Path(path))
    if model is not None and note["settings"].get("model") != (here := fingerprint(model)):
        warnings.warn(
            files.printable(
                f"{os.fspath(path)} was written by {note['name']} (weights {note['settings'].get('model')}), but the "
                f"model given has the weights {here}: these samples are not of its own distribution"
            ),
            stacklevel=2,
        )
    return kept


def chat_opening(tokenizer: Any) -> list[int]:
    """The tokens of the tokenizer's chat template up to the user's first word. Behind them the model writes as a user.

    Raises:
        ValueError: the template does not contain what the user says.
    """
    mark = "tokenpaths-mark"
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    opening, found, _ = text.partition(mark)
    if not found:
        raise ValueError("this tokenizer's chat template does not write what the user says: give openings of your own")
    return inner(tokenizer, opening)


def _openings(tokenizer: Any, openings: Sequence[str] | Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    if openings is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("this tokenizer has no begin-of-text token: say what the texts begin with, openings=[...]")
        return [(int(tokenizer.bos_token_id),)]
    if isinstance(openings, str) or not len(openings):
        raise ValueError(f"openings must be a list of texts or of token ids, at least one, not {openings!r:.80}")
    prompts = [
        tuple(int(i) for i in (tokenized(tokenizer, opening, goes_on=True) if isinstance(opening, str) else opening))
        for opening in openings
    ]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"opening {number} has no token: {openings[number]!r:.40}")
    return prompts


def _check(model: nn.Module, longest: int, count: int, settings: dict[str, Any]) -> None:
    """Refuse settings that are out of range, and texts that may not fit the model's window."""
    most = settings["max_new_tokens"]
    for name, value in (("count", count), ("max_new_tokens", most), ("batch_size", settings["batch_size"])):
        as_whole(name, value)
    if not 0 < settings["temperature"] < float("inf"):
        raise ValueError(f"temperature={settings['temperature']} must be a finite number above 0")
    for name in ("top_p", "near"):
        if not 0 < settings[name] <= 1:
            raise ValueError(f"{name}={settings[name]} must be above 0 and at most 1")
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{type(model).__name__} does not write texts: self_samples needs a causal language model")
    window = host.window(model)
    if window is not None and window < longest + most:
        raise ValueError(
            f"the longest opening has {longest} tokens, and with max_new_tokens={most} more the text would not fit "
            f"the model's window of {window}: shorten either"
        )


def _batch(prompts: Sequence[tuple[int, ...]], number: int, size: int, seed: int) -> list[tuple[int, ...]]:
    """The openings of batch `number`. They come in permutations, and those of `BUCKETS` batches are sorted by length.

    These batches come in a random order, so that wherever the writing stops, long and short openings have come about
    equally often.
    """
    window, place = divmod(number, BUCKETS)
    orders: dict[int, Any] = {}
    chosen: list[tuple[int, ...]] = []
    for drawn in range(window * BUCKETS * size, (window + 1) * BUCKETS * size):
        epoch, rank = divmod(drawn, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, 0, epoch]).permutation(len(prompts))
        chosen.append(prompts[int(orders[epoch][rank])])
    chosen.sort(key=len)
    bucket = int(np.random.default_rng([seed, 1, window]).permutation(BUCKETS)[place])
    return chosen[bucket * size : (bucket + 1) * size]


def _write(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], settings: dict[str, Any], number: int
) -> list[Example]:
    """Let the model go on from openings. Its random numbers are those of the batch's number."""
    written = generate(
        model,
        [Example.of(prompt) for prompt in prompts],
        tokenizer,
        max_new_tokens=settings["max_new_tokens"],
        sample=True,
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        seed=int(np.random.default_rng([settings["seed"], 2, number]).integers(2**62)),
        batch_size=len(prompts),
    )
    return [Example.of(prompt, one.ids) for prompt, one in zip(prompts, written, strict=True)]


def _runs(example: Example) -> set[tuple[int, ...]]:
    """The runs of `GRAM` tokens that the model wrote; all of its tokens as one run, if they are fewer."""
    written = example.ids[example.prompt_length :]
    return set(grams(written, min(GRAM, len(written))))


def _begin(path: Any, settings: dict[str, Any], model: Any) -> tuple[list[Example], dict[str, Any]]:
    """The samples that the file holds already, and the note to go on with."""
    if path is not None and Path(path).exists():
        kept, note = _read(Path(path))
        now = {name: value for name, value in settings.items() if name != "key" or name in note["settings"]}
        if different := differences(note["settings"], now):  # files of 0.1 have no exact key
            raise ValueError(
                f"{path} holds samples made otherwise ({different}): give another path, or take the file away"
            )
        return kept, note
    versions = {name: importlib.metadata.version(name) for name in ("tokenpaths", "torch", "transformers")}
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    note = {"name": str(name), "dtype": str(model.dtype), "versions": versions, "settings": settings}
    return [], {**note, **dict(batches=0, drawn=0, alike=0, empty=0)}


_NOTE = {"name", "dtype", "versions", "settings", "batches", "drawn", "alike", "empty", "kept"}


def _save(path: Path, note: dict[str, Any], kept: Sequence[Example], tokenizer: Any) -> None:
    """Write the file whole or not at all: a line that says how it was made, then a line a sample."""
    lines: list[dict[str, Any]] = []
    for example in kept:
        start = example.prompt_length
        text = tokenizer.decode(example.ids[start:])  # for people who open the file; `_read` reads the ids
        lines.append({"opening": example.ids[:start], "written": example.ids[start:], "text": text})
    files.write_json(path, {"tokenpaths samples": 1, **note, "kept": len(kept)}, lines)


def _read(path: Path) -> tuple[list[Example], dict[str, Any]]:
    try:
        note, *lines = map(files.strict_json, files.read_lines(path))
        if note.pop("tokenpaths samples") != 1:
            raise ValueError("its first line is of another version")
        note.pop("sha256", None)
        kept = [_example(line) for line in lines]
        if missing := _NOTE - set(note):
            raise ValueError(f"its first line lacks {', '.join(sorted(missing))}")
        if strange := set(note) - _NOTE:
            raise ValueError(f"its first line has the keys {', '.join(sorted(strange)):.80}")
        counts = [note[key] for key in ("batches", "drawn", "alike", "empty", "kept")]
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(note["settings"], dict):
            raise ValueError("its first line does not tell how the samples were made")
        if note.pop("kept") != len(kept):
            raise ValueError(f"its first line is not of the {len(kept)} samples after it")
    except OSError:
        raise
    except Exception as error:  # what is damaged may fail in any way
        raise SampleFileError(f"{path} is not a whole file of self_samples ({error!s:.300})") from None
    return kept, note


def _example(line: dict[str, Any]) -> Example:
    """The sample of a line. Raises `ValueError`, or another error for what is no such line."""
    for ids in (line["opening"], line["written"]):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError(f"a sample is made of token ids, not {ids!r:.60}")
    return Example.of(line["opening"], line["written"])
