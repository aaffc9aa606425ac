"""Trail files: what is written comes back bit for bit, and nothing but that comes back."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import jaxtyping
import pytest
import safetensors.torch
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING, TRAILS
from torch import Tensor, nn

import tokenpaths
from benchmarks.torture.mutants import packed
from tokenpaths import (
    All,
    Answer,
    AnswerFirst,
    Capped,
    First,
    Last,
    LoReFT,
    Match,
    NoReFT,
    Prompt,
    Scaled,
    Site,
    Span,
    Tokens,
    Trail,
    TrailMap,
)
from tokenpaths.files import TrailFileError
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.trailmap import notes
from tokenpaths.trails import RED, Chain, OrthonormalRows

DIM = 16
RULES = [
    All(),
    Prompt(),
    Answer(),
    AnswerFirst(8),
    First(),
    Last(3),
    Tokens([5, 2]),
    Match(r"\d+ é\"\\"),
    Span("steps ü"),
    First(2) | Last(1),
    Answer() & Tokens([1]),
    Prompt() - ~(First(1) | Match("[\n]")),
]


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def equal(one: TrailMap, other: TrailMap) -> None:
    """The same map bit for bit: parameters, what they are called, and what they do."""
    assert repr(one) == repr(other)
    assert (one.sites, one.index, one.blocks) == (other.sites, other.index, other.blocks)
    before, after = one.state_dict(), other.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(tensor.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)), name
    for site, trail in one.items():
        h = states(next(trail.parameters()).dtype)
        assert torch.equal(trail(h), other[site](h)), site


def everything(dtype: torch.dtype = torch.float32) -> TrailMap:
    """Every trail, every rule, every stream; the first trail tied over three sites."""
    pairs = [(Site(i, RULES[i % len(RULES)]), make(DIM)) for i, make in enumerate(MOVING.values())]
    streams = [Site(1, All(), "attention", 3), Site(0, All(), "embedding"), Site(-1, All(), "mlp")]
    return TrailMap([*pairs, *((site, pairs[0][1]) for site in streams)], blocks="model.layers").to(dtype)


# ----------------------------------------------------------------------------- what is written comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_every_trail_rule_and_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    trails = everything(dtype)
    trails.save(tmp_path / "folder" / "made" / "t.safetensors")
    loaded = TrailMap.load(tmp_path / "folder" / "made" / "t.safetensors")
    equal(trails, loaded)
    assert len(loaded.trails) == len(MOVING)
    assert len(loaded) == len(MOVING) + 3
    assert loaded[Site(1, All(), "attention", 3)] is loaded[Site(0, RULES[0])], "tied trails are one trail again"
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.training
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "folder" / "made" / "t.safetensors").read_bytes()


@pytest.mark.parametrize("name", TRAILS)
def test_a_fresh_trail_and_its_gradient(tmp_path, name):
    trails = TrailMap({Site(0): TRAILS[name](DIM)})
    trails.save(tmp_path / "t")
    loaded = TrailMap.load(tmp_path / "t")
    equal(trails, loaded)
    for each in (trails, loaded):
        each[Site(0)](states()).square().sum().backward()
    for (key, one), (_, other) in zip(trails.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key


OTHER_PROCESS = """
import sys, torch
from tokenpaths import Site, Trail, TrailMap
from tokenpaths.files import TrailFileError

class Shift(Trail):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = torch.nn.Parameter(torch.arange(dim) + 0.5)
    def forward(self, h):
        return self.v.expand_as(h)

folder = sys.argv[1]
h = torch.load(f"{folder}/states")
for dtype in ("float32", "bfloat16"):
    trails = TrailMap.load(f"{folder}/{dtype}")
    torch.save([trail(h.to(getattr(torch, dtype))) for _, trail in trails.items()], f"{folder}/{dtype}.moved")
TrailMap({Site(0): Shift(3)}).save(f"{folder}/shift")
print(TrailMap.load(f"{folder}/shift", Shift)[Site(0)].v.tolist())
try:
    TrailMap.load(f"{folder}/shift")
except TrailFileError as error:
    print(error)
