"""Is it better?  The same items asked of two arms or more, compared in pairs, with one verdict and its report."""

from tokenpaths.ab.arms import Arm as Arm
from tokenpaths.ab.arms import frozen as frozen
from tokenpaths.ab.arms import steered as steered
from tokenpaths.ab.contamination import Overlap as Overlap
from tokenpaths.ab.contamination import exact as exact
from tokenpaths.ab.contamination import nearest as nearest
from tokenpaths.ab.contamination import shared_grams as shared_grams
from tokenpaths.ab.paired import Effect as Effect
from tokenpaths.ab.paired import effect as effect
from tokenpaths.ab.paired import holm as holm
from tokenpaths.ab.power import Power as Power
from tokenpaths.ab.power import foresee as foresee
from tokenpaths.ab.power import mcnemar_power as mcnemar_power
from tokenpaths.ab.protocol import Question as Question
from tokenpaths.ab.protocol import ab_test as ab_test
from tokenpaths.ab.report import Comparison as Comparison
from tokenpaths.ab.report import Report as Report
from tokenpaths.ab.retained import Margins as Margins
from tokenpaths.ab.retained import Retained as Retained
from tokenpaths.ab.sequential import always_valid as always_valid
from tokenpaths.ab.sequential import evidence as evidence
