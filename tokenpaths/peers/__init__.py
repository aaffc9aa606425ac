"""Low-rank adapters on PEFT, beside trails: trained, read and measured by the very same tools.

`PeftAdapter` takes what PEFT itself offers (LoRA, DoRA, PiSSA, CorDA, OSF, ...). SC-LoRA, CURLoRA and I-LoRA, which
PEFT lacks, are here.
"""

from importlib.util import find_spec

if find_spec("peft") is None:
    raise ImportError("tokenpaths.peers is built on PEFT, which is not installed: pip install tokenpaths[peers]")

from tokenpaths.peers.adapter import PeftAdapter as PeftAdapter
from tokenpaths.peers.curlora import CurLoraConfig as CurLoraConfig
from tokenpaths.peers.ilora import DualMemory as DualMemory
from tokenpaths.peers.ilora import ReplayNear as ReplayNear
from tokenpaths.peers.reservoir import Reservoir as Reservoir
from tokenpaths.peers.sclora import ScLoraConfig as ScLoraConfig
from tokenpaths.peers.sclora import sc_lora as sc_lora
