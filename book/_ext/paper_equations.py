r"""Sphinx extension: where the book has the paper's equations.

A chapter marks a formula as the paper's equation (13) by ``\paper{13}`` and gives it a label. The directive
``{paper-equations}`` holds one line ``13: what the equation is`` for each equation of the paper and becomes a
table that links each to its places, in the order of the book. An equation without a place is a warning, and
so are a mark without a label and a mark with a number that no line has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
MARK = re.compile(r"\\paper\{(\d+)([^}]*)\}")
LINE = re.compile(r"(\d+): (\S.*)")


class PendingPlaces(nodes.Inline, nodes.Element):
    """Stands for the places of one equation until all chapters have been read."""


class PaperEquationsDirective(SphinxDirective):
    """Table of the paper's equations: number, description, places in the book."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        group = nodes.tgroup("", cols=3)
        group += [nodes.colspec(colwidth=width) for width in (10, 45, 45)]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        titles = [nodes.Text(title) for title in ("Paper", "What it is", "In the book")]
        head += table_row([[title] for title in titles])
        numbers = set()
        for line in self.content:
            match = LINE.fullmatch(line)
            if not match:
                raise self.error(f"expected a line like '13: what the equation is', got {line!r}")
            number, text = int(match[1]), match[2]
            numbers.add(number)
            inline, _ = self.state.inline_text(text, self.lineno)
            places = PendingPlaces(number=number)
            body += table_row([[nodes.Text(f"({number})")], inline, [places]])
        indexed(self.env)[self.env.docname] = numbers
        return [nodes.table("", group, classes=["paper-equations"])]


def table_row(cells: list[list[nodes.Node]]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *content)) for content in cells))


def marks(env: BuildEnvironment) -> dict[str, list[tuple[int, str, str]]]:
    """Marked equations by page: {docname: [(paper's number, rest of the mark, label)]}."""
    if not hasattr(env, "wpo_paper_marks"):
        env.wpo_paper_marks = {}
    return env.wpo_paper_marks


def indexed(env: BuildEnvironment) -> dict[str, set[int]]:
    """Numbers of the equations that a page lists."""
    if not hasattr(env, "wpo_paper_indexed"):
        env.wpo_paper_indexed = {}
    return env.wpo_paper_indexed


def collect(app: Sphinx, doctree: nodes.document) -> None:
    found = []
    for block in doctree.findall(nodes.math_block):
        for number, rest in MARK.findall(block.astext()):
            if block.get("label"):
                found.append((int(number), rest, block["label"]))
            else:
                logger.warning(
                    "the formula marked \\paper{%s} has no label, so nothing can link to it",
                    number,
                    location=block,
                )
    marks(app.env)[app.env.docname] = found


def purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    marks(env).pop(docname, None)
    indexed(env).pop(docname, None)


def check(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Compare marks and lists; the pages with a list are written again, as any chapter may have changed."""
    for page, numbers in indexed(env).items():
        marked = {number for found in marks(env).values() for number, _, _ in found}
        for number in sorted(numbers - marked):
            logger.warning("no formula is marked \\paper{%d}", number, location=page)
        for number in sorted(marked - numbers):
            logger.warning("no line for the formula marked \\paper{%d}", number, location=page)
    return list(indexed(env))


def in_order(env: BuildEnvironment, page: str) -> Iterator[str]:
    """A page and those below it in the table of contents, as a reader meets them."""
    yield page
    for below in env.toctree_includes.get(page, []):
        yield from in_order(env, below)


class PlacesTransform(SphinxPostTransform):
    """Puts the links in, before Sphinx resolves references (priority 5 with LaTeX, 10 with HTML)."""

    default_priority = 3

    def run(self, **kwargs: object) -> None:
        for pending in list(self.document.findall(PendingPlaces)):
            parts: list[nodes.Node] = []
            for page in in_order(self.env, self.config.root_doc):
                for number, rest, label in marks(self.env).get(page, []):
                    if number == pending["number"]:
                        parts += [nodes.Text("; ")] * bool(parts)
                        parts += [self.link(label), nodes.Text(f"{rest}, ")]
                        parts.append(nodes.emphasis("", self.env.titles[page].astext()))
            pending.replace_self(parts)

    def link(self, label: str) -> nodes.Node:
        """What the role ``{eq}`` makes."""
        return addnodes.pending_xref(
            "",
            nodes.literal("", label),
            refdomain="math",
            reftype="eq",
            reftarget=label,
            refdoc=self.env.docname,
            refexplicit=False,
            refwarn=True,
        )


def setup(app: Sphinx) -> dict:
    app.add_directive("paper-equations", PaperEquationsDirective)
    app.add_post_transform(PlacesTransform)
    app.connect("doctree-read", collect)
    app.connect("env-purge-doc", purge)
    app.connect("env-updated", check)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
