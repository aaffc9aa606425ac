"""Interventions of pyreft, carried in and out: Wu et al. 2024, arXiv 2404.03592; stanfordnlp/pyreft 0.1.0.

trails = from_pyreft("runs/reft", model, positions="f1+l1")
positions = to_pyreft(trails, "runs/again")

    pyreft                                     here            R, P: r x d
    LoreftIntervention      Wx + b - Rx  in R   `LoReFT`
    NoreftIntervention      Wx + b - Px  in P   `NoReFT`
    DireftIntervention      Wx + b       in R   `DirectReFT`
    NodireftIntervention    Wx + b       in P   `DiReFT`
    ConsreftIntervention    b - Rx       in R   `ConstantReFT`
    LobireftIntervention    b            in R   `BiasReFT`

pyreft keeps R behind torch's `orthogonal`: as `base` (d x d) and as `original` (d x r), whose part below the diagonal
is that of Householder reflections. It does not keep where in a text the interventions lie, nor their activation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tokenpaths.checking import quoted
from tokenpaths.files import TrailFileError, read_json, whole
from tokenpaths.interop.foreign import new_folder, tensors_in
from tokenpaths.interop.reft import filled, kept_rotation, rotation
from tokenpaths.site import Host, Site
from tokenpaths.tokens import Either, First, Last, Rule
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.reft import BiasReFT, ConstantReFT, DirectReFT, DiReFT, LoReFT, NoReFT, Rotated

Kind: TypeAlias = Literal[
    "LoreftIntervention",
    "NoreftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
]
KINDS: Mapping[str, type[Trail]] = {
    "LoreftIntervention": LoReFT,
    "NoreftIntervention": NoReFT,
    "DireftIntervention": DirectReFT,
    "NodireftIntervention": DiReFT,
    "ConsreftIntervention": ConstantReFT,
    "LobireftIntervention": BiasReFT,
}
COMPONENTS = {"block_output": "block", "attention_output": "attention", "mlp_output": "mlp"}
_NAME = re.compile(r"intkey_(?:layer[_.](\d+)[_.])?comp[_.](.+)[_.]unit[_.](.+)[_.]nunit[_.]\d+#(\d+)")
_LINK, _FIELDS = (
    "intervention_link_key",
    (
        "layer component unit max_number_of_units low_rank_dimension intervention_type intervention subspace_partition "
        "group_key intervention_link_key moe_key source_representation hidden_source_representation latent_dim"
    ).split(),
)


@dataclass(frozen=True)
class _Found:
    """One intervention of a folder: where it lies, the how-many-eth at that place, of which class, its tensors."""

    where: str
    site: Site
    number: int
    kind: str
    tensors: Mapping[str, Tensor]


@torch.no_grad()
def from_pyreft(
    folder: str | os.PathLike[str],
    model: nn.Module,
    positions: str,
    *,
    kind: Kind | None = None,
    blocks: str | None = None,
) -> TrailMap:
    """Trails that do what the interventions of a folder do, to the rounding of float32.

    Read is what `ReftModel.save` wrote, and the `intervenable_model` folders of a Trainer, which lack the
    configuration. Interventions with equal numbers become one tied trail. Two at one place are those of
    `share_weights=False`: the first of them lies at the first tokens, the second at the last.

    pyreft takes at most half of a prompt for either end; here a short prompt gives what it has. It applies dropout to
    the whole state in training; the trails have none. What it was given as `act_fn` stands nowhere in the folder: only
    "linear" is meant.

    Args:
        folder: with `intkey_*.bin`, and `config.json` if there is one.
        model: the base model.
        positions: where in the prompt, as pyreft names it: "f1+l1" is the first token and the last; "f2", "l4".
        kind: pyreft's class of them all, where there is no configuration and the tensors do not tell.
        blocks: the name of the block list of a model that has several.

    Raises:
        FileNotFoundError: there are no interventions in the folder.
        TrailFileError: a file is damaged, holds more than tensors or others than its class has, or does not fit the
            model; interventions are linked; or their class or place has no like here. Nothing is executed.
        ValueError: `positions` is not of that form.
    """
    folder = Path(folder)
    ends = _ends(positions)
    host = Host.of(model, blocks)
    found = _configured(folder, host) if (folder / "config.json").exists() else _named(folder, host, kind)
    several = {one.where for one in found if one.number > 0}
    if several and (len(ends) < 2 or {one.where for one in found if one.number == 0} != several):
        raise TrailFileError(
            f"{folder}: {len(found)} interventions lie at {len({one.where for one in found})} places. Two at each are "
            f"those of the first and of the last tokens (share_weights=False), and positions={positions!r} has not both"
        )
    made: dict[str, list[tuple[Mapping[str, Tensor], Trail]]] = {}
    pairs: list[tuple[Site, Trail]] = []
    for one in found:
        rule = ends[one.number] if several else (Either(*ends) if len(ends) > 1 else ends[0])
        known = made.setdefault(one.kind, [])
        trail = next((trail for tensors, trail in known if _equal(tensors, one.tensors)), None)
        if trail is None:
            trail = _trail(folder, one, host.locate(one.site)[1].width)
            known.append((one.tensors, trail))
        pairs.append((Site(one.site.layer, rule, one.site.stream), trail))
    return TrailMap(pairs, blocks=blocks)


def _ends(positions: str) -> list[Rule]:
    parts = [re.fullmatch(r"([fl])([1-9]\d*)", part) for part in str(positions).split("+")]
    letters = [part[1] for part in parts if part is not None]
    if None in parts or letters not in (["f"], ["l"], ["f", "l"]):
        raise ValueError(f'positions={quoted(positions)}: write it as pyreft does, "f1+l1", "f2" or "l4"')
    return [(First if part[1] == "f" else Last)(int(part[2])) for part in parts if part is not None]


def _configured(folder: Path, host: Host) -> list[_Found]:
    """By the configuration, as `ReftModel.save` writes it."""
    config = read_json(folder / "config.json")
    told, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(told, list) or not isinstance(types, list) or not len(told) == len(types) > 0:
        raise TrailFileError(f"{folder}/config.json does not tell representations and intervention_types, one for each")
    found: list[_Found] = []
    for entry, name in zip(told, types, strict=True):
        fields: Any = dict(zip(_FIELDS, entry, strict=False)) if isinstance(entry, list) else entry
        if not isinstance(fields, dict) or not {"layer", "component"} <= set(fields):
            raise TrailFileError(f"{folder}/config.json: a representation is {entry!r:.120}")
        if fields.get(_LINK) is not None:
            raise TrailFileError(
                f"{folder}: interventions are linked ({_LINK}={fields[_LINK]!r:.40}), so that the later one reads what "
                "the earlier one made, and not the state at its own place: no trails do this"
            )
        shown = re.search(r"(\w+)\W*$", str(name))
        kind = shown[1] if shown else ""
        layer, component, unit = fields["layer"], str(fields["component"]), fields.get("unit") or "pos"
        where, site = f"{layer} {component}", _site(folder, host, layer, component, str(unit))
        number = sum(one.where == where for one in found)
        key = [*([] if "." in component else ["layer", str(layer)]), "comp", component, "unit", str(unit), "nunit"]
        key.append(f"{fields.get('max_number_of_units') or 1}#{number}.bin")
        now, earlier = "_".join(key).replace(component, component.replace(".", "_")), ".".join(key)
        file = folder / f"intkey_{earlier}"  # with dots, as earlier versions of pyvene wrote it
        file = file if file.exists() else folder / f"intkey_{now}"
        found.append(_Found(where, site, number, _known(folder, kind), tensors_in(file)))
    return found


def _named(folder: Path, host: Host, kind: Kind | None) -> list[_Found]:
    """By the names of the files, where a Trainer left no configuration."""
    found: list[_Found] = []
    for file in sorted(folder.glob("intkey_*.bin")):
        told = _NAME.fullmatch(file.stem)
        if told is None:
            raise TrailFileError(f"{file} is not named as pyreft names an intervention")
        layer, component, unit, number = told.groups()
        if layer is None:  # dots are written as underscores: model_layers[1]_output
            inside = re.search(r"[\[._](\d+)\]?[_.](output|input)$", component)
            if inside is None:
                raise TrailFileError(f"{file}: what lies at {component!r} is not known without a config.json")
            layer, component = inside[1], f"block_{inside[2]}"
        tensors = tensors_in(file)
        shown = _known(folder, kind or _shown_by(tensors) or "")
        site = _site(folder, host, int(layer), component, unit)
        found.append(_Found(f"{layer} {component}", site, int(number), shown, tensors))
    if not found:
        raise FileNotFoundError(
            f"{folder} has neither config.json nor intkey_*.bin: name the folder that pyreft saved to"
        )
    found.sort(key=lambda one: (one.number, one.site.layer))
    return found


def _shown_by(tensors: Mapping[str, Tensor]) -> str | None:
    """The class that alone has such tensors; None if two have."""
    if "rotate_layer" in tensors and "weight" in tensors:
        return "LoreftIntervention"
    turned = any(name.startswith("rotate_layer") for name in tensors)
    return "DireftIntervention" if turned and "learned_source.weight" in tensors else None


def _known(folder: Path, kind: str) -> str:
    if kind in KINDS:
        return kind
    if not kind:
        raise TrailFileError(
            f"{folder} has no config.json, and two classes of pyreft have these tensors: name the class, "
            f"kind={list(KINDS)[1]!r} for instance"
        )
    raise TrailFileError(f"{folder}: {kind!r:.80} has no like here; known are {', '.join(KINDS)}")


def _site(folder: Path, host: Host, layer: Any, component: str, unit: str) -> Site:
    """Where a component lies. Its rule is not told yet."""
    if unit != "pos":
        raise TrailFileError(f"{folder}: unit {unit!r:.40} of {component!r:.80} has no site here, only 'pos' has")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise TrailFileError(f"{folder}: {component!r:.80} lies at layer {layer!r:.40}, which is no layer")
    dotted = re.fullmatch(r"(.+?)\.?\[?(\d+)\]?\.(output|input)", component)
    if dotted:
        name, place = f"{dotted[1]}.{dotted[2]}", int(dotted[2])
        modules = {found.removeprefix("base_model.model."): module for found, module in host.model.named_modules()}
        if place >= len(host.blocks) or modules.get(name.removeprefix("base_model.model.")) is not host.blocks[place]:
            raise TrailFileError(f"{folder}: {component!r:.80} is not the output of a block of this model")
        layer, component = place, f"block_{dotted[3]}"
    if component == "block_input":
        site = Site(layer - 1) if layer else Site(0, stream="embedding")
    elif component in COMPONENTS:
        site = Site(layer, stream=COMPONENTS[component])  # pyright: ignore[reportArgumentType]
    else:
        raise TrailFileError(
            f"{folder}: component {component!r:.80} has no site here; there are {', '.join(COMPONENTS)}, block_input, "
            "and model.layers[L].output"
        )
    try:
        return host.locate(site)[0]
    except ValueError as error:
        raise TrailFileError(f"{folder}: {error}") from None


# Tensors


def _trail(folder: Path, one: _Found, dim: int) -> Trail:
    """A trail with the numbers of an intervention."""
    told = f"{folder}: the {one.kind} at {one.where}"
    cls, sizes = KINDS[one.kind], ("embed_dim", "interchange_dim")
    tensors = {name: tensor.float() for name, tensor in one.tensors.items() if name not in sizes}
    rotated = any(name.startswith("rotate_layer") for name in tensors)
    turned = rotation(told, tensors) if rotated else tensors.pop("proj_layer.weight", None)
    more = None if rotated else tensors.pop("proj_layer.bias", None)
    constant, short = cls in (ConstantReFT, BiasReFT), "weight" in tensors
    W = None if constant else tensors.pop("weight" if short else "learned_source.weight", None)
    b = tensors.pop("learned_source" if constant else "bias" if short else "learned_source.bias", None)
    bare = W is None and not constant
    if turned is None or b is None or bare or tensors or rotated != issubclass(cls, Rotated):
        raise TrailFileError(f"{told} has the tensors {', '.join(one.tensors)}, which are not those of its class")
    rank = len(turned) if turned.ndim == 2 else 0
    shapes = [(turned, (rank, dim)), (b, (rank,)), *([(W, (rank, dim))] if W is not None else [])]
    shapes += [] if more is None else [(more, (rank,))]
    if not 1 <= rank <= dim or any(tuple(tensor.shape) != shape for tensor, shape in shapes):
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in one.tensors.items())
        raise TrailFileError(f"{told} has the shapes {sizes}, which do not fit states of width {dim}")
    if cls is NoReFT and more is not None:
        b = b - more  # Wx + b - (Px + b')
    return filled(told, cls, turned, W, b)


@torch.no_grad()
def to_pyreft(trails: TrailMap, folder: str | os.PathLike[str]) -> str:
    """Write a folder that `ReftModel.load` reads, and tell the positions to give pyreft, such as "f1+l1".

    pyreft 0.1.0 rebuilds four of its six classes in bfloat16, or with arguments that it does not keep; docs/how-to/
    from-pyreft.md has the two lines that mend it.

    Args:
        trails: of the six classes, at blocks, attention, mlp or the embedding, and on the first or the last tokens of
            the prompt, or on both: the same at all sites, or one trail at the first and another at the last of each.
        folder: a new folder, or an empty one.

    Raises:
        FileExistsError: the folder holds files.
        ValueError: what pyreft does not have: another class, rule or place, or a gate. Nothing is written then.
    """
    folder = new_folder(folder)
    if trails.gate is not None:
        raise ValueError("pyreft has no gates: take it away (trails.gate = None), and say so to who gets the folder")
    rules = list(dict.fromkeys(site.tokens for site in trails.sites))
    positions = _positions(rules)
    parts: list[_Part] = []
    for number, rule in enumerate(rules):
        parts += [_part(site, number, trail) for site, trail in trails.items() if site.tokens == rule]
    places = [{part.place for part in parts if part.number == number} for number in range(len(rules))]
    if any(some != places[0] for some in places):
        raise ValueError(f"to_pyreft: with {rules[0]} and {rules[1]} apart, each needs a trail at every place")
    config = {
        "intervention_constant_sources": [True] * len(parts),
        "intervention_dimensions": [part.dim for part in parts],
        "intervention_types": [f"<class 'pyreft.interventions.{part.kind}'>" for part in parts],
        "mode": "parallel",
        "representations": [[*part.place, "pos", 1, part.rank, *[None] * 9] for part in parts],
        "sorted_keys": [part.key for part in parts],
    }
    with whole(folder) as beside:
        beside.mkdir(exist_ok=True)
        for part in parts:
            torch.save(part.tensors, beside / f"intkey_{part.key}.bin")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return positions


@dataclass(frozen=True)
class _Part:
    """An intervention to be written: its place, the how-many-eth it is there, its class, sizes and tensors."""

    place: tuple[int, str]
    number: int
    kind: str
    rank: int
    dim: int
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        layer, component = self.place
        return f"layer_{layer}_comp_{component}_unit_pos_nunit_1#{self.number}"


def _component(site: Site) -> tuple[int, str]:
    if site.stream == "embedding":
        return 0, "block_input"
    if site.head is not None or site.layer < 0:
        raise ValueError(f"to_pyreft: {site} lies at a head or at a layer that is counted from the last")
    return site.layer, {stream: component for component, stream in COMPONENTS.items()}[site.stream]


def _positions(rules: Sequence[Rule]) -> str:
    """As pyreft names them. Raises `ValueError` for what it has no name for."""
    parts = [part for rule in rules for part in ((rule.left, rule.right) if isinstance(rule, Either) else (rule,))]
    counted = [part for part in parts if isinstance(part, (First, Last))]
    if [type(part) for part in parts] not in ([First], [Last], [First, Last]) or len(rules) > 2:
        raise ValueError(
            f"to_pyreft: pyreft moves the first and the last tokens of prompts, as First(n) | Last(m), and not "
            f"{', '.join(map(str, rules)):.200}"
        )
    return "+".join(f"{'f' if isinstance(part, First) else 'l'}{part.n}" for part in counted)


def _part(site: Site, number: int, trail: Trail) -> _Part:
    """Raises `ValueError` for a class that pyreft does not have."""
    kind = next((name for name, cls in KINDS.items() if type(trail) is cls), None)
    if kind is None:
        known = ", ".join(cls.__name__ for cls in KINDS.values())
        raise ValueError(f"to_pyreft: pyreft has no {trail!r:.80}; it has {known}")
    own: Any = trail
    sizes = {"embed_dim": torch.tensor(own.dim), "interchange_dim": torch.tensor(own.dim)}
    source = {"learned_source.bias": own.b}
    if isinstance(trail, LoReFT):
        tensors = {"weight": trail.W, "bias": trail.b, "rotate_layer": trail.R.mT}
    elif isinstance(trail, NoReFT):
        tensors = {"proj_layer.weight": trail.P, "learned_source.weight": trail.W, **source, **sizes}
    elif isinstance(trail, DiReFT):
        tensors = {"proj_layer.weight": trail.W2, "learned_source.weight": trail.W1, **source, **sizes}
    elif isinstance(trail, DirectReFT):
        tensors = {"learned_source.weight": trail.W, **source, **kept_rotation(trail.R), **sizes}
    else:
        tensors = {"learned_source": own.b, **kept_rotation(own.R), **sizes}
    told = {
        name: (part.detach().cpu().float() if part.is_floating_point() else part).contiguous().clone()
        for name, part in tensors.items()
    }
    return _Part(_component(site), number, kind, own.rank, own.dim, told)


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
