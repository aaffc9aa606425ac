"""Did a trail learn the way or the form, and does the model answer by its chains?"""

from tokenpaths.lab.chains.faithful import faithfulness as faithfulness
from tokenpaths.lab.chains.form import WayOrForm as WayOrForm
from tokenpaths.lab.chains.form import Worked as Worked
from tokenpaths.lab.chains.form import way_or_form as way_or_form
from tokenpaths.lab.chains.report import Change as Change
from tokenpaths.lab.chains.report import Faithfulness as Faithfulness
