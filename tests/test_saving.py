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
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING, TRAILS
from torch import Tensor, nn

import tokenpaths
from tokenpaths import (
    RED,
    All,
    Answer,
    Capped,
    Chain,
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
    TrailFileError,
    TrailMap,
    attach,
    saving,
)
from tokenpaths.trails import OrthonormalRows

DIM = 16
RULES = [
    All(),
    Prompt(),
    Answer(),
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
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
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


def test_saved_in_one_process_loaded_in_another(tmp_path):
    model = FAMILIES["llama"].make()
    trails = TrailMap({Site(i, Last(2) | Answer()): make(32) for i, make in enumerate(list(MOVING.values())[:3])})
    trails.save(tmp_path / "t", model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), attach(model, trails):
        logits = model(ids).logits
    code = """
import sys, torch
from families import FAMILIES
from tokenpaths import TrailMap, attach
model = FAMILIES["llama"].make()
with torch.no_grad(), attach(model, TrailMap.load(sys.argv[1], model=model)):
    torch.save(model(torch.arange(3, 12)[None]).logits, sys.argv[2])
"""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{Path(tokenpaths.__file__).parents[1]}"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, tmp_path / "t", tmp_path / "logits"]
    subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits"), logits)


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


# ----------------------------------------------------------------------------- one's own classes


class Own(Trail):
    """A trail of the user's, with arguments of every kind that a file holds, a buffer, and a constructor that is picky."""

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
    given = dict(
        dim=DIM, seed=4, names=["a", "b"], parts=[RED(DIM), MOVING["Capped"](DIM)], inner=Scaled(RED(DIM), 0.5)
    )
    return Own(**{**given, **changes})


def test_a_class_of_ones_own_must_be_passed(tmp_path):
    trails = TrailMap({Site(0): Chain(own(), RED(DIM))})
    trails.save(tmp_path / "t")
    with pytest.raises(TrailFileError, match=re.escape("class 'Own': pass that class to load(path, ...)")):
        TrailMap.load(tmp_path / "t")
    loaded = TrailMap.load(tmp_path / "t", Own)
    equal(trails, loaded)
    assert isinstance(loaded[Site(0)].first.parts[1], Capped)
    with pytest.raises(TypeError, match="only Trail classes may follow the path, not <module"):
        TrailMap.load(tmp_path / "t", torch)
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="a model is given as model="):
        TrailMap.load(tmp_path / "t", model)


def test_a_buffer_of_another_kind_is_refused(tmp_path):
    TrailMap({Site(0): own()}).save(tmp_path / "t")
    for value in (torch.tensor(3.0), torch.tensor(3, dtype=torch.int32), torch.tensor(True)):
        path = with_tensors(tmp_path / "t", {"trails.0.steps": value})
        with pytest.raises(
            TrailFileError, match=re.escape(f"'trails.0.steps' is {value.dtype} in the file, torch.int64")
        ):
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


