"""Figure 5: the kernels' axes against the curve's tangent and the noise, also as the noise shrinks.

Chapter: *Figure 5* (``book/figure-5.md``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wpo_notes.experiments import figure2
from wpo_notes.experiments.runs import Case
from wpo_notes.mixture import GaussianMixture

__all__ = ["Axes", "axes_along_curve", "cases"]


class Axes(NamedTuple):
    """Kernels of a planar mixture beside the curve, (N,) each."""

    angle: Tensor  # between the long axis and the tangent, degrees
    along: Tensor  # standard deviation along the tangent
    across: Tensor  # standard deviation along the normal
    offset: Tensor  # distance from the centre to the curve


def cases(scale: str, *, seed: int = 0) -> list[Case]:
    """The runs of Figure 2 on thin moons and the swissroll: Figure 5 looks into their models."""
    return [
        case
        for name in ("moons", "swissroll")
        for case in figure2.kernel_cases(scale, data=name, seed=seed)
    ]


def axes_along_curve(mixture: GaussianMixture, law) -> Axes:
    """Compare each kernel with the tangent at the point of the law's curve that is nearest to it."""
    nearest = law.nearest(mixture.centers)
    tangent = nearest.tangent
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], -1)
    covariance = torch.cholesky_inverse(mixture.precision_tril)
    long_axis = torch.linalg.eigh(covariance).eigenvectors[:, :, 1]
    cosine = (long_axis * tangent).sum(-1).abs().clamp(max=1)

    def deviation(direction: Tensor) -> Tensor:
        return torch.einsum("ni,nij,nj->n", direction, covariance, direction).sqrt()

    return Axes(
        torch.rad2deg(cosine.acos()),
        deviation(tangent),
        deviation(normal),
        (mixture.centers - nearest.point).norm(dim=-1),
    )
