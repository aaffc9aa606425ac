"""README and docs are run: the python blocks of a page, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    text = page.read_text()
    if "demo_model()" in text:
        request.getfixturevalue("smollm2")  # skips with a reason where the wheel is absent
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        before = text[: block.start(1)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * before + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert "<<<<" + "<<<" not in page.read_text()  # two versions of a page in one
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_readme_example_is_short() -> None:
    first = BLOCK.search((ROOT / "README.md").read_text())
    assert first is not None
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 16
