"""Checks the built site as a reader without a network would find it: ``check_site.py _build/html``.

Reported: links and anchors that lead nowhere, anything loaded from another host, images without a
description, figures without a caption, formulas, references or warnings left as raw text, errors in cell
outputs, and pages that weigh too much.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
# <link> elements that name a page without loading it
NOT_LOADED = {"canonical", "next", "prev", "index", "search", "author", "license"}
HASH = re.compile(r"[0-9a-f]{20,}|_images/")
# Text that a page has only if something was not rendered
RAW = re.compile(
    r"\$[^$\n]*\\[a-zA-Z]+[^$\n]*\$|\\paper\b|\{(?:eq|doc|prf:ref|numref|cite|glue)[^}]*\}`"
)
VERBATIM = {"script", "style", "pre", "code", "textarea"}
MAX_WEIGHT = 1_500_000  # bytes of a page with what it loads, without what the pages share
EXTERNAL_CSS = re.compile(r"(?:@import\s+|url\()\s*['\"]?(?:https?:)?//[^)'\"]+")


class Page(HTMLParser):
    """What one page defines, loads, links to and shows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.problems: list[str] = []
        self._verbatim = 0
        self._math = 0
        self._captions: list[str] = []  # text of each figure that is open, the innermost last
        self._in_caption = False
        self._quoting = False  # whether the last problem is to quote the next text
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        classes = set(found.get("class", "").split())
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self._verbatim += tag in VERBATIM
        # Formulas are raw text by design, in elements that MathJax will render.
        if self._math or (tag in {"span", "div"} and "math" in classes):
            self._math += tag in {"span", "div"}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        url = found.get(LOADED.get(tag, ""), "")
        if url and not NOT_LOADED & set(found.get("rel", "").split()):
            if urlsplit(url).netloc:
                self.problems.append(f"loads {url}")
            elif not url.startswith("data:"):
                self.links.append(url)
                self.loaded.append(url)
        if tag == "figure":
            self._captions.append("")
        self._in_caption |= tag == "figcaption"
        if tag == "img":
            if not self._captions and "_static/" not in url:
                self.problems.append(f"image outside of a figure: {url[:60]}")
            alt = found.get("alt", "").strip()
            if not alt or HASH.search(alt):
                self.problems.append(f"image without a description: {url[:60]}")
        if "system-message" in classes:
            self.problems.append("a message of the build is on the page")
        if classes & {"stderr", "traceback"}:
            self.problems.append(f"a cell's output is of class {' '.join(sorted(classes))}")
            self._quoting = True

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag in VERBATIM
        if self._math and tag in {"span", "div"}:
            self._math -= 1
        self._in_caption &= tag != "figcaption"
        if tag == "figure" and self._captions and not self._captions.pop().strip(" #\n"):
            self.problems.append("figure without a caption")

    def handle_data(self, data: str) -> None:
        if self._quoting and data.strip():
            self.problems[-1] += f": {' '.join(data.split())[:200]}"
            self._quoting = False
        if self._in_caption and self._captions:
            self._captions[-1] += data
        if not self._verbatim and not self._math:
            self.problems += [f"not rendered: {match}" for match in RAW.findall(data)]


def own_files(path: Path, page: Page) -> set[Path]:
    """Files that the page loads and the other pages do not: not the theme's, nor the search index."""
    files = {(path.parent / unquote(urlsplit(url).path)).resolve() for url in page.loaded}
    return {file for file in files if file.is_file() and "_static" not in file.parts} - {
        path.parent / "searchindex.js"
    }


def check(site: Path) -> list[str]:
    """All problems of the site, each with its page."""
    pages = {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.relative_to(site).parts
    }
    if not pages:
        return [f"{site}: no pages; run `make book` first"]
    problems = []
    for path, page in pages.items():
        found = list(page.problems)
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            anchor = unquote(target.fragment)
            if not file.exists():
                found.append(f"link to a missing file: {link}")
            elif anchor and file in pages and anchor not in pages[file].ids:
                found.append(f"link to a missing place: {link}")
        weight = sum(file.stat().st_size for file in (path, *own_files(path, page)))
        if weight > MAX_WEIGHT:
            found.append(f"weighs {weight / 1e6:.2f} MB, more than {MAX_WEIGHT / 1e6:g} MB")
        problems += [f"{path.relative_to(site)}: {problem}" for problem in dict.fromkeys(found)]
    for path in sorted(site.rglob("*.css")):
        urls = EXTERNAL_CSS.findall(path.read_text(encoding="utf-8", errors="replace"))
        problems += [f"{path.relative_to(site)}: loads {url}" for url in urls]
    return problems


def main() -> int:
    """Print the problems of the site named on the command line; the status is 1 if there are any."""
    problems = check(Path(sys.argv[1]).resolve())
    print("\n".join(problems) or "Site: all checks passed!")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
