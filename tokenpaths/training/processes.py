"""What the processes of one run do together: agree on what is trained, start from the same numbers, wait for a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.checkpoints import differences

if TYPE_CHECKING:
    from accelerate import Accelerator


def agree(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """See that all processes were given the same run: each takes its part of one step, by numbers that all know.

    Raises `ValueError` on every process if one has other settings, examples or weights than the first.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    first, *others = gather_object([json.loads(json.dumps(settings))])
    for rank, other in enumerate(others, 1):
        if different := differences(first, other):
            raise ValueError(
                f"process {rank} was given another run than process 0: {different.replace(' was ', ' is ')} there. "
                "Give all processes the same arguments, and data in the same order"
            )


@torch.no_grad()
def share_start(trails: Adapter, accelerator: Accelerator) -> None:
    """All processes start from the trails of the first."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for tensor in trails.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))


def by_the_first(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Let the first process act, such as write a file, while the others wait.

    Raises what `act` raises, and on the other processes `RuntimeError`.
    """
    if accelerator.num_processes == 1:
        act()
        return
    from accelerate.utils import gather_object

    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            act()
        except Exception as caught:
            error = caught
    failed = next((text for text in gather_object([None if error is None else repr(error)]) if text), None)
    if error is not None:
        raise error
    if failed is not None:
        raise RuntimeError(f"process 0 failed, and the run ends: {failed}")
