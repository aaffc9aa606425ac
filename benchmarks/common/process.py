"""Seconds and memory of a process. Torch and the standard library only: peers' environments import it too."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from pathlib import Path

import torch


def now() -> float:
    """CPU seconds of this process; with a GPU, seconds on the clock, once it has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Memory:
    """The peak of this process from here on, over what it holds here, in MiB; `gpu_mib` is torch's own counter."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # no glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has left behind would hide what training takes
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is forgotten
            self.before, self.resets = _status("VmRSS"), True
        except OSError:
            self.before, self.resets = peak_mib(), False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.on_gpu = torch.cuda.memory_allocated()

    def used(self) -> dict[str, float]:
        peak = _status("VmHWM") if self.resets else peak_mib()
        found = {"before_mib": self.before, "peak_mib": peak - self.before}
        if torch.cuda.is_available():
            found["gpu_mib"] = (torch.cuda.max_memory_allocated() - self.on_gpu) / 2**20
        return found


def peak_mib() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
