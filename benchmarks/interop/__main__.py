"""How far what is carried in or out is from the trails themselves, on SmolLM2 in float32: claims, and a page of docs.

    python -m benchmarks.interop                 # five minutes; writes docs/compatibility.md as well
    python -m benchmarks.interop --table         # the claims and the page, of what was measured

The counterparts are the packages themselves: pyreft 0.1.0, PEFT, llama.cpp (the wheel xllamacpp, if it is installed),
and what adapters 1.2.0 made (tests/fixtures/adapters). Logits of 24 random tokens are compared, and those of SmolLM2 go
up to 30.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyreft_oracle
import torch
from peft import PeftModel
from torch import Tensor

import tokenpaths as tp
from benchmarks.common.folders import KEPT
from benchmarks.common.kept import keep, read
from benchmarks.common.llama_cpp import Llama, in_float32
from benchmarks.common.models import twin
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, environment, write
from benchmarks.interop.page import write_page
from tokenpaths.demo import _packaged_gguf, demo_model  # pyright: ignore[reportPrivateUsage]
from tokenpaths.interop import from_gguf, from_pyreft, merge, serve, to_gguf, to_peft, to_pyreft
from tokenpaths.interop.pyreft import KINDS
from tokenpaths.trails import BiasReFT, ConstantReFT, DirectReFT

FILE = KEPT / "interop" / "measured.json"
IDS = torch.randint(0, 40_000, (24,), generator=torch.Generator().manual_seed(0))
ENDS = [0, len(IDS) - 1]
AFFINE = (tp.LoReFT, tp.NoReFT, tp.DiReFT, DirectReFT, ConstantReFT, BiasReFT)


def random(trail: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trail.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trail


@torch.no_grad()
def logits(model: Any, trails: tp.TrailMap | None = None) -> Tensor:
    if trails is None:
        return model(input_ids=IDS[None]).logits[0]
    with tp.attach(model, trails):
        return model(input_ids=IDS[None]).logits[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def of_pyreft(model: Any, folder: Path) -> dict[str, Any]:
    """Each class: written, loaded by pyreft, and read again."""
    told: dict[str, Any] = {}
    for kind, cls in KINDS.items():
        made: Any = cls
        laid = {tp.Site(at, tp.First(1) | tp.Last(1)): random(made(576, 4), at) for at in (5, 20)}
        trails = tp.TrailMap(laid)
        to_pyreft(trails, folder / kind)
        with pyreft_oracle.mended(), contextlib.redirect_stdout(io.StringIO()):
            reft = pyreft_oracle.load_pyreft().ReftModel.load(str(folder / kind), copy.deepcopy(model))
        where = {"sources->base": (None, [[ENDS], [ENDS]])}
        with torch.no_grad():
            theirs = reft({"input_ids": IDS[None]}, unit_locations=where)[1].logits[0]
        ours = logits(model, trails)
        back = logits(model, from_pyreft(folder / kind, model, "f1+l1"))
        told[kind] = {"there": apart(theirs, ours), "back": apart(back, ours), "moved": apart(ours, logits(model))}
    return told


def of_weights(model: Any, folder: Path) -> dict[str, Any]:
    """Each affine class, at attention and mlp: merged, and as a LoRA of PEFT."""
    told: dict[str, Any] = {}
    for cls in AFFINE:
        places = (tp.Site(3, stream="attention"), tp.Site(12, stream="mlp"))
        trails = tp.TrailMap({site: random(cls(576, 4), site.layer) for site in places})
        ours = logits(model, trails)
        to_peft(trails, folder / cls.__name__, model)
        lora = PeftModel.from_pretrained(twin(model), str(folder / cls.__name__))
        other = twin(model)
        merge(other, trails)
        told[cls.__name__] = {
            "merged": apart(logits(other), ours),
            "peft": apart(logits(lora), ours),
            "moved": apart(ours, logits(model)),
        }
    return told


def of_engine(model: Any, folder: Path) -> dict[str, Any]:
    """A hook over chunks of one token, of three, and of all, with a cache."""
    rule = tp.First(2) | tp.Last(3) | tp.Answer()
    trails = tp.TrailMap({site: random(tp.LoReFT(576, 4), site.layer) for site in tp.sites(model, [5, 20], rule)})
    prompt = 15
    with torch.no_grad(), tp.attach(model, trails):
        ours = model(IDS[None], prompt_mask=(torch.arange(len(IDS)) < prompt)[None]).logits[0]
    told: dict[str, Any] = {"moved": apart(ours, logits(model))}
    for length in (1, 3, len(IDS)):
        told[str(length)] = apart(served(twin(model), trails, prompt, length), ours)
    return told


@torch.no_grad()
def served(model: Any, trails: tp.TrailMap, prompt: int, length: int) -> Tensor:
    begin = 0

    def hooked(move: serve.Move) -> Callable[..., Tensor]:
        return lambda module, args, output: torch.stack([move(row, begin, prompt) for row in output])

    for site in trails.sites:
        model.model.layers[site.layer].register_forward_hook(hooked(serve.hook(trails, site)))
    cache, found = None, []
    while begin < len(IDS):
        out = model(IDS[None, begin : begin + length], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0])
        begin += length
    return torch.cat(found)


def of_llama_cpp(model: Any, folder: Path) -> dict[str, Any]:
    """The same model file in float32, frozen and with a control vector that llama.cpp's own loader reads."""
    made = {tp.Site(at): random(tp.Additive(576), at) for at in (1, 3, 10, 20, 29)}
    trails = tp.TrailMap(made)
    with torch.no_grad():
        for _, trail in trails.items():
            trail.v.mul_(3)
    to_gguf(trails, folder / "vector.gguf", model)
    whole = in_float32(_packaged_gguf(), KEPT / "interop" / "smollm2-f32.gguf")
    with Llama(whole) as llama:
        plain = torch.from_numpy(llama.logits(IDS.tolist()))
        llama.steer(folder / "vector.gguf")
        assert llama.vector is not None
        rows = torch.from_numpy(llama.vector).view(-1, 576)
        exact = all(torch.equal(rows[site.layer - 1], made[site].v.detach()) for site in made)
        steered = torch.from_numpy(llama.logits(IDS.tolist()))
        llama.steer(None)
        cleared = torch.equal(torch.from_numpy(llama.logits(IDS.tolist())), plain)
    frozen, ours = logits(model), logits(model, trails)
    back = logits(model, from_gguf(folder / "vector.gguf", model))
    return {
        "frozen": apart(plain, frozen), "vector": apart(steered, ours), "moved": apart(ours, frozen),
        "loaded to the bit": exact, "cleared to the bit": cleared, "back": apart(back, ours),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    model, _ = demo_model(dtype=torch.float32)
    model.requires_grad_(False)
    parts: Sequence[tuple[str, Callable[[Any, Path], dict[str, Any]]]] = (
        ("pyreft", of_pyreft), ("weights", of_weights), ("engine", of_engine), ("llama.cpp", of_llama_cpp),
    )  # fmt: skip
    told: dict[str, Any] = {**environment()}
    for name, part in parts:
        with tempfile.TemporaryDirectory() as folder:
            told[name] = part(model, Path(folder))
        print(name, told[name], flush=True)
    return told


def claims(told: dict[str, Any]) -> list[Claim]:
    def largest(part: str, *keys: str) -> float:
        return max(row[key] for row in told[part].values() for key in keys)

    unit, where = "logits, which go up to 30", "SmolLM2, float32, 24 tokens"
    engine, vector = told["engine"], told["llama.cpp"]
    return [
        Claim(
            "pyreft_roundtrip_max_abs",
            f"largest difference of logits, six classes written, loaded by pyreft 0.1.0, and read back; {where}",
            largest("pyreft", "there", "back"), unit, "1e-4",
        ),
        Claim(
            "merge_max_abs", f"largest difference of logits, merged against attached, six classes; {where}",
            largest("weights", "merged"), unit, "3e-3",
        ),
        Claim(
            "lora_export_max_abs", f"largest difference of logits, PEFT's LoRA against attached, six classes; {where}",
            largest("weights", "peft"), unit, "3e-3",
        ),
        Claim(
            "serving_hook_max_abs", f"largest difference of logits, a hook over chunks against attached; {where}",
            max(engine[length] for length in ("1", "3", str(len(IDS)))), unit, "1e-3",
        ),
        Claim(
            "gguf_frozen_max_abs", f"largest difference of logits, llama.cpp against transformers, frozen; {where}",
            vector["frozen"], unit,
        ),
        Claim(
            "gguf_vs_attach_max_abs",
            f"largest difference of logits, llama.cpp's control vector against attached; {where}",
            vector["vector"], unit, "twice the frozen",
        ),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__, table=True)
    torch.set_num_threads(1)
    if not options.parse_args().table:
        keep(FILE, measure)
    (told,) = read([FILE])
    write("interop", told, claims(told), seed=0)
    write_page(told)


if __name__ == "__main__":
    main()
