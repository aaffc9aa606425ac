"""Low-rank adapters on PEFT, beside trails: the same tools train, read and measure them.

`PeftAdapter` takes what PEFT itself offers (LoRA, DoRA, PiSSA, CorDA, OSF, ...). SC-LoRA, CURLoRA and I-LoRA, which
PEFT lacks, are built here.
"""

from importlib.util import find_spec

if find_spec("peft") is None:
    raise ImportError("tokenpaths.lab.peers is built on PEFT, which is not installed: pip install tokenpaths[peers]")

from tokenpaths.lab.peers.adapter import PeftAdapter as PeftAdapter
from tokenpaths.lab.peers.curlora import CurLoraConfig as CurLoraConfig
from tokenpaths.lab.peers.ilora import DualMemory as DualMemory
from tokenpaths.lab.peers.ilora import ReplayNear as ReplayNear
from tokenpaths.lab.peers.reservoir import Reservoir as Reservoir
from tokenpaths.lab.peers.sclora import ScLoraConfig as ScLoraConfig
from tokenpaths.lab.peers.sclora import sc_lora as sc_lora
