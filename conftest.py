"""Lets ``pytest --nbval`` collect the book's chapters, which are MyST Markdown notebooks."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import jupytext
import pytest
from nbval.plugin import IPyNbFile

BOOK = Path(__file__).parent / "book"
NBVAL_DEFAULT_TIMEOUT = 2000.0  # seconds: what a dead kernel would cost
CELL_TIMEOUT = 300.0


def pytest_configure(config: pytest.Config) -> None:
    if config.option.nbval_cell_timeout == NBVAL_DEFAULT_TIMEOUT:
        config.option.nbval_cell_timeout = CELL_TIMEOUT


def is_chapter(path: Path) -> bool:
    return path.suffix == ".md" and "jupytext:" in path.read_text(encoding="utf-8")[:200]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if parent.config.option.nbval and file_path.parent == BOOK and is_chapter(file_path):
        return Chapter.from_parent(parent, path=file_path)
    return None


class Chapter(IPyNbFile):
    """A MyST Markdown notebook."""

    has_failed = False

    def collect(self):
        # nbval reads with nbformat; jupytext reads a chapter into the same structure.
        def read(path: str, as_version: int):
            return jupytext.read(path, fmt="md:myst", as_version=as_version)

        with mock.patch("nbval.plugin.nbformat.read", read):
            yield from super().collect()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if isinstance(item.parent, Chapter) and item.parent.has_failed:
        pytest.skip("an earlier cell of this chapter failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and isinstance(item.parent, Chapter):
        item.parent.has_failed = True
    return report
