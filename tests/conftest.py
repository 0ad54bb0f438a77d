"""Shared by the unit tests: settings of the property tests, and a switch for the shape checks."""

from __future__ import annotations

import jaxtyping
import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

mpl.use("Agg")
# One thread: the tests run side by side, and spinning threads slow each other down.
torch.set_num_threads(1)

# The same examples every time, and no deadline on a shared machine.
settings.register_profile("wpo_notes", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("wpo_notes")


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Turn jaxtyping's checks off, so that a user's own error message is what a test sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
