"""tokenpaths: lay learned trails into a frozen language model, and measure what was learned and what was lost."""

from difflib import get_close_matches as _close
from typing import Any as _Any

import lazy_loader as _lazy

_load, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)  # the names stand in __init__.pyi
_MOVED = {"Guarded": "trails", "PSR": "trails", "Scaled": "trails"}  # found here as ever, and shown in their room
__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    if name in __all__:
        return _load(name)
    if name in _MOVED:
        return getattr(_load(_MOVED[name]), name)
    near = "".join(f"; did you mean {found!r}?" for found in _close(name, __all__, 1))
    raise AttributeError(f"tokenpaths has no {name!r}{near}")
