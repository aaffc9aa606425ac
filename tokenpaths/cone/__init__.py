"""What trails cannot change is computed once."""

from tokenpaths.cone.cone import Cone as Cone
from tokenpaths.cone.cone import at_work as at_work
from tokenpaths.cone.cone import blocks_below as blocks_below
from tokenpaths.cone.prefix import common_prefix as common_prefix
from tokenpaths.cone.prefix import inputs_of as inputs_of
from tokenpaths.cone.prefix import narrowed as narrowed
