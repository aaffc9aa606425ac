"""How far a run of a model is from the frozen one: by token, by layer, by head, and as sets of states."""

from tokenpaths.drift.meter import Meter as Meter
from tokenpaths.drift.meter import compare as compare
from tokenpaths.drift.meter import drift as drift
from tokenpaths.drift.readings import Reading as Reading
from tokenpaths.drift.readings import Run as Run
from tokenpaths.drift.readings import evaluating as evaluating
from tokenpaths.drift.readings import read as read
from tokenpaths.drift.readings import runs as runs
from tokenpaths.drift.report import Drift as Drift
