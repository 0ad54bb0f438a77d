"""Tables: every cell comes back from the HTML as it was given."""

import xml.etree.ElementTree as ElementTree

import pytest
from markdown_it import MarkdownIt

from wpo_notes.experiments.tables import table

HEAD = ("law", "KL")
ROWS = [("moons & <rings>", 0.25), ('a "quoted" name', None)]


def test_html_has_every_cell_as_it_was_given():
    # Parsed by the standard library: an unescaped < or & would not parse, or change the cells.
    root = ElementTree.fromstring(table(HEAD, ROWS)._repr_html_())
    cells = [[(cell.tag, cell.text or "") for cell in row] for row in root.iter("tr")]
    assert cells == [
        [("th", "law"), ("th", "KL")],
        [("td", "moons & <rings>"), ("td", "0.25")],
        [("td", 'a "quoted" name'), ("td", "")],
    ]
    assert root.tag == "table"


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        ("0.25 ± 0.01 nats", "0.25\u00a0±\u00a00.01 nats"),
        ("0.25 (0.2 to 1e-05)", "0.25 (0.2\u00a0to\u00a01e-05)"),
        ("1 of 3, 5.8 / -2", "1\u00a0of\u00a03, 5.8\u00a0/\u00a0-2"),
        ("0.25 (0.2–0.3)", "0.25 (0.2\u2060–\u20600.3)"),
        ("back to 2 of them", "back to 2 of them"),
    ],
)
def test_numbers_that_belong_together_stay_on_one_line(cell, kept):
    root = ElementTree.fromstring(table(["KL"], [[cell]])._repr_html_())
    assert "".join(root.find("tbody/tr/td").itertext()) == kept


def test_a_number_is_not_broken_after_the_sign_of_its_exponent_and_can_be_copied():
    root = ElementTree.fromstring(table(["KL", "error"], [["8.0e-08 <", "non-e-2"]])._repr_html_())
    number, word = root.findall("tbody/tr/td")
    assert (number[0].text, number[0].get("style")) == ("8.0e-08", "white-space: nowrap")
    assert "".join(number.itertext()) == "8.0e-08 <"
    assert len(word) == 0


def test_markdown_says_what_html_says_whatever_punctuation_is_in_it():
    rows = [
        ["$x_i$ | <b> & `a`", "**1**"],
        ["{math}`2` \\\\ [a](b) ~~c~~ # ---", None],
        ["", "-0.5"],
    ]
    shown = table(["a *b*", "KL"], rows)
    parsed = ElementTree.fromstring(
        MarkdownIt().enable(["table", "strikethrough"]).render(shown._repr_markdown_())
    )
    cells = [["".join(cell.itertext()) for cell in row] for row in parsed.iter("tr")]
    assert cells == [list(shown.head), *map(list, shown.rows)]
    assert all(len(cell) == 0 for row in parsed.iter("tr") for cell in row)  # no markup inside


def test_plain_text_is_aligned():
    assert repr(table(HEAD, ROWS)) == (
        'law              KL\nmoons & <rings>  0.25\na "quoted" name'
    )


def test_rows_may_come_from_a_generator_and_may_be_none():
    assert table(HEAD, (row for row in ROWS)).rows == table(HEAD, ROWS).rows
    assert repr(table(HEAD, [])) == "law  KL"


def test_row_of_another_length_is_refused():
    with pytest.raises(
        ValueError, match=r"each row must have 2 cells.*row 1 has 3: \('1', '2', '3'\)"
    ):
        table(HEAD, [(1, 2), (1, 2, 3)])
