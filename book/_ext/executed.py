"""The cache of executed chapters, which the site's build and ``pytest --nbval`` share.

Jupyter Book's own cache knows a chapter's code only. This one is in a folder whose name is a digest of the
package's source, the records and the pinned requirements too, so that a change in any of them executes all
chapters again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]


def key() -> str:
    """Digest of what a chapter's results depend on beside its code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "wpo_notes").rglob("*.py")):
        digest.update(path.read_bytes())
    for path in sorted((ROOT / "book" / "results").rglob("*.json")):
        digest.update(path.read_bytes())
    digest.update((ROOT / "requirements.txt").read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    return ROOT / "_build" / ".execution" / key()


def read(chapter: Path) -> NotebookNode:
    """The chapter as the site's build reads it."""
    return read_myst_markdown_notebook(chapter.read_text(encoding="utf-8"))


def create() -> None:
    """Make an empty cache, with its tables, if there is none."""
    get_cache(folder()).db  # noqa: B018


def holds(chapter: Path) -> bool:
    """Whether the chapter's results are in the cache."""
    try:
        get_cache(folder()).match_cache_notebook(read(chapter))
    except KeyError:
        return False
    return True


def keep(chapter: Path, outputs: list[list[NotebookNode]], seconds: float) -> None:
    """Put the results of a chapter's code cells into the cache.

    Raises:
        ValueError: not as many lists of outputs as the chapter has code cells.
    """
    notebook = read(chapter)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, (cell, found) in enumerate(zip(cells, outputs, strict=True), start=1):
        cell.outputs, cell.execution_count = found, number
    bundle = CacheBundleIn(notebook, str(chapter), data={"execution_seconds": seconds})
    get_cache(folder()).cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
