"""The experiments behind the figures of README and docs: a folder each, run as `python -m benchmarks.<folder>`.

What several of them share is in `common`. Some take up the demonstration in `examples`, or the laws and the oracle in
`tests`, which are no packages: their folders go to the end of the path.
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]
