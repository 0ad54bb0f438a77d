"""Leaves the tests of the site out of a plain `pytest`."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Collect only on demand (`make browser`): the built site is needed, which takes minutes to build."""
    return None if any("browser" in argument for argument in config.args) else True
