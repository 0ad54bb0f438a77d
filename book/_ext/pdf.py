r"""Sphinx extension: what the PDF of the book needs beside the pages.

The macros of the site's formulas (``mathjax3_config``) are defined for LaTeX too. Of a cell's output LaTeX shows the
text or the picture where the site shows HTML.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.config import Config


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


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", define)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
