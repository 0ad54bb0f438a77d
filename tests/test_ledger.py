"""Verdicts: their HTML carries the record whole, whatever characters the evidence has."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from wpo_notes.ledger import VERDICTS, record


class Parsed(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize(
    "evidence",
    [
        "Residual 3.2e-15 against 0.97.",
        "|Γ(x − Z)|² − Tr Γ < 1e-9 & \"mass\" = 'one' > 0; \\sqrt{\\det} </div><script>alert(1)</script>",
        "two\nlines",
    ],
)
def test_html_round_trip(verdict, evidence):
    box = Parsed(record("eq-25-determinant", verdict, evidence)._repr_html_())
    assert [tag for tag, _ in box.tags] == ["div", "strong", "code"]  # nothing injected
    attributes = box.tags[0][1]
    assert json.loads(attributes["data-record"]) == {
        "claim": "eq-25-determinant",
        "verdict": verdict,
        "evidence": evidence,
    }
    assert attributes["id"] == "verdict-eq-25-determinant"
    assert attributes["class"] == f"verdict verdict-{verdict.replace(' ', '-')}"
    assert box.text == f"{verdict.capitalize()} eq-25-determinant {evidence}"


def test_text_for_a_terminal():
    verdict = record("semigroup", "holds", "Error 1e-16.")
    assert repr(verdict) == "semigroup: holds. Error 1e-16."
    assert (verdict.claim, verdict.verdict, verdict.evidence) == (
        "semigroup",
        "holds",
        "Error 1e-16.",
    )


def test_errors():
    with pytest.raises(ValueError, match=r"verdict must be one of .*'does not hold'.* got 'true'"):
        record("semigroup", "true", "Error 1e-16.")
    for evidence in ("", "  \n"):
        with pytest.raises(ValueError, match="evidence must be a sentence with the numbers"):
            record("semigroup", "holds", evidence)
