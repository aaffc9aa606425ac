"""The laboratory: built on all else, and imported by nothing below."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # peers needs PEFT: only when asked for
