"""The contract of adapters: what is trained beside a frozen base. An adapter of one's own is a third kind."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from tiny import DIM, llama, make_examples, make_trails
from torch import nn

import tokenpaths as tp
from tokenpaths import Imitate, Stay
from tokenpaths.attachment import working
from tokenpaths.trailmap import Adapter


class Shift(Adapter):
    """A bias after the first block, by a hook: nothing that this library has made."""

    saved_as: ClassVar[str] = "shift.safetensors"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(DIM))
        self.on = True
        self.block = (model.model.layers[0],)
        self.block[0].register_forward_hook(lambda module, args, output: output + self.b if self.on else output)

    @contextmanager
    def off(self) -> Generator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def check(self, model: nn.Module) -> None:
        if self.block[0] not in set(model.modules()):
            raise ValueError("it lies in another model")

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"b": self.b.detach()}, path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        self.load_state_dict(safetensors.torch.load_file(path))


def test_an_adapter_of_ones_own_is_trained_and_measured(tmp_path: Path) -> None:
    texts = [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(4, seed=3)]

    def run(folder: Path, stop: int = 4, resume: bool = False) -> Shift:
        model = llama()
        shift = Shift(model)
        goals = [Imitate(make_examples()), Stay(texts, within=0.05)]
        settings: dict[str, Any] = dict(batch_size=4, lr=0.1, progress=False, save_every=1, checkpoint=folder)
        for step in tp.steps(model, shift, goals, steps=4, resume=resume, **settings):
            if step.step == stop:
                break
        assert tp.measure_drift(model, shift, texts)["kl"].mean > 0
        return shift

    whole = run(tmp_path / "a")
    run(tmp_path / "b", stop=2)
    assert torch.equal(run(tmp_path / "b", resume=True).b, whole.b)
    assert whole.size() == DIM
    other = llama()
    with pytest.raises(ValueError, match="it lies in another model"):
        next(tp.steps(other, whole, [Imitate(make_examples())], steps=1, progress=False))


def test_trail_maps_are_adapters(tmp_path: Path) -> None:
    model, trails = llama(), make_trails()
    assert isinstance(trails, Adapter)
    trails.check(model)
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        tp.TrailMap({tp.Site(7): tp.trails.RED(DIM)}).check(model)
    told = {name: tensor.clone() for name, tensor in trails.state_dict().items()}
    trails.save(tmp_path / "trails.safetensors")
    parameters = list(trails.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    trails.restore(tmp_path / "trails.safetensors")
    assert all(torch.equal(tensor, told[name]) for name, tensor in trails.state_dict().items())
    assert all(p is q for p, q in zip(parameters, trails.parameters(), strict=True))
    with pytest.raises(tp.files.TrailFileError, match=r"has trails at .*Site\(layer=2, tokens=Answer"):
        tp.TrailMap(
            {tp.Site(0): tp.LoReFT(DIM, 2), tp.Site(1): tp.LoReFT(DIM, 2), tp.Site(2): tp.LoReFT(DIM, 2)}
        ).restore(tmp_path / "trails.safetensors")


def test_working_attaches_trails_once() -> None:
    model, trails = llama(), make_trails()
    with working(model, trails):
        assert tp.attachment.is_attached(model, trails)
        with working(model, trails):
            pass
        assert tp.attachment.is_attached(model, trails)
    assert not tp.attachment.is_attached(model, trails)
