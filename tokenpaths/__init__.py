"""tokenpaths: lay learned trails into a frozen language model, and measure what was learned and what was lost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names stand in __init__.pyi
__version__ = "0.1.0"
