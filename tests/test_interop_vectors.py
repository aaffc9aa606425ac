"""Steering vectors of other libraries become h + c v; control vectors are read and written as llama.cpp has them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_interop_pyreft import Evil
from tiny import DIM, llama

import tokenpaths as tp
from benchmarks.torture.mutants import mutant
from tokenpaths.files import TrailFileError
from tokenpaths.interop import from_gguf, from_vectors, to_gguf
from tokenpaths.trails import BiasReFT, Chain, Scaled

IDS = torch.arange(5, 17)[None]
V, W = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)).unbind()


@dataclass
class SteeringVector:
    """As steering-vectors has it."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    """As repeng has it."""

    directions: dict[int, np.ndarray]


def torch_file(value: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Path:
        torch.save(value, folder / "vectors.pt")
        return folder / "vectors.pt"

    return make


def numpy_file(value: np.ndarray) -> Callable[[Path], Any]:
    def make(folder: Path) -> Path:
        np.save(folder / "vectors.npy", value)
        return folder / "vectors.npy"

    return make


def safe_file(folder: Path) -> Path:
    save_file({"layer.1": V, "layer.2": W}, folder / "vectors.safetensors")
    return folder / "vectors.safetensors"


BOTH = {1: V, 2: W}
SOURCES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], dict[int, torch.Tensor]]] = {
    "CAA": (torch_file(V), {"layers": 1}, {1: V}),
    "dict": (lambda _: BOTH, {}, BOTH),
    "dict of lists": (lambda _: {1: V.tolist()}, {}, {1: V}),
    "dict in a file": (torch_file({1: V, 2: W}), {}, BOTH),
    "safetensors": (safe_file, {}, BOTH),
    "matrix": (numpy_file(torch.stack([V, W]).numpy()), {"layers": [2, 0]}, {2: V, 0: W}),
    "half": (torch_file(V.half()), {"layers": 1}, {1: V.half().float()}),
    "AxBench": (torch_file(torch.stack([V, W])), {"layers": 2, "concept": 1, "scale": 3.0}, {2: 3 * W}),
    "steering-vectors": (lambda _: SteeringVector(BOTH), {"scale": 2.0}, {1: 2 * V, 2: 2 * W}),
    "repeng": (lambda _: ControlVector({1: V.numpy()}), {}, {1: V}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_vector_is_added_at_its_layer(name: str, tmp_path: Path) -> None:
    make, options, expected = SOURCES[name]
    trails = from_vectors(make(tmp_path), llama(), **options)
    assert {site.layer: site.stream for site in trails} == dict.fromkeys(expected, "block")
    for site, trail in trails.items():
        assert isinstance(trail, tp.Additive) and torch.equal(trail.v, expected[site.layer])


def test_the_source_tells_the_stream_and_the_caller_the_tokens() -> None:
    trails = from_vectors(SteeringVector({1: V}, "mlp"), llama(), tokens=tp.Answer())
    assert trails.sites == (tp.Site(1, tp.Answer(), "mlp"),)


def test_a_vector_does_what_is_done_by_hand(tmp_path: Path) -> None:
    model = llama()
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out + 1.5 * V)
    with torch.no_grad():
        expected = model(IDS).logits
        handle.remove()
        with tp.attach(model, from_vectors({1: V}, model), strength=1.5):
            torch.testing.assert_close(model(IDS).logits, expected)


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[Exception], str]] = {
    "no layers": (torch_file(V), {}, ValueError, "does not tell its layers: give layers="),
    "many": (torch_file(V), {"layers": [0, 1]}, ValueError, "one for each vector, does not fit shape"),
    "AxBench": (torch_file(torch.stack([V, W])), {"layers": 2, "concept": 1}, ValueError, "give scale=max_act"),
    "row": (torch_file(torch.stack([V, W])), {"layers": 2, "concept": 2, "scale": 1.0}, ValueError, "and no such row"),
    "told twice": (lambda _: BOTH, {"layers": [1, 2]}, ValueError, "but the source tells its layers: 1, 2"),
    "width": (torch_file(torch.zeros(7)), {"layers": 1}, TrailFileError, "the states of the model have width 32"),
    "layer": (lambda _: {9: V}, {}, ValueError, "layer 9 is out of range"),
    "norm": (lambda _: SteeringVector(BOTH, "input_layernorm"), {}, ValueError, "has no stream here"),
    "a name": (lambda _: {"happy": V}, {}, ValueError, "'happy' tells no layer"),
    "nan": (lambda _: {1: V * torch.nan}, {}, ValueError, "numbers that are not finite"),
    "text": (lambda _: object(), {}, TypeError, "is none of a file, a dict from layers to vectors"),
    "gone": (lambda folder: folder / "no.pt", {}, FileNotFoundError, "there is no file"),
    "kind": (lambda folder: Path(__file__), {}, TrailFileError, "is none of .bin"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    make, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        from_vectors(make(tmp_path), llama(), **options)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({1: Evil(mark)}, tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    for name in ("v.pt", "v.npy"):
        with pytest.raises(TrailFileError, match=re.escape(name)):
            from_vectors(tmp_path / name, llama())
    assert not mark.exists()


@pytest.mark.parametrize("make", [torch_file({1: V}), numpy_file(V.numpy()), safe_file])
def test_mutants_are_read_or_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path, model = make(tmp_path), llama()
    whole = path.read_bytes()
    for seed in range(400):
        path.write_bytes(mutant(whole, seed))
        with contextlib.suppress(TrailFileError, ValueError):
            from_vectors(path, model, layers=1 if path.suffix == ".npy" else None)


# --- control vectors


def laid() -> tp.TrailMap:
    constant, low = tp.Additive(DIM), BiasReFT(DIM, 3)
    torch.nn.init.normal_(constant.v)
    torch.nn.init.normal_(low.b)
    return tp.TrailMap({tp.Site(1): constant, tp.Site(2): Chain(Scaled(low, 0.5), constant)})


def test_a_control_vector_holds_what_the_trails_add(tmp_path: Path) -> None:
    model, trails = llama(), laid()
    to_gguf(trails, tmp_path / "v.gguf", model, strength=2.0)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "llama"
    assert [(t.name, str(t.tensor_type.name), t.data.shape) for t in reader.tensors] == [
        ("direction.1", "F32", (DIM,)),
        ("direction.2", "F32", (DIM,)),
    ]
    back = from_gguf(tmp_path / "v.gguf", model)
    assert back.sites == (tp.Site(1), tp.Site(2))
    with torch.no_grad():
        with tp.attach(model, trails, strength=2.0):
            expected = model(IDS).logits
        with tp.attach(model, back):
            torch.testing.assert_close(model(IDS).logits, expected)
    same = from_vectors(tmp_path / "v.gguf", model)
    assert all(torch.equal(one.v, other.v) for (_, one), (_, other) in zip(same.items(), back.items(), strict=True))


NO_VECTOR = {
    "block 0": (tp.TrailMap({tp.Site(0): tp.Additive(DIM)}), "llama.cpp has no control vector for block 0"),
    "rule": (tp.TrailMap({tp.Site(1, tp.Last(1)): tp.Additive(DIM)}), "acts at stream 'block' and on all tokens"),
    "stream": (tp.TrailMap({tp.Site(1, stream="mlp"): tp.Additive(DIM)}), "acts at stream 'block' and on all tokens"),
    "reads": (tp.TrailMap({tp.Site(1): tp.NoReFT(DIM, 2, init="paper")}), "NoReFT depends on what it reads"),
}


@pytest.mark.parametrize("name", NO_VECTOR)
def test_what_is_no_control_vector_is_not_written(name: str, tmp_path: Path) -> None:
    trails, message = NO_VECTOR[name]
    with pytest.raises(ValueError, match=message):
        to_gguf(trails, tmp_path / "v.gguf", llama())
    assert not (tmp_path / "v.gguf").exists()


def test_another_models_file_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    def written(name: str, values: np.ndarray) -> Path:
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    for name, values, message in (
        ("direction.1", np.zeros(7, np.float32), "the model has 3 blocks of width 32"),
        ("direction.9", np.zeros(DIM, np.float32), "the model has 3 blocks of width 32"),
        ("token_embd.weight", np.zeros(DIM, np.float32), "is not the direction of a block: this is no control vector"),
        ("direction.2", np.zeros(DIM, np.float16), "is not in float32"),
    ):
        with pytest.raises(TrailFileError, match=message):
            from_gguf(written(name, values), llama())


def test_mutants_of_a_control_vector_are_read_or_refused(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "v.gguf"
    to_gguf(laid(), path, model)
    whole = path.read_bytes()
    for seed in range(400):
        path.write_bytes(mutant(whole, seed))
        with contextlib.suppress(TrailFileError):
            from_gguf(path, model)
