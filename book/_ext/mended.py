"""Sphinx extension: mends what the pages' readers would stumble on in the HTML of other extensions."""

from __future__ import annotations

from sphinx.application import Sphinx


def without_thebe(app: Sphinx, config) -> None:
    """Keep sphinx-thebe, which Jupyter Book always loads, from adding its scripts.

    They start a kernel on another host, and declare a constant twice, which is an error on every page.
    """
    for event in ("env-before-read-docs", "doctree-resolved"):
        listeners = app.events.listeners[event]
        listeners[:] = [each for each in listeners if each.handler.__module__ != "sphinx_thebe"]


def references_are_items(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree
) -> None:
    """Give the entries of a list of references the role that screen readers know.

    Docutils has ``doc-biblioentry``, which DPUB-ARIA 1.1 withdrew in favour of ``listitem``.
    """
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", without_thebe)
    app.connect("html-page-context", references_are_items)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
