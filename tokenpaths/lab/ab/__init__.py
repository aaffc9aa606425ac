"""Is it better?  Two arms or more are asked the same items and compared in pairs, with one verdict and its report."""

from tokenpaths.lab.ab.arms import Arm as Arm
from tokenpaths.lab.ab.arms import frozen as frozen
from tokenpaths.lab.ab.arms import steered as steered
from tokenpaths.lab.ab.comparison import Comparison as Comparison
from tokenpaths.lab.ab.embedding import nearest as nearest
from tokenpaths.lab.ab.protocol import ab_test as ab_test
from tokenpaths.lab.ab.report import Report as Report
from tokenpaths.lab.ab.retained import Margins as Margins
from tokenpaths.lab.ab.retained import Retained as Retained
