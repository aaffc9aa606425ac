"""The options that several experiments have."""

from __future__ import annotations

from argparse import SUPPRESS as SUPPRESS
from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser(doc: str | None, *, seeds: bool = False, table: bool = False) -> ArgumentParser:
    """A parser that shows the docstring of the experiment as it is written."""
    made = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if seeds:
        made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    if table:
        made.add_argument("--table", action="store_true", help="measure nothing")
    return made
