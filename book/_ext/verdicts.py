"""Sphinx extension: the ledger's tables from the verdicts that the executed chapters hold.

It also makes every build strict (warnings are errors, and stay errors when the build is repeated), and
keys the cache of executed chapters by the package's source and the records, which Jupyter Book's own cache
ignores.
"""

from __future__ import annotations

import html
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import executed
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
RECORD = re.compile(r'class="verdict [^>]*data-record="([^"]*)"')
NOT_EXAMINED = "not yet examined"
KINDS = {"claim": "claims", "erratum": "formulas and details in doubt"}
# How a count of one, and of several, reads
COUNTED = {
    "holds": ("holds", "hold"),
    "holds corrected": ("holds after a correction", "hold after a correction"),
    "does not hold": ("does not hold", "do not hold"),
    NOT_EXAMINED: ("is not yet examined", "are not yet examined"),
}


def load_claims() -> dict[str, dict]:
    with (ROOT / "book" / "claims.toml").open("rb") as file:
        return {claim["id"]: claim for claim in tomllib.load(file)["claim"]}


class PendingVerdict(nodes.Inline, nodes.Element):
    """Stands for a claim's verdict and evidence until all chapters have been read."""


class PendingSummary(nodes.Inline, nodes.Element):
    """Stands for the count of verdicts."""


class LedgerDirective(SphinxDirective):
    """Table of the claims of one kind: place, statement, verdict and evidence."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (kind,) = self.arguments
        self.env.note_dependency(str(ROOT / "book" / "claims.toml"))
        uses_verdicts(self.env).add(self.env.docname)
        group = nodes.tgroup("", cols=3)
        group += [nodes.colspec(colwidth=width) for width in (12, 44, 44)]
        head = nodes.thead()
        body = nodes.tbody()
        group += [head, body]
        row = nodes.row()
        for title in ("Place", "What is printed or claimed", "Verdict and evidence"):
            row += nodes.entry("", nodes.paragraph("", title))
        head += row
        for claim in load_claims().values():
            if claim["kind"] != kind:
                continue
            row = nodes.row(ids=[f"claim-{claim['id']}"])
            for text in (claim["place"], claim["text"]):
                inline, _ = self.state.inline_text(text, self.lineno)
                row += nodes.entry("", nodes.paragraph("", "", *inline))
            row += nodes.entry("", nodes.paragraph("", "", PendingVerdict(claim=claim["id"])))
            body += row
        return [nodes.table("", group, classes=["ledger"])]


class SummaryDirective(SphinxDirective):
    """A sentence for each kind of claim: how many have which verdict."""

    def run(self) -> list[nodes.Node]:
        uses_verdicts(self.env).add(self.env.docname)
        return [nodes.paragraph("", "", PendingSummary())]


def records(env) -> dict[str, dict[str, dict]]:
    """Verdicts by page: {docname: {claim: record}}."""
    if not hasattr(env, "wpo_records"):
        env.wpo_records = {}
    return env.wpo_records


def uses_verdicts(env) -> set[str]:
    if not hasattr(env, "wpo_uses_verdicts"):
        env.wpo_uses_verdicts = set()
    return env.wpo_uses_verdicts


def collect(app: Sphinx, doctree: nodes.document) -> None:
    found = {}
    for raw in doctree.findall(nodes.raw):
        for match in RECORD.findall(raw.astext()):
            record = json.loads(html.unescape(match))
            found[record["claim"]] = record
    unknown = set(found) - set(load_claims())
    if unknown:
        logger.warning(
            "verdicts on claims that claims.toml lacks: %s",
            sorted(unknown),
            location=app.env.docname,
        )
    records(app.env)[app.env.docname] = found


def purge(app: Sphinx, env, docname: str) -> None:
    records(env).pop(docname, None)
    uses_verdicts(env).discard(docname)


def evidence_of(env, claim: str) -> list[tuple[str, dict]]:
    found = [(page, kept[claim]) for page, kept in sorted(records(env).items()) if claim in kept]
    if len({record["verdict"] for _, record in found}) > 1:
        logger.warning("chapters disagree on claim %s: %s", claim, [page for page, _ in found])
    return found


def verdict_of(env, claim: str) -> str:
    found = evidence_of(env, claim)
    return found[0][1]["verdict"] if found else NOT_EXAMINED


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for pending in list(doctree.findall(PendingVerdict)):
        verdict = verdict_of(app.env, pending["claim"])
        style = "verdict-" + verdict.replace(" ", "-")
        parts: list[nodes.Node] = [nodes.strong("", verdict.capitalize(), classes=[style])]
        for page, record in evidence_of(app.env, pending["claim"]):
            url = app.builder.get_relative_uri(docname, page) + f"#verdict-{pending['claim']}"
            title = app.env.titles[page].astext()
            link = nodes.reference("", title, refuri=url, internal=True)
            parts += [nodes.Text(". " + record["evidence"] + " "), nodes.emphasis("", "", link)]
        pending.replace_self(parts)
    for pending in list(doctree.findall(PendingSummary)):
        pending.replace_self(nodes.Text(" ".join(summary(app.env, kind) for kind in KINDS)))


def summary(env, kind: str) -> str:
    counts = Counter(
        verdict_of(env, claim) for claim, about in load_claims().items() if about["kind"] == kind
    )
    listed = ", ".join(
        f"{counts[verdict]} {COUNTED[verdict][counts[verdict] > 1]}"
        for verdict in COUNTED
        if counts[verdict]
    )
    return f"Of {counts.total()} {KINDS[kind]}: {listed}."


def key_cache(app: Sphinx, config) -> None:
    config.nb_execution_cache_path = str(executed.folder())


def outdated(app: Sphinx, env, added, changed, removed) -> set[str]:
    """Read every page again when the package has changed since the last build."""
    key = executed.key()
    stale = getattr(env, "wpo_package_key", key) != key
    env.wpo_package_key = key
    return set(env.found_docs) if stale else set()


def forget_after_warnings(app: Sphinx, exception: Exception | None) -> None:
    """Make the next build read every page again: Sphinx warns about a page only when it reads it."""
    if exception or app._warncount:
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)


def setup(app: Sphinx) -> dict:
    app.keep_going = True  # what -W --keep-going sets: warnings fail the build at its end
    app.add_directive("ledger", LedgerDirective)
    app.add_directive("ledger-summary", SummaryDirective)
    app.connect("config-inited", key_cache)
    app.connect("env-get-outdated", outdated)
    app.connect("doctree-read", collect)
    app.connect("env-purge-doc", purge)
    app.connect("env-updated", lambda app, env: uses_verdicts(env))
    app.connect("doctree-resolved", resolve)
    app.connect("build-finished", forget_after_warnings)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
