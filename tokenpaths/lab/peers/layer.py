"""What PEFT asks of a method, for methods that add a linear change to a linear map: W x + b + change(x).

PEFT wraps each target module in a layer that holds the entries of all adapters, and a tuner puts the layers in place.
The classes here do that once, with disabling, merging and mixed batches (`adapter_names`) as PEFT has them. A method
adds a configuration, and a layer that defines `begin`, `lay`, `change` and `delta`.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from tokenpaths.attachment.hooks import only_here
from tokenpaths.undo import Undo, tidy


@dataclass
class AddedConfig(PeftConfig):
    """What the configurations of all methods here have.

    Args:
        r: the rank, at most the smaller side of any target.
        target_modules: the modules to change, as in other PEFT configurations, or "all-linear".
        exclude_modules: the modules among them not to change.
        layers_to_transform: the numbers of the blocks to change; by default all.
        layers_pattern: the name of the block list, where PEFT does not know it.

    Raises:
        ValueError: an r below 1.
    """

    method: ClassVar[str]
    """The name that PEFT knows the method by."""
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "PEFT asks for it; leave it out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = self.method
        if self.r < 1:
            raise ValueError(f"{type(self).__name__}: r={self.r} must be at least 1")


class AddedLinear(nn.Module, BaseTunerLayer):
    """A linear map with changes beside it, one for each adapter.

    It wraps `nn.Linear` and the `Conv1D` of GPT-2, which holds its weight transposed. The name of a layer's class holds
    "Linear", by which PEFT's "all-linear" finds it when a second adapter is added.

    Raises:
        TypeError: any other module, or a quantised one.
        ValueError: a rank above the smaller side of the weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AddedConfig, key: str) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        weight = getattr(base_layer, "weight", None)
        linear = isinstance(base_layer, (nn.Linear, Conv1D))
        if not linear or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(
                f"{key} is a {type(base_layer).__name__} that {type(self).__name__} cannot change: target nn.Linear or "
                "Conv1D modules that are not quantised"
            )
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.base().shape
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self.begin()
        self.update_layer(adapter_name, config, key)

    def base(self) -> Float[Tensor, "out in"]:
        """The frozen weight W0, as in y = W0 x."""
        weight = self._weight().detach()
        return weight.T if self.transposed else weight

    def _weight(self) -> nn.Parameter:
        base: Any = self.get_base_layer()
        return base.weight

    def begin(self) -> None:
        """Make the dicts that hold the entries."""
        raise NotImplementedError

    def lay(self, adapter: str, config: Any, key: str) -> None:
        """Make the entry of an adapter."""
        raise NotImplementedError

    def change(self, adapter: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What an adapter adds to the output."""
        raise NotImplementedError

    def delta(self, adapter: str) -> Float[Tensor, "out in"]:
        """The matrix of `change`."""
        raise NotImplementedError

    def entries(self) -> set[str]:
        """The adapters that change this layer."""
        return self._get_available_adapters()

    def update_layer(self, adapter_name: str, config: AddedConfig, key: str) -> None:
        """Make the entry of an adapter, as PEFT asks for it. `key` is the name of the module."""
        if config.r > (side := min(self.base().shape)):
            raise ValueError(f"{key}: r={config.r} is more than its smaller side, {side}")
        self.lay(adapter_name, config, key)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight, in the layout of the base layer."""
        delta = self.delta(adapter)
        return delta.T if self.transposed else delta

    @tidy
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes of adapters to the weight.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: the adapters to merge; by default the active ones.

        Raises:
            ValueError: with `safe_merge`, a result that is not finite.
        """
        weight = self._weight()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.entries():
                continue
            changed = (weight.data + self.get_delta_weight(adapter)).to(weight.dtype)
            if safe_merge and not bool(changed.isfinite().all()):
                raise ValueError(f"merging adapter {adapter!r} would give NaN or infinity: it is damaged")
            if self._unmerged is None:  # subtracting the change again would leave its rounding behind
                self._unmerged = weight.data
            weight.data = changed
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the base layer the weight that it had, to the bit."""
        if self._unmerged is not None:
            weight = self._weight()
            weight.data = self._unmerged.to(weight.device)
        self._unmerged = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if adapter_names is not None:
            return self._by_row(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.entries():
                result = result + self.change(adapter, x)
        return result.to(dtype)

    def _by_row(self, x: Tensor, result: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """Each row of the batch with its own adapter; "__base__" stands for none."""
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.entries():
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
                changed = result[rows] + self.change(adapter, x[rows])
                result = result.index_copy(0, rows, changed.to(result.dtype))
        return result


class AddedModel(BaseTuner):
    """Puts the layers of a method, `tuner_layer_cls`, in place."""

    tuner_layer_cls: type[Any]
    target_module_mapping: dict[str, list[str]] = {}  # none, so that PEFT asks for target_modules

    def _create_and_replace(
        self,
        peft_config: Any,  # an AddedConfig; PEFT says PeftConfig
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AddedLinear):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        made: AddedLinear = self.tuner_layer_cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """PEFT's way to a mixed batch: inside, each layer is given the adapter of each row."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, AddedLinear)]
        _check_names(self, layers, names)
        names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        give = only_here(functools.partial(_give, names))
        with Undo() as undo:
            for layer in layers:
                undo.hook(layer.register_forward_pre_hook, give, with_kwargs=True)
            yield


def register(config: type[AddedConfig], tuner: type[AddedModel]) -> None:
    """Make a method known to PEFT.

    PEFT's own `register_peft_method` takes only names that its enumeration of methods has. These are the three entries
    that it would make. A configuration names its method by a plain string, which PEFT looks up as it does its own.
    """
    key: Any = config.method
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner


def _give(names: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "adapter_names": names}


def _check_names(tuner: AddedModel, layers: Sequence[AddedLinear], names: Sequence[str]) -> None:
    if tuner.training:
        raise ValueError("adapter_names is for inference: call eval() first")
    known = {"__base__", *(name for layer in layers for name in layer.entries())}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"adapter_names has {unknown[0]!r}, which is none of {', '.join(sorted(known))}")
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names needs the adapters apart from the weights: call unmerge_adapter() first")
