"""What a trail file says. It is one safetensors file whose metadata holds a JSON note.

The tensors are the trails' parameters. The note says how to rebuild the trails: the class and constructor arguments of
each, the site that it lies at, and the model that it was made for. Nothing in a file is ever executed or imported:
class names are looked up among tokenpaths' own trails and the classes that the caller passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from inspect import isabstract
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenpaths import tokens, trails
from tokenpaths.files import TrailFileError
from tokenpaths.site import Site
from tokenpaths.tokens import Rule
from tokenpaths.trails.base import Trail, arguments
from tokenpaths.trails.stiefel import OrthonormalRows

_DEEPEST = 64  # how far trails, rules or lists may be nested
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RULES: dict[str, type[Rule]] = {
    name: value
    for name, value in vars(tokens).items()
    if isinstance(value, type) and issubclass(value, Rule) and not isabstract(value)
}
_TRAILS: dict[str, type[Trail]] = {
    name: value
    for name, value in vars(trails).items()
    if isinstance(value, type) and issubclass(value, Trail) and value is not Trail
}


def named(classes: Sequence[type[Trail]]) -> dict[str, type[Trail]]:
    """The classes that a file may name: tokenpaths' own trails and those of the caller, by name.

    Raises `TypeError` for what is no `Trail` class, and `ValueError` for two classes of one name.
    """
    known = dict(_TRAILS)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Trail)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"only Trail classes may follow the path, not {cls!r:.80}; a model is given as model=...")
        if known.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"two different trail classes are named {cls.__name__}: a file could mean either")
    return known


def foreign(module: nn.Module) -> tuple[type[Trail], ...]:
    """The classes of the trails in a module that are not tokenpaths' own."""
    kinds = {type(part) for part in module.modules() if isinstance(part, Trail)}
    return tuple(kinds - set(_TRAILS.values()))


def trail_to_note(trail: Trail, depth: int = 0) -> dict[str, Any]:
    """The class name and constructor arguments of a trail, and of the trails inside it.

    Raises `TypeError` for an argument that JSON does not have, and `ValueError` beyond 64 levels.
    """
    name = type(trail).__name__
    if _TRAILS.get(name, type(trail)) is not type(trail):
        raise TypeError(f"your class {name} has the name of one of tokenpaths' own trails: rename it, then save")
    given = {key: _to_note(f"{name}: argument {key!r}", value, depth) for key, value in arguments(trail).items()}
    return {"class": name, "arguments": given}


def trail_from_note(note: Any, known: Mapping[str, type[Trail]], depth: int = 0) -> Trail:
    """Build a trail from its note. Raises `TrailFileError`, also for arguments that a constructor refuses."""
    _check_note(note, {"class", "arguments"}, "a trail", depth)
    name, given = note["class"], note["arguments"]
    if not isinstance(name, str) or name not in known:
        raise TrailFileError(f"the file holds a trail of class {name!r:.80}: pass that class to load(path, ...)")
    if not isinstance(given, dict):
        raise TrailFileError(f"the arguments of {name} must be a JSON object, not {given!r:.80}")
    built = {key: _from_note(value, known, depth) for key, value in cast("dict[str, Any]", given).items()}
    try:
        return known[name](**built)
    except Exception as error:  # a constructor may refuse its arguments in any way it likes
        raise TrailFileError(
            f"{name} cannot be built with the arguments in the file, {given!r:.200}: {error}"
        ) from error


def site_to_note(site: Site) -> dict[str, Any]:
    """The four fields of a site."""
    return {"layer": site.layer, "stream": site.stream, "head": site.head, "tokens": rule_to_note(site.tokens)}


def site_from_note(note: Any) -> Site:
    """Build a site from its note. Raises `TrailFileError`."""
    _check_note(note, {"layer", "stream", "head", "tokens"}, "a site")
    rule = rule_from_note(note["tokens"])
    try:
        return Site(note["layer"], rule, note["stream"], note["head"])
    except (TypeError, ValueError) as error:
        raise TrailFileError(f"the file names an impossible site: {error}") from None


def rule_to_note(rule: Rule, depth: int = 0) -> dict[str, Any]:
    """The class name of a rule and its fields, and those of the rules inside it.

    Raises `TypeError` for a rule that is not of `tokenpaths.tokens`, and `ValueError` beyond 64 levels.
    """
    if _RULES.get(type(rule).__name__) is not type(rule):
        raise TypeError(f"{rule} is a rule of your own and cannot be saved; combine the rules of tokenpaths.tokens")
    if depth > _DEEPEST:
        raise ValueError(f"not saved: a token rule is nested more than {_DEEPEST} deep")
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    parts = {k: rule_to_note(value, depth + 1) if isinstance(value, Rule) else value for k, value in fields.items()}
    return {"class": type(rule).__name__, **parts}


