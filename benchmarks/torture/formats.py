"""Every kind of file that tokenpaths reads: how a small one is written, and what is read of it.

A new loader is one entry of `FORMATS`, and inherits the laws of tests/test_laws_files.py and the fuzzing of fuzz.py.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import files
from tokenpaths.data import Choice, Task, Text
from tokenpaths.engine.cone.kept import InFolder
from tokenpaths.files import TrailFileError
from tokenpaths.lab import ab, audit, chains, forgetting, peers, reasoning
from tokenpaths.lab.audit.report import Threshold
from tokenpaths.lab.chains.report import HELD_OUT, TRAIN, Score, WayOrForm
from tokenpaths.lab.forgetting import datasets
from tokenpaths.report.records import Record
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trails import RED
from tokenpaths.training import beside, samples
from tokenpaths.training.checkpoints import Checkpoints
from tokenpaths.training.objectives import targets

DIM = 8


def documented(error: Exception, ours: bool) -> bool:
    """Whether a loader may raise this for a file. Of data sets some errors are about the arguments, as `ValueError`."""
    return isinstance(error, (TrailFileError, OSError)) or (not ours and type(error) is ValueError)


ROOMS = (ab, audit, chains, forgetting, peers, reasoning, tp.drift)  # imported, so that all records are known


@dataclass(frozen=True)
class Format:
    """How a file or folder is written below a folder, which path is read, and what is read, as plain values.

    `ours` says whether this library writes it, with checksums.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    ours: bool = True


def files_of(path: Path) -> list[Path]:
    """The file, or all files in the folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def plain(value: Any) -> Any:
    """Tensors as their bytes, and all else as it is shown: equal if and only if every number is."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().contiguous().flatten().view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return repr(value)


# Tensors


def trails() -> tp.TrailMap:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        here = tp.Site(0, tp.First() | tp.Match(r"\d+"))
        made = tp.TrailMap({here: tp.trails.Scaled(tp.LoReFT(DIM, 2), 0.5), tp.Site(1, tp.Last()): RED(DIM)})
        for parameter in made.parameters():
            nn.init.normal_(parameter)
        return made


def gate() -> Gate:
    made = Gate((0, 1), ((5, 6), (7,)), DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for number in made.buffers():
            number.normal_()
    return made


def saved_gate(folder: Path) -> Path:
    gate().save(folder / "gate.safetensors")
    return folder / "gate.safetensors"


def gated_trails(folder: Path) -> Path:
    made = trails()
    made.gate = gate()
    made.save(folder / "gated.safetensors")
    return folder / "gated.safetensors"


def saved_trails(folder: Path) -> Path:
    trails().save(folder / "trails.safetensors")
    return folder / "trails.safetensors"


def of_map(loaded: tp.TrailMap) -> Any:
    return [repr(loaded), plain(loaded.state_dict())]


def restored(path: Path) -> Any:
    made = trails()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    made.restore(path)
    return of_map(made)


def in_folder(folder: Path) -> Path:
    saved_trails(folder / "run")
    return folder / "run"


def learning() -> tuple[tp.TrailMap, torch.optim.Optimizer]:
    made = trails()
    optimizer = torch.optim.AdamW(made.parameters())
    sum(parameter.square().sum() for parameter in made.parameters()).backward()
    optimizer.step()
    return made, optimizer


def checkpoint(folder: Path) -> Path:
    made, optimizer = learning()
    kept = Checkpoints(folder / "run", {"steps": 3, "lr": 0.1}, 1, False)
    kept.write(2, made, nn.Linear(2, 2), optimizer, [1.0, 0.5], [0.1])
    return folder / "run"


def resumed(path: Path) -> Any:
    made, optimizer = learning()
    weights: list[float] = []
    kept = Checkpoints(path, {"steps": 3, "lr": 0.1}, 1, True)
    rates: list[float] = []
    step = kept.restore(made, optimizer, weights, rates)
    return [step, weights, rates, plain(made.state_dict()), plain(optimizer.state_dict()["state"])]


def cone_store(folder: Path) -> Path:
    store = InFolder(folder / "cone", 1 << 20)
    for number in range(3):
        store.put(f"key{number}", {"states": torch.arange(12.0).view(3, 4) + number, "more": torch.ones(2)})
    store.flush()
    return folder / "cone"


def of_store(path: Path) -> Any:
    store = InFolder(path, 1 << 20)
    return [plain(store.get(f"key{number}")) for number in range(3)]


IDS = [(1, 2, 3), (4, 5, 6, 7)]


def captured(folder: Path) -> Path:
    path = folder / "targets.safetensors"
    positions = [[torch.tensor([1, 2])], [torch.tensor([0, 3])]]
    values = ((number, [torch.randn(2, DIM, generator=torch.Generator().manual_seed(number))]) for number in (1, 0))
    targets.store(path, "states", [tp.Site(0)], {"name": "tiny", "fingerprint": "f" * 16}, IDS, positions, values)
    return path


def of_targets(path: Path) -> Any:
    loaded = targets.Targets.load(path)
    return [plain(loaded.of(ids, 0)) if ids in loaded else None for ids in IDS]


def saved_beside(folder: Path) -> Path:
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "score": nn.Linear(2, 3)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(model["score"].weight)
    files.write(folder / beside.FILE_NAME, {"score.weight": model["score"].weight}, {"also": ["score.weight"]})
    return folder


def loaded_beside(path: Path) -> Any:
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "score": nn.Linear(2, 3)})
    return [beside.load_also(path, model), plain(model["score"].weight)]


