r"""How far a model is from a law: Kullback-Leibler divergence and a two-sample test.

The divergence is the one that eq. (14) relates to cross-entropy and entropy,
:math:`\mathcal D_{KL}(\mu \| \pi) = -\mathcal E(\mu) + \mathcal H(\mu, \pi)`. Every estimate comes with
its standard error, every test with its p-value.

Chapter: *Algorithm 1* (``book/algorithm.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from wpo_notes._checks import checked_points, make_generator

__all__ = ["Estimate", "Law", "energy_test", "kl_divergence"]

# This many distances are computed at a time.
_BLOCK_ELEMENTS = 2**22


class Estimate(NamedTuple):
    """A number and its standard error (or, for quadrature, its error estimate)."""

    value: float
    error: float


@runtime_checkable
class Law(Protocol):
    """What a metric needs of a law: samples and the exact log-density (see `wpo_notes.datasets`)."""

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """N independent points, (n, d)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (..., d) -> (...)."""


@torch.no_grad()
def kl_divergence(
    law: Law,
    log_prob: Callable[[Tensor], Tensor],
    *,
    n: int,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Kullback-Leibler divergence of a model from a law, in nats, by Monte Carlo.

    .. math:: \mathcal D_{KL}(\pi \| \hat\pi) = \E_\pi[\log\pi(X) - \log\hat\pi(X)]
              \approx \frac1n \sum_{i=1}^n \bigl(\log\pi(X_i) - \log\hat\pi(X_i)\bigr),
              \qquad X_i \sim \pi .

    The estimate is infinite if the model's density is zero at one of the points.

    Args:
        law: the law :math:`\pi`.
        log_prob: the model's log-density, (n, d) -> (n,).
        n: number of points, at least 2.
        generator: source of randomness; a fresh one if None.

    Raises:
        ValueError: n below 2, or a log-density of the wrong shape or with a NaN.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard error, got {n}")
    x = law.sample(n, generator=generator)
    model = log_prob(x)
    if model.shape != (n,):
        raise ValueError(
            f"log_prob must map points {tuple(x.shape)} to values ({n},), got {tuple(model.shape)}"
        )
    if bool(model.isnan().any()):
        raise ValueError(
            f"log_prob must be a number, but {int(model.isnan().sum())} values are NaN"
        )
    difference = law.log_prob(x) - model
    return Estimate(float(difference.mean()), float(difference.std() / n**0.5))


@torch.no_grad()
def energy_test(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    permutations: int = 499,
    generator: torch.Generator | None = None,
) -> float:
    r"""p-value of the two-sample permutation test on the energy distance (Székely and Rizzo 2013).

    .. math:: \mathcal E(x, y) = \frac{2}{nm}\sum_{ij}|x_i - y_j| - \frac{1}{n^2}\sum_{ij}|x_i - x_j|
              - \frac{1}{m^2}\sum_{ij}|y_i - y_j| = -w^\top D w ,

    with D the distances of the pooled points and w = 1/n on x, -1/m on y. Under the null hypothesis
    that x and y have one law, permuting w changes nothing: with B permutations
    :math:`p = (1 + \#\{b : \mathcal E_b \ge \mathcal E\}) / (1 + B)` is at most a with probability at
    most a.

    Time grows as (n + m)² (B + d); memory as (n + m) B.

    Args:
        x: (n, d), the first sample.
        y: (m, d), the second.
        permutations: B.
        generator: source of randomness on the samples' device; a fresh one if None.

    Raises:
        ValueError: samples that are not matrices of equal width, empty, or not finite; B below 1.
    """
    checked_points("x", x)
    checked_points("y", y, x.shape[-1])
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} must be a matrix (n, d) with at least one point, got {tuple(value.shape)}"
            )
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    generator = make_generator(generator, x.device)
    # In double precision equal splits of the pooled points have equal statistics up to rounding.
    pooled = torch.cat([x, y]).double()
    count = len(pooled)
    weights = torch.cat(
        [pooled.new_full((len(x),), 1 / len(x)), pooled.new_full((len(y),), -1 / len(y))]
    )
    order = torch.rand(permutations, count, generator=generator, device=x.device).argsort(1)
    splits = torch.cat([weights[None], weights[order]]).mT.contiguous()  # (n + m, 1 + B)
    energy = pooled.new_zeros(1 + permutations)
    rows = max(1, _BLOCK_ELEMENTS // count)
    for block, block_splits in zip(pooled.split(rows), splits.split(rows), strict=True):
        distance = torch.cdist(block, pooled, compute_mode="donot_use_mm_for_euclid_dist")
        energy -= (block_splits * (distance @ splits)).sum(0)
    as_large = int((energy[1:] >= energy[0] - 1e-12 * energy[0].abs()).sum())
    return (1 + as_large) / (1 + permutations)