"""


def test_saved_in_one_process_loaded_in_another_and_a_class_of_the_main_program(tmp_path):
    maps = {"float32": everything(), "bfloat16": everything(torch.bfloat16)}
    for dtype, trails in maps.items():
        trails.save(tmp_path / dtype)
    torch.save(states(), tmp_path / "states")
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenpaths.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", OTHER_PROCESS, str(tmp_path)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    for dtype, trails in maps.items():
        moved = [trail(states(getattr(torch, dtype))) for _, trail in trails.items()]
        assert all(map(torch.equal, torch.load(tmp_path / f"{dtype}.moved"), moved))
    numbers, refusal = done.stdout.splitlines()
    assert numbers == "[0.5, 1.5, 2.5]"
    assert refusal == f"{tmp_path}/shift: the file holds a trail of class 'Shift': pass that class to load(path, ...)"


def test_parameters_that_are_views_of_one_storage(tmp_path):
    trails = TrailMap({Site(0): MOVING["NoReFT"](DIM), Site(1): MOVING["RED"](DIM)})
    vector = nn.utils.parameters_to_vector(trails.parameters())
    nn.utils.vector_to_parameters(vector.detach().clone(), trails.parameters())
    trails.save(tmp_path / "t")
    equal(trails, TrailMap.load(tmp_path / "t"))


def test_load_leaves_the_random_numbers_alone(tmp_path):
    everything().save(tmp_path / "t")
    before = torch.get_rng_state()
    TrailMap.load(tmp_path / "t")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TrailFileError):
        TrailMap.load(edited(tmp_path / "t", lambda note: note["trails"][0]["arguments"].update(rank=17)))
    assert torch.equal(torch.get_rng_state(), before)


def test_load_heeds_no_default_device(tmp_path):
    everything().save(tmp_path / "t")
    with torch.device("meta"):
        loaded = TrailMap.load(tmp_path / "t")
    equal(everything(), loaded)


# ----------------------------------------------------------------------------- one file, whole or not at all


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    old = everything()
    old.save(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space left"):
                TrailMap({Site(0): LoReFT(DIM, 2)}).save(tmp_path / "t")
        assert [path.name for path in tmp_path.iterdir()] == ["t"]
        assert (tmp_path / "t").read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        old.save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "t"]


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    old = os.umask(0o027)
    try:
        TrailMap({Site(0): RED(DIM)}).save(tmp_path / "t")
    finally:
        os.umask(old)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640


def test_a_folder_in_place_of_a_file_is_told_with_what_to_do(tmp_path):
    trails = everything()
    with pytest.raises(IsADirectoryError, match=f"is a folder, and a map is one file: save to {tmp_path}/trails.s"):
        trails.save(tmp_path)
    with pytest.raises(IsADirectoryError, match=f"is a folder: load {tmp_path}/trails.safetensors, or use TrailMap.f"):
        TrailMap.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_version_before_has_no_checksums_and_is_loaded_without_a_word(tmp_path):
    trails = everything()
    trails.save(tmp_path / "t")
    tensors, metadata = parts(tmp_path / "t")
    note = json.loads(metadata["tokenpaths"])
    del note["sha256"]
    old = {"tokenpaths": json.dumps({**note, "version": 1}, sort_keys=True)}
    (tmp_path / "t").write_bytes(safetensors.torch.save(tensors, old))
    equal(trails, TrailMap.load(tmp_path / "t"))
    trails.restore(tmp_path / "t")


def test_every_flipped_bit_of_a_trail_file_is_noticed(tmp_path, unchecked):
    path = tmp_path / "t"
    TrailMap({Site(0): RED(2)}).save(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(TrailFileError, match=re.escape(str(path))):
            TrailMap.load(path)


# ----------------------------------------------------------------------------- restore, and folders of one's own


def test_restore_takes_no_nan_no_other_sites_and_no_other_trails(tmp_path):
    trails = TrailMap({Site(0, Last()): LoReFT(4, 2), Site(1): own()})
    trails.save(tmp_path / "t")
    before = {name: tensor.clone() for name, tensor in trails.state_dict().items()}
    trails.restore(tmp_path / "t")  # with a class of one's own
    for other, message in (
        (
            with_tensors(tmp_path / "t", {"trails.0.W": before["trails.0.W"] * float("nan")}),
            "trails.0.W holds NaN",
        ),
        ({Site(0, First()): LoReFT(4, 2), Site(1): own()}, "has trails at Site(layer=0, tokens=First(n=1)"),
        ({Site(0, Last()): LoReFT(4, 1), Site(1): own()}, "tensor 'trails.0.W' has shape [1, 4] in the file, [2, 4]"),
        ({Site(0, Last()): RED(4), Site(1): own()}, "the file lacks tensors that its note calls for: trails.0.W"),
    ):
        if isinstance(other, dict):
            TrailMap(other).save(tmp_path / "t")
        with pytest.raises(TrailFileError, match=re.escape(f"{tmp_path}/t") + ".*" + re.escape(message)):
            trails.restore(tmp_path / "t")
        assert all(torch.equal(tensor, before[name]) for name, tensor in trails.state_dict().items())


@pytest.mark.parametrize(
    "repo",
    ["runs/best", "there/best", "./best", "/nowhere/best", "../x", "a/b/c", "~/best", "a\\b", "best/", "", "outputs/a"],
)
def test_the_hub_is_not_asked_for_a_folder_that_is_missing(tmp_path, monkeypatch, repo):
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the Hub is asked")

    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    for name in [repo, Path("some/folder")]:
        if not name:  # the folder here, without a file
            continue
        with pytest.raises(FileNotFoundError, match="there is no folder .* name it owner/name and give revision="):
            TrailMap.from_pretrained(name)
    for name, options in (("me/trails", {}), ("trails", {}), (repo or "x", dict(revision="main"))):
        with pytest.raises(AssertionError, match="the Hub is asked"):
            TrailMap.from_pretrained(name, **options)


# ----------------------------------------------------------------------------- one's own classes


class Own(Trail):
    """A user's trail: arguments of every kind that a file holds, a buffer, and a constructor that is picky."""

    def __init__(self, dim: int, seed: int, names: list[str], parts: list[Trail], inner: Trail | None = None) -> None:
        super().__init__()
        self.dim, self.seed, self.names, self.parts, self.inner = dim, seed, names, parts, inner
        self.list = nn.ModuleList(parts)
        # a generator of the CPU refuses to work for the meta device
        self.v = nn.Parameter(torch.randn(dim, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, h: Tensor) -> Tensor:
        return sum((part(h) for part in self.list), self.v.expand_as(h)) * self.steps


def own(**changes: object) -> Own:
    boxes = [RED(DIM), MOVING["Capped"](DIM)]
    given = dict(dim=DIM, seed=4, names=["a", "b"], parts=boxes, inner=Scaled(RED(DIM), 0.5))
    return Own(**{**given, **changes})


def test_a_class_of_ones_own_must_be_passed(tmp_path):
    trails = TrailMap({Site(0): Chain(own(), RED(DIM))})
    trails.save(tmp_path / "t")
    with pytest.raises(TrailFileError, match=re.escape("class 'Own': pass that class to load(path, ...)")):
        TrailMap.load(tmp_path / "t")
    loaded = TrailMap.load(tmp_path / "t", Own)
    equal(trails, loaded)
    assert isinstance(loaded[Site(0)].first.parts[1], Capped)


def test_only_classes_of_trails_may_follow_the_path(unchecked, tmp_path):
    for what in (torch, nn.Linear, RED(2), "RED"):
        with pytest.raises(TypeError, match=r"only Trail classes may follow the path, not .*; a model is given as mod"):
            TrailMap.load(tmp_path / "t", what)


def test_a_buffer_of_another_kind_is_refused(tmp_path):
    TrailMap({Site(0): own()}).save(tmp_path / "t")
    for value in (torch.tensor(3.0), torch.tensor(3, dtype=torch.int32), torch.tensor(True)):
        path = with_tensors(tmp_path / "t", {"trails.0.steps": value})
        message = f"'trails.0.steps' is {value.dtype} in the file, torch.int64 by the note"
        with pytest.raises(TrailFileError, match=re.escape(message)):
            TrailMap.load(path, Own)


def test_two_classes_of_one_name(tmp_path):
    def made(base: type[Trail]) -> type[Trail]:
        return type("NoReFT", (base,), {})

    mine = made(NoReFT)
    with pytest.raises(TypeError, match="your class NoReFT has the name of one of tokenpaths' own trails: rename it"):
        TrailMap({Site(0): Scaled(mine(DIM, 2), 1.0)}).save(tmp_path / "t")
    assert not (tmp_path / "t").exists()
    TrailMap({Site(0): NoReFT(DIM, 2)}).save(tmp_path / "t")
    with pytest.raises(ValueError, match="two different trail classes are named NoReFT"):
        TrailMap.load(tmp_path / "t", mine)
    assert type(TrailMap.load(tmp_path / "t", NoReFT)[Site(0)]) is NoReFT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(names={"a": 1}), "Own: argument 'names' is {'a': 1}, which a trail file cannot hold: use finite numbers"),
        (dict(names=[torch.zeros(1)]), "Own: argument 'names' is tensor([0.]), which a trail file cannot hold"),
        (dict(seed=float("nan")), "Own: argument 'seed' is nan, which a trail file cannot hold"),
        (dict(names=float("inf")), "Own: argument 'names' is inf, which a trail file cannot hold"),
    ],
)
def test_arguments_that_a_file_cannot_hold(tmp_path, change, message):
    trail = own()
    vars(trail).update(change)
    with pytest.raises(TypeError, match=re.escape(message)):
        TrailMap({Site(0): trail}).save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def nested(levels: int) -> tuple[TrailMap, TrailMap, TrailMap]:
    trail, rule, names = RED(4), First(), []
    for _ in range(levels):
        trail, rule, names = Scaled(trail, 1.0), rule | Last(), [names]
    return TrailMap({Site(0): trail}), TrailMap({Site(0, rule): RED(4)}), TrailMap({Site(0): own(names=names)})


