"""tokenpaths: lay learned trails into a frozen language model, and measure what was learned and what was lost."""

from tokenpaths import tokens as tokens
from tokenpaths import trails as trails
from tokenpaths.attach import Attachment as Attachment
from tokenpaths.attach import attach as attach
from tokenpaths.saving import TrailFileError as TrailFileError
from tokenpaths.sites import Site as Site
from tokenpaths.sites import find_blocks as find_blocks
from tokenpaths.sites import sites as sites
from tokenpaths.sites import width as width
from tokenpaths.tokens import All as All
from tokenpaths.tokens import Answer as Answer
from tokenpaths.tokens import First as First
from tokenpaths.tokens import Last as Last
from tokenpaths.tokens import Match as Match
from tokenpaths.tokens import Prompt as Prompt
from tokenpaths.tokens import Rule as Rule
from tokenpaths.tokens import Span as Span
from tokenpaths.tokens import Tokens as Tokens
from tokenpaths.trailmap import TrailMap as TrailMap
from tokenpaths.trails import PSR as PSR
from tokenpaths.trails import RED as RED
from tokenpaths.trails import Additive as Additive
from tokenpaths.trails import BiasReFT as BiasReFT
from tokenpaths.trails import Capped as Capped
from tokenpaths.trails import Chain as Chain
from tokenpaths.trails import ConstantReFT as ConstantReFT
from tokenpaths.trails import DiReFT as DiReFT
from tokenpaths.trails import DirectReFT as DirectReFT
from tokenpaths.trails import Gated as Gated
from tokenpaths.trails import LoReFT as LoReFT
from tokenpaths.trails import NoReFT as NoReFT
from tokenpaths.trails import ReFTr1 as ReFTr1
from tokenpaths.trails import Scaled as Scaled
from tokenpaths.trails import Trail as Trail

__version__ = "0.1.0"
