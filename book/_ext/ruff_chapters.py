"""Runs ruff on the code cells of the chapters: lint and format check, or with --fix the corrections.

Ruff reads notebooks but not MyST Markdown, so the cells are handed to it as a notebook. A chapter's
text and cell options are never touched. Lines are kept to 79 characters, which a phone can show.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1]
# A code cell: fence, options (a YAML block or ":key: value" lines), then the code, which is group 1.
CELL = re.compile(
    r"^```\{code-cell\}[^\n]*\n(?:---\n.*?^---\n|(?::[^\n]*\n)+)?\n*(.*?)\n?^```$", re.M | re.S
)


def ruff(command: list[str], cells: list[str], name: str) -> subprocess.CompletedProcess[str]:
    """Run ruff on the cells as the notebook `name`."""
    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell-{number}",
                "metadata": {},
                "outputs": [],
                "source": source.splitlines(keepends=True),
            }
            for number, source in enumerate(cells, start=1)
        ],
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    options = ["--line-length", "79", "--stdin-filename", str(BOOK / name), "-"]
    return subprocess.run(
        [sys.executable, "-m", "ruff", *command, *options],
        input=json.dumps(notebook),
        capture_output=True,
        text=True,
    )


def rewritten(text: str, name: str, command: list[str]) -> str:
    """The chapter `text` with its code cells as the ruff command leaves them."""
    run = ruff(command, CELL.findall(text), name)
    if run.returncode:
        raise ValueError(run.stderr)
    sources = iter("".join(cell["source"]) for cell in json.loads(run.stdout)["cells"])

    def replace(match: re.Match[str]) -> str:
        start, end = match.start(1) - match.start(), match.end(1) - match.start()
        return match[0][:start] + next(sources) + match[0][end:]

    return CELL.sub(replace, text)


def fix(path: Path) -> None:
    """Sort the imports, make ruff's other safe corrections and format."""
    text, name = path.read_text(encoding="utf-8"), f"{path.stem}.ipynb"
    corrected = rewritten(text, name, ["check", "--fix", "--exit-zero", "--quiet"])
    path.write_text(rewritten(corrected, name, ["format"]), encoding="utf-8")


def check(path: Path) -> list[str]:
    """What ruff has to say about one chapter."""
    text, name = path.read_text(encoding="utf-8"), f"{path.stem}.ipynb"
    lint = ruff(["check", "--quiet", "--output-format", "concise"], CELL.findall(text), name)
    problems = [line for line in (lint.stdout + lint.stderr).splitlines() if line]
    if not problems and rewritten(text, name, ["format"]) != text:
        problems.append(f"{path}: code cells would be reformatted (make format)")
    return problems


def main() -> int:
    """Check all chapters, after correcting them if asked; the status is 1 if problems are left."""
    chapters = [path for path in sorted(BOOK.glob("*.md")) if CELL.search(path.read_text())]
    if "--fix" in sys.argv[1:]:
        for path in chapters:
            fix(path)
    problems = [line for path in chapters for line in check(path)]
    print("\n".join(problems) or "Code cells of the chapters: all checks passed!")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