def test_a_class_of_the_main_program(tmp_path):
    code = """
import sys, torch
from tokenpaths import Site, Trail, TrailMap, TrailFileError
class Shift(Trail):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = torch.nn.Parameter(torch.arange(dim) + 0.5)
    def forward(self, h):
        return self.v.expand_as(h)
TrailMap({Site(0): Shift(3)}).save(sys.argv[1])
print(TrailMap.load(sys.argv[1], Shift)[Site(0)].v.tolist())
try:
    TrailMap.load(sys.argv[1])
except TrailFileError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenpaths.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "t")]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "[0.5, 1.5, 2.5]"
    assert done.stdout.splitlines()[1].endswith("holds a trail of class 'Shift': pass that class to load(path, ...)")


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
        with pytest.raises(
            ValueError, match="a parameter is shared inside the trails; tie whole trails instead, at two"
        ):
            TrailMap(trails).save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
    TrailMap({Site(0): shared, Site(1): shared}).save(tmp_path / "t")


def test_a_rule_of_ones_own_is_refused(tmp_path):
    class Even(tokenpaths.Rule):
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
        f"{tmp_path}/t was made for someone/llama (weights {saving.fingerprint(llama)}), but the model given is "
        f"GPT2LMHeadModel (weights {saving.fingerprint(gpt2)}): measure before you trust the trails on it"
    )
    assert caught[0].filename == __file__
    # no warning: the same weights under another name, in another dtype, in a wrapper, or no word about the base
    same = copy.deepcopy(llama).to(torch.bfloat16)
    same.config._name_or_path = "/a/folder"
    TrailMap.load(tmp_path / "t", model=same)
    TrailMap.load(tmp_path / "t", model=nn.DataParallel(llama))
    trails.save(tmp_path / "u")
    TrailMap.load(tmp_path / "u", model=gpt2)


def test_fingerprint():
    model = FAMILIES["llama"].make()
    first = saving.fingerprint(model)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert saving.fingerprint(FAMILIES["llama"].make()) == first
    assert saving.fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == first
    assert saving.fingerprint(copy.deepcopy(model).to(torch.float64)) == first
    for name, parameter in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():  # one weight, anywhere
            changed.get_parameter(name).view(-1)[hash(name) % parameter.numel()] += 3
        assert saving.fingerprint(changed) != first, name
    swapped = copy.deepcopy(model)
    with torch.no_grad():  # the same values in another order
        swapped.model.norm.weight.copy_(torch.arange(32))
        one = saving.fingerprint(swapped)
        swapped.model.norm.weight.copy_(torch.arange(32).flip(0))
        assert saving.fingerprint(swapped) != one
    assert saving.fingerprint(copy.deepcopy(model).to("meta")) != first
    # trails that a trainer put among the model's modules are not of the model
    model.add_module("trails", everything())
    assert saving.fingerprint(model) == first


# ----------------------------------------------------------------------------- damaged and hostile files


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), header["__metadata__"]


def with_tensors(path: Path, changes: dict[str, Tensor]) -> Path:
    tensors, metadata = parts(path)
    path.write_bytes(safetensors.torch.save({**tensors, **changes}, metadata))
    return path


def with_note(path: Path, text: str) -> Path:
    tensors, _ = parts(path)
    path.write_bytes(safetensors.torch.save(tensors, {"tokenpaths": text}))
    return path


def edited(path: Path, edit: Callable[[dict], object]) -> Path:
    note = json.loads(parts(path)[1]["tokenpaths"])
    edit(note)
    return with_note(path, json.dumps(note))


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
        "tokenpaths.saving.write",
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
def test_only_the_names_of_whole_trails_mean_anything(small, name, monkeypatch):
    monkeypatch.setattr("builtins.__import__", lambda *given, **_: pytest.fail(f"imported {given[0]}"))
    path = edited(small, lambda note: note["trails"][1].update({"class": name}))
    with pytest.raises(
        TrailFileError, match=re.escape(f"{small}: the file holds a trail of class {name!r}: pass that")
    ):
        TrailMap.load(path)


@pytest.mark.parametrize(
    "name", ["Rule", "Pair", "Context", "re.compile", "__class__", "Site", "leaves", "", 5, None, []]
)
def test_only_the_names_of_whole_rules_mean_anything(small, name):
    path = edited(small, lambda note: note["sites"][0]["tokens"].update(rule=name))
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
        (set_in("version", to=2), "its note is of version 2, this tokenpaths reads version 1"),
        (lambda note: note.pop("version"), "its note is of version None"),
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
            "the file holds an impossible token rule: First(n=1000",
        ),
        (set_in("sites", 0, "tokens", "left", to=3), "both sides must be token rules"),
        (set_in("sites", 0, "tokens", "right", "pattern", to="("), "Match('(') is not a regular expression"),
        (set_in("sites", 0, "tokens", "right", "pattern", to="(" * 9999 + ")" * 9999), "is not a regular expression"),
        (set_in("sites", 0, "tokens", to={"rule": "Tokens", "ids": [-1]}), "token ids are whole numbers from 0 up"),
        (set_in("sites", 0, "tokens", to={"rule": "Tokens", "ids": "12"}), "Tokens takes a sequence of token ids"),
        (set_in("sites", 0, "tokens", to={"rule": "Span", "name": 3}), "Span takes the name of a span"),
        (set_in("sites", 0, "tokens", to={"rule": "All", "n": 3}), "the note of All must have the keys rule, but is"),
        (set_in("trails", 1, "arguments", to=[4]), "the arguments of RED must be a JSON object, not [4]"),
        (set_in("trails", 1, "arguments", "dim", to=-4), "RED cannot be built with the file's arguments, {'dim': -4}"),
        (set_in("trails", 1, "arguments", "self", to=4), "RED cannot be built with the file's arguments"),
        (
            set_in("trails", 1, "arguments", "dim", to=5),
            "tensor 'trails.1.s' has shape [4] in the file, [5] by the note",
        ),
        (
            set_in("trails", 0, "arguments", "trail", "arguments", "rank", to=5),
            "LoReFT: rank 5 must be from 1 to dim 4",
        ),
        (
            set_in("trails", 0, "arguments", "factor", to=1e999),
            "its note is not JSON (Infinity is not a finite number)",
        ),
        (
            set_in("trails", 0, "arguments", "factor", to=float("nan")),
            "its note is not JSON (NaN is not a finite number)",
        ),
        (set_in("trails", 0, "class", to="Gated"), "Gated cannot be built with the file's arguments"),
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
        ("[1]", "its note is of version None"),
        ("[" * 100_000, "its note is not JSON"),
        (good.replace('"version": 1', '"version": 1, "version": 1'), "a key stands twice in one object"),
        (good.replace('"factor": 0.5', '"factor": 1e999'), "1e999 is not a finite number"),
        (good.replace('"factor": 0.5', '"factor": ' + "9" * 5000), "its note is not JSON"),
    ]:
        with pytest.raises(TrailFileError, match=re.escape(message)):
            TrailMap.load(with_note(small, text))
    small.write_bytes(safetensors.torch.save({"x": torch.zeros(2)}))
    with pytest.raises(
        TrailFileError, match="is a safetensors file, but not of tokenpaths: it has no 'tokenpaths' note"
    ):
        TrailMap.load(small)
    for content in (b"", b"\0" * 8, b"PK\x03\x04" * 50, b"\xff" * 64, struct.pack("<Q", 2**63) + b"{}"):
        small.write_bytes(content)
        with pytest.raises(TrailFileError, match="is not a whole safetensors file"):
            TrailMap.load(small)


@pytest.mark.parametrize("levels", [30, 70, 200, 400, 900])
def test_a_note_of_any_depth(small, levels):
    lists: object = 1
    trail, rule = {"class": "RED", "arguments": {"dim": 4}}, {"rule": "All"}
    for _ in range(levels):
        lists = [lists]
        trail = {"class": "Scaled", "arguments": {"trail": trail, "factor": 1.0}}
        rule = {"rule": "Not", "rule_": 0, "x": rule}
    for edit in (
        set_in("trails", 1, "arguments", "dim", to=lists),
        set_in("trails", 1, to=lists),
        set_in("trails", 1, to=trail),
        set_in("sites", 1, "tokens", to=rule),
        set_in("sites", 1, to=lists),
        set_in("base", to=lists),
        set_in("blocks", to=lists),
    ):
        content = small.read_bytes()
        with pytest.raises(TrailFileError, match=re.escape(str(small))):
            TrailMap.load(edited(small, edit))
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


def test_many_sites_take_time_in_proportion(tmp_path):
    trail = RED(2)
    trails = TrailMap([(Site(layer), trail) for layer in range(5_000)])
    trails.save(tmp_path / "t")
    start = time.perf_counter()
    assert len(TrailMap.load(tmp_path / "t")) == 5_000
    assert time.perf_counter() - start < 10


# --------------------------------------------------------------- two thousand mutated files

WILD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        10**12,
        10**30,
        0.5,
        -1e308,
        1e999,
        float("nan"),
        "",
        "LoReFT",
        "Rule",
    ]
    + ["(", "block", "attention", [], [0], [[[]]], {}, {"rule": "All"}, {"rule": "Not", "rule_": 1}, {"class": "Trail"}]
    + [{"class": "RED", "arguments": {"dim": 4}}, "__import__", "os.system", "\ud800", "x" * 10_000]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]


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
        return bytes(
            changed[:start] + changed[stop:] if cut == "drop" else changed + changed[start:] * (cut == "repeat")
        )
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
                inner[where[-1]] = draw(WILD)
            elif action == "drop":
                del inner[where[-1]]
            elif isinstance(inner, list):
                inner.append(copy.deepcopy(inner[where[-1]]) if action == "copy" else draw(WILD))
            else:
                inner[draw(st.sampled_from(["dim", "rank", "rule", "class", "self", "more"]))] = draw(WILD)
        metadata["tokenpaths"] = json.dumps(note)
    elif kind == "text":
        text = metadata["tokenpaths"]
        start, stop = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        changed = draw(
            st.sampled_from(["", "1", '"', "[", "{}", "1e9999", "NaN", text[start:stop] * 2, '"dim": 4, "dim": 5'])
        )
        metadata["tokenpaths"] = text[:start] + changed + text[min(stop, start + draw(st.integers(0, 9))) :]
    elif kind == "tensors":
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        action = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "value", "more", "zero"]))
        if action == "dtype":
            tensor = tensor.to(draw(st.sampled_from(DTYPES)))
        elif action == "shape":
            tensor = draw(
                st.sampled_from([tensor.flatten(), tensor[..., :-1], tensor[None], tensor.new_zeros(0), tensor.mT])
            )
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
        metadata = draw(
            st.sampled_from(
                [{}, {"format": "pt"}, {**metadata, "format": "pt"}, {"Tokenpaths": metadata["tokenpaths"]}]
            )
        )
    return safetensors.torch.save(tensors, metadata)


def sound(path: Path, trails: TrailMap) -> None:
    """What was loaded is a whole map: shapes by its own arguments, finite, orthonormal, ready to be saved again."""
    fresh = TrailMap(copy.deepcopy(list(trails.items())))
    rebuilt = [saving.trail_from_note(saving.trail_to_note(trail), saving.named([])) for trail in trails.trails]
    for trail, again in zip(trails.trails, rebuilt, strict=True):
        shapes = {name: tensor.shape for name, tensor in trail.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in again.state_dict().items()}
        assert all(tensor.dtype.is_floating_point and tensor.isfinite().all() for tensor in trail.state_dict().values())
        for part in trail.modules():
            if isinstance(part, OrthonormalRows):
                rows = part()
                assert (rows @ rows.mT - torch.eye(len(rows))).abs().max() < 1e-4
    assert fresh.sites == trails.sites
    trails.save(path.with_name("again"))


@settings(max_examples=2000)
@given(st.data())
def test_two_thousand_damaged_files_are_refused_or_sound(tmp_path_factory, data):
    content, path = damaged_from(tmp_path_factory)
    path.write_bytes(data.draw(mutations(content), label="file"))
    before, rng = torch.get_default_dtype(), torch.get_rng_state()
    try:
        loaded = TrailMap.load(path)
    except TrailFileError as error:
        assert str(path) in str(error)
        COUNT["refused"] += 1
    else:
        sound(path, loaded)
        COUNT["sound"] += 1
    assert torch.get_default_dtype() == before
    assert torch.equal(torch.get_rng_state(), rng)


COUNT = {"refused": 0, "sound": 0}
_MADE: list[tuple[bytes, Path]] = []


def damaged_from(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    if not _MADE:
        path = tmp_path_factory.mktemp("damaged") / "t"
        trail = MOVING["LoReFT"](4)
        TrailMap(
            {
                Site(0, First(2) | Match("a")): Capped(MOVING["Gated"](4), 0.5),
                Site(1, ~Tokens([1, 2])): trail,
                Site(2, Span("s") - Last()): trail,
                Site(-1, All(), "attention", 1): MOVING["ReFTr1"](4),
            }
        ).save(path, FAMILIES["gpt2"].make())
        _MADE.append((path.read_bytes(), path))
    return _MADE[0]


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
    names = vars(tokenpaths)
    assert repr(eval(repr(trails), dict(names))) == repr(trails)
