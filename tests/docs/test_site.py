"""The site: it builds strictly, its links lead somewhere, and a browser fetches nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.site import Page, broken_links, is_external, read_site

pytest.importorskip("material", reason="the site needs mkdocs-material")

ROOT = Path(__file__).parents[2]
# Its news, which are no warnings of ours.
QUIET = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=QUIET)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return read_site(site)


def test_every_source_is_a_page(site: Path, pages: dict[Path, Page]) -> None:
    for source in (ROOT / "docs").glob("*.md"):
        page = site / "index.html" if source.stem == "index" else site / source.stem / "index.html"
        assert page in pages


def test_internal_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 100
    assert broken_links(site, pages) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path: Path) -> None:
    links = '<a href="gone/">a</a> <a href="#here">b</a> <a href="#nowhere">c</a>'
    (tmp_path / "index.html").write_text(f'{links}<p id="here">')
    assert broken_links(tmp_path, read_site(tmp_path)) == ["index.html: gone/", "index.html: #nowhere"]


def test_external_links_are_addresses(pages: dict[Path, Page]) -> None:
    links = {link for page in pages.values() for link in page.links if is_external(link)}
    for link in links:
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link


def test_nothing_is_loaded_from_other_hosts(site: Path, pages: dict[Path, Page]) -> None:
    assert [load for page in pages.values() for load in page.loads if is_external(load)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()) == []


def test_the_search_has_every_page(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text()
    for source in (ROOT / "docs").glob("*.md"):
        assert f'"location":"{"" if source.stem == "index" else f"{source.stem}/"}"' in index
