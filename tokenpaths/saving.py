"""What a trail file is: one safetensors file whose metadata holds a JSON note.

The tensors are the trails' parameters; the note says how to rebuild them: the class and constructor arguments of each
trail, the site that it lies at, and the model that it was made for. Nothing in a file is ever executed or imported:
class names are looked up among tokenpaths' own trails and the classes that the caller passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tokenpaths import tokens, trails
from tokenpaths.sites import Site
from tokenpaths.tokens import Rule
from tokenpaths.trails import OrthonormalRows, Trail, arguments

VERSION = 1
_DEEPEST = 32  # how far trails or rules may be nested in a file

_RULES: dict[str, type[Rule]] = {
    name: value for name, value in vars(tokens).items() if isinstance(value, type) and issubclass(value, Rule)
}
_TRAILS: dict[str, type[Trail]] = {
    name: value for name, value in vars(trails).items() if isinstance(value, type) and issubclass(value, Trail)
}


class TrailFileError(ValueError):
    """A file that is not a whole, sound trail file for the classes given."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write a file whole or not at all: beside its place first, then renamed over it."""
    path = Path(path)
    metadata = {"tokenpaths": json.dumps({"version": VERSION, **note}, sort_keys=True)}
    content = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a file. Raises `FileNotFoundError` and `TrailFileError`."""
    path = Path(path)
    content = path.read_bytes()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str] | None", file.metadata())
        tensors = safetensors.torch.load(content)
    except Exception as error:  # the parser's own errors are of several unrelated classes
        raise TrailFileError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    if not metadata or "tokenpaths" not in metadata:
        raise TrailFileError(f"{path} is a safetensors file, but not of tokenpaths: it has no 'tokenpaths' note")
    try:
        note = json.loads(metadata["tokenpaths"])
    except (ValueError, RecursionError) as error:
        raise TrailFileError(f"{path}: its note is not JSON ({error}): copy or download it again") from None
    version = note.pop("version", None) if isinstance(note, dict) else None
    if version != VERSION:
        raise TrailFileError(f"{path}: its note is of version {version!r}, this tokenpaths reads version {VERSION}")
    return tensors, cast("dict[str, Any]", note)


def trail_to_note(trail: Trail) -> dict[str, Any]:
    """The class name and constructor arguments of a trail, nested trails included."""
    given = {name: _argument_to_note(trail, name, value) for name, value in arguments(trail).items()}
    return {"class": type(trail).__name__, "arguments": given}


def trail_from_note(note: Any, classes: Sequence[type[Trail]], depth: int = 0) -> Trail:
    """Build a trail from its note. Raises `TrailFileError`, also for whatever a constructor refuses."""
    _check_note(note, {"class", "arguments"}, "a trail", depth)
    known = {**_TRAILS, **{cls.__name__: cls for cls in classes}}
    name, given = note["class"], note["arguments"]
    if not isinstance(name, str) or name not in known:
        raise TrailFileError(f"the file holds a trail of class {name!r}: pass that class to load(path, {name})")
    if not isinstance(given, dict):
        raise TrailFileError(f"the arguments of {name} must be a JSON object, not {given!r:.80}")
    built = {
        key: trail_from_note(value, classes, depth + 1) if isinstance(value, dict) else value
        for key, value in cast("dict[str, Any]", given).items()
    }
    try:
        return known[name](**built)
    except Exception as error:  # a constructor may refuse its arguments in any way it likes
        raise TrailFileError(f"{name} cannot be built with the arguments in the file, {given!r:.200}: {error}") from error


def site_to_note(site: Site) -> dict[str, Any]:
    return {"layer": site.layer, "stream": site.stream, "head": site.head, "tokens": rule_to_note(site.tokens)}


def site_from_note(note: Any) -> Site:
    _check_note(note, {"layer", "stream", "head", "tokens"}, "a site", 0)
    head = note["head"]
    if head is not None and (isinstance(head, bool) or not isinstance(head, int)):
        raise TrailFileError(f"a site's head must be a whole number or null, not {head!r:.80}")
    try:
        return Site(note["layer"], rule_from_note(note["tokens"]), note["stream"], head)
    except TrailFileError:
        raise
    except (TypeError, ValueError) as error:
        raise TrailFileError(f"the file names an impossible site: {error}") from None


def rule_to_note(rule: Rule) -> dict[str, Any]:
    if _RULES.get(type(rule).__name__) is not type(rule):
        raise TypeError(f"{rule} is a rule of your own and cannot be saved; combine the rules of tokenpaths.tokens")
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return {
        "rule": type(rule).__name__,
        **{name: rule_to_note(value) if isinstance(value, Rule) else value for name, value in fields.items()},
    }


def rule_from_note(note: Any, depth: int = 0) -> Rule:
    cls = _RULES.get(note["rule"]) if isinstance(note, dict) and isinstance(note.get("rule"), str) else None
    if cls is None or cls is Rule:
        raise TrailFileError(f"the file names an unknown token rule: {note!r:.80}")
    names = {field.name for field in dataclasses.fields(cls)}
    _check_note(note, {"rule", *names}, cls.__name__, depth)
    built = {name: _rule_argument(cls, name, note[name], depth) for name in names}
    try:
        return cls(**built)
    except (TypeError, ValueError, OverflowError) as error:
        raise TrailFileError(f"the file holds an impossible token rule: {error}") from None


def load_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module the tensors of a file, in the file's dtype, after checking all of them."""
    expected = module.state_dict()
    check_shapes(expected, tensors)
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise TrailFileError(f"tensor {name!r} holds numbers that are not finite, or not floating point")
    module.load_state_dict(dict(tensors), assign=True)
    for name, part in module.named_modules():
        if isinstance(part, OrthonormalRows):
            rows = part().detach()
            error = (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype)).abs().max()
            if not error < 1e-4:
                raise TrailFileError(f"{name} does not give orthonormal rows (R R^T differs from I by {error:.1e})")


