"""Text from models, data and files, made safe for where it is shown: one function for each place.

Whatever is printed, written into a page, a table or a figure and was not written by this library goes through one of
these.
"""

from __future__ import annotations

import re
from html import escape

from tokenpaths.files import printable as terminal

__all__ = ["html", "markdown", "mathtext", "one_line", "terminal"]

html = escape
"""For a page: what HTML would read as its own is written as an entity."""

_MARKS = re.compile(r"[\\`*|~$]|\](?=\()|(?<!\w)_|_(?!\w)")
_TAGS = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")


def one_line(text: str) -> str:
    r"""For a line in print: control characters are written out, line breaks and tabs too, as `\n` and `\t`."""
    return terminal(text).replace("\n", "\\n").replace("\t", "\\t")


def markdown(text: str) -> str:
    """For a line of Markdown: no tag, link, emphasis, code, formula or border of a cell. White space is folded."""
    told = _MARKS.sub(lambda found: "\\" + found.group(), " ".join(terminal(text).split()))
    return _TAGS.sub(lambda found: escape(found.group()), told)


def mathtext(text: str) -> str:
    """For a matplotlib figure: a dollar is a dollar, and begins no formula."""
    return terminal(text).replace("\t", " ").replace("$", r"\$")
