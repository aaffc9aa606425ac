"""Adapters that adapters 1.2.0 saved do here what they did there: fixtures/adapters, and make.py that made it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tokenpaths as tp
from benchmarks.torture.mutants import mutant
from tokenpaths.files import TrailFileError
from tokenpaths.interop import from_adapters

FOLDER = Path(__file__).parent / "fixtures" / "adapters"
IDS = torch.arange(5, 14)[None]
pytestmark = pytest.mark.filterwarnings("ignore:.*has suffix_positions=1")


def gpt2() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    told = load_file(FOLDER / "expected.safetensors")
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    model.load_state_dict({name[5:]: value for name, value in told.items() if name.startswith("base.")}, strict=False)
    return model, told


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["LoReFT", "NoReFT", "DiReFT"])
def test_an_adapter_does_here_what_it_did_there(kind: Any, tied: str) -> None:
    model, told = gpt2()
    with torch.no_grad():
        assert (model(IDS).logits - told["frozen"]).abs().max() < 1e-5
        with pytest.warns(UserWarning, match="suffix_positions=1: taken for the last tokens of the prompt"):
            trails = from_adapters(FOLDER / f"{kind}-{tied}", model, kind)
        with tp.attach(model, trails):
            found = model(IDS).logits
    expected = told[f"{kind}-{tied}"]
    assert (found - expected).abs().max() < 1e-5
    assert (expected - told["frozen"]).abs().max() > 1
    both = tp.First(2) | tp.Last(1)
    assert trails.sites == tuple(
        tp.Site(layer, rule) for layer in (0, 2) for rule in ((both,) if tied == "tied" else (tp.First(2), tp.Last(1)))
    )


def told(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "adapter_config.json").read_text())
        whole["config"].update(changes)
        (folder / "adapter_config.json").write_text(json.dumps(whole))

    return change


BAD = {
    "nonlinearity": (told(non_linearity="relu"), TrailFileError, "has the nonlinearity 'relu', which no trail has"),
    "orthogonality": (told(orthogonality=False), ValueError, "orthogonality=False: it is no LoReFT"),
    "architecture": (told(architecture="lora"), TrailFileError, "not that of a ReFT adapter"),
    "nowhere": (told(prefix_positions=0, suffix_positions=0), TrailFileError, "at which nothing lies"),
    "tied": (told(tied_weights=True), TrailFileError, "has unit 1 of layer 0"),
    "gone": (lambda folder: (folder / "adapter.safetensors").unlink(), FileNotFoundError, "there is no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_like_here_is_refused(name: str, tmp_path: Path) -> None:
    change, error, message = BAD[name]
    change(shutil.copytree(FOLDER / "LoReFT-untied", tmp_path / "bad"))
    with pytest.raises(error, match=message):
        from_adapters(tmp_path / "bad", gpt2()[0], "LoReFT")


def test_an_adapter_of_another_model_is_refused() -> None:
    from tiny import llama

    model = llama()
    from_adapters(FOLDER / "LoReFT-tied", model, "LoReFT")  # of the same width
    from transformers import GPT2Config, GPT2LMHeadModel

    wide = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64))
    with pytest.raises(TrailFileError, match="the model has width 64"):
        from_adapters(FOLDER / "LoReFT-tied", wide, "LoReFT")
    with pytest.raises(ValueError, match="kind='Loreft' is none of LoReFT, NoReFT, DiReFT"):
        from_adapters(FOLDER / "LoReFT-tied", model, "Loreft")


@pytest.mark.parametrize("name", ["LoReFT-tied/pytorch_adapter.bin", "LoReFT-untied/adapter.safetensors"])
def test_mutants_are_read_or_refused(name: str, tmp_path: Path) -> None:
    model = gpt2()[0]
    folder = shutil.copytree((FOLDER / name).parent, tmp_path / "bad")
    for file in (folder / Path(name).name, folder / "adapter_config.json"):
        whole = file.read_bytes()
        for seed in range(400):
            file.write_bytes(mutant(whole, seed))
            with contextlib.suppress(TrailFileError, FileNotFoundError, ValueError):
                from_adapters(folder, model, "LoReFT")
        file.write_bytes(whole)
