"""Shared by the unit tests: settings of the property tests, and the checks of shapes with a switch for them."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

# Shapes and types are checked at each call of what is public, where they are promised, and of the experiments,
# which mypy leaves alone. Checking calls between private modules too, which promise no shapes and which mypy
# reads, would take most of the time that the tests take.
CHECKED = [
    f"wpo_notes.{path.stem}"
    for path in (Path(__file__).parents[1] / "wpo_notes").glob("[!_]*")
    if path.suffix == ".py" or path.name == "experiments"
]
jaxtyping.install_import_hook(CHECKED, "typechecking.check")

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
