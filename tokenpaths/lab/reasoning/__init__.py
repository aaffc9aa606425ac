"""How long a model thinks, which questions it learns to think from, and which of its tokens trails steer."""

from tokenpaths.lab.reasoning.attention_flow import critical as critical
from tokenpaths.lab.reasoning.attention_flow import critical_rule as critical_rule
from tokenpaths.lab.reasoning.attention_flow import rows_of_spans as rows_of_spans
from tokenpaths.lab.reasoning.budget import BudgetForcing as BudgetForcing
from tokenpaths.lab.reasoning.budget import Thinking as Thinking
from tokenpaths.lab.reasoning.difficulty import clusters as clusters
from tokenpaths.lab.reasoning.difficulty import solved_by_generation as solved_by_generation
from tokenpaths.lab.reasoning.difficulty import solved_by_likelihood as solved_by_likelihood
from tokenpaths.lab.reasoning.selection import Funnel as Funnel
from tokenpaths.lab.reasoning.selection import Selection as Selection
from tokenpaths.lab.reasoning.selection import Stage as Stage
from tokenpaths.lab.reasoning.selection import sample as sample
from tokenpaths.lab.reasoning.selection import select as select
from tokenpaths.lab.reasoning.thinking import Level as Level
from tokenpaths.lab.reasoning.thinking import LevelPoint as LevelPoint
from tokenpaths.lab.reasoning.thinking import Scaling as Scaling
from tokenpaths.lab.reasoning.thinking import scaling as scaling
