r"""Sphinx extension: what the PDF of the book needs beside the pages.

The macros of the site's formulas (``mathjax3_config``) are defined for LaTeX too. Chapters and propositions have the
site's numbers, solutions are printed, verdicts can be linked to, and long tables are broken over pages. Of another cell's output LaTeX shows
the text, Markdown or picture where the site shows HTML.
"""

from __future__ import annotations

import verdicts
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx_jupyterbook_latex.nodes import HiddenCellNode
from sphinx_proof.nodes import NODE_TYPES, proof_node

# Sphinx keeps a table of up to 30 rows on one page, and does not break the lines of a longer one.
_ROWS, _CHARACTERS = 30, 2500
_WIDEST, _NARROWEST = 60, 8  # characters of a column that count for its share of the page
# The depth to which LaTeX numbers: no part, or the three levels of a chapter that the site numbers.
_UNNUMBERED, _NUMBERED = -2, 2

# Sphinx lets a picture be as high as a page, and then there is no place for its caption.
_CAPTIONED = r"\makeatletter\AtBeginDocument{\spx@image@maxheight.8\textheight}\makeatother" + "\n"


# ---- before the chapters are read


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
    elements["preamble"] = elements.get("preamble", "") + tex + _CAPTIONED + _depth(_UNNUMBERED)
    config.latex_additional_files = ["_ext/bbm.sty"]


def number_by_chapter(app: Sphinx) -> None:
    """Number propositions within chapters, as on the site, and not within sections as Jupyter Book does for LaTeX."""
    if app.builder.format == "latex":
        app.config["numfig_secnum_depth"] = 1


def restore_depth(app: Sphinx, env) -> None:
    """What the LaTeX writer takes for the numbers of figures, which count parts as a level."""
    if app.builder.format == "latex":
        app.config["numfig_secnum_depth"] = 2


# ---- when the chapters are one document


def write(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    if app.builder.format == "latex":
        number_chapters(app.env, doctree)
        name_propositions(app.env, doctree)
        open_proofs(doctree)
        show_solutions(doctree)
        leave_out_downloads(doctree)
        show_verdicts(app.env, doctree)
        break_tables(doctree)


def number_chapters(env, doctree: nodes.document) -> None:
    """Number the chapters that the site numbers, by its numbers; no part and no other page."""
    for page in doctree.findall(addnodes.start_of_file):
        number = env.toc_secnumbers.get(page["docname"], {}).get("")
        if number:
            page.insert(0, _latex(_depth(_NUMBERED) + _chapter(number[0] - 1)))
            page.append(_latex(_depth(_UNNUMBERED) + _chapter(0)))


def name_propositions(env, doctree: nodes.document) -> None:
    """Give propositions and remarks the number and the label by which they are referred to."""
    kinds = tuple(NODE_TYPES.values())
    for node in list(doctree.findall(lambda node: isinstance(node, kinds))):
        (label,) = node["ids"]
        number = env.toc_fignumbers[_page(node)][node["countertype"]][label]
        title, content = node.children
        name = f"{node['realtype'].capitalize()} {'.'.join(map(str, number))}"
        box = nodes.admonition("", nodes.title("", name, *title.children), *content.children)
        node.replace_self([nodes.target(ids=[label]), box])


def open_proofs(doctree: nodes.document) -> None:
    """Set proofs as text: in a box of their own they had an empty title."""
    for node in list(doctree.findall(proof_node)):
        (box,) = node.children
        start = next(iter(box.findall(nodes.Text)))
        word, dot, rest = start.partition(".")
        start.parent.replace(start, [nodes.emphasis("", word + dot), nodes.Text(rest)])
        node.replace_self(box.children)


def show_solutions(doctree: nodes.document) -> None:
    """Print the cells that the site opens by a click; they would be left out."""
    for hidden in list(doctree.findall(HiddenCellNode)):
        if "tag_hide-cell" in hidden["classes"]:
            hidden.replace_self(nodes.container("", *hidden.children, classes=hidden["classes"]))


def leave_out_downloads(doctree: nodes.document) -> None:
    """Leave out the paragraphs that offer the page's notebook."""
    for link in list(doctree.findall(addnodes.download_reference)):
        link.parent.parent.remove(link.parent)


def show_verdicts(env, doctree: nodes.document) -> None:
    """Set verdicts as a paragraph to which the ledger can link, where a cell's output would be a block of code."""
    for block in list(doctree.findall(nodes.literal_block)):
        claim, _, text = block.astext().partition(": ")
        record = verdicts.records(env).get(_page(block), {}).get(claim)
        if record and text.startswith(record["verdict"]):
            verdict = nodes.strong("", record["verdict"].capitalize())
            name = nodes.literal("", claim)
            evidence = nodes.Text(" " + record["evidence"])
            paragraph = nodes.paragraph("", "", verdict, nodes.Text(" "), name, evidence)
            block.replace_self([nodes.target(ids=[f"verdict-{claim}"]), paragraph])


def break_tables(doctree: nodes.document) -> None:
    """Let a table that is long break over pages, each column as wide as its longest cell, within bounds."""
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


def _page(node: nodes.Element) -> str:
    """The page from which a node of the whole book comes: Sphinx notes it in each section."""
    while "docname" not in node:
        node = node.parent
    return node["docname"]


def _latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


def _depth(depth: int) -> str:
    return rf"\setcounter{{secnumdepth}}{{{depth}}}"


def _chapter(number: int) -> str:
    return rf"\setcounter{{chapter}}{{{number}}}"


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", define)
    app.connect("builder-inited", number_by_chapter, priority=900)
    app.connect("env-check-consistency", restore_depth)
    app.connect("doctree-resolved", write, priority=900)  # after the ledger's tables are made
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
