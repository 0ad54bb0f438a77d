"""Sphinx extension: what stands at a chapter's beginning and at its end.

``{opening}`` is a box with what the reader will know, the chapters that are needed, the time that the chapter
took to run when it was last executed, and links to what its cells use of the package. ``{checked-claims}`` lists the
verdicts that the chapter holds.
"""

from __future__ import annotations

from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from myst_nb.core.execute import ExecutionResult
from myst_nb.sphinx_ import NbMetadataCollector
from reference_links import used
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from verdicts import load_claims, records

logger = logging.getLogger(__name__)


class PendingTime(nodes.Inline, nodes.Element):
    """Stands for the time that the page took to run."""


class PendingUses(nodes.General, nodes.Element):
    """Stands for the links to what the page's cells use of the package."""


class PendingClaims(nodes.General, nodes.Element):
    """Stands for the list of the page's verdicts."""


class OpeningDirective(SphinxDirective):
    """Box at the beginning of a chapter; the content says what the reader will know at its end."""

    has_content = True
    option_spec: ClassVar = {"needs": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        self.assert_has_content()
        box = nodes.container(classes=["opening"])
        self.state.nested_parse(self.content, self.content_offset, box)
        needs = [name.strip() for name in self.options.get("needs", "").split(",") if name.strip()]
        text = ", ".join(f"{{doc}}`{name}`" for name in needs) or "no other chapter"
        links, _ = self.state.inline_text(text, self.lineno)
        box += nodes.paragraph("", "", nodes.strong("", "Needs"), nodes.Text(" "), *links)
        box[-1] += nodes.Text(".")
        box += nodes.paragraph(
            "", "", nodes.strong("", "Runs"), nodes.Text(" in "), PendingTime(page=self.env.docname)
        )
        box += PendingUses(page=self.env.docname)
        return [box]


class CheckedClaimsDirective(SphinxDirective):
    """List of the ledger's claims that the page decides, each with verdict and evidence."""

    def run(self) -> list[nodes.Node]:
        statements = nodes.container()
        for claim, about in load_claims().items():
            inline, _ = self.state.inline_text(about["text"], self.lineno)
            statements += nodes.paragraph("", "", *inline, claim=claim)
        return [PendingClaims("", *statements.children, page=self.env.docname)]


def seconds(execution: ExecutionResult | None) -> str:
    """Time of a page's execution as it reads in a sentence."""
    if not execution or execution["runtime"] is None:
        return "a time that was not measured"
    return f"{max(1, round(execution['runtime']))} s (this page, when it was last built)"


def uses(app: Sphinx, docname: str, page: str) -> list[nodes.Node]:
    """Paragraph with links to the entries of the reference that the page's cells use, if there are any."""
    parts: list[nodes.Node] = []
    for name, entry in used(app.env, page).items():
        short = nodes.literal("", name.rpartition(".")[2], classes=["xref", "py"])
        link = make_refnode(app.builder, docname, entry.docname, entry.node_id, short, name)
        parts += [nodes.Text(", " if parts else ": "), link]
    start = nodes.strong("", "In the package")
    return [nodes.paragraph("", "", start, *parts, nodes.Text("."))] if parts else []


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    # The nodes name their page: a PDF is resolved as one document.
    for pending in list(doctree.findall(PendingTime)):
        execution = NbMetadataCollector.get_exec_data(app.env, pending["page"])
        pending.replace_self(nodes.Text(seconds(execution) + "."))
    for pending in list(doctree.findall(PendingUses)):
        pending.replace_self(uses(app, docname, pending["page"]))
    for pending in list(doctree.findall(PendingClaims)):
        found, items = records(app.env).get(pending["page"], {}), []
        for statement in pending.children:
            if statement["claim"] in found:
                record = found[statement["claim"]]
                style = "verdict-" + record["verdict"].replace(" ", "-")
                verdict = nodes.reference(
                    "",
                    "",
                    nodes.strong("", record["verdict"].capitalize(), classes=[style]),
                    refuri=f"#verdict-{statement['claim']}",
                    internal=True,
                )
                sentence = statement.deepcopy()
                sentence += [nodes.Text(" "), verdict, nodes.Text(". " + record["evidence"])]
                items.append(nodes.list_item("", sentence))
        if items:
            pending.replace_self(nodes.bullet_list("", *items, classes=["checked-claims"]))
        else:
            text = "No claim of the ledger is decided on this page."
            pending.replace_self(nodes.paragraph("", text))


def setup(app: Sphinx) -> dict:
    app.add_directive("opening", OpeningDirective)
    app.add_directive("checked-claims", CheckedClaimsDirective)
    app.connect("doctree-resolved", resolve)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
