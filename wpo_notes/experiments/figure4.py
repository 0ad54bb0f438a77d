"""Figure 4: the swissroll in six dimensions, its pairwise marginals, and what sub-blocks would show.

Chapter: *Figures 3 and 4* (``book/figures-3-4.md``).
"""

from __future__ import annotations

from itertools import combinations

import torch

from wpo_notes.experiments import figure2
from wpo_notes.experiments.kernel import KernelRun
from wpo_notes.experiments.runs import Case
from wpo_notes.mixture import GaussianMixture

__all__ = ["PAIRS", "cases", "conditional_blocks"]

PAIRS = tuple(combinations(range(6), 2))
# Section 5.1: 1e6 training points, 5000 centres, six hidden layers, 1e5 steps of batch 64.
_SETTINGS = {
    "paper": {
        "n": 1_000_000,
        "centers": 5000,
        "steps": 100_000,
        "hidden": (64,) * 6,
        "record_every": 5000,
    },
    "quick": {
        "n": 20_000,
        "centers": 300,
        "steps": 400,
        "hidden": (64,) * 6,
        "record_every": 400,
        "measured": 1000,
    },
}


def cases(scale: str, *, seed: int = 0) -> list[Case]:
    """The runs, of the same kinds as Figure 2's."""
    return [
        Case(
            "figure4",
            figure2.kernel_name(mode, schedule, seed),
            KernelRun(
                data="swissroll6d", mode=mode, schedule=schedule, seed=seed, **_SETTINGS[scale]
            ),
        )
        for mode, schedule in figure2.KERNELS[scale]
    ]


def conditional_blocks(mixture: GaussianMixture, dims: tuple[int, int]) -> GaussianMixture:
    """What comes of taking sub-blocks of the precisions for those of a marginal.

    A sub-block of a precision is that of the kernel *given* its other coordinates: too narrow.
    """
    # The factor of rows rows' without the product, whose condition number would be the square of that of the rows.
    upper = torch.linalg.qr(mixture.precision_tril[:, dims].mT).R
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    tril = upper.mT * signs[:, None, :]
    return GaussianMixture(mixture.centers[:, dims], tril, log_weights=mixture.log_weights)
