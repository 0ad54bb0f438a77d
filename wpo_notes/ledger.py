"""Verdicts: how a chapter records, on the page, what became of a claim of the paper.

Chapters: all; the pages *Ledger* and *Errata* are built from these records (``book/_ext/verdicts.py``).
"""

from __future__ import annotations

import html
import json

__all__ = ["VERDICTS", "Verdict", "record"]

VERDICTS = ("holds", "holds corrected", "does not hold")


class Verdict:
    """A claim's verdict with its evidence; shown as a box in Jupyter and on the site."""

    def __init__(self, claim: str, verdict: str, evidence: str) -> None:
        self.claim, self.verdict, self.evidence = claim, verdict, evidence

    def __repr__(self) -> str:
        return f"{self.claim}: {self.verdict}. {self.evidence}"

    def _repr_html_(self) -> str:
        data = {"claim": self.claim, "verdict": self.verdict, "evidence": self.evidence}
        kind = self.verdict.replace(" ", "-")
        return (
            f'<div class="verdict verdict-{kind}" id="verdict-{html.escape(self.claim)}" '
            f'data-record="{html.escape(json.dumps(data))}"><strong>{self.verdict.capitalize()}</strong> '
            f"<code>{html.escape(self.claim)}</code> {html.escape(self.evidence)}</div>"
        )


def record(claim: str, verdict: str, evidence: str) -> Verdict:
    """Record the verdict on a claim of ``book/claims.toml``; the last line of the cell that decides it.

    Call it after the cell's assertions: a chapter that reaches it has passed them.

    Args:
        claim: the claim's id.
        verdict: one of `VERDICTS`.
        evidence: one sentence with the numbers that decided it, formatted from the cell's variables.

    Raises:
        ValueError: an unknown verdict, or no evidence.

    Examples:
        >>> from wpo_notes.ledger import record
        >>> record("cole-hopf", "holds", f"The residual is {3e-9:.0e}.")
        cole-hopf: holds. The residual is 3e-09.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {VERDICTS}, got {verdict!r}")
    if not evidence.strip():
        raise ValueError("evidence must be a sentence with the numbers that decided the claim")
    return Verdict(claim, verdict, evidence)
