"""What to train for. An `Objective` is its examples, its weight, and a loss; `steps` adds several up."""

from tokenpaths.objectives.base import Objective as Objective
from tokenpaths.objectives.imitate import Imitate as Imitate
from tokenpaths.objectives.imitate import answer_logits as answer_logits
from tokenpaths.objectives.stay import Stay as Stay
from tokenpaths.objectives.stay import StayAttention as StayAttention
from tokenpaths.objectives.stay import StayMoments as StayMoments
from tokenpaths.objectives.stay import StayStates as StayStates
