"""Figure 6: early stopping, an isotropic kernel on every training point, against the kernel model.

Chapter: *Figure 6* (``book/figure-6.md``).
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from wpo_notes.experiments import figure2
from wpo_notes.experiments.runs import Case, chosen
from wpo_notes.mixture import GaussianMixture

__all__ = ["EPSILONS", "LAWS", "best_variance", "cases", "leave_one_out_variance"]

# The paper names neither the four data sets nor whether epsilon is a variance.
LAWS = ("moons", "swissroll", "pinwheel", "checkerboard")
EPSILONS = (0.05, 0.1, 0.2)


def cases(scale: str, *, data: str | None = None, seed: int = 0) -> list[Case]:
    """The runs of Figure 2 on the four laws, or on one of them: their models are the last row."""
    return [
        case
        for name in chosen(LAWS, data)
        for case in figure2.kernel_cases(scale, data=name, seed=seed)
    ]


def best_variance(centers: Tensor, points: Tensor) -> float:
    """Variance of the isotropic kernels on `centers` that makes `points` likeliest.

    With points that are evaluated on later it is an oracle's; with further training points, a validation's.
    """
    return _minimise(
        lambda variance: (
            -float(GaussianMixture.from_variance(centers, variance).log_prob(points).mean())
        ),
        centers,
    )


def leave_one_out_variance(x: Tensor) -> float:
    """Variance chosen by leave-one-out cross-validation of the likelihood, on x alone.

    .. math:: \\sum_i \\log \\tfrac1{n-1} \\sum_{j \\ne i} N(x_i; x_j, v I)
    """
    own = torch.arange(len(x), device=x.device)

    def objective(variance: float) -> float:
        # Not the density less the point's own kernel: far from the others the difference is rounding.
        [log_prob] = GaussianMixture.from_variance(x, variance)._evaluate(x, exclude=own)
        return -float(log_prob.double().mean())

    return _minimise(objective, x)


def _minimise(objective, x: Tensor) -> float:
    """Minimise over log variance, from far below the spacing of the points to the data's own."""
    high = math.log(float(x.var(0).sum()))
    found = minimize_scalar(
        lambda u: objective(math.exp(u)),
        bounds=(high - 16, high),
        method="bounded",
        options={"xatol": 1e-2},
    )
    return math.exp(found.x)
