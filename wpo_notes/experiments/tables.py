"""Tables of numbers: HTML on the site and in Jupyter, Markdown for print, aligned text elsewhere.

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["Table", "table"]


class Table:
    """A head and rows of cells; shown as an HTML table in Jupyter and on the site."""

    def __init__(self, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        self.head, self.rows = head, rows

    def __repr__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        head = _row("th", self.head)
        body = "".join(_row("td", row) for row in self.rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _repr_markdown_(self) -> str:
        rule = "|---" * len(self.head) + "|"
        return "\n".join([_line(self.head), rule, *map(_line, self.rows)])


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Table:
    """Table of the cells' text; None is an empty cell.

    Args:
        head: titles of the columns.
        rows: as many cells each as there are titles, formatted as they shall be read.

    Raises:
        ValueError: a row of another length than the head.

    Examples:
        >>> from wpo_notes.experiments.tables import table
        >>> table(["law", "nats"], [("moons", f"{0.5:.2f}"), ("rings", None)])
        law    nats
        moons  0.50
        rings
    """
    head = _texts(head)
    rows = [_texts(row) for row in rows]
    for number, row in enumerate(rows):
        if len(row) != len(head):
            raise ValueError(
                f"each row must have {len(head)} cells, one a title, but row {number} has "
                f"{len(row)}: {row}"
            )
    return Table(head, rows)


def _texts(cells: Sequence[object]) -> tuple[str, ...]:
    return tuple("" if cell is None else str(cell) for cell in cells)


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_unbroken(cell)}</{tag}>" for cell in cells) + "</tr>"


def _line(cells: tuple[str, ...]) -> str:
    """A row of Markdown, in which no punctuation of a cell has a meaning."""
    return "".join("| " + re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", cell) + " " for cell in cells) + "|"


def _unbroken(cell: str) -> str:
    """The cell for HTML; on a phone a number, or two with a sign or a word between them, stay on one line."""
    cell = re.sub(
        r"(?<=\d) (±|to|of|/) (?=[-+\d])", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", cell
    )
    cell = re.sub(r"(?<=\d)–(?=[-+\d])", "\N{WORD JOINER}–\N{WORD JOINER}", cell)
    # a browser breaks 8.0e-08 after its hyphen; no joiner here, so that a copied number is still one
    return re.sub(
        r"[\d.]+e-\d+", r'<span style="white-space: nowrap">\g<0></span>', html.escape(cell)
    )
