"""What trails cannot change is computed once."""

from tokenpaths.engine.cone.cone import Cone as Cone
from tokenpaths.engine.cone.cone import active_cone as active_cone
from tokenpaths.engine.cone.prefix import common_prefix as common_prefix
from tokenpaths.engine.cone.prefix import inputs_of as inputs_of
from tokenpaths.engine.cone.prefix import narrowed as narrowed