def test_nesting_as_deep_as_may_be_saved_may_be_loaded(tmp_path):
    for trails in nested(60):
        trails.save(tmp_path / "t")
        assert repr(TrailMap.load(tmp_path / "t", Own)) == repr(trails)
    for trails in nested(70):
        with pytest.raises(ValueError, match="is nested more than 64 deep"):
            trails.save(tmp_path / "u")
    assert not (tmp_path / "u").exists()


# ----------------------------------------------------------------------------- refused at save, by name


def test_nan_is_refused_by_name(tmp_path):
    for value in (float("nan"), float("inf")):
        trails = everything()
        trails.trails[3].b.data[1] = value
        with pytest.raises(ValueError, match=re.escape("not saved: trails.3.b holds NaN or infinity")):
            trails.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_inside_two_trails_is_refused(tmp_path):
    shared = NoReFT(DIM, 2)
    other = NoReFT(DIM, 2)
    other.W = shared.W
    for trails in (
        {Site(0): Scaled(shared, 1.0), Site(1): Scaled(shared, 2.0)},
        {Site(0): Chain(shared, shared)},
        {Site(0): shared, Site(1): other},
    ):
        with pytest.raises(ValueError, match="a parameter is shared inside the trails; tie whole trails"):
            TrailMap(trails).save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
    TrailMap({Site(0): shared, Site(1): shared}).save(tmp_path / "t")


