"""The paper's experiments: one module a figure, at two scales.

A module's ``cases(scale, ...)`` lists what it runs, each a `runs.Case` with all the settings that its
result depends on. The scale ``quick`` runs live in a chapter; ``paper`` has the paper's own settings, is run
by ``make paper`` and kept in ``book/results`` (`records.Record`).

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from types import ModuleType

from wpo_notes.experiments import (
    ablation,
    denoiser_memorises,
    digits,
    figure2,
    figure3,
    figure4,
    figure5,
    figure6,
    less_data,
    self_scoring,
)

__all__ = ["EXPERIMENTS", "SHORT"]

EXPERIMENTS: dict[str, ModuleType] = {
    "ablation": ablation,
    "denoiser_memorises": denoiser_memorises,
    "digits": digits,
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "less_data": less_data,
    "self_scoring": self_scoring,
}

# Their cases take seconds or a minute or two: `make paper` gives a process several, which then loads PyTorch once.
SHORT = frozenset({"ablation", "digits", "less_data"})
