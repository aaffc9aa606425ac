"""The demo's task in other words, and other requests about the same lists: what a gate must tell apart.

worded(GIVEN["told"], items)      # the questions of these items, asked so
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks import Item

GIVEN = {
    "as taught": "{links}\n {start}",
    "told": "Everybody hands the parcel on.{links}\nThe parcel begins with {start}, who hands it on to",
    "asked": "Q: Each link says who hands the parcel to whom:{links} Who gets it from {start}, one after another?\nA:",
    "ordered": "Follow the links, and write the names on the way.\n\nLinks:{links}\nStart: {start}\nWay:",
    "in a chat": "User: Here is who passes to whom:{links} I start at {start}. Where to?\nAssistant: It goes to",
    "as fields": "links:{links}\nstart: {start}\npath:",
    "arrow": "{links} {start} ->",
    "headed": "## Links\n{links}\n\n## Path from {start}\n",
}
"""Wordings that the gate is fitted on. The trail learns the first."""

KEPT = {
    "in a circle": "They stood in a circle, and each knew the next.{links} When {start} had the ball, it went to",
    "start first": "The start is {start}.\n{links}\nThen come",
    "step by step": "Pairs:{links}\nFrom {start}, step by step:",
    "in code": "# pairs:{links}\n# follow({start}) =",
}
"""Wordings that the gate has not met."""

REQUESTS = {
    "counted": "{links}\nNumber of links:",
    "longest": "Pairs:{links}\nLongest name:",
    "translated": "Translate into French:{links}\nFrench:",
    "a story": "User: Write a story about these people:{links}\nAssistant:",
    "in the list": "Links:{links}\nName: {start}\nIs the name in the list?",
    "who before": "{links}\nWho hands the parcel to {start}?",
    "title": "{links}\nTitle:",
    "sorted": "Names in order of the alphabet.{links}\nNames:",
}
"""Other requests about the lists."""


def worded(template: str, items: Sequence[Item]) -> list[str]:
    """The questions of items in a wording, or another request about their lists."""
    parts = [item.question.rsplit("\n ", 1) for item in items]
    return [template.format(links=links, start=start) for links, start in parts]
