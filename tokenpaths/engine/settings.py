"""Settings of generation that hold in the thread that writes, and nowhere else.

`generate` of transformers fills up what it is given from `model.generation_config`, an attribute that all threads read.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tokenpaths.undo import Undo

_LOCK = threading.RLock()


@contextmanager
def generating_as(model: Any, config: Any) -> Generator[None]:
    """Inside, the model's generation settings are these alone: its own would fill up any that `generate` is given."""
    # PEFT's wrapper shows the settings of the model inside, and writes its own over them
    modules = [module for module in model.modules() if "generation_config" in vars(module)]
    with Undo() as undo:
        for module in modules:
            undo.add(_restore_settings, module, config)
            with _LOCK:
                there = vars(module)["generation_config"]
                if type(there) is not _Settings:
                    there = module.generation_config = _Settings(there)
                there._by_thread.setdefault(threading.get_ident(), []).append(config)
        yield


def _restore_settings(module: Any, config: Any) -> None:
    with _LOCK:
        there = vars(module)["generation_config"]
        if type(there) is not _Settings:
            return
        mine = there._by_thread.get(threading.get_ident(), [])
        mine[:] = [other for other in mine if other is not config]
        if not mine:
            there._by_thread.pop(threading.get_ident(), None)
        if not there._by_thread:
            module.generation_config = there._of_the_model


class _Settings:
    """Stands for the settings of a model: in the threads that write as we do for ours, elsewhere for the model's."""

    def __init__(self, of_the_model: Any) -> None:
        vars(self).update(_of_the_model=of_the_model, _by_thread={})

    def _now(self) -> Any:
        mine = self._by_thread.get(threading.get_ident())
        return mine[-1] if mine else self._of_the_model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._now(), name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._now(), memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self._now(),)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._now())
