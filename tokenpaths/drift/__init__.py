"""How far trails have moved a model from the frozen one."""

from tokenpaths.drift.first import Drift as Drift
from tokenpaths.drift.first import drift as drift
