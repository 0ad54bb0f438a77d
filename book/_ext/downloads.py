"""Sphinx extension: the notebook behind ``{nb-download}`` runs away from this repository (`portable`).

myst-nb leaves each executed chapter as a notebook. Those that a page offers are rewritten when all pages have
been read, when titles and the numbers of equations are known.
"""

from __future__ import annotations

import json
import os
import re
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.core.variables import format_plain_text
from portable import portable
from pybtex.database import BibliographyData, parse_file
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def offered(env: BuildEnvironment) -> dict[str, Path]:
    """Notebooks, by page, that have been executed and not yet been rewritten."""
    if not hasattr(env, "wpo_offered"):
        env.wpo_offered = {}
    return env.wpo_offered


def collect(app: Sphinx, doctree: nodes.document) -> None:
    docname = app.env.docname
    for link in doctree.findall(addnodes.download_reference):
        if link["reftarget"].endswith(f"/{docname}.ipynb"):
            _, path = app.env.relfn2path(link["reftarget"], docname)
            offered(app.env)[docname] = Path(path)


def rewrite(app: Sphinx, env: BuildEnvironment) -> None:
    macros = app.config.mathjax3_config["tex"]["macros"]
    for docname, path in offered(env).items():
        before, notebook = path.stat(), nbformat.read(path, as_version=4)
        # An environment that was kept names notebooks that an earlier build has rewritten.
        if notebook.cells[0].get("id") == "setup":
            continue
        references = {**roles(app, docname), "glue:text": glued(path.with_suffix(".glue.json"))}
        nbformat.write(portable(notebook, macros, references), path)
        # The page depends on the file: with a new time it would be read again in the next build.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    offered(env).clear()


def glued(path: Path) -> Callable[[str], str]:
    """What the role ``{glue:text}`` shows, from the file in which myst-nb leaves the page's numbers."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def value(target: str) -> str:
        name, _, form = target.partition(":")
        return format_plain_text(values[name]["data"]["text/plain"], form)

    return value


def roles(app: Sphinx, docname: str) -> dict[str, Callable[[str], str]]:
    """What a reader of the page sees for a reference, by role."""
    env = app.env
    sources = [parse_file(str(Path(app.srcdir) / name)) for name in app.config.bibtex_bibfiles]

    def number(page: str, kind: str, identity: str) -> str:
        return ".".join(map(str, env.toc_fignumbers[page].get(kind, {}).get(identity, ())))

    def equation(target: str) -> str:
        page, _ = env.get_domain("math").equations[target]
        return number(page, "displaymath", nodes.make_id(f"equation-{target}"))

    def document(target: str) -> str:
        title = env.titles[target].astext()
        return f"*{title}*" if target != docname else f"*{title}* (this page)"

    def figure(target: str) -> str:
        page, identity, _ = env.get_domain("std").labels[target]
        return f"Fig. {number(page, 'figure', identity)}"

    def statement(target: str) -> str:
        found = env.proof_list[target]
        kind = found["countertype"]
        return f"{found['realtype'].capitalize()} {number(found['docname'], kind, target)}"

    def parenthesised(target: str) -> str:
        cited = [", ".join(author_and_year(sources, key.strip())) for key in target.split(",")]
        return f"({'; '.join(cited)})"

    def textual(target: str) -> str:
        cited = [author_and_year(sources, key.strip()) for key in target.split(",")]
        return ", ".join(f"{author} ({year})" for author, year in cited)

    return {
        "eq": lambda target: f"({equation(target)})",
        "doc": document,
        "numref": figure,
        "prf:ref": statement,
        "cite": parenthesised,
        "cite:p": parenthesised,
        "cite:t": textual,
    }


def author_and_year(sources: list[BibliographyData], key: str) -> tuple[str, str]:
    """An entry of the bibliography as it reads in a sentence."""
    entry = ChainMap(*(source.entries for source in sources))[key]
    people = [
        re.sub(r"[{}\\'\"]", "", " ".join(person.last_names))
        for person in entry.persons.get("author") or entry.persons["editor"]
    ]
    name = people[0] + (" et al." if len(people) > 2 else "".join(f" and {p}" for p in people[1:]))
    return name, entry.fields["year"]


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", collect)
    app.connect("env-check-consistency", rewrite)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
