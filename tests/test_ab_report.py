"""The report of an A/B test: its rule, its files, and its page in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tokenpaths import ab_test
from tokenpaths.data import Overlap, Question
from tokenpaths.lab.ab import Arm, Comparison, Report, Retained
from tokenpaths.lab.ab.report import Answers
from tokenpaths.stats import effect, foresee

HOSTILE = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x' onerror=alert(1)> & \"quoted\" | `"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def kept(loss: float, low: float, high: float, measure: str = "nats a token") -> Retained:
    return Retained("sea", measure, 2.0, 2.0 + loss, loss, (low, high), 0.975, 0.05, 24, "9.0% of tokens moved")


KEPT, LOST, OPEN = kept(0.01, -0.01, 0.04), kept(0.2, 0.1, 0.3), kept(0.04, -0.1, 0.2)


def comparison(wins: int, losses: int, *retained: Retained, arm: str = "trail") -> Comparison:
    a = np.array([0.0] * wins + [1.0] * losses + [0.0] * (50 - wins - losses))
    b = np.array([1.0] * wins + [0.0] * losses + [0.0] * (50 - wins - losses))
    found = effect(a, b)
    return Comparison(arm, found, found.p, 0.05, foresee(found), retained)


def report(*comparisons: Comparison, said: str = "It is.") -> Report:
    def answers(arm: str, first: int, last: int) -> Answers:
        return Answers(arm, (tuple(float(first <= i < last) for i in range(50)),), ((said,) * 50,))

    others = [answers(c.arm, 0, c.effect.wins) for c in comparisons]
    a = answers("frozen", comparisons[0].effect.wins, comparisons[0].effect.wins + comparisons[0].effect.losses)
    asked = tuple(Question(f"{said} {i}", said) for i in range(50))
    return Report("frozen", comparisons, asked, 50, (a, *others), 0.05)


# The rule


@pytest.mark.parametrize(
    ("wins", "losses", "retained", "verdict"),
    [
        (20, 2, (), "better"),
        (2, 20, (), "worse"),
        (6, 5, (), "cannot tell"),
        (20, 2, (KEPT,), "better"),
        (20, 2, (KEPT, LOST), "worse"),
        (20, 2, (KEPT, OPEN), "cannot tell"),
        (2, 20, (KEPT,), "worse"),
        (6, 5, (LOST,), "worse"),
        (6, 5, (KEPT,), "cannot tell"),
        (0, 0, (), "cannot tell"),
    ],
)
def test_the_verdict_is_the_rule(wins: int, losses: int, retained: tuple[Retained, ...], verdict: str) -> None:
    found = comparison(wins, losses, *retained)
    assert found.verdict == verdict
    assert report(found).verdict == verdict


def test_alpha_decides_and_is_compared_with_the_adjusted_p() -> None:
    found = comparison(12, 2)
    assert found.effect.p < 0.05 and found.task == "better"
    assert replace(found, adjusted=0.051).task == "cannot tell"
    assert replace(found, adjusted=0.05).task == "better"


def test_what_a_loss_says_and_how_many_items_tell() -> None:
    assert (KEPT.says, LOST.says, OPEN.says) == ("kept", "lost", "cannot tell")
    assert kept(0.05, 0.05, 0.05).says == "kept"
    assert OPEN.tells == 24 * round((0.16 / 0.01) ** 2)
    assert kept(0.05, -1.0, 1.0).tells is None  # at the margin itself no number does
    assert kept(0.0, -math.inf, math.inf).tells is None
    assert kept(0.1, -0.1, 0.3).tells == math.ceil(24 * 4**2 - 1e-6)


def test_reasons_say_why_and_what_would_tell() -> None:
    told = " ".join(comparison(9, 5, OPEN).reasons)
    assert "The task: cannot tell (adjusted p = 0.42 > 0.05)." in told
    assert re.search(r"50 items show an effect of 0\.2\d? with probability 0\.8", told)
    assert re.search(r"were the effect \+0\.08 as found, \d{3} would", told)
    assert "cannot tell whether the loss is within 0.05: about 6,144 items tell." in told
    assert "sea, nats a token: the loss of 0.2 is beyond the margin of 0.05." in comparison(20, 2, LOST).reasons
    assert comparison(20, 2, KEPT).reasons[-1] == "Retention and drift: all within their margins."
    few = effect(np.zeros(4), np.array([1.0, 0, 0, 0]))
    assert "4 items are too few to show any effect" in Comparison("b", few, few.p, 0.05, foresee(few)).reasons[1]
    skills = np.random.default_rng(0).normal(0.1, 0.5, 30) + np.array([[-0.6], [0.0], [0.7]])
    seeds = effect(np.zeros((1, 30)), skills)
    assert "take more seeds" in Comparison("b", seeds, seeds.p, 0.05, foresee(seeds)).reasons[1]


# In print and in files


def test_print_and_markdown_have_the_figures() -> None:
    found = report(comparison(20, 2, KEPT, arm="a | b"))
    text, table = str(found), found.to_markdown()
    for told in (text, table):
        assert "+0.360" in told and "better" in told and "9.0% of tokens moved" in told and "McNemar, exact" in told
    assert "a \\| b" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]} == {10}


def test_a_report_is_what_its_file_says(tmp_path: Path) -> None:
    unbounded = effect(np.zeros(3), np.full(3, 0.5))
    odd = Comparison("odd", unbounded, 1.0, 0.05, foresee(unbounded), (), unbounded, 3.5)
    for found in (
        report(comparison(20, 2, KEPT, LOST), odd, said=HOSTILE),
        replace(report(comparison(1, 0)), overlaps=(Overlap("exact", 0, 1, 1.0),), searched=("exact match",)),
        ab_test(Arm("a", [lambda p: ["x"] * len(p)]), Arm("b", [lambda p: ["y"] * len(p)]), [Question("q", "x")] * 4),
        ab_test(Arm("a", [lambda p: ["x"] * len(p)]), Arm("b", [lambda p: ["\ud800"] * len(p)]), [Question("q", "x")]),
    ):
        found.to_json(tmp_path / "report.json")
        assert Report.from_json(tmp_path / "report.json") == found
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["verdicts"] == {"b": "cannot tell"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ab": {"a": 3}}', '{"ab": 3}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other.json is not an A/B report as to_json writes it"):
        Report.from_json(path)


def test_a_damaged_figure_is_refused(tmp_path: Path, unchecked: None) -> None:
    path = tmp_path / "report.json"
    report(comparison(20, 2)).to_json(path)
    for before, after in (
        ('"of": 50', '"of": "50"'),
        ('"wins": 20', '"wins": null'),
        ('"alpha": 0.05', '"alpha": "x"'),
    ):
        text = path.read_text()
        assert before in text
        damaged = tmp_path / "damaged.json"
        damaged.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match="is not an A/B report"):
            Report.from_json(damaged)


# The page


def page(found: Report, tmp_path: Path) -> str:
    found.to_html(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile() -> Report:
    found = comparison(20, 2, replace(KEPT, task=HOSTILE, note=HOSTILE), arm=HOSTILE)
    overlaps = (Overlap("exact", 0, 0, 1.0),)
    return replace(report(found, said=HOSTILE), overlaps=overlaps, searched=(HOSTILE,))


def test_the_page_escapes_everything_and_names_nothing_outside(tmp_path: Path) -> None:
    tags = Tags()
    tags.feed(page(hostile(), tmp_path))
    assert not tags.names & {"script", "img", "iframe", "object", "embed", "form", "a", "base"}
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "action", "style")]
    assert [value for name, value in tags.attributes if name == "href"] == ["data:,"]
    assert tags.text.count(HOSTILE) > 50
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_the_items_on_which_arms_differ(tmp_path: Path) -> None:
    text = page(report(comparison(20, 2), said="word"), tmp_path)
    assert text.count("<tr>") == 3 + 23  # two arms and a header; 22 items and a header
    assert "22 of 50 items" in text
    none = page(report(comparison(0, 0)), tmp_path)
    assert "0 of 50 items" in none


def test_the_page_can_draw_what_has_no_bounds(tmp_path: Path) -> None:
    unbounded = effect(np.zeros(50), np.full(50, 0.5))
    text = page(report(Comparison("odd", unbounded, 1.0, 0.05, foresee(unbounded))), tmp_path)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text))
    assert "inf" not in drawn and "nan" not in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is there, no script has run, and nothing was fetched, though all text asks for it."""
    fetched: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(globals(), "HOSTILE", HOSTILE.replace("http://127.0.0.1:9/", address))
        page(hostile(), tmp_path)
        shown = browse(tmp_path / "report.html", tmp_path / "profile")
        control = tmp_path / "control.html"  # without our page's care, the browser does fetch
        control.write_text(f"<img src='{address}control'>")
        browse(control, tmp_path / "profile")
        server.shutdown()
    assert fetched == ["/control"]
    assert "<title>&lt;script&gt;" in shown and "<strong>better</strong>" in shown and "<polyline" in shown
    assert "<script" not in shown and "<img" not in shown


def browse(path: Path, profile: Path) -> str:
    """What a page is once a browser has read it."""
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    ).split()
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
