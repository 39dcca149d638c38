"""The built site as a tree of pages, read with Python's own HTML parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Elements that make a browser fetch something, and the attribute that says what."""


@dataclass
class Page(HTMLParser):
    """What a page offers and what it refers to."""

    file: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        # The canonical address and the like are not fetched.
        if tag in LOADED and LOADED[tag] in given and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given[LOADED[tag]])


def read_site(folder: Path) -> dict[Path, Page]:
    """All pages of a built site, by file."""
    return {file: Page(file) for file in sorted(folder.rglob("*.html"))}


def is_external(link: str) -> bool:
    """Whether a link leaves the site."""
    parts = urlsplit(link)
    return bool(parts.scheme or parts.netloc)


def target(site: Path, page: Path, link: str) -> tuple[Path, str]:
    """The file that an internal link of ``page`` leads to, and the anchor in it ("" for none)."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    file = (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def broken_links(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Internal links, and files that pages load, that lead nowhere."""
    broken = []
    for file, page in pages.items():
        for link in filter(lambda link: not is_external(link), [*page.links, *page.loads]):
            to, anchor = target(site, file, link)
            known = pages[to].anchors if to in pages else set()
            if not to.is_file() or (anchor and to in pages and anchor not in known):
                broken.append(f"{file.relative_to(site)}: {link}")
    return broken
