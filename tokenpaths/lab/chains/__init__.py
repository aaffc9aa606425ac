"""Did a trail learn the way or the form, and does the model answer by its chains?"""

from tokenpaths.lab.chains.faithful import faithfulness as faithfulness
from tokenpaths.lab.chains.form import way_or_form as way_or_form
from tokenpaths.lab.chains.report import Faithfulness as Faithfulness
from tokenpaths.lab.chains.report import Score as Score
from tokenpaths.lab.chains.report import Shift as Shift
from tokenpaths.lab.chains.report import Sign as Sign
from tokenpaths.lab.chains.report import WayOrForm as WayOrForm
