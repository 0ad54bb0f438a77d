"""Lets ``pytest --nbval`` collect the book's chapters, which are MyST Markdown notebooks.

A chapter whose cells have all passed goes into the cache of executed chapters (`book/_ext/executed.py`), from
which the site is built: chapters run in parallel here, one after another there.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import executed
import jupytext
import pytest
from nbval.plugin import IPyNbFile

BOOK = Path(__file__).parent / "book"
NBVAL_DEFAULT_TIMEOUT = 2000.0  # seconds: what a dead kernel would cost
CELL_TIMEOUT = 300.0


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "with --nbval: only chapters whose results are not in the cache"
    parser.addoption("--unexecuted", action="store_true", help=about)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.nbval_cell_timeout == NBVAL_DEFAULT_TIMEOUT:
        config.option.nbval_cell_timeout = CELL_TIMEOUT
    if config.option.nbval and not hasattr(config, "workerinput"):
        executed.create()  # before the workers, which would both make its tables


def is_chapter(path: Path) -> bool:
    return path.suffix == ".md" and "jupytext:" in path.read_text(encoding="utf-8")[:200]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    option = parent.config.option
    if not option.nbval or file_path.parent != BOOK or not is_chapter(file_path):
        return None
    if option.unexecuted and executed.holds(file_path):
        return None
    return Chapter.from_parent(parent, path=file_path)


class Chapter(IPyNbFile):
    """A MyST Markdown notebook."""

    has_failed = False

    def collect(self):
        # nbval reads with nbformat; jupytext reads a chapter into the same structure.
        def read(path: str, as_version: int):
            return jupytext.read(path, fmt="md:myst", as_version=as_version)

        with mock.patch("nbval.plugin.nbformat.read", read):
            yield from super().collect()
        self.outputs: list[list] = []
        self.seconds = 0.0

    def teardown(self) -> None:
        super().teardown()
        cells = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        if not self.has_failed and len(self.outputs) == len(cells):  # all of them were chosen
            executed.keep(self.path, self.outputs, self.seconds)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if isinstance(item.parent, Chapter) and item.parent.has_failed:
        pytest.skip("an earlier cell of this chapter failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    chapter = item.parent
    if isinstance(chapter, Chapter):
        if report.failed:
            chapter.has_failed = True
        elif report.passed and report.when == "call":
            chapter.outputs.append(item.test_outputs)
            chapter.seconds += call.duration
    return report
