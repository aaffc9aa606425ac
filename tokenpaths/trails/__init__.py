"""Trails: how a hidden state is moved. A trail maps a state to its displacement."""

from tokenpaths.trails.base import Trail as Trail
from tokenpaths.trails.base import arguments as arguments
from tokenpaths.trails.reft import BiasReFT as BiasReFT
from tokenpaths.trails.reft import ConstantReFT as ConstantReFT
from tokenpaths.trails.reft import DirectReFT as DirectReFT
from tokenpaths.trails.reft import DiReFT as DiReFT
from tokenpaths.trails.reft import LoReFT as LoReFT
from tokenpaths.trails.reft import NoReFT as NoReFT
from tokenpaths.trails.steering import PSR as PSR
from tokenpaths.trails.steering import RED as RED
from tokenpaths.trails.steering import Additive as Additive
from tokenpaths.trails.steering import ReFTr1 as ReFTr1
from tokenpaths.trails.stiefel import OrthonormalRows as OrthonormalRows
from tokenpaths.trails.wrappers import Capped as Capped
from tokenpaths.trails.wrappers import Chain as Chain
from tokenpaths.trails.wrappers import Confined as Confined
from tokenpaths.trails.wrappers import Gated as Gated
from tokenpaths.trails.wrappers import Guarded as Guarded
from tokenpaths.trails.wrappers import Scaled as Scaled