def rule_from_note(note: Any, depth: int = 0) -> Rule:
    """Build a rule from its note. Raises `TrailFileError`."""
    name = cast("dict[str, Any]", note).get("class") if isinstance(note, dict) else None
    if not isinstance(name, str) or name not in _RULES:
        raise TrailFileError(f"the file names an unknown token rule: {note!r:.80}")
    fields = {field.name for field in dataclasses.fields(_RULES[name])}
    _check_note(note, {"class", *fields}, name, depth)
    built = {k: rule_from_note(note[k], depth + 1) if isinstance(note[k], dict) else note[k] for k in fields}
    try:
        return _RULES[name](**built)
    except (TypeError, ValueError) as error:
        raise TrailFileError(f"the file holds an impossible token rule: {error!s:.200}") from None


def check_map(note: Mapping[str, Any]) -> dict[str, str] | None:
    """The base model that the note of a map names, if any: its name and fingerprint.

    Raises `TrailFileError` unless the note has a list of trails, a list of sites, a block list and a base.
    """
    if set(note) - {"gate"} != {"trails", "sites", "blocks", "base"}:
        raise TrailFileError(f"its note has the keys {', '.join(sorted(note)):.120}")
    if not isinstance(note["trails"], list) or not isinstance(note["sites"], list):
        raise TrailFileError("its trails and sites must be lists")
    blocks, base = note["blocks"], note["base"]
    if not isinstance(blocks, str | None):
        raise TrailFileError(f"its blocks must be a string or null, not {blocks!r:.80}")
    words = cast("dict[str, Any]", base) if isinstance(base, dict) else {}
    described = words.keys() == {"name", "fingerprint"} and all(isinstance(word, str) for word in words.values())
    if base is not None and not described:
        raise TrailFileError(f"its base must have a name and a fingerprint, but is {base!r:.80}")
    return words or None


def load_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module the tensors of a file, in the file's dtype. Raises `TrailFileError` unless all are sound."""
    expected = module.state_dict()
    check_shapes(expected, tensors)
    check_numbers(expected, tensors)
    module.load_state_dict(dict(tensors), assign=True)
    if found := fault(module):
        raise TrailFileError(found)


def check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `TrailFileError` unless the tensors of a file are those that its note calls for."""
    if missing := sorted(set(expected) - set(tensors)):
        raise TrailFileError(f"the file lacks tensors that its note calls for: {', '.join(missing[:8])}")
    if extra := sorted(set(tensors) - set(expected)):
        raise TrailFileError(f"the file holds tensors that its note does not call for: {', '.join(extra[:8])}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)} in the file, {list(tensor.shape)} by the note"
            raise TrailFileError(f"tensor {name!r} has shape {shapes}")


def check_numbers(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `TrailFileError` for tensors of a file that are of another kind than expected, or not finite."""
    for name, tensor in expected.items():
        if tensors[name].dtype not in (_FLOATS if tensor.is_floating_point() else (tensor.dtype,)):
            raise TrailFileError(f"tensor {name!r} is {tensors[name].dtype} in the file, {tensor.dtype} by the note")
        if not bool(tensors[name].isfinite().all()):
            raise TrailFileError(f"{name} holds NaN or infinity")


@torch.no_grad()
def fault(module: nn.Module) -> str | None:
    """Why the numbers of a module cannot be kept, with the name of the tensor; None if they are sound."""
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinity"
    for name, part in module.named_modules():
        if isinstance(part, OrthonormalRows):
            # every matrix has an orthonormal factor, but dependent rows do not determine it
            triangle = torch.linalg.qr(part.weight.cpu().double().mT, mode="r").R.diagonal().abs()
            if not triangle.min() > 1e-6 * triangle.max():
                return f"the rows of {name}.weight depend on each other, so they span no subspace of their number"
            rows = part().cpu().double()
            error = (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device="cpu")).abs().max()
            if not error < 1e-4:
                return f"{name}.weight does not give orthonormal rows (R R^T differs from I by {error:.1e})"
    return None


def _to_note(what: str, value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"not saved: {what} is nested more than {_DEEPEST} deep")
    if isinstance(value, Trail):
        return trail_to_note(value, depth + 1)
    if isinstance(value, (list, tuple)):
        return [_to_note(what, item, depth + 1) for item in cast("Sequence[Any]", value)]
    if value is None or isinstance(value, (bool, int, str)) or isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(
        f"{what} is {value!r:.80}, which a trail file cannot hold: use finite numbers, strings, lists and trails as "
        "constructor arguments"
    )


def _from_note(value: Any, known: Mapping[str, type[Trail]], depth: int) -> Any:
    if isinstance(value, dict):
        return trail_from_note(cast("dict[str, Any]", value), known, depth + 1)
    if isinstance(value, list):
        return [_from_note(item, known, depth + 1) for item in cast("list[Any]", value)]
    return value


def _check_note(note: Any, keys: set[str], what: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise TrailFileError(f"its note is nested more than {_DEEPEST} deep")
    if not isinstance(note, dict) or set(cast("dict[str, Any]", note)) != keys:
        raise TrailFileError(f"the note of {what} must have the keys {', '.join(sorted(keys))}, but is {note!r:.120}")
