"""Texts that the frozen model itself writes: something to rehearse where there is no original data.

    samples = self_samples(model, tokenizer, 500, path="samples.jsonl")       # from its begin-of-text token
    goals = [Imitate(task), Stay(samples, within=0.01)]
    drift(model, trails, held_out_samples)["kl"].mean                         # nats a token, on its own distribution

At temperature 1 and top-p 1 the samples are the model's own distribution p, so that the mean of KL(p || q) over them is
an unbiased estimate of how far a steered model q is from it, and no text of anyone else's is needed for it. Other
settings sharpen the samples, and the estimate is then of what the model says most.

A sample is an `Example` whose prompt is the opening and whose answer is what the model wrote after it, its end-of-text
token included: the very ids, since a text that is tokenised again may come out as others.

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
import json
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tokenpaths import files
from tokenpaths.data.examples import Example
from tokenpaths.engine.batches import bar
from tokenpaths.engine.generate import end_tokens, seeded, write_ids
from tokenpaths.engine.readings import evaluating, frozen
from tokenpaths.site import host
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.trailmap.adapter import Adapter

GRAM = 8
"""Two samples are alike by the runs of so many tokens that they share."""
BUCKETS = 8  # of so many batches of openings, those of like length are put into one batch
BARREN = 10  # batches in a row that bring nothing new: then there is nothing more to come


class SampleFileError(ValueError):
    """A file that is not a whole file of samples."""


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

    A text is left out if at least `near` of its 8-token runs are in texts that came before it (of a shorter one, if the
    whole of it came), as the same text twice always is; and so is one in which nothing was written but its end.

    Args:
        model: a Hugging Face causal language model, where it is, in any dtype. Its mode, its generation settings and
            torch's random state are afterwards as before.
        tokenizer: its tokenizer.
        count: how many samples.
        openings: what the texts begin with, each taken equally often: strings, tokenised as a prompt is, or token ids.
            Unless told, the begin-of-text token.
        temperature: p is proportional to p^(1/temperature).
        top_p: the words drawn from are the likeliest, of this probability together; 1 for all words.
        max_new_tokens: the most that are written.
        near: above 0; at 1, only texts are left out that hold nothing new at all.
        batch_size: of one `generate`.
        seed: with it, on one machine, the samples are the same; batch k follows from seed and k alone.
        path: keep them in this file, written whole after each batch. What is in it already, of the same model and
            settings, is not written again: so a run goes on after a kill, and a larger `count` adds to a smaller one.
        progress: show a progress bar.
        trails: an adapter that lies in the model without being attached, as PEFT's do: it is off meanwhile.

    Raises:
        ValueError: a setting that cannot be, an opening without tokens or too long for the model, a file of another
            model or of other settings (naming them), or texts so alike that there are no `count` different ones.
        SampleFileError: a file that holds something else.
    """
    prompts = _openings(tokenizer, openings)
    _check(model, prompts, count, temperature, top_p, max_new_tokens, near, batch_size)
    ends = end_tokens(model, tokenizer)
    with _frozen(model, trails):
        weights = fingerprint(model)
    settings = {
        "model": weights,
        "openings": f"{len(prompts)} ({hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]})",
        **dict(temperature=float(temperature), top_p=float(top_p), max_new_tokens=max_new_tokens, near=float(near)),
        **dict(batch_size=batch_size, seed=seed, ends=ends),
    }
    kept, note = _begin(path, settings, model)
    seen = {gram for example in kept for gram in _grams(example)}
    barren = 0
    with ExitStack() as stack:
        shown = stack.enter_context(bar("self-samples", progress, done=min(len(kept), count), total=count))
        stack.enter_context(_frozen(model, trails))
        while len(kept) < count:
            new = 0
            for example in _write(model, _batch(prompts, note["batches"], batch_size, seed), settings, note["batches"]):
                grams = _grams(example)
                empty = not (set(example.ids[example.prompt_length :]) - set(ends))
                alike = not empty and sum(gram in seen for gram in grams) >= near * len(grams)
                note["drawn"] += 1
                note["empty"] += empty
                note["alike"] += alike
                if not empty and not alike:
                    seen |= grams
                    kept.append(example)
                    new += 1
            note["batches"] += 1
            if path is not None:
                _save(Path(path), note, kept, tokenizer)
            shown.update(max(0, min(new, count - shown.n)))
            barren = 0 if new else barren + 1
            if barren == BARREN:
                raise ValueError(
                    f"{note['drawn']} texts were drawn and {len(kept)} of them differ, the last {BARREN} batches "
                    f"bringing no new one: {note['alike']} were like others, {note['empty']} empty. For {count}, raise "
                    "temperature, top_p or near, or give more openings"
                )
    return kept[:count]


