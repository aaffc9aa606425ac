"""What to train for. An `Objective` is its examples, its weight, and a loss; `steps` adds several up."""

from tokenpaths.objectives.align import Align as Align
from tokenpaths.objectives.align import Attempts as Attempts
from tokenpaths.objectives.align import assessment_accuracy as assessment_accuracy
from tokenpaths.objectives.align import sample_chains as sample_chains
from tokenpaths.objectives.align import score_attempts as score_attempts
from tokenpaths.objectives.base import Objective as Objective
from tokenpaths.objectives.chains import ImitateParts as ImitateParts
from tokenpaths.objectives.chains import encode_parts as encode_parts
from tokenpaths.objectives.head import Logits as Logits
from tokenpaths.objectives.head import logits_at as logits_at
from tokenpaths.objectives.imitate import Imitate as Imitate
from tokenpaths.objectives.imitate import answer_logits as answer_logits
from tokenpaths.objectives.imitate import answers as answers
from tokenpaths.objectives.rehearse import Rehearse as Rehearse
from tokenpaths.objectives.stay import Stay as Stay
from tokenpaths.objectives.stay import StayAttention as StayAttention
from tokenpaths.objectives.stay import StayMoments as StayMoments
from tokenpaths.objectives.stay import StayStates as StayStates
from tokenpaths.objectives.targets import Targets as Targets
from tokenpaths.objectives.waypoints import Waypoints as Waypoints
from tokenpaths.objectives.waypoints import WaypointsAttention as WaypointsAttention
from tokenpaths.objectives.waypoints import capture_attention as capture_attention
from tokenpaths.objectives.waypoints import capture_states as capture_states
