"""Run a model, and keep what need not be run again."""

from tokenpaths.attachment.runs import evaluating as evaluating
from tokenpaths.engine.forwards import answer_logits as answer_logits
from tokenpaths.engine.forwards import answers as answers
from tokenpaths.engine.logits import Logits as Logits
from tokenpaths.engine.logits import logits_at as logits_at
from tokenpaths.engine.reach import reached as reached
from tokenpaths.engine.reach import share_reached as share_reached
from tokenpaths.engine.readings import Reading as Reading
from tokenpaths.engine.readings import Run as Run
from tokenpaths.engine.readings import read as read
from tokenpaths.engine.readings import read_one as read_one
from tokenpaths.engine.readings import runs as runs
