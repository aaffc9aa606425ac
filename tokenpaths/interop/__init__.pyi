"""What is carried, and by which file."""

from .pyreft import from_pyreft as from_pyreft
from .pyreft import to_pyreft as to_pyreft
