"""What a model lost for its trails, and how rehearsal scales."""

from tokenpaths.lab.forgetting.datasets import arc_easy as arc_easy
from tokenpaths.lab.forgetting.datasets import blimp as blimp
from tokenpaths.lab.forgetting.datasets import trec as trec
from tokenpaths.lab.forgetting.datasets import trec_pairs as trec_pairs
from tokenpaths.lab.forgetting.datasets import wikitext2 as wikitext2
from tokenpaths.lab.forgetting.harness import Harness as Harness
from tokenpaths.lab.forgetting.law import Law as Law
from tokenpaths.lab.forgetting.law import Trial as Trial
from tokenpaths.lab.forgetting.law import fit as fit
from tokenpaths.lab.forgetting.margins import Margins as Margins
from tokenpaths.lab.forgetting.report import Forgetting as Forgetting
from tokenpaths.lab.forgetting.report import Loss as Loss
from tokenpaths.lab.forgetting.suite import forgetting as forgetting
