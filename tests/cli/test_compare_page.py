"""The page of ``qnext compare``: whole, self-contained, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qnext_plugins.cli.compare.page import render_page, write_page
from qnext_plugins.cli.compare.report import Report, Side

RECORDED = Path(__file__).parent / "data" / "compare_report.json"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
LOADS = ("src", "href", "xlink:href", "action", "data", "poster")


@pytest.fixture
def report() -> Report:
    return Report.model_validate_json(RECORDED.read_text())


class Page(HTMLParser):
    """What a page refers to, its ids and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in LOADS and value]
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_loads_nothing_and_its_plots_share_no_names(report: Report) -> None:
    html = render_page(report)
    page = Page(html)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(set(page.ids)) == len(page.ids) > 20
    used = {reference[1:] for reference in page.references if reference.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert used <= set(page.ids)
    assert html.count("<svg") == len(report.pairs) + 2


def test_page_says_what_the_report_says(report: Report) -> None:
    text = " ".join(Page(render_page(report)).text.split())
    for line in report.verdict:
        assert " ".join(line.split()) in text
    for side in report.sides:
        assert side.spec in text
        assert side.served_by is None or " ".join(side.served_by.split()) in text


def test_text_of_a_server_cannot_become_part_of_the_page(report: Report) -> None:
    evil = "<script>alert(1)</script>&"
    report.sides[0].problems.append(evil)
    report.prompts[0].prompt = evil
    parted = next(pair for pair in report.pairs if pair.partings)
    parted.partings[0].a = evil
    old, report.sides[0].name = report.sides[0].name, evil
    for pair in report.pairs:
        pair.a = evil if pair.a == old else pair.a
    html = render_page(report)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 5


def test_report_without_anything_is_still_a_page(report: Report) -> None:
    empty = Report(
        made_at=report.made_at,
        versions={},
        machine={},
        settings={"max_tokens": 1},
        prompts=report.prompts,
        sides=[Side(name="a", spec="hf:a", kind="hf", problems=["it did not start"])],
    )
    text = Page(render_page(empty)).text
    assert "it did not start" in text
    assert "Incomplete" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser_draws_the_page_without_a_network(report: Report, tmp_path: Path) -> None:
    from PIL import Image

    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_page(report, page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000", f"--screenshot={picture}"]
    done = subprocess.run([str(BROWSER), *flags, page.as_uri()], capture_output=True, timeout=120, check=False)
    assert picture.exists(), done.stderr
    image = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in image.getcolors(maxcolors=1 << 24) or []}
    # The status, the maps' cells and the bars of the first side.
    for wanted in ((0xB3, 0x12, 0x3A), (0xB7, 0xDF, 0xC4), (0x00, 0x72, 0xB2)):
        assert any(max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= 2 for colour in colours), wanted
