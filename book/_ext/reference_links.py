"""Sphinx extension: the entries of the reference link to the chapters.

A docstring's ``Chapter: *Title* (``book/name.md``)`` becomes a link, and each function and class gets a line with
the chapters whose cells use it, or if there are none those that its module names. The links back are in the box at a
chapter's beginning (`openings`), from `used`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import jupytext
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.environment import BuildEnvironment

KINDS = {"class", "function", "exception"}
NAMED = re.compile(r"\*([^*]+)\*\s+\(``book/([\w-]+)\.md``\)")


def uses(chapter: Path) -> set[str]:
    """Full names of what the chapter's cells import from the package, and of the attributes that they use."""
    cells = [
        cell for cell in jupytext.read(chapter, fmt="md:myst").cells if cell.cell_type == "code"
    ]
    source = "\n".join(re.sub(r"^%.*$", "", cell.source, flags=re.M) for cell in cells)
    nodes = list(ast.walk(ast.parse(source)))
    full = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "wpo_notes"
        for alias in node.names
    }
    attributes = {
        f"{full[node.value.id]}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in full
    }
    return set(full.values()) | attributes


def index(app: Sphinx) -> None:
    """Chapters by the name of what they use, in the order of the book; the reference is read again if they change."""
    found: dict[str, list[str]] = {}
    for page in app.config.external_site_map:
        path = Path(app.srcdir) / f"{page}.md"
        if path.read_text(encoding="utf-8").startswith("---\njupytext:"):
            for name in uses(path):
                found.setdefault(name, []).append(page)
    app.env.wpo_users, app.env.wpo_users_before = found, getattr(app.env, "wpo_users", None)


def outdated(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> set[str]:
    return {"api"} & set(env.found_docs) if env.wpo_users != env.wpo_users_before else set()


def link(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Link the chapters in a docstring."""
    text = NAMED.sub(
        lambda match: f":doc:`{' '.join(match[1].split())} <{match[2]}>`", "\n".join(lines)
    )
    lines[:] = text.split("\n")
    if what not in KINDS:
        return
    module = sys.modules.get(name.rpartition(".")[0])  # none for a class in a class
    named = [page for _, page in NAMED.findall(module.__doc__ or "")] if module else []
    pages = app.env.wpo_users.get(name)
    if pages or named:
        links = ", ".join(f":doc:`{page}`" for page in pages or named)
        lines += ["", f"{'Used in' if pages else 'See'} {links}.", ""]


def used(env: BuildEnvironment, page: str) -> dict[str, ObjectEntry]:
    """Entries of the reference that the page's cells use, by their full names; the experiments are left out."""
    entries = env.get_domain("py").objects
    return {
        name: entries[name]
        for name, pages in sorted(env.wpo_users.items())
        if page in pages
        and name in entries
        and entries[name].objtype in KINDS
        and not name.startswith("wpo_notes.experiments.")
    }


def leave_out_aliases(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Leave out the docstring that Python makes for a field of a named tuple: it says nothing."""
    if lines and re.fullmatch(r"Alias for field number \d+", lines[0]):
        lines.clear()


def setup(app: Sphinx) -> dict:
    app.connect("builder-inited", index)
    app.connect("env-get-outdated", outdated)
    app.connect("autodoc-process-docstring", link, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-docstring", leave_out_aliases)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
