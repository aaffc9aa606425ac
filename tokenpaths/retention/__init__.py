"""What a model lost for its trails, how rehearsal scales, and whether a trail learned the way or the form."""

from tokenpaths.retention.form import WayOrForm as WayOrForm
from tokenpaths.retention.form import Worked as Worked
from tokenpaths.retention.form import way_or_form as way_or_form
from tokenpaths.retention.harness import Harness as Harness
from tokenpaths.retention.law import Law as Law
from tokenpaths.retention.law import Trial as Trial
from tokenpaths.retention.law import fit as fit
from tokenpaths.retention.suite import Forgetting as Forgetting
from tokenpaths.retention.suite import Loss as Loss
from tokenpaths.retention.suite import forgetting as forgetting
from tokenpaths.retention.tasks import Choice as Choice
from tokenpaths.retention.tasks import Task as Task
from tokenpaths.retention.tasks import Text as Text
from tokenpaths.retention.tasks import arc_easy as arc_easy
from tokenpaths.retention.tasks import blimp as blimp
from tokenpaths.retention.tasks import trec as trec
from tokenpaths.retention.tasks import trec_pairs as trec_pairs
from tokenpaths.retention.tasks import wikitext2 as wikitext2
