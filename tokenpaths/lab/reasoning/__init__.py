"""How long a model thinks, what it learns to think from, and which of its tokens are steered."""

from tokenpaths.lab.reasoning.attention_flow import critical as critical
from tokenpaths.lab.reasoning.attention_flow import critical_rule as critical_rule
from tokenpaths.lab.reasoning.attention_flow import rows_of_spans as rows_of_spans
from tokenpaths.lab.reasoning.budget import BudgetForcing as BudgetForcing
from tokenpaths.lab.reasoning.budget import Thinking as Thinking
from tokenpaths.lab.reasoning.difficulty import clusters as clusters
from tokenpaths.lab.reasoning.difficulty import solved_by_generation as solved_by_generation
from tokenpaths.lab.reasoning.difficulty import solved_by_likelihood as solved_by_likelihood
from tokenpaths.lab.reasoning.pictures import funnel_picture as funnel_picture
from tokenpaths.lab.reasoning.pictures import scaling_picture as scaling_picture
from tokenpaths.lab.reasoning.selection import Funnel as Funnel
from tokenpaths.lab.reasoning.selection import Problem as Problem
from tokenpaths.lab.reasoning.selection import Selection as Selection
from tokenpaths.lab.reasoning.selection import contaminated as contaminated
from tokenpaths.lab.reasoning.selection import sample as sample
from tokenpaths.lab.reasoning.selection import select as select
from tokenpaths.lab.reasoning.thinking import Level as Level
from tokenpaths.lab.reasoning.thinking import Scaling as Scaling
from tokenpaths.lab.reasoning.thinking import scaling as scaling