def load_samples(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> list[Example]:
    """The samples of a file of `self_samples`. With `model`, warns when another model wrote them.

    Raises `FileNotFoundError`, and `SampleFileError` for a file that is not whole and sound.
    """
    kept, note = _read(Path(path))
    if model is not None and note["settings"].get("model") != (here := fingerprint(model)):
        warnings.warn(
            f"{os.fspath(path)} was written by {note['name']} (weights {note['settings'].get('model')}), but the model "
            f"given has the weights {here}: these samples are not of its own distribution",
            stacklevel=2,
        )
    return kept


def chat_opening(tokenizer: Any) -> list[int]:
    """The tokens of the tokenizer's chat template up to the user's first word: there the model writes a user's part.

    Raises `ValueError` for a template that does not contain what the user says.
    """
    mark = "tokenpaths-mark"
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    opening, found, _ = text.partition(mark)
    if not found:
        raise ValueError("this tokenizer's chat template does not write what the user says: give openings of your own")
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def _openings(tokenizer: Any, openings: Sequence[str] | Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    if openings is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("this tokenizer has no begin-of-text token: say what the texts begin with, openings=[...]")
        return [(int(tokenizer.bos_token_id),)]
    if isinstance(openings, str) or not len(openings):
        raise ValueError(f"openings must be a list of texts or of token ids, at least one, not {openings!r:.80}")
    prompts = [
        tuple(int(i) for i in (tokenizer(opening)["input_ids"] if isinstance(opening, str) else opening))
        for opening in openings
    ]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"opening {number} has no token: {openings[number]!r:.40}")
    return prompts


def _check(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    near: float,
    batch_size: int,
) -> None:
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a finite number above 0")
    for name, value in (("top_p", top_p), ("near", near)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} must be above 0 and at most 1")
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{type(model).__name__} does not write texts: self_samples needs a causal language model")
    most = host.window(model)
    longest = max(map(len, prompts))
    if most is not None and most < longest + max_new_tokens:
        raise ValueError(
            f"the longest opening has {longest} tokens, and with max_new_tokens={max_new_tokens} more the text would not fit "
            f"the model's window of {most}: shorten either"
        )


def _batch(prompts: Sequence[tuple[int, ...]], number: int, size: int, seed: int) -> list[tuple[int, ...]]:
    """The openings of a batch: the openings in permutations, those of `BUCKETS` batches sorted by length.

    These come in an order of their own, so that wherever the writing stops, long and short are alike in number.
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


def _write(model: Any, prompts: Sequence[tuple[int, ...]], settings: dict[str, Any], number: int) -> list[Example]:
    """Let the model go on from openings. Its random numbers are those of the batch's number."""
    ends: list[int] = settings["ends"]
    seed = int(np.random.default_rng([settings["seed"], 2, number]).integers(2**62))
    with seeded(model, seed):
        rows = write_ids(
            model,
            [Example(prompt, (False,) * len(prompt)) for prompt in prompts],
            ends=ends,
            pad=ends[0] if ends else 0,
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
        )
    return [
        Example((*prompt, *row), (False,) * len(prompt) + (True,) * len(row))
        for prompt, row in zip(prompts, rows, strict=True)
    ]


@contextmanager
def _frozen(model: nn.Module, trails: Adapter | None) -> Generator[None]:
    """Inside, the model is the frozen one, in evaluation mode."""
    with frozen(model, trails), evaluating(model):
        yield


def _grams(example: Example) -> set[tuple[int, ...]]:
    """The runs of `GRAM` tokens among those that the model wrote; the whole of them where they are fewer."""
    written = example.ids[example.prompt_length :]
    return {written[i : i + GRAM] for i in range(max(1, len(written) - GRAM + 1))}


def _begin(path: Any, settings: dict[str, Any], model: Any) -> tuple[list[Example], dict[str, Any]]:
    """What is written already, and the note to go on with."""
    if path is not None and Path(path).exists():
        kept, note = _read(Path(path))
        then = note["settings"]
        different = [name for name in {**then, **settings} if then.get(name) != settings.get(name)]
        if different:
            named = "; ".join(f"{n} was {then.get(n)!r:.80}, is {settings.get(n)!r:.80}" for n in different)
            raise ValueError(f"{path} holds samples made otherwise ({named}): give another path, or take the file away")
        return kept, note
    versions = {name: importlib.metadata.version(name) for name in ("tokenpaths", "torch", "transformers")}
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    note = {"name": str(name), "dtype": str(model.dtype), "versions": versions, "settings": settings}
    return [], {**note, **dict(batches=0, drawn=0, alike=0, empty=0)}


def _save(path: Path, note: dict[str, Any], kept: Sequence[Example], tokenizer: Any) -> None:
    """Write the file whole or not at all: a line that says how it was made, then a line a sample."""
    lines: list[dict[str, Any]] = [{"tokenpaths samples": 1, **note, "kept": len(kept)}]
    for example in kept:
        start = example.prompt_length
        text = tokenizer.decode(example.ids[start:])  # for whoever looks into the file: the ids are what is read
        lines.append({"opening": example.ids[:start], "written": example.ids[start:], "text": text})
    files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(path: Path) -> tuple[list[Example], dict[str, Any]]:
    try:
        # not splitlines(), which also splits at characters that JSON leaves as they are
        note, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        if note.pop("tokenpaths samples") != 1:
            raise ValueError("its first line is of another version")
        kept = [
            Example(
                tuple(line["opening"]) + tuple(line["written"]),
                (False,) * len(line["opening"]) + (True,) * len(line["written"]),
            )
            for line in lines
        ]
        if missing := {"name", "settings", "kept", "batches", "drawn", "alike", "empty"} - set(note):
            raise ValueError(f"its first line lacks {', '.join(sorted(missing))}")
        if not isinstance(note["settings"], dict) or note.pop("kept") != len(kept):
            raise ValueError(f"its first line is not of the {len(kept)} samples after it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SampleFileError(f"{path} is not a whole file of self_samples ({error!r:.120})") from None
    return kept, note
