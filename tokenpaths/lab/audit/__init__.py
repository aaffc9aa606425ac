"""Is there a hidden trigger in an adapter that someone else made?"""

from tokenpaths.lab.audit.auditing import audit as audit
from tokenpaths.lab.audit.lens import logit_lens as logit_lens
from tokenpaths.lab.audit.lens import nearest_inputs as nearest_inputs
from tokenpaths.lab.audit.maps import AffineMap as AffineMap
from tokenpaths.lab.audit.maps import Part as Part
from tokenpaths.lab.audit.maps import linearise as linearise
from tokenpaths.lab.audit.maps import parts as parts
from tokenpaths.lab.audit.repairing import Ablated as Ablated
from tokenpaths.lab.audit.repairing import repair as repair
from tokenpaths.lab.audit.report import DETECTORS as DETECTORS
from tokenpaths.lab.audit.report import Audit as Audit
from tokenpaths.lab.audit.report import Finding as Finding
from tokenpaths.lab.audit.report import Threshold as Threshold
from tokenpaths.lab.audit.respond import Memory as Memory
from tokenpaths.lab.audit.scanning import Scan as Scan
from tokenpaths.lab.audit.scanning import phrases_of as phrases_of
from tokenpaths.lab.audit.scanning import scan as scan
from tokenpaths.lab.audit.searching import search as search
from tokenpaths.lab.audit.spectra import features as features
from tokenpaths.lab.audit.spectra import intruders as intruders
from tokenpaths.lab.audit.spectra import outliers as outliers
from tokenpaths.lab.audit.tails import on_texts as on_texts
