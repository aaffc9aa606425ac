"""Random numbers of one's own: drawn from a seed, one at a time in a process, with the user's left alone."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from tokenpaths.undo import Undo

_ONE_AT_A_TIME = threading.RLock()  # torch has one generator for all threads


@contextmanager
def own_randomness(seed: int | None = None, device: torch.device | None = None) -> Generator[None]:
    """Inside, torch's random numbers follow from the seed; afterwards the user's go on as if none had been drawn.

    Dropout takes no generator, so torch's own is seeded and set back. Another thread that comes here waits meanwhile:
    each draws as if it were alone. A thread that draws without coming here draws from this seed.

    Args:
        seed: of the numbers; without one the user's go on inside too.
        device: an accelerator whose numbers are drawn as well as those of the CPU.
    """
    kind = "cpu" if device is None else device.type
    accelerator: Any = None if kind == "cpu" else getattr(torch, kind, None)
    with _ONE_AT_A_TIME, Undo() as undo:  # torch's fork_rng loses the numbers when it is interrupted
        undo.add(torch.set_rng_state, torch.get_rng_state())
        if accelerator is not None:
            for number in range(accelerator.device_count()):
                undo.add(accelerator.set_rng_state, accelerator.get_rng_state(number), number)
        if seed is not None:
            # not torch.manual_seed, which also seeds accelerators whose state is not set back
            torch.default_generator.manual_seed(seed)
            if accelerator is not None:
                getattr(accelerator, "manual_seed_all", accelerator.manual_seed)(seed)
        yield
