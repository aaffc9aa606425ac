"""tokenpaths: lay learned trails into a frozen language model, and measure what was learned and what was lost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenpaths import tokens as tokens
from tokenpaths import trails as trails
from tokenpaths.adapter import Adapter as Adapter
from tokenpaths.attach import Attachment as Attachment
from tokenpaths.attach import attach as attach
from tokenpaths.attach import is_attached as is_attached
from tokenpaths.cone import Cone as Cone
from tokenpaths.data import Batch as Batch
from tokenpaths.data import Example as Example
from tokenpaths.data import collate as collate
from tokenpaths.data import encode as encode
from tokenpaths.data import plain as plain
from tokenpaths.drift import Drift as Drift
from tokenpaths.drift import Meter as Meter
from tokenpaths.drift import compare as compare
from tokenpaths.drift import drift as drift
from tokenpaths.saving import TrailFileError as TrailFileError
from tokenpaths.sites import Site as Site
from tokenpaths.sites import find_blocks as find_blocks
from tokenpaths.sites import sites as sites
from tokenpaths.sites import width as width
from tokenpaths.tokens import All as All
from tokenpaths.tokens import Answer as Answer
from tokenpaths.tokens import AnswerFirst as AnswerFirst
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
from tokenpaths.trails import Confined as Confined
from tokenpaths.trails import ConstantReFT as ConstantReFT
from tokenpaths.trails import DirectReFT as DirectReFT
from tokenpaths.trails import DiReFT as DiReFT
from tokenpaths.trails import Gated as Gated
from tokenpaths.trails import Guarded as Guarded
from tokenpaths.trails import LoReFT as LoReFT
from tokenpaths.trails import NoReFT as NoReFT
from tokenpaths.trails import ReFTr1 as ReFTr1
from tokenpaths.trails import Scaled as Scaled
from tokenpaths.trails import Trail as Trail

if TYPE_CHECKING:
    from tokenpaths import ab as ab
    from tokenpaths import audit as audit
    from tokenpaths import peers as peers
    from tokenpaths import reasoning as reasoning
    from tokenpaths import retention as retention
    from tokenpaths.ab import ab_test as ab_test
    from tokenpaths.limits import confine as confine
    from tokenpaths.limits import guard as guard
    from tokenpaths.limits import strength_curve as strength_curve
    from tokenpaths.limits import strength_within as strength_within
    from tokenpaths.mixing import Mix as Mix
    from tokenpaths.mixing import MixedStream as MixedStream
    from tokenpaths.mixing import mix as mix
    from tokenpaths.objectives import Align as Align
    from tokenpaths.objectives import Attempts as Attempts
    from tokenpaths.objectives import Imitate as Imitate
    from tokenpaths.objectives import ImitateParts as ImitateParts
    from tokenpaths.objectives import Logits as Logits
    from tokenpaths.objectives import Objective as Objective
    from tokenpaths.objectives import Rehearse as Rehearse
    from tokenpaths.objectives import Stay as Stay
    from tokenpaths.objectives import StayAttention as StayAttention
    from tokenpaths.objectives import StayMoments as StayMoments
    from tokenpaths.objectives import StayStates as StayStates
    from tokenpaths.objectives import Targets as Targets
    from tokenpaths.objectives import Waypoints as Waypoints
    from tokenpaths.objectives import WaypointsAttention as WaypointsAttention
    from tokenpaths.objectives import answers as answers
    from tokenpaths.objectives import assessment_accuracy as assessment_accuracy
    from tokenpaths.objectives import capture_attention as capture_attention
    from tokenpaths.objectives import capture_states as capture_states
    from tokenpaths.objectives import encode_parts as encode_parts
    from tokenpaths.objectives import logits_at as logits_at
    from tokenpaths.objectives import sample_chains as sample_chains
    from tokenpaths.objectives import score_attempts as score_attempts
    from tokenpaths.retention import Choice as Choice
    from tokenpaths.retention import Task as Task
    from tokenpaths.retention import Text as Text
    from tokenpaths.retention import Worked as Worked
    from tokenpaths.retention import forgetting as forgetting
    from tokenpaths.retention import way_or_form as way_or_form
    from tokenpaths.samples import chat_opening as chat_opening
    from tokenpaths.samples import load_samples as load_samples
    from tokenpaths.samples import self_samples as self_samples
    from tokenpaths.training import Step as Step
    from tokenpaths.training import TrustRegion as TrustRegion
    from tokenpaths.training import steps as steps
    from tokenpaths.training import trainable as trainable

__version__ = "0.1.0"

_WHEN_USED = {  # not everyone who attaches trails trains them
    "ab_test": "tokenpaths.ab",
    "confine": "tokenpaths.limits",
    "guard": "tokenpaths.limits",
    "strength_curve": "tokenpaths.limits",
    "strength_within": "tokenpaths.limits",
    "mix": "tokenpaths.mixing",
    "Mix": "tokenpaths.mixing",
    "MixedStream": "tokenpaths.mixing",
    "Align": "tokenpaths.objectives",
    "answers": "tokenpaths.objectives",
    "assessment_accuracy": "tokenpaths.objectives",
    "Attempts": "tokenpaths.objectives",
    "capture_attention": "tokenpaths.objectives",
    "capture_states": "tokenpaths.objectives",
    "encode_parts": "tokenpaths.objectives",
    "Imitate": "tokenpaths.objectives",
    "ImitateParts": "tokenpaths.objectives",
    "Logits": "tokenpaths.objectives",
    "logits_at": "tokenpaths.objectives",
    "Objective": "tokenpaths.objectives",
    "Rehearse": "tokenpaths.objectives",
    "sample_chains": "tokenpaths.objectives",
    "score_attempts": "tokenpaths.objectives",
    "Stay": "tokenpaths.objectives",
    "StayAttention": "tokenpaths.objectives",
    "StayMoments": "tokenpaths.objectives",
    "StayStates": "tokenpaths.objectives",
    "Targets": "tokenpaths.objectives",
    "Waypoints": "tokenpaths.objectives",
    "WaypointsAttention": "tokenpaths.objectives",
    "Choice": "tokenpaths.retention",
    "forgetting": "tokenpaths.retention",
    "Task": "tokenpaths.retention",
    "Text": "tokenpaths.retention",
    "way_or_form": "tokenpaths.retention",
    "Worked": "tokenpaths.retention",
    "chat_opening": "tokenpaths.samples",
    "load_samples": "tokenpaths.samples",
    "self_samples": "tokenpaths.samples",
    "Step": "tokenpaths.training",
    "steps": "tokenpaths.training",
    "trainable": "tokenpaths.training",
    "TrustRegion": "tokenpaths.training",
}

_ROOMS = ("ab", "audit", "peers", "reasoning", "retention")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"tokenpaths.{name}")
    if name not in _WHEN_USED:
        raise AttributeError(f"module 'tokenpaths' has no attribute {name!r}")
    return getattr(import_module(_WHEN_USED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHEN_USED, *_ROOMS})
