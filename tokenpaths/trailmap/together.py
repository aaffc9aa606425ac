"""Several adapters of one model as one: trails, and LoRA in the weights beside them.

both = Together(trails, lora)                                   # lora = PeftAdapter(peft_model)
for step in steps(peft_model, both, goals, steps=60): ...       # both learn
with attach(peft_model, both, when=gate): ...                   # or both.gate = gate, which is saved with them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, cast

from torch import Tensor, nn

from tokenpaths import files
from tokenpaths.files import TrailFileError
from tokenpaths.site import Site
from tokenpaths.trailmap.adapter import Adapter, check_adapter
from tokenpaths.trailmap.gate import FILE_NAME as GATE_FILE
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trails.base import Trail
from tokenpaths.undo import Undo, tidy


class Together(Adapter):
    """Adapters that are trained, measured, switched, gated and saved as one.

    Args:
        parts: two adapters or more, such as a `TrailMap` and a `PeftAdapter`, in the order in which they are attached.

    Raises:
        TypeError: a part that is no adapter.
        ValueError: fewer than two parts, one that is named twice, parts of several block lists, or a part with a gate
            of its own: `Together` has one for all.
    """

    saved_as: ClassVar[str] = "together"

    def __init__(self, *parts: Adapter) -> None:
        super().__init__()
        for part in parts:
            check_adapter(part)
            if part.gate is not None:
                raise ValueError(
                    f"Together: a {type(part).__name__} has a gate of its own, where all have one: take it away "
                    "(part.gate = None), and set both.gate"
                )
        if len(parts) < 2 or len({id(part) for part in parts}) < len(parts):
            raise ValueError(f"Together takes two adapters or more, each once, not {len(parts)}")
        lists = {part.blocks for part in parts if part.sites}
        if len(lists) > 1:
            raise ValueError(f"Together: its parts lie in several block lists, {sorted(map(str, lists))}")
        self._members = nn.ModuleList(parts)
        self.blocks = next(iter(lists), None)
        if all(part.sites for part in parts):
            self.sites: tuple[Site, ...] = tuple(site for part in parts for site in part.sites)

    def __repr__(self) -> str:
        return f"Together({', '.join(map(repr, self.members))})"

    @property
    def members(self) -> tuple[Adapter, ...]:
        return tuple(cast("list[Adapter]", list(self._members)))

    def items(self) -> list[tuple[Site, Trail]]:
        return [item for part in self.members for item in part.items()]

    @property
    def enabled(self) -> bool:
        return all(part.enabled for part in self.members)

    @property
    def running(self) -> list[nn.Module]:
        return [module for part in self.members for module in part.running]

    @contextmanager
    def off(self) -> Generator[None]:
        """Inside, all parts are off."""
        with ExitStack() as stack:
            for part in self.members:
                stack.enter_context(part.off())
            yield

    @contextmanager
    def switched(self, on: bool) -> Generator[None]:
        """Inside, all parts are off unless `on`."""
        with ExitStack() as stack:
            for part in self.members:
                stack.enter_context(part.switched(on))
            yield

    def by_rows(self, undo: Undo, at_work: Callable[[], Tensor | bool]) -> None:
        for part in self.members:
            if not part.items():
                part.by_rows(undo, at_work)

    def check(self, model: nn.Module) -> None:
        for part in self.members:
            part.check(model)

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write a folder with a file or folder of each part, whole or not at all.

        Raises as the parts do, and `ValueError` for a folder that holds anything else.
        """
        path = Path(path)
        names = self._names()
        if path.exists() and (odd := sorted({entry.name for entry in path.iterdir()} - {*names, GATE_FILE})):
            raise ValueError(f"{path} holds {odd[0]}, which is of no {self!r:.60}: save to another folder")
        with files.whole(path) as beside:
            beside.mkdir(exist_ok=True)
            for name, part in zip(names, self.members, strict=True):
                part.save(beside / name, model)
            if self.gate is not None:
                self.gate.save(beside / GATE_FILE)

    @tidy
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Copy the numbers that `save` wrote.

        Raises as the parts do, and `TrailFileError` for a folder of other parts. Then nothing has changed.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder: adapters are saved together in one")
        if missing := [name for name in self._names() if not (path / name).exists()]:
            raise TrailFileError(f"{path} has no {missing[0]}: it holds other adapters than {self!r:.80}")
        gate = Gate.of_folder(path)
        self.check_gate(gate, path)
        before = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        try:
            for name, part in zip(self._names(), self.members, strict=True):
                part.restore(path / name)
        except BaseException:
            self.load_state_dict(before)
            raise
        self.take_gate(gate)

    def _names(self) -> list[str]:
        return [f"{number}-{part.saved_as}" for number, part in enumerate(self.members)]
