r"""Sphinx extension: what the PDF of the book needs beside the pages.

The macros of the site's formulas (``mathjax3_config``) are defined for LaTeX too. Of a cell's output LaTeX shows the
text or the picture where the site shows HTML. Large tables are broken over pages, and their lines over columns' widths.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

# Sphinx keeps a table of up to 30 rows on one page, and does not break the lines of a longer one.
_ROWS, _CHARACTERS = 30, 2500
_WIDEST, _NARROWEST = 60, 8  # characters of a column that count for its share of the page


def macros(definitions: dict[str, str | list]) -> str:
    """Definitions of MathJax's macros in LaTeX."""
    lines = []
    for name, definition in definitions.items():
        body, count = definition if isinstance(definition, list) else (definition, 0)
        # MathJax takes a colour by its code, xcolor needs to be told that it is one.
        body = body.replace(r"\color{##", r"\color[HTML]{")
        # \d is an accent in text; and renewcommand refuses a new name.
        lines.append(rf"\providecommand{{\{name}}}{{}}\renewcommand{{\{name}}}[{count}]{{{body}}}")
    return "\n".join(lines) + "\n"


def define(app: Sphinx, config: Config) -> None:
    elements = config.latex_elements
    tex = macros(config.mathjax3_config["tex"]["macros"])
    elements["preamble"] = elements.get("preamble", "") + tex
    config.latex_additional_files = ["_ext/bbm.sty"]


def break_tables(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let a table that is long break over pages, each column as wide as its longest cell, within bounds."""
    if app.builder.format != "latex":
        return
    for table in doctree.findall(nodes.table):
        rows = list(table.findall(nodes.row))
        if len(rows) <= _ROWS and len(table.astext()) <= _CHARACTERS:
            continue
        cells = [[len(entry.astext()) for entry in row.findall(nodes.entry)] for row in rows]
        for column, lengths in zip(
            table.findall(nodes.colspec), zip(*cells, strict=True), strict=True
        ):
            column["colwidth"] = min(max(*lengths, _NARROWEST), _WIDEST)
        table["classes"] += ["longtable", "colwidths-given"]


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", define)
    app.connect("doctree-resolved", break_tables, priority=900)  # after the tables are made
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
