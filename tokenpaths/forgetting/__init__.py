"""What a model lost for its trails, how rehearsal scales, and whether a trail learned the way or the form."""

from tokenpaths.forgetting.form import WayOrForm as WayOrForm
from tokenpaths.forgetting.form import Worked as Worked
from tokenpaths.forgetting.form import way_or_form as way_or_form
from tokenpaths.forgetting.harness import Harness as Harness
from tokenpaths.forgetting.law import Law as Law
from tokenpaths.forgetting.law import Trial as Trial
from tokenpaths.forgetting.law import fit as fit
from tokenpaths.forgetting.suite import Forgetting as Forgetting
from tokenpaths.forgetting.suite import Loss as Loss
from tokenpaths.forgetting.suite import forgetting as forgetting
from tokenpaths.forgetting.tasks import Choice as Choice
from tokenpaths.forgetting.tasks import Task as Task
from tokenpaths.forgetting.tasks import Text as Text
from tokenpaths.forgetting.tasks import arc_easy as arc_easy
from tokenpaths.forgetting.tasks import blimp as blimp
from tokenpaths.forgetting.tasks import trec as trec
from tokenpaths.forgetting.tasks import trec_pairs as trec_pairs
from tokenpaths.forgetting.tasks import wikitext2 as wikitext2
