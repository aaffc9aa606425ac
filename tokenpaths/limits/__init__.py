"""Limits on what a trail can do: in which directions, on which states, how strongly, and how far in one step."""

from tokenpaths.limits.directions import confine as confine
from tokenpaths.limits.gates import Gates as Gates
from tokenpaths.limits.gates import Guard as Guard
from tokenpaths.limits.gates import guard as guard
from tokenpaths.limits.kinds import Kind as Kind
from tokenpaths.limits.openings import GateFit as GateFit
from tokenpaths.limits.openings import KindOpened as KindOpened
from tokenpaths.limits.requests import fit_gate as fit_gate
from tokenpaths.limits.strength import AtStrength as AtStrength
from tokenpaths.limits.strength import strength_curve as strength_curve
from tokenpaths.limits.strength import strength_within as strength_within
from tokenpaths.limits.trust import TrustRegion as TrustRegion