@lru_cache(maxsize=1)
def lora() -> peers.PeftAdapter:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    made = peers.PeftAdapter(model)
    with torch.no_grad():
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return made


def saved_lora(folder: Path) -> Path:
    lora().save(folder / "adapter")
    return folder / "adapter"


def restored_lora(path: Path) -> Any:
    lora().restore(path)
    return plain(dict(lora().named_parameters()))


def saved_memory(folder: Path) -> Path:
    peers.DualMemory(trails()).save(folder / "slow.safetensors")
    return folder / "slow.safetensors"


def restored_memory(path: Path) -> Any:
    memory = peers.DualMemory(trails())
    memory.restore(path)
    with memory.slow():
        return [memory.updates, plain(memory.trails.state_dict())]


# JSON


def of_kind(kind: Any) -> Any:
    """Some value of a kind, by its annotations."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Threshold:
        return Threshold({"tokens": 0.5}, {"tokens": 1.5}, 2.5, 9)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if kind is WayOrForm:
            scores = tuple(replace(of_kind(Score), name=name) for name in (TRAIN, HELD_OUT, of_kind(str)))
            return WayOrForm(scores, of_kind(hints["signs"]), of_kind(hints["written"]))
        return kind(**{field.name: of_kind(hints[field.name]) for field in fields(kind)})
    if origin is tuple:
        return tuple(of_kind(part) for part in (parts[:1] * 2 if parts[-1] is Ellipsis else parts))
    if kind == dict[str, dict[str, Any]]:  # the parts of an audit
        return {of_kind(str): {"kind": of_kind(str), "layer": 1, "features": {"sigma": 0.5}}}
    if origin is dict:
        return {of_kind(parts[0]): of_kind(parts[1])}
    if origin is Literal:
        return parts[0]
    if origin in (Union, types.UnionType):
        return of_kind(parts[0])
    return {float: 0.25, int: 3, str: "a $\\frac{$ <b>\x1b[31m é", bool: True, Any: 4}[kind]


def record(kind: type[Record]) -> Format:
    def write(folder: Path) -> Path:
        of_kind(kind).to_json(folder / "record.json")
        return folder / "record.json"

    return Format(write, lambda path: repr(kind.from_json(path)))


def records() -> Iterator[type[Record]]:
    """All kinds of report, but the inside of a Reservoir, which is read as one."""
    return (kind for kind in Record.__subclasses__() if not kind.__name__.startswith("_"))


def saved_task(items: tuple[Any, ...]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Task("letters", items, "a note").save(folder / "task.jsonl")
        return folder / "task.jsonl"

    return write


class Decoder:
    """As much of a tokenizer as a file of samples needs."""

    def decode(self, ids: Any) -> str:
        return "é\ud800" + " ".join(map(str, ids))


def saved_samples(folder: Path) -> Path:
    note = dict(name="tiny", dtype="torch.float32", versions={}, settings={"model": "f" * 16, "seed": 0})
    kept = [tp.Example.of((1, 2), (3, 4, 5)), tp.Example.of((1,), (7,))]
    samples._save(folder / "s.jsonl", {**note, **dict(batches=1, drawn=3, alike=1, empty=0)}, kept, Decoder())
    return folder / "s.jsonl"


def saved_reservoir(folder: Path) -> Path:
    reservoir = peers.Reservoir(3)
    reservoir.extend(tp.Example((1, 2, i), (False, True, True), {"steps": (1, 2)}) for i in range(5))
    reservoir.save(folder / "reservoir.json")
    return folder / "reservoir.json"


def read_reservoir(path: Path) -> Any:
    loaded = peers.Reservoir.load(path)
    return [repr(loaded), list(map(repr, loaded))]


# Data sets, which are not ours and have no checksums


def data_set(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        if "TREC" in name:
            (folder / "trec/TREC.train").write_text("LOC:city Where is B ?\n")
        return folder

    return write


ARC = "Please choose the correct answer to the question: What is hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: x"
PAIR = json.dumps({"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}) + "\n"

FORMATS: dict[str, Format] = {
    "trails": Format(saved_trails, lambda path: of_map(tp.TrailMap.load(path))),
    "trails, restored": Format(saved_trails, restored),
    "trails, from a folder": Format(in_folder, lambda path: of_map(tp.TrailMap.from_pretrained(path))),
    "gate": Format(saved_gate, lambda path: plain(Gate.load(path).state_dict())),
    "trails behind a gate": Format(gated_trails, lambda path: of_map(tp.TrailMap.load(path))),
    "checkpoint": Format(checkpoint, resumed),
    "cone store": Format(cone_store, of_store),
    "targets": Format(captured, of_targets),
    "beside trails": Format(saved_beside, loaded_beside),
    "LoRA": Format(saved_lora, restored_lora),
    "dual memory": Format(saved_memory, restored_memory),
    "samples": Format(saved_samples, lambda path: repr(samples.load_samples(path))),
    "reservoir": Format(saved_reservoir, read_reservoir),
    "texts": Format(saved_task((Text("ab", "c"), Text("d"))), lambda path: repr(Task.load(path))),
    "choices": Format(saved_task((Choice((" a", " b"), 1, "c"),)), lambda path: repr(Task.load(path))),
    **{f"record {kind.__name__}": record(kind) for kind in records()},
    "wikitext2": Format(
        data_set("wikitext2/test.txt", "some words and more of them " * 40),
        lambda folder: repr(datasets.wikitext2(folder, windows=2, characters=100)),
        ours=False,
    ),
    "trec": Format(
        data_set("trec/TREC.test", "NUM:count How many A are there ?\n"),
        lambda folder: repr(datasets.trec(folder)),
        ours=False,
    ),
    "trec, pairs": Format(
        data_set("trec/TREC.test", "NUM:count How many A are there ?\n"),
        lambda folder: repr(datasets.trec_pairs(folder)),
        ours=False,
    ),
    "arc_easy": Format(
        data_set("arc_easy/test.json", json.dumps([{"instruction": ARC, "answer": "answer2"}])),
        lambda folder: repr(datasets.arc_easy(folder)),
        ours=False,
    ),
    "blimp": Format(data_set("blimp/a.jsonl", PAIR * 2), lambda folder: repr(datasets.blimp(folder)), ours=False),
}
