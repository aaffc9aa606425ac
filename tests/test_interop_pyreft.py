"""What real pyreft 0.1.0 saves does the same here, and what is written here does the same there."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyreft_oracle
import pytest
import torch
from tiny import DIM, llama

import tokenpaths as tp
from benchmarks.torture.mutants import mutant
from tokenpaths.files import TrailFileError
from tokenpaths.interop import from_pyreft, to_pyreft
from tokenpaths.interop.pyreft import KINDS

CLASSES = list(KINDS)
IDS = torch.arange(5, 14)[None]
ENDS = [0, 8]
EXACT = 1e-5
pytestmark = pytest.mark.usefixtures("pyreft")


def theirs(
    model: Any,
    kind: str,
    places: Sequence[tuple[int, str]] = ((1, "block_output"), (2, "block_output")),
    **options: Any,
) -> Any:
    """A real ReftModel of a copy of the model, whose interventions have been trained for some steps."""
    pyreft = pyreft_oracle.load_pyreft()
    torch.manual_seed(3)
    made = [
        {
            "layer": layer,
            "component": component,
            "low_rank_dimension": 3,
            "intervention": getattr(pyreft, kind)(
                embed_dim=DIM, low_rank_dimension=3, **{"dtype": torch.float32, "add_bias": True, **options}
            ),
        }
        for layer, component in places
    ]
    reft = pyreft.get_reft_model(copy.deepcopy(model), pyreft.ReftConfig(representations=made), set_device=False)
    parameters = [p for one in reft.interventions.values() for p in one.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05)
    for step in range(3):
        _, out = reft({"input_ids": IDS + step}, unit_locations=at([ENDS] * len(places)))
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), IDS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reft


def at(positions: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {"sources->base": (None, [[list(some)] for some in positions])}


def logits_of(reft: Any, positions: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.no_grad():
        return reft({"input_ids": IDS}, unit_locations=at(positions))[1].logits


def ours(model: Any, trails: tp.TrailMap) -> torch.Tensor:
    with torch.no_grad(), tp.attach(model, trails):
        return model(IDS).logits


def saved(reft: Any, folder: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        reft.save(str(folder))
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_of_pyreft_does_here_what_it_does_there(kind: str, tmp_path: Path) -> None:
    model = llama()
    reft = theirs(model, kind)
    trails = from_pyreft(saved(reft, tmp_path / "reft"), model, "f1+l1")
    expected = logits_of(reft, [ENDS, ENDS])
    assert [type(trail) for _, trail in trails.items()] == [KINDS[kind]] * 2
    assert (ours(model, trails) - expected).abs().max() < EXACT
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() > 1000 * EXACT


@pytest.mark.parametrize("kind", CLASSES)
def test_a_trainers_folder_without_a_configuration_is_read_by_its_names(kind: str, tmp_path: Path) -> None:
    model = llama()
    reft = theirs(model, kind)
    folder = saved(reft, tmp_path / "reft")
    (folder / "config.json").unlink()
    if kind not in ("LoreftIntervention", "DireftIntervention"):
        with pytest.raises(TrailFileError, match="two classes of pyreft have these tensors: name the class, kind="):
            from_pyreft(folder, model, "f1+l1")
    trails = from_pyreft(folder, model, "f1+l1", kind=kind)
    assert (ours(model, trails) - logits_of(reft, [ENDS, ENDS])).abs().max() < EXACT


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("place", [(1, "block_output"), (1, "model.layers[1].output")])
def test_names_with_dots_of_earlier_versions_are_read(place: tuple[int, str], configured: bool, tmp_path: Path) -> None:
    model = llama()
    reft = theirs(model, "LoreftIntervention", [place])
    folder = saved(reft, tmp_path / "reft")
    (file,) = folder.glob("*.bin")
    layer, component = place
    key = f"comp.{component}" if "." in component else f"layer.{layer}.comp.{component}"
    file.rename(folder / f"intkey_{key}.unit.pos.nunit.1#0.bin")
    if not configured:
        (folder / "config.json").unlink()
    trails = from_pyreft(folder, model, "f1+l1")
    assert trails.sites == (tp.Site(1, tp.First(1) | tp.Last(1)),)
    assert (ours(model, trails) - logits_of(reft, [ENDS])).abs().max() < EXACT


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ((1, "attention_output"), tp.Site(1, stream="attention")),
        ((1, "mlp_output"), tp.Site(1, stream="mlp")),
        ((0, "block_input"), tp.Site(0, stream="embedding")),
        ((2, "block_input"), tp.Site(1)),
        ((1, "model.layers[1].output"), tp.Site(1)),
    ],
)
def test_components_are_the_streams_here(place: tuple[int, str], site: tp.Site, tmp_path: Path) -> None:
    model = llama()
    reft = theirs(model, "LoreftIntervention", [place])
    trails = from_pyreft(saved(reft, tmp_path / "reft"), model, "f1+l1")
    assert trails.sites == (tp.Site(site.layer, tp.First(1) | tp.Last(1), site.stream),)
    assert (ours(model, trails) - logits_of(reft, [ENDS])).abs().max() < EXACT


def test_two_interventions_at_a_place_are_the_first_and_the_last_tokens(tmp_path: Path) -> None:
    model = llama()
    places = [(1, "block_output"), (2, "block_output")] * 2
    reft = theirs(model, "LoreftIntervention", places)
    folder = saved(reft, tmp_path / "reft")
    trails = from_pyreft(folder, model, "f2+l1")
    expected = logits_of(reft, [[0, 1], [0, 1], [8], [8]])
    assert (ours(model, trails) - expected).abs().max() < EXACT
    assert to_pyreft(trails, tmp_path / "again") == "f2+l1"
    with pyreft_oracle.mended():
        again = pyreft_oracle.load_pyreft().ReftModel.load(str(tmp_path / "again"), copy.deepcopy(model))
    assert (logits_of(again, [[0, 1], [0, 1], [8], [8]]) - expected).abs().max() < EXACT
    with pytest.raises(TrailFileError, match=r"share_weights=False\), and positions='l1' has not both"):
        from_pyreft(folder, model, "l1")


def test_equal_interventions_become_one_tied_trail(tmp_path: Path) -> None:
    model = llama()
    reft = theirs(model, "NodireftIntervention")
    first, second = reft.interventions.values()
    second.load_state_dict(first.state_dict())
    trails = from_pyreft(saved(reft, tmp_path / "reft"), model, "l1")
    assert len(trails) == 2 and len(trails.trails) == 1


WHOLE = [(kind, DIM) for kind in CLASSES if kind != "ConsreftIntervention"]  # which leaves nothing but rounding then


@pytest.mark.parametrize(("kind", "rank"), [*((kind, 3) for kind in CLASSES), *WHOLE])
def test_real_pyreft_loads_what_is_written_here(kind: str, rank: int, tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(4)
    made: dict[tp.Site, tp.Trail] = {}
    for layer in (0, 2):
        trail = made[tp.Site(layer, tp.First(1) | tp.Last(1))] = KINDS[kind](DIM, rank)
        for parameter in trail.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    trails = tp.TrailMap(made)
    assert to_pyreft(trails, tmp_path / "reft") == "f1+l1"
    with pyreft_oracle.mended():
        reft = pyreft_oracle.load_pyreft().ReftModel.load(str(tmp_path / "reft"), copy.deepcopy(model))
    expected = ours(model, trails)
    assert (logits_of(reft, [ENDS, ENDS]) - expected).abs().max() < EXACT * max(1, expected.abs().max().item() / 10)
    back = from_pyreft(tmp_path / "reft", model, "f1+l1")
    assert (ours(model, back) - expected).abs().max() < 1e-5 * max(1, expected.abs().max().item() / 10)


# --- what is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(theirs(llama(), "DireftIntervention"), tmp_path_factory.mktemp("pyreft") / "reft")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def told(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return make


def numbers(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = sorted(folder.glob("*.bin"))[0]
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)

    return make


ORIGINAL = "rotate_layer.parametrizations.weight.original"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "linked": (told(lambda c: c["representations"][0].__setitem__(9, 0)), "interventions are linked"),
    "unit": (told(lambda c: c["representations"][0].__setitem__(2, "h.pos")), "unit 'h.pos' of 'block_output' has no"),
    "component": (
        told(lambda c: c["representations"][0].__setitem__(1, "head_attention_value_output")),
        "'head_attention_value_output' has no site here",
    ),
    "class": (told(lambda c: c["intervention_types"].__setitem__(0, "os.system")), "'system' has no like here"),
    "no types": (told(lambda c: c.pop("intervention_types")), "does not tell representations and intervention_types"),
    "layer": (told(lambda c: c["representations"][0].__setitem__(0, 30)), "layer 30 is out of range"),
    "other class": (
        told(lambda c: c["intervention_types"].__setitem__(0, "x.NoreftIntervention")),
        "are not those of its class",
    ),
    "shrunk": (numbers(lambda t: t[ORIGINAL].mul_(0.9)), "not orthonormal .* Weight decay does this"),
    "narrow": (numbers(lambda t: t.update({"learned_source.weight": torch.zeros(3, 8)})), "do not fit states of width"),
    "nan": (numbers(lambda t: t["learned_source.bias"].fill_(torch.nan)), "holds NaN or infinity"),
    "more": (numbers(lambda t: t.update(more=torch.zeros(2))), "are not those of its class"),
    "gone": (lambda folder: sorted(folder.glob("*.bin"))[0].unlink(), "there is no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_like_here_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, message = BAD[name]
    bad = copied(folder, tmp_path / "bad")
    change(bad)
    with pytest.raises((TrailFileError, FileNotFoundError), match=message):
        from_pyreft(bad, llama(), "f1+l1")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_file_is_not_executed(how: str, folder: Path, tmp_path: Path) -> None:
    bad, mark = copied(folder, tmp_path / "bad"), tmp_path / "mark"
    file = sorted(bad.glob("*.bin"))[0]
    if how == "torch":
        torch.save({"weight": torch.zeros(3, DIM), "bias": Evil(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(TrailFileError, match=re.escape(str(file))):
        from_pyreft(bad, llama(), "f1+l1")
    assert not mark.exists()


def test_mutants_of_a_folder_are_read_as_they_were_or_refused(folder: Path, tmp_path: Path) -> None:
    """A pyreft file has no checksum of its own but that of the zip file, which torch does not read."""
    model, bad = llama(), copied(folder, tmp_path / "bad")
    for file in (sorted(bad.glob("*.bin"))[0], bad / "config.json"):
        whole = file.read_bytes()
        for seed in range(400):
            file.write_bytes(mutant(whole, seed))
            with contextlib.suppress(TrailFileError, FileNotFoundError):
                from_pyreft(bad, model, "f1+l1")
        file.write_bytes(whole)


@pytest.mark.parametrize("positions", ["", "f0", "l1+f1", "f1+f2", "f1 l1", "last"])
def test_positions_are_written_as_pyreft_writes_them(positions: str, folder: Path) -> None:
    with pytest.raises(ValueError, match='write it as pyreft does, "f1\\+l1", "f2" or "l4"'):
        from_pyreft(folder, llama(), positions)


LAST = tp.Last(1)
UNWRITTEN = {
    "class": (tp.TrailMap({tp.Site(1, LAST): tp.Additive(DIM)}), "pyreft has no Additive"),
    "rule": (tp.TrailMap({tp.Site(1): tp.LoReFT(DIM, 2)}), "pyreft moves the first and the last tokens of prompts"),
    "head": (tp.TrailMap({tp.Site(1, LAST, "attention", 0): tp.LoReFT(8, 2)}), "lies at a head"),
    "apart": (
        tp.TrailMap({tp.Site(1, tp.First(1)): tp.LoReFT(DIM, 2), tp.Site(2, LAST): tp.LoReFT(DIM, 2)}),
        "each needs a trail at every place",
    ),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_pyreft_does_not_have_is_not_written(name: str, tmp_path: Path) -> None:
    trails, message = UNWRITTEN[name]
    with pytest.raises(ValueError, match=message):
        to_pyreft(trails, tmp_path / "reft")
    assert not (tmp_path / "reft").exists()


def test_a_folder_with_files_is_not_written_to(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="write to a new folder"):
        to_pyreft(tp.TrailMap({tp.Site(1, LAST): tp.LoReFT(DIM, 2)}), folder)
