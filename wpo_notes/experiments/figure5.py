"""Figure 5: the kernels' axes against the curve's tangent and the noise, also as the noise shrinks.

Chapter: *Figure 5* (``book/figure-5.md``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wpo_notes.datasets import Nearest, NoisyCurve
from wpo_notes.experiments import figure2
from wpo_notes.experiments.runs import Case, chosen
from wpo_notes.mixture import GaussianMixture

__all__ = ["LAWS", "Axes", "axes_along_curve", "cases", "normal_offset"]

LAWS = ("moons", "swissroll")


class Axes(NamedTuple):
    """Kernels of a planar mixture beside the curve, (N,) each."""

    angle: Tensor  # between the long axis and the tangent, degrees
    along: Tensor  # standard deviation along the tangent
    across: Tensor  # standard deviation along the normal
    offset: Tensor  # of the centre from the curve, along the normal, signed


def cases(scale: str, *, data: str | None = None, seed: int = 0) -> list[Case]:
    """The runs of Figure 2 on thin moons and the swissroll: Figure 5 looks into their models."""
    return [
        case
        for name in chosen(LAWS, data)
        for case in figure2.kernel_cases(scale, data=name, seed=seed)
    ]


def axes_along_curve(mixture: GaussianMixture, law: NoisyCurve) -> Axes:
    """Compare each kernel with the tangent at the point of the law's curve that is nearest to it."""
    nearest = law.nearest(mixture.centers)
    tril = mixture.precision_tril
    long_axis = torch.linalg.eigh(tril @ tril.mT).eigenvectors[:, :, 0]
    cosine = (long_axis * nearest.tangent).sum(-1).abs().clamp(max=1)

    def deviation(direction: Tensor) -> Tensor:
        # |L^-1 v|, the root of v' (L L')^-1 v
        root = torch.linalg.solve_triangular(tril, direction[..., None], upper=False)
        return root[..., 0].norm(dim=-1)

    return Axes(
        torch.rad2deg(cosine.acos()),
        deviation(nearest.tangent),
        deviation(_normal(nearest)),
        normal_offset(mixture.centers, law),
    )


def normal_offset(x: Tensor, law: NoisyCurve) -> Tensor:
    """Signed distance of the points x from the law's curve along its normal, (n, 2) -> (n,).

    For draws of the law it is about N(0, std²), up to the curvature of order std / radius.
    """
    nearest = law.nearest(x)
    return ((x - nearest.point) * _normal(nearest)).sum(-1)


def _normal(nearest: Nearest) -> Tensor:
    return torch.stack([-nearest.tangent[..., 1], nearest.tangent[..., 0]], -1)