def test_a_rule_of_ones_own_is_refused(tmp_path):
    class Even(tokenpaths.tokens.Rule):
        def choose(self, context: tokenpaths.tokens.Context) -> Tensor:
            return context.real & (context.real.cumsum(1) % 2 == 1)

    with pytest.raises(TypeError, match="is a rule of your own and cannot be saved; combine the rules of tokenpaths"):
        TrailMap({Site(0, All() - Even()): RED(4)}).save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", ["twice", "zero", "almost"])
def test_rows_that_depend_on_each_other_are_refused(tmp_path, spoil):
    sound = TrailMap({Site(0): Scaled(LoReFT(DIM, 3), 2.0)})
    sound.save(tmp_path / "sound")
    weight = sound.state_dict()["trails.0.trail.rotation.weight"].clone()
    # QR makes an orthonormal factor of each of these as well, but one that rounding chose
    weight[1] = {"twice": weight[0], "zero": weight[0] * 0, "almost": 3 * weight[0] + 1e-7 * weight[2]}[spoil]
    name = "trails.0.trail.rotation"
    message = f"the rows of {name}.weight depend on each other, so they span no subspace of their number"
    with pytest.raises(TrailFileError, match=re.escape(f"{tmp_path}/sound: {message}")):
        TrailMap.load(with_tensors(tmp_path / "sound", {f"{name}.weight": weight}))
    with torch.no_grad():
        sound.get_parameter(f"{name}.weight").copy_(weight)
    with pytest.raises(ValueError, match=re.escape(f"not saved: {message}")):
        sound.save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_rows_of_any_sound_size_are_kept_and_rows_that_overflow_refused(tmp_path):
    trails = TrailMap({Site(0): LoReFT(DIM, 3)})
    trails.save(tmp_path / "t")
    name = "trails.0.rotation.weight"
    weight = trails.state_dict()[name].clone()
    content = (tmp_path / "t").read_bytes()
    for scale in (1e-30, 1e30, torch.tensor([[1.0], [1e-4], [30.0]])):
        equal_rows = TrailMap.load(with_tensors(tmp_path / "t", {name: weight * scale}))
        assert (equal_rows[Site(0)].R - trails[Site(0)].R).abs().max() < 1e-5
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(TrailFileError, match=re.escape(f"{name} does not give orthonormal rows")):
        TrailMap.load(with_tensors(tmp_path / "t", {name: weight.sign() * 3e38}))


# ----------------------------------------------------------------------------- the base model


def test_a_file_for_another_model_warns_and_names_both(tmp_path):
    llama, gpt2 = FAMILIES["llama"].make(), FAMILIES["gpt2"].make()
    llama.config._name_or_path = "someone/llama"
    trails = TrailMap({Site(0): RED(32)})
    trails.save(tmp_path / "t", llama)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TrailMap.load(tmp_path / "t", model=gpt2)
    assert str(caught[0].message) == (
        f"{tmp_path}/t was made for someone/llama (weights {fingerprint(llama)}), but the model given is "
        f"GPT2LMHeadModel (weights {fingerprint(gpt2)}): measure before you trust the trails on it"
    )
    assert len(caught) == 1
    # no warning: the same weights under another name, in another dtype, in a wrapper, or no word about the base
    same = copy.deepcopy(llama).to(torch.bfloat16)
    same.config._name_or_path = "/a/folder"
    TrailMap.load(tmp_path / "t", model=same)
    TrailMap.load(tmp_path / "t", model=nn.DataParallel(llama))
    trails.save(tmp_path / "u")
    TrailMap.load(tmp_path / "u", model=gpt2)


def test_fingerprint():
    model = FAMILIES["llama"].make()
    first = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint(FAMILIES["llama"].make()) == first
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == first
    assert fingerprint(copy.deepcopy(model).to(torch.float64)) == first
    for name, parameter in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():  # one weight, anywhere
            changed.get_parameter(name).view(-1)[hash(name) % parameter.numel()] += 3
        assert fingerprint(changed) != first, name
    swapped = copy.deepcopy(model)
    with torch.no_grad():  # the same values in another order
        swapped.model.norm.weight.copy_(torch.arange(32))
        one = fingerprint(swapped)
        swapped.model.norm.weight.copy_(torch.arange(32).flip(0))
        assert fingerprint(swapped) != one
    assert fingerprint(copy.deepcopy(model).to("meta")) != first
    # trails that a trainer put among the model's modules are not of the model
    model.add_module("trails", everything())
    assert fingerprint(model) == first


