"""What PEFT has laid into a model, as an adapter: the same tools train, read and measure it as trails.

peft_model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
lora = PeftAdapter(peft_model)
for step in steps(peft_model, lora, [Imitate(task), Stay(texts, within=0.01)], steps=100, lr=1e-3): ...
measure_drift(peft_model, lora, texts, tokenizer)
lora.save("folder")                      # PEFT's own format: PeftModel.from_pretrained(model, "folder")
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

import safetensors.torch
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.attachment.hooks import alone, shadow
from tokenpaths.files import TrailFileError
from tokenpaths.files.sealing import opened
from tokenpaths.scope import Switch
from tokenpaths.trailmap import notes
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import FILE_NAME as GATE_FILE
from tokenpaths.trailmap.gate import Gate
from tokenpaths.undo import Undo, tidy

Layer: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper
_WRAPPED = ("base_layer", "original_module", "model")  # children that belong to the base
_NOT_SHOWN = ("peft_version", "base_model_name_or_path", "auto_mapping", "inference_mode", "peft_type", "revision")
_CHECKSUMS = "checksums.json"  # ours, beside PEFT's files: PEFT passes over it
_WRITTEN = ("README.md", "adapter_config.json", SAFETENSORS_WEIGHTS_NAME, _CHECKSUMS, GATE_FILE)


class PeftAdapter(Adapter):
    """The active adapters of a PEFT model, of any method: LoRA, DoRA, PiSSA, OSF, and those of `tokenpaths.lab.peers`.

    The PEFT model remains the user's own object; the user trains, calls and measures it. An adapter changes weights, so
    no token and no layer is known to stay as it was: there is no light cone.

    PiSSA, CorDA, OLoRA and LoRA-GA take their first factors out of the base weights, so the base that they leave is not
    the model that they came from. Their frozen base is the model with its *first* factors, equal to the original up to
    rounding: `fresh=True` says that the factors are the first ones now, and keeps a copy. LoftQ and KaSA replace base
    weights by others, so `off()` has no frozen base to go back to, `fresh` or not.

    Args:
        peft_model: what `get_peft_model` or `PeftModel.from_pretrained` returned.
        fresh: the adapter has not been trained yet. The methods just named need it for `off()`.

    Raises:
        TypeError: not a PEFT model.
        ValueError: a prompt method, whose tokens are no part of any layer; or parameters of the base that learn as well
            (as with `bias="all"`), so that there would be no frozen base.
    """

    saved_as: ClassVar[str] = "adapter"

    def __init__(self, peft_model: nn.Module, *, fresh: bool = False) -> None:
        if not isinstance(peft_model, PeftModel):
            raise TypeError(f"PeftAdapter takes what get_peft_model returned, not {type(peft_model).__name__}")
        if peft_model.active_peft_config.is_prompt_learning or peft_model.active_peft_config.is_adaption_prompt:
            kind = type(peft_model.active_peft_config).__name__
            raise ValueError(f"{kind} prepends tokens to every text, which nothing here counts: it cannot be compared")
        super().__init__()
        self._model = (peft_model,)  # in a tuple, so that the base is no part of this module
        self.adapters = tuple(_active(peft_model))
        self.layers = tuple(_layers(peft_model))
        self.parts = nn.ModuleList(_parts(peft_model, self.adapters))
        own = {id(parameter) for parameter in self.parameters()}
        strangers = [n for n, p in peft_model.named_parameters() if p.requires_grad and id(p) not in own]
        if strangers:
            raise ValueError(
                f"{len(strangers)} parameters outside the adapter learn as well, the first of them {strangers[0]}: so "
                'there is no frozen base. Freeze them, and leave bias="none" in the PEFT configuration'
            )
        self._first = [(p, p.detach().clone()) for p in self.parameters()] if fresh else None
        self._swapped = False
        self._switch = Switch("adapter.off()")
        self._users, self._flags = set[object](), list[tuple[Layer, bool]]()

    def __repr__(self) -> str:
        configs = self.peft_model.peft_config
        described = ", ".join(f"{name}: {_describe(configs[name])}" for name in self.adapters)
        return f"PeftAdapter({described})"

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model that it was made of."""
        return self._model[0]

    @property
    def running(self) -> list[nn.Module]:
        """PEFT's layers."""
        return [cast("nn.Module", layer) for layer in self.layers]

    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` for another model, and for adapters that were activated, merged or deleted since."""
        inside = {id(module) for module in model.modules()}
        if not all(id(layer) in inside for layer in self.layers):
            raise ValueError(
                f"the adapter does not lie in this {type(model).__name__}: give the PEFT model that it was made of"
            )
        if (active := tuple(_active(self.peft_model))) != self.adapters:
            raise ValueError(f"the active adapters are {active} now, but were {self.adapters}: make a new PeftAdapter")
        if any(layer.merged_adapters for layer in self.layers):
            raise ValueError("the adapter is merged into the weights: call unmerge_adapter() first")

    @contextmanager
    def off(self) -> Generator[None]:
        """Inside, the model is the frozen base: PEFT's layers are disabled, or have their first factors.

        Afterwards flags, factors and PEFT's own state are as before, to the bit.

        Raises:
            ValueError: the adapter is merged, replaced base weights, or took factors out of the base and is not
                `fresh`.
        """
        self.check(self.peft_model)
        starts = self._starts()
        if lost := [start for start in starts if start.startswith(_REPLACING)]:
            raise ValueError(
                f"{lost[0]} has replaced base weights by others, so there is no frozen base to go back to: measure "
                "with compare(frozen_model, peft_model, ...)"
            )
        taken = [start for start in starts if start.startswith(_TAKING)]
        if not taken:
            with self._disabled():
                yield
        elif self._first is None:
            raise ValueError(
                f"{taken[0]} took its first factors out of the base weights, so the model without them is not the "
                "frozen one: make PeftAdapter(peft_model, fresh=True) before training, or measure with "
                "compare(frozen_model, peft_model, ...)"
            )
        else:
            with self._at_first(self._first):
                yield

    def _starts(self) -> list[str]:
        """The name of the way that each adapter begins."""
        return [_start(self.peft_model.peft_config[name]) for name in self.adapters]

    @property
    def enabled(self) -> bool:
        return self._switch.is_on()

    def by_rows(self, undo: Undo, at_work: Callable[[], Tensor | bool]) -> None:
        """Hold the adapter to rows, layer by layer: the others have what PEFT's layer gives when it is disabled.

        Raises `ValueError` for an adapter that changed base weights, so that no layer can be disabled.
        """
        starts = self._starts()
        if changed := [start for start in starts if start.startswith((*_TAKING, *_REPLACING))]:
            raise ValueError(
                f"{changed[0]} changed the base weights, which all rows share: an adapter of this kind cannot be at "
                "work in some rows alone"
            )
        self._disable(undo)
        for layer in self.layers:
            shadow(undo, cast("nn.Module", layer), "forward", functools.partial(self._forward_by_rows, at_work))

    def _forward_by_rows(
        self, at_work: Callable[[], Tensor | bool], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        rows = at_work()
        moved = None if rows is False else forward(*args, **kwargs)
        if rows is True:
            return moved
        with self._switch.off():
            frozen = forward(*args, **kwargs)
        if moved is None:
            return frozen
        assert isinstance(rows, Tensor)
        if len(moved) != len(rows):
            raise ValueError(
                f"a layer of the adapter was given {len(moved)} rows in a batch of {len(rows)}, as experts are, which "
                "are given tokens: it cannot be told whose they are. Leave the experts out of target_modules"
            )
        return torch.where(rows.to(moved.device).view(-1, *[1] * (moved.ndim - 1)), moved, frozen)

    @contextmanager
    def _disabled(self) -> Generator[None]:
        """PEFT's layers disabled, in the thread or task that is inside."""
        with Undo() as undo:
            self._disable(undo)
            with self._switch.off():
                yield

    def _disable(self, undo: Undo) -> None:
        """Let PEFT's layers be disabled where the switch is off, until `undo` runs."""
        user = object()
        undo.add(self._enable, user)
        with _LOCK:
            self._users.add(user)
            if not self._flags:
                self._flags += [(layer, bool(layer.disable_adapters)) for layer in self.layers]
            for layer, disabled in self._flags:
                vars(layer)["_disable_adapters"] = _Disabled(disabled, self._switch)

    def _enable(self, user: object) -> None:
        with _LOCK:
            self._users.discard(user)
            if not self._users:
                for layer, disabled in self._flags:
                    vars(layer)["_disable_adapters"] = disabled
                self._flags.clear()

    @contextmanager
    def _at_first(self, first: list[tuple[nn.Parameter, Tensor]]) -> Generator[None]:
        with alone(self.running, "has this adapter off, by giving it its first factors"), Undo() as undo:
            if self._swapped:
                yield
                return
            undo.set(self, "_swapped", True)
            with exchanged(first):
                yield

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write a folder by PEFT's `save_pretrained`, whole or not at all. An earlier one is replaced.

        Beside PEFT's files lies `checksums.json`, by which `restore` notices a damaged file.

        Args:
            path: the folder.
            model: not used: PEFT's configuration names the base.

        Raises:
            ValueError: a number that is not finite, or a folder that holds other files than PEFT's.
        """
        if fault := notes.fault(self):
            raise ValueError(f"not saved: {fault}")
        path = Path(path)
        _check_free(path)
        with files.whole(path) as beside:
            # the embedding is frozen, and PEFT would ask the Hub whether it was resized
            self.peft_model.save_pretrained(
                str(beside), selected_adapters=list(self.adapters), save_embedding_layers=False
            )
            if self.gate is not None:
                self.gate.save(beside / GATE_FILE)
            files.write_json(beside / _CHECKSUMS, {"files": files.digests(beside)}, indent=1)

    @tidy
    @torch.no_grad()
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the numbers of a folder that `save` wrote, or PEFT itself, in place.

        What PEFT wrote, without `checksums.json`, is read unchecked. Without a gate, the folder's is taken.

        Raises:
            FileNotFoundError: there is no such folder.
            TrailFileError: a file is damaged, its tensors are not those of this adapter, a number is not finite, or
                its gate is another one or missing. It is a `ValueError`. Then nothing has changed.
        """
        _check_sums(Path(path))
        found = {
            name: self._read(name, Path(path) if name == "default" else Path(path, name)) for name in self.adapters
        }
        gate = Gate.of_folder(path)
        self.check_gate(gate, path)
        for name, tensors in found.items():
            set_peft_model_state_dict(self.peft_model, tensors, adapter_name=name)
        self.take_gate(gate)

    def _read(self, name: str, folder: Path) -> dict[str, Tensor]:
        """The tensors of one adapter in its folder. Raises as `restore`."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: an adapter of PEFT is saved in one")
        with opened(folder / SAFETENSORS_WEIGHTS_NAME) as file:
            content = file.read()
        try:
            tensors = safetensors.torch.load(content)
        except Exception as error:  # the parser's own errors are of several unrelated classes
            raise TrailFileError(f"{file.name} is not a whole safetensors file ({error}): copy it again") from None
        due = get_peft_model_state_dict(self.peft_model, adapter_name=name, save_embedding_layers=False)
        if tensors.keys() != due.keys() or any(tensors[key].shape != due[key].shape for key in due):
            odd = sorted(key for key in {**tensors, **due} if _shape(tensors, key) != _shape(due, key))
            raise TrailFileError(
                f"{folder} is of another adapter than {name!r}: {odd[0]} is {_shape(tensors, odd[0])} there, "
                f"{_shape(due, odd[0])} here"
            )
        try:
            notes.check_numbers(due, tensors)
        except TrailFileError as error:
            raise TrailFileError(f"{folder}: {error}") from None
        return tensors


_LOCK = threading.RLock()


class _Disabled:
    """A flag of PEFT, which asks only whether it is true: true in the threads and tasks that are inside `off()`."""

    def __init__(self, before: bool, switch: Switch) -> None:
        self._before, self._switch = before, switch

    def __bool__(self) -> bool:
        return self._before or not self._switch.is_on()

    def __repr__(self) -> str:
        return repr(bool(self))


@contextmanager
def exchanged(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Generator[None]:
    """Inside, parameters have other values; afterwards their own again, to the bit.

    The storage is exchanged, not written: what a graph has saved for its backward stays what it was.
    """
    with Undo() as undo:
        for parameter, value in values:
            undo.set(parameter, "data", value.to(parameter.device, parameter.dtype))
        yield


_TAKING = ("pissa", "corda", "olora", "lora_ga")
_REPLACING = ("loftq", "kasa")


def _start(config: Any) -> str:
    """The name of the way that an adapter begins; "" where the configuration gives none."""
    start = getattr(config, "init_lora_weights", None)
    return "kasa" if getattr(config, "kasa_config", None) else start.lower() if isinstance(start, str) else ""


def _active(peft_model: PeftModel) -> list[str]:
    active: Any = peft_model.base_model.active_adapters
    return list(active)


def _layers(peft_model: PeftModel) -> Iterator[Layer]:
    for module in peft_model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module


def _parts(peft_model: PeftModel, adapters: tuple[str, ...]) -> Iterator[nn.Module]:
    """The adapters' modules: their entries in PEFT's dicts of each layer, and whole what is not split by adapter."""
    for module in peft_model.modules():
        if not isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for name, child in module.named_children():
            if name in _WRAPPED:
                continue
            if isinstance(child, nn.ModuleDict):
                yield from (child[adapter] for adapter in adapters if adapter in child)
            elif isinstance(child, nn.ParameterDict):
                found = [child[adapter] for adapter in adapters if adapter in child]
                if found:
                    yield nn.ParameterList(found)
            else:
                yield child


def _describe(config: PeftConfig) -> str:
    """A configuration, with the fields that differ from their defaults."""
    values = {field: getattr(config, field.name) for field in fields(config) if field.name not in _NOT_SHOWN}
    changed = {field.name: value for field, value in values.items() if value != _default(field)}
    shown = {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_free(path: Path) -> None:
    """Refuse a path that holds anything but an earlier save."""
    if path.is_dir():
        others = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name not in _WRITTEN]
        if others:
            raise ValueError(f"{path} holds other files ({others[0]}), and would be replaced: name a folder of its own")
    elif path.exists():
        raise ValueError(f"{path} is a file, and PEFT saves a folder")


def _check_sums(folder: Path) -> None:
    """Check a folder against the checksums that `save` left in it, if it did. Raises `TrailFileError`."""
    if (folder / _CHECKSUMS).exists():
        told = files.read_json(folder / _CHECKSUMS)
        if set(told) != {"files"} or not isinstance(told["files"], dict):
            raise TrailFileError(f"{folder / _CHECKSUMS} is not as PeftAdapter.save writes it: save the adapter again")
        files.check_folder(folder, told["files"])


def _shape(tensors: dict[str, Tensor], key: str) -> str:
    return str(list(tensors[key].shape)) if key in tensors else "absent"
