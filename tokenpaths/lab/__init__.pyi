"""The rooms of the laboratory."""

from . import ab as ab
from . import audit as audit
from . import chains as chains
from . import forgetting as forgetting
from . import peers as peers
from . import reasoning as reasoning