# ----------------------------------------------------------------------------- damaged and hostile files


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), header["__metadata__"]


def with_tensors(path: Path, changes: dict[str, Tensor]) -> Path:
    tensors, metadata = parts(path)
    path.write_bytes(packed({**tensors, **changes}, metadata))
    return path


def with_note(path: Path, text: str) -> Path:
    tensors, _ = parts(path)
    path.write_bytes(packed(tensors, {"tokenpaths": text}))
    return path


def edited(path: Path, edit: Callable[[dict], object]) -> Path:
    note = json.loads(parts(path)[1]["tokenpaths"])
    edit(note)
    return with_note(path, json.dumps(note))


FORBIDDEN = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
SEEN: list[str] | None = None


def report(event: str, args: tuple[object, ...]) -> None:
    if SEEN is not None and event in FORBIDDEN:
        SEEN.append(f"{event} {args[:1]!r:.80}")


@pytest.fixture(scope="module")
def nothing_executed(tmp_path_factory) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the interpreter reports every import, exec and new process; there must be none.

    Without the run-time check of types, which compiles code and would hide what the library itself refuses.
    """
    path = tmp_path_factory.mktemp("warm") / "t"
    everything().save(path)
    TrailMap.load(path)  # torch imports parts of itself when they are first used
    content = path.read_bytes()
    for place in (10, len(content) - 1):  # and types are compiled when a message is first told
        path.write_bytes(content[:place] + b"!" + content[place + 1 :])
        with pytest.raises(TrailFileError):
            TrailMap.load(path)
    sys.addaudithook(report)

    @contextmanager
    def silent() -> Iterator[None]:
        global SEEN
        jaxtyping.config.update("jaxtyping_disable", True)
        # jaxtyping 0.2 goes on to check dataclasses.
        with mock.patch("jaxtyping._decorator._check_dataclass_annotations", create=True):
            SEEN = []
            try:
                yield
                assert SEEN == []
            finally:
                SEEN = None
                jaxtyping.config.update("jaxtyping_disable", False)

    return silent


@pytest.fixture
def small(tmp_path) -> Path:
    TrailMap({Site(0, First() | Match("a")): Scaled(LoReFT(4, 2), 0.5), Site(1): RED(4)}).save(tmp_path / "t")
    return tmp_path / "t"


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TrailMap.load(tmp_path / "nowhere")


def test_a_file_cut_at_every_fiftieth_of_its_length(small):
    content = small.read_bytes()
    for fiftieth in range(50):
        small.write_bytes(content[: len(content) * fiftieth // 50])
        with pytest.raises(TrailFileError, match=re.escape(f"{small} is not a whole safetensors file")):
            TrailMap.load(small)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "tokenpaths.files.write",
        "tokenpaths.trails.LoReFT",
        "Trail",
        "LowRank",
        "Rotated",
        "OrthonormalRows",
        "TrailMap",
        "Module",
        "arguments",
        "torch",
        "__builtins__",
        "__class__",
        "__init__",
        "eval",
        "loreft",
        "",
    ],
)
def test_only_the_names_of_whole_trails_mean_anything(small, name, nothing_executed):
    path = edited(small, lambda note: note["trails"][1].update({"class": name}))
    with nothing_executed(), pytest.raises(TrailFileError) as caught:
        TrailMap.load(path)
    assert str(caught.value) == f"{small}: the file holds a trail of class {name!r}: pass that class to load(path, ...)"


@pytest.mark.parametrize("name", ["Rule", "Pair", "Context", "re.compile", "__class__", "Site", "leaves", "", 5, []])
def test_only_the_names_of_whole_rules_mean_anything(small, name):
    path = edited(small, lambda note: note["sites"][0]["tokens"].update({"class": name}))
    with pytest.raises(TrailFileError, match=re.escape(f"{small}: the file names an unknown token rule")):
        TrailMap.load(path)


def set_in(*path: str | int, to: object) -> Callable[[dict], object]:
    def edit(note: dict) -> None:
        for key in path[:-1]:
            note = note[key]
        note[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("version", to=3), "its note is of version 3, this tokenpaths reads versions 1 to 2"),
        (lambda note: note.pop("version"), "its note is of no known version"),
        (lambda note: note.pop("base"), "its note has the keys blocks, sites, trails"),
        (set_in("more", to=1), "its note has the keys base, blocks, more, sites, trails"),
        (set_in("trails", to={}), "its trails and sites must be lists"),
        (set_in("blocks", to=3), "its blocks must be a string or null, not 3"),
        (set_in("base", to={"name": 1, "fingerprint": "x"}), "its base must have a name and a fingerprint"),
        (set_in("base", to="gpt2"), "its base must have a name and a fingerprint, but is 'gpt2'"),
        (set_in("trails", to=[]), "a site must name one of the 0 trails"),
        (set_in("sites", to=[]), "a TrailMap needs at least one trail"),
        (set_in("sites", 0, "trail", to=1), "its sites must name every trail, in order"),
        (set_in("sites", 0, "trail", to=True), "a site must name one of the 2 trails"),
        (set_in("sites", 0, "trail", to=-1), "a site must name one of the 2 trails"),
        (set_in("sites", 0, "layer", to="0"), "the file names an impossible site: Site(layer='0'"),
        (set_in("sites", 0, "stream", to="blocks"), "unknown stream 'blocks'"),
        (set_in("sites", 0, "stream", to=[["block"]]), "unknown stream [['block']]"),
        (set_in("sites", 0, "head", to=1), "a head is part of stream 'attention'"),
        (set_in("sites", 0, "head", to=[0]), "head is the number of one attention head"),
        (lambda note: note["sites"].append(note["sites"][1]), "is named twice"),
        (set_in("sites", 0, "tokens", "left", "n", to=0), "the file holds an impossible token rule: First(n=0)"),
        (
            set_in("sites", 0, "tokens", "left", "n", to=10**400),
            "an impossible token rule: First(n=1000",
        ),
        (set_in("sites", 0, "tokens", "left", to=3), "both sides must be token rules"),
        (set_in("sites", 0, "tokens", "right", "pattern", to="("), "Match('(') is not a regular expression"),
        (set_in("sites", 0, "tokens", "right", "pattern", to="(" * 9999 + ")" * 9999), "is not a regular expression"),
        (set_in("sites", 0, "tokens", to={"class": "Tokens", "ids": [-1]}), "token ids are whole numbers from 0 up"),
        (set_in("sites", 0, "tokens", to={"class": "Tokens", "ids": "12"}), "Tokens takes a sequence of token ids"),
        (set_in("sites", 0, "tokens", to={"class": "Span", "name": 3}), "Span takes the name of a span"),
        (set_in("sites", 0, "tokens", to={"class": "All", "n": 3}), "the note of All must have the keys class, but is"),
        (set_in("trails", 1, "arguments", to=[4]), "the arguments of RED must be a JSON object, not [4]"),
        (
            set_in("trails", 1, "arguments", "dim", to=-4),
            "RED cannot be built with the arguments in the file, {'dim'",
        ),
        (set_in("trails", 1, "arguments", "self", to=4), "RED cannot be built with the arguments in the file"),
        (
            set_in("trails", 1, "arguments", "dim", to=5),
            "'trails.1.s' has shape [4] in the file, [5] by the note",
        ),
        (
            set_in("trails", 0, "arguments", "trail", "arguments", "rank", to=5),
            "rank 5 must be from 1 to dim 4",
        ),
        (
            set_in("trails", 0, "arguments", "factor", to=1e999),
            "not JSON (Infinity is not a finite number)",
        ),
        (
            set_in("trails", 0, "arguments", "factor", to=float("nan")),
            "not JSON (NaN is not a finite number)",
        ),
        (set_in("trails", 0, "class", to="Gated"), "Gated cannot be built with the arguments in the file"),
        (set_in("trails", 1, "class", to="Additive"), "the file lacks tensors that its note calls for: trails.1.v"),
    ],
)
def test_a_note_that_does_not_fit_is_refused_with_a_message(small, unchecked, edit, message):
    with pytest.raises(TrailFileError) as caught:
        TrailMap.load(edited(small, edit))
    assert str(caught.value).startswith(str(small))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_other_files(small):
    good = parts(small)[1]["tokenpaths"]
    for text, message in [
        ("{", "its note is not JSON"),
        ("[1]", "its note is of no known version"),
        ("[" * 100_000, "its note is not JSON"),
        (good.replace('"version": 2', '"version": 2, "version": 2'), "a key stands twice in one object"),
        (good.replace('"factor": 0.5', '"factor": 1e999'), "1e999 is not a finite number"),
        (good.replace('"factor": 0.5', '"factor": ' + "9" * 5000), "its note is not JSON"),
    ]:
        with pytest.raises(TrailFileError, match=re.escape(message)):
            TrailMap.load(with_note(small, text))
    headers = [b"{}", b'{"__metadata__":null}', b'{"__metadata__":{"Tokenpaths":"{}"}}']
    bare = [struct.pack("<Q", len(header)) + header for header in headers]
    for content in (safetensors.torch.save({"x": torch.zeros(2)}), *bare):
        small.write_bytes(content)
        with pytest.raises(
            TrailFileError, match="a safetensors file, but not of tokenpaths: it has no 'tokenpaths' no"
        ):
            TrailMap.load(small)
    for content in (b"", b"\0" * 8, b"PK\x03\x04" * 50, b"\xff" * 64, struct.pack("<Q", 2**63) + b"{}"):
        small.write_bytes(content)
        with pytest.raises(TrailFileError, match="is not a whole safetensors file"):
            TrailMap.load(small)


@pytest.mark.parametrize("levels", [30, 70, 200, 400, 600, 800, 900, 950, 3000])
def test_a_note_of_any_depth(small, levels):
    deep = {
        "lists": "[" * levels + "1" + "]" * levels,
        "trails": '{"class": "Scaled", "arguments": {"factor": 1.0, "trail": ' * levels + "1" + "}}" * levels,
        "rules": '{"class": "Not", "rule": ' * levels + "1" + "}" * levels,
    }
    content = small.read_bytes()
    for edit in (
        set_in("trails", 1, "arguments", "dim", to="HERE"),
        set_in("trails", 1, to="HERE"),
        set_in("sites", 1, "tokens", to="HERE"),
        set_in("sites", 1, to="HERE"),
        set_in("base", to="HERE"),
        set_in("blocks", to="HERE"),
        set_in("version", to="HERE"),
    ):
        text = parts(edited(small, edit))[1]["tokenpaths"]
        for inner in deep.values():
            with pytest.raises(TrailFileError, match=re.escape(str(small))):
                TrailMap.load(with_note(small, text.replace('"HERE"', inner)))
        small.write_bytes(content)


def test_a_note_that_asks_for_the_moon_fails_fast_and_in_little_memory(small):
    huge = [
        set_in("trails", 1, "arguments", "dim", to=10**12),
        set_in("trails", 1, "arguments", "dim", to=10**25),
        set_in("trails", 0, "arguments", "trail", "arguments", to={"dim": 10**12, "rank": 10**12}),
        set_in("trails", 0, "arguments", "trail", "arguments", to={"dim": 10**12, "rank": 2}),
        set_in("trails", 0, "arguments", "trail", "arguments", to={"dim": 10**6, "rank": 10**4}),
    ]
    content = small.read_bytes()
    for edit in huge:
        path = edited(small, edit)
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(TrailFileError):
            TrailMap.load(path)
        assert time.perf_counter() - start < 2
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()
        small.write_bytes(content)


@mock.patch("jaxtyping._decorator._check_dataclass_annotations", mock.Mock(), create=True)  # 0.2 compiles for each Site
def test_many_sites_take_time_in_proportion(tmp_path):
    trail = RED(2)
    trails = TrailMap([(Site(layer), trail) for layer in range(5_000)])
    trails.save(tmp_path / "t")
    start = time.perf_counter()
    assert len(TrailMap.load(tmp_path / "t")) == 5_000
    assert time.perf_counter() - start < 10


# --------------------------------------------------------------- two thousand mutated files

WILD = st.sampled_from(
    [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**12, 10**30, 0.5, -1e308, 1e999, float("nan"), "", "(", "block"]
    + ["LoReFT", "Rule", "attention", "__import__", "os.system", "\ud800", "x" * 10_000, [], [0], [[[]]], {}]
    + [{"class": "All"}, {"class": "Not", "rule": 1}, {"class": "Trail"}, {"class": "RED", "arguments": {"dim": 4}}]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]
if torch.complex64 in safetensors.torch._SIZE:
    DTYPES.append(torch.complex64)


def places(note: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every value of a JSON document, by the keys that lead to it."""
    inner = note.items() if isinstance(note, dict) else enumerate(note) if isinstance(note, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """One damaged file: its bytes, its note or its tensors."""
    kind = draw(st.sampled_from(["bytes", "bytes", "note", "note", "note", "text", "tensors", "metadata"]))
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        start, stop = draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))
        cut = draw(st.sampled_from(["", "", "drop", "repeat"]))
        if cut == "drop":
            return bytes(changed[:start] + changed[stop:])
        return bytes(changed + changed[start:] * (cut == "repeat"))
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(content)
    if kind == "note":
        note = json.loads(metadata["tokenpaths"])
        for _ in range(draw(st.integers(1, 2))):
            where = draw(st.sampled_from([place for place in places(note) if place]))
            inner = note
            for key in where[:-1]:
                inner = inner[key]
            action = draw(st.sampled_from(["set", "set", "drop", "copy", "more"]))
            if action == "set":
                inner[where[-1]] = copy.deepcopy(draw(WILD))
            elif action == "drop":
                del inner[where[-1]]
            elif isinstance(inner, list):
                inner.append(copy.deepcopy(inner[where[-1]]) if action == "copy" else copy.deepcopy(draw(WILD)))
            else:
                inner[draw(st.sampled_from(["dim", "rank", "rule", "class", "self", "more"]))] = copy.deepcopy(
                    draw(WILD)
                )
        metadata["tokenpaths"] = json.dumps(note)
    elif kind == "text":
        text = metadata["tokenpaths"]
        start, stop = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        twice = text[start:stop] * 2
        changed = draw(st.sampled_from(["", "1", '"', "[", "{}", "1e9999", "NaN", twice, '"dim": 4, "dim": 5']))
        metadata["tokenpaths"] = text[:start] + changed + text[min(stop, start + draw(st.integers(0, 9))) :]
    elif kind == "tensors":
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        action = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "value", "more", "zero"]))
        if action == "dtype":
            tensor = tensor.to(draw(st.sampled_from(DTYPES)))
        elif action == "shape":
            tensor = draw(st.sampled_from([tensor.flatten()[:-1], tensor[None], tensor.new_zeros(0)]))
        elif action == "value":
            flat = tensor.flatten().clone()
            flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from([float("nan"), float("inf"), 3e38, 1e-45]))
            tensor = flat.view(tensor.shape)
        elif action == "zero":
            tensor = torch.zeros_like(tensor)
        if action != "drop":
            tensors[name + "x" if action == "rename" else name] = tensor.contiguous()
        if action == "more":
            tensors["trails.9.W"] = torch.zeros(2)
    else:
        others = [{}, {"format": "pt"}, {**metadata, "format": "pt"}, {"Tokenpaths": metadata["tokenpaths"]}]
        metadata = draw(st.sampled_from(others))
    return packed(tensors, metadata)


