"""What is carried, and by which file."""

from . import serve as serve
from .adapters import from_adapters as from_adapters
from .gguf import from_gguf as from_gguf
from .gguf import to_gguf as to_gguf
from .merging import Merged as Merged
from .merging import merge as merge
from .modelcard import card as card
from .peft import to_peft as to_peft
from .pyreft import from_pyreft as from_pyreft
from .pyreft import to_pyreft as to_pyreft
from .vectors import from_vectors as from_vectors
