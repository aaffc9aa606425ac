"""Which backward is running. Blocks that gradient checkpointing computes again run inside of one, in any thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NO_BACKWARD = -1


def running_backward() -> int:
    """The number of the backward that the running thread works for; `NO_BACKWARD` outside of any."""
    return torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]


def in_backward() -> bool:
    """Whether the running thread works for a backward. Code that torch.compile traces does not."""
    return not torch.compiler.is_compiling() and running_backward() != NO_BACKWARD


def at_the_end(call: Callable[[], object]) -> None:
    """Call back when the running backward has ended."""
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
    engine.queue_callback(call)
