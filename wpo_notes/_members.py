"""Members of a kernel model that are trained side by side, each on points of its own.

A step of a small mixture is mostly calls of functions: five members together take far less than five times as long as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wpo_notes._evaluation import evaluate
from wpo_notes._shapes import Int
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel

if TYPE_CHECKING:
    from wpo_notes.fit import Loss

__all__ = ["Members", "sorted_by"]


class Members(FreeKernelModel):
    """One model of all members, which start as the given mixtures: the trainable parameters of all, in their order."""

    def __init__(self, starts: Sequence[GaussianMixture]) -> None:
        super().__init__(
            GaussianMixture(
                torch.cat([start.centers for start in starts]),
                torch.cat([start.precision_tril for start in starts]),
                log_weights=torch.cat([start.log_weights for start in starts]),
            )
        )
        self._centers = [len(start.centers) for start in starts]
        self._points = [0] * len(starts)

    def at(self, member: Int[Tensor, " n"]) -> Members:
        """Say to which member each of the points belongs that the mixture is evaluated at next, in ascending order."""
        self._points = torch.bincount(member, minlength=len(self._centers)).tolist()
        return self

    def forward(self) -> GaussianMixture:
        """Mixture that is the first member at the points of the first, and so on."""
        return _SideBySide(self.pooled(), list(zip(self._centers, self._points, strict=True)))

    def pooled(self) -> GaussianMixture:
        """Mixture of the members with equal weights."""
        return super().forward()


class _SideBySide(GaussianMixture):
    """Numbers of centres and of points that follow each other: at its points a part is the mixture."""

    def __init__(self, pooled: GaussianMixture, parts: list[tuple[int, int]]) -> None:
        parameters = pooled.centers, pooled.precision_tril
        super().__init__(*parameters, log_weights=pooled.log_weights, validate_args=False)
        self.log_weights = self.log_weights + math.log(len(parts))  # those of a member sum to one
        self._parts = parts

    def _evaluate(
        self,
        x: Tensor,
        *,
        score: bool = False,
        laplacian: bool = False,
        exclude: Tensor | None = None,
    ) -> list[Tensor]:
        points = sum(points for _, points in self._parts)
        if exclude is not None or x.shape != (points, self.centers.shape[1]):
            raise ValueError(
                f"the loss must evaluate the mixture at points like those that it is given, ({points}, "
                f"{self.centers.shape[1]}), and without exclude; it did so at shape {tuple(x.shape)}"
            )
        return evaluate(self._parameters, x, score=score, laplacian=laplacian, parts=self._parts)

    def _exponents(
        self, x: Tensor, *, score: bool = False, laplacian: bool = False
    ) -> list[Tensor]:
        raise ValueError(
            "the loss must do without responsibilities: members have centres of their own"
        )

    def _like(self, *parameters: Tensor) -> GaussianMixture:
        return _SideBySide(super()._like(*parameters), self._parts)


def sorted_by(member: Int[Tensor, " n"], loss: Loss) -> Loss:
    """The loss, whose mean over points is the members' mean weighted by their shares, for points sorted by member."""

    def sorted_loss(
        members: nn.Module, x: Tensor, index: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        assert isinstance(members, Members)
        assert index is not None
        own, order = member[index].sort()
        return loss(members.at(own), x[order], None, generator)

    return sorted_loss