def sound(path: Path, trails: TrailMap) -> None:
    """What was loaded is a whole map: shapes by its own arguments, finite, orthonormal; it can move and be saved."""
    for trail in trails.trails:
        rebuilt = notes.trail_from_note(notes.trail_to_note(trail), notes.named([])).state_dict()
        kept = trail.state_dict()
        assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in rebuilt.items()}
        assert all(tensor.dtype.is_floating_point and tensor.isfinite().all() for tensor in kept.values())
        for part in trail.modules():
            if isinstance(part, OrthonormalRows):
                rows = part()
                assert (rows @ rows.mT - torch.eye(len(rows))).abs().max() < 1e-4
        if len({tensor.dtype for tensor in kept.values()}) == 1:
            h = torch.ones(3, 4, dtype=next(iter(kept.values())).dtype)
            assert trail(h).shape == h.shape
    trails.save(path.with_name("again"))


def test_three_thousand_damaged_files_are_refused_or_sound(tmp_path, nothing_executed):
    trail, path = MOVING["LoReFT"](4), tmp_path / "t"
    trails = {
        Site(0, First(2) | Match("a")): Capped(MOVING["Gated"](4), 0.5),
        Site(1, ~Tokens([1, 2])): trail,
        Site(2, Span("s") - Last()): trail,
        Site(-1, All(), "attention", 1): MOVING["ReFTr1"](4),
    }
    TrailMap(trails).save(path, FAMILIES["gpt2"].make())
    counts = {"refused": 0, "sound": 0}

    @settings(max_examples=3000)
    @given(mutations(path.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        random, loaded, refusal = torch.get_rng_state(), None, str(path)
        with nothing_executed():
            try:
                loaded = TrailMap.load(path)
            except TrailFileError as error:
                refusal = str(error)
            if loaded is not None:
                assert torch.equal(torch.get_rng_state(), random)
                sound(path, loaded)
        assert refusal.startswith(str(path))
        counts["refused" if loaded is None else "sound"] += 1

    check()
    assert min(counts.values()) > 100, counts


# ----------------------------------------------------------------------------- TrailMap


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "a TrailMap needs at least one trail: TrailMap({Site(15, Last(1)): LoReFT(576, rank=4)})"),
        ([], ValueError, "a TrailMap needs at least one trail"),
        (5, TypeError, "a TrailMap is made of a dict {Site: Trail}, or of such pairs, not of 5"),
        ([Site(0)], TypeError, "a TrailMap is made of a dict {Site: Trail}, or of such pairs, not of [Site("),
        ({0: RED(4)}, TypeError, "a TrailMap maps a Site to a Trail, but was given 0: RED(dim=4)"),
        ({Site(0): RED}, TypeError, "a TrailMap maps a Site to a Trail, but was given Site("),
        ({Site(0): nn.Linear(2, 2)}, TypeError, "Linear(in_features=2"),
        ([(Site(0), RED(4)), (Site(0), RED(4))], ValueError, "is named twice: use Chain(first, second) for two trails"),
    ],
)
def test_a_bad_map_is_refused_with_a_message(unchecked, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TrailMap(given)


def test_a_map_reads_like_a_dict():
    first, second = RED(4), LoReFT(4, 1)
    trails = TrailMap({Site(1): first, Site(0): second, Site(2): first})
    assert list(trails) == [Site(1), Site(0), Site(2)]
    assert [trail for _, trail in trails.items()] == [first, second, first]
    assert trails[Site(2)] is first
    assert len(trails) == 3
    assert trails.size() == 8 + 9
    with pytest.raises(KeyError, match=re.escape("no trail lies at Site(layer=3")):
        trails[Site(3)]
    names = {name: getattr(tokenpaths, name) for name in tokenpaths.__all__} | vars(tokenpaths.trails)
    assert repr(eval(repr(trails), names)) == repr(trails)
