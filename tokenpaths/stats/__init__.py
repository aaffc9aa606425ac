"""Intervals, paired tests, power."""

from tokenpaths.stats.intervals import difference_interval as difference_interval
from tokenpaths.stats.intervals import mean_interval as mean_interval
from tokenpaths.stats.paired import Effect as Effect
from tokenpaths.stats.paired import effect as effect
from tokenpaths.stats.paired import holm as holm
from tokenpaths.stats.power import Power as Power
from tokenpaths.stats.power import foresee as foresee
from tokenpaths.stats.power import mcnemar_power as mcnemar_power
from tokenpaths.stats.sequential import always_valid as always_valid
from tokenpaths.stats.sequential import evidence as evidence
