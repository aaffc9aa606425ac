"""Train trails: objectives, the loop, trails under the loop of another library, texts that the frozen model writes."""

from tokenpaths.training.beside import load_also as load_also
from tokenpaths.training.foreign import trainable as trainable
from tokenpaths.training.loop import Step as Step
from tokenpaths.training.loop import steps as steps
from tokenpaths.training.objectives.align import Align as Align
from tokenpaths.training.objectives.align import Attempts as Attempts
from tokenpaths.training.objectives.align import assessment_accuracy as assessment_accuracy
from tokenpaths.training.objectives.align import sample_chains as sample_chains
from tokenpaths.training.objectives.align import score_attempts as score_attempts
from tokenpaths.training.objectives.base import Objective as Objective
from tokenpaths.training.objectives.imitate import Imitate as Imitate
from tokenpaths.training.objectives.parts import ImitateParts as ImitateParts
from tokenpaths.training.objectives.replay import Replay as Replay
from tokenpaths.training.objectives.stay import Stay as Stay
from tokenpaths.training.objectives.stay import StayAttention as StayAttention
from tokenpaths.training.objectives.stay import StayMoments as StayMoments
from tokenpaths.training.objectives.stay import StayStates as StayStates
from tokenpaths.training.objectives.targets import Targets as Targets
from tokenpaths.training.objectives.waypoints import Waypoints as Waypoints
from tokenpaths.training.objectives.waypoints import WaypointsAttention as WaypointsAttention
from tokenpaths.training.objectives.waypoints import capture_attention as capture_attention
from tokenpaths.training.objectives.waypoints import capture_states as capture_states
from tokenpaths.training.samples import chat_opening as chat_opening
from tokenpaths.training.samples import load_samples as load_samples
from tokenpaths.training.samples import self_samples as self_samples
