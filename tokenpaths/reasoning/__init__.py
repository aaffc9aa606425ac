"""Reasoning: how long a model thinks, what it learns to think from, and which of its tokens are steered."""

from tokenpaths.reasoning.budget import BudgetForcing as BudgetForcing
from tokenpaths.reasoning.budget import Thinking as Thinking
from tokenpaths.reasoning.critical import critical as critical
from tokenpaths.reasoning.critical import critical_rule as critical_rule
from tokenpaths.reasoning.critical import rows_of_spans as rows_of_spans
from tokenpaths.reasoning.difficulty import clusters as clusters
from tokenpaths.reasoning.difficulty import solved_by_generation as solved_by_generation
from tokenpaths.reasoning.difficulty import solved_by_likelihood as solved_by_likelihood
from tokenpaths.reasoning.faithfulness import faithfulness as faithfulness
from tokenpaths.reasoning.faithfulness_report import Change as Change
from tokenpaths.reasoning.faithfulness_report import Faithfulness as Faithfulness
from tokenpaths.reasoning.pictures import funnel_picture as funnel_picture
from tokenpaths.reasoning.pictures import scaling_picture as scaling_picture
from tokenpaths.reasoning.scaling import Level as Level
from tokenpaths.reasoning.scaling import Scaling as Scaling
from tokenpaths.reasoning.scaling import scaling as scaling
from tokenpaths.reasoning.selection import Funnel as Funnel
from tokenpaths.reasoning.selection import Problem as Problem
from tokenpaths.reasoning.selection import Selection as Selection
from tokenpaths.reasoning.selection import contaminated as contaminated
from tokenpaths.reasoning.selection import sample as sample
from tokenpaths.reasoning.selection import select as select