def check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise TrailFileError(f"the file lacks tensors that its note calls for: {', '.join(missing[:8])}")
    if extra := sorted(set(tensors) - set(expected)):
        raise TrailFileError(f"the file holds tensors that its note does not call for: {', '.join(extra[:8])}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} in the file, {list(expected[name].shape)} by the note"
            raise TrailFileError(f"tensor {name!r} has shape {shapes}")


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameter names, shapes and 64 values of each, the same in float32 as in bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        step = max(1, len(values) // 64)
        sample = values[::step][:64].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{list(parameter.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


def _argument_to_note(trail: Trail, name: str, value: Any) -> Any:
    if isinstance(value, Trail):
        return trail_to_note(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_argument_to_note(trail, name, item) for item in cast("Sequence[Any]", value)]
    raise TypeError(
        f"{type(trail).__name__}: argument {name!r} is a {type(value).__name__}, which a trail file cannot hold: "
        "use numbers, strings, lists and trails as constructor arguments"
    )


def _rule_argument(cls: type[Rule], name: str, value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return rule_from_note(cast("dict[str, Any]", value), depth + 1)
    if isinstance(value, Rule) or cls in (tokens.Either, tokens.Both, tokens.Without, tokens.Not):
        raise TrailFileError(f"{cls.__name__} combines token rules, but its {name!r} is {value!r:.80}")
    if cls is tokens.Span and not isinstance(value, str):
        raise TrailFileError(f"Span takes a name, not {value!r:.80}")
    return value


def _check_note(note: Any, keys: set[str], what: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise TrailFileError(f"the note is nested more than {_DEEPEST} deep")
    if not isinstance(note, dict) or set(cast("dict[str, Any]", note)) != keys:
        raise TrailFileError(f"the note of {what} must have the keys {', '.join(sorted(keys))}, but is {note!r:.120}")
