"""Sphinx extension: a button above each page that hides the cells' code, on all pages, and shows it again.

The button's work is done by ``toggleCode`` in ``_static/book.js`` and by ``_static/book.css``.
"""

from __future__ import annotations

from sphinx.application import Sphinx


def add_button(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    if 'class="cell_input' in context.get("body", ""):
        context["header_buttons"].append(
            {
                "type": "javascript",
                "javascript": "toggleCode()",
                "tooltip": "Hide or show the code",
                "icon": "fas fa-code",
                "label": "code-button",
            }
        )


def setup(app: Sphinx) -> dict:
    # The theme makes the list of buttons at priority 500 and fills it at 501.
    app.connect("html-page-context", add_button, priority=502)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
