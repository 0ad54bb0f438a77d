r"""Planar laws with exact densities: thin moons and the swissroll.

Both are a random point on a curve plus Gaussian noise, so that the density is an integral over the
curve's parameter,

.. math:: \pi(x) = \frac1K \sum_{k=1}^K \int_0^1 \mathcal N\bigl(x; c_k(u), \sigma^2 I\bigr) \,\d u ,

which `NoisyCurve` computes by quadrature in log space: the true score, divergence and likelihood of
every experiment of Section 5 can be compared with a model's.

Chapter: *Algorithm 1* (``book/algorithm.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wpo_notes._checks import checked_points, checked_positive, make_generator
from wpo_notes.metrics import Estimate

__all__ = ["NAMES", "NoisyCurve", "get"]

# This many exponents (points times quadrature nodes) are computed at a time: they stay in cache.
_BLOCK_ELEMENTS = 2**15
# Autograd keeps up to this many exponents and recomputes those of more.
_KEPT_ELEMENTS = 2**22


class NoisyCurve:
    r"""Law of :math:`c_k(u) + \sigma\varepsilon`, with k and u uniform and ε normal in the plane.

    Args:
        name: the law's name.
        curves: the K pieces c_k, each a function of u in [0, 1], (m,) -> (m, 2).
        std: the noise's standard deviation σ, in the data's units.
        panels: panels of the quadrature in u; a panel should be at most 4 σ long.
    """

    dim = 2

    def __init__(
        self,
        name: str,
        curves: Sequence[Callable[[Tensor], Tensor]],
        *,
        std: float,
        panels: int = 80,
    ) -> None:
        self.name = name
        self.curves = tuple(curves)
        self.std = checked_positive("std", std)
        self.panels = panels

    def __repr__(self) -> str:
        return f"NoisyCurve({self.name!r}, std={self.std:g})"

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Float[Tensor, "n 2"]:
        """Independent points, (n, 2).

        Args:
            n: how many, at least 1.
            generator: source of randomness; a fresh one if None.
            dtype: torch's default if None.
            device: the generator's if None, or torch's default without a generator.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if device is None:
            device = generator.device if generator is not None else torch.get_default_device()
        generator = make_generator(generator, device)
        options = {"generator": generator, "device": device}
        u = torch.rand(n, dtype=dtype, **options)
        piece = torch.randint(len(self.curves), (n,), **options)
        noise = torch.randn(n, 2, dtype=dtype, **options)
        points = torch.stack([curve(u) for curve in self.curves], 1)  # (n, K, 2)
        points = points.take_along_dim(piece[:, None, None], 1)[:, 0]
        return points + self.std * noise

    def log_prob(self, x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        r"""Log-density, (..., 2) -> (...), differentiable: autograd gives the exact score.

        Composite Gauss-Legendre quadrature over the curve's parameter, with panels that shrink
        geometrically towards the curve's ends, where the integrand has boundary layers. In float64
        the error is below 1e-6 within 10 units of the origin. In float32 rounding adds up to 3e-6
        times :math:`1 + |\log\pi|`.
        """
        x = checked_points("x", x, self.dim)
        log_weights, centers = (part.to(x.device, x.dtype) for part in self._quadrature)
        points = x.reshape(-1, self.dim)
        rows = max(1, _BLOCK_ELEMENTS // len(centers))
        recompute = points.requires_grad and len(points) * len(centers) > _KEPT_ELEMENTS
        blocks = [
            checkpoint(
                self._log_prob,
                block,
                centers,
                log_weights,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            if recompute
            else self._log_prob(block, centers, log_weights)
            for block in points.split(rows)
        ]
        return torch.cat(blocks).reshape(x.shape[:-1])

    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error.

        The mean over the noise is a product Gauss-Hermite rule, the one over the curve a graded
        Gauss-Legendre rule; the error is the difference from the rules of lower order.
        """
        coarse, fine = (self._entropy(order=order, noise_order=2 * order) for order in (4, 5))
        return Estimate(fine, abs(fine - coarse))

    def diffuse(self, variance: float) -> NoisyCurve:
        """Law of Y(s) when Y(0) has this law, eq. (17): variance β²s is added to the noise's."""
        checked_positive("variance", variance, zero=True)
        std = math.sqrt(self.std**2 + variance)
        return NoisyCurve(self.name, self.curves, std=std, panels=self.panels)

    def _log_prob(self, points: Tensor, centers: Tensor, log_weights: Tensor) -> Tensor:
        exponents, scale = log_weights, -0.5 / self.std**2
        for k in range(self.dim):
            # Differences, not the expanded square: that would cancel in float32.
            difference = points[:, None, k] - centers[None, :, k]  # (points, nodes)
            exponents = torch.addcmul(exponents, difference, difference, value=scale)
        constant = -self.dim * math.log(self.std * math.sqrt(2 * math.pi))
        return torch.logsumexp(exponents, 1) + constant

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the weights, (K nodes,), and points of the curve, (K nodes, 2)."""
        u, weights = _graded_rule(self.panels, order=16, levels=6)
        centers = torch.cat([curve(u) for curve in self.curves])
        return (weights / len(self.curves)).log().repeat(len(self.curves)), centers

    def _entropy(self, *, order: int, noise_order: int) -> float:
        u, weights = _graded_rule(8, order=order, levels=4)
        noise, noise_weights = (
            torch.as_tensor(part, device=u.device)
            for part in np.polynomial.hermite_e.hermegauss(noise_order)
        )
        noise_weights = noise_weights / noise_weights.sum()
        points = torch.cat([curve(u) for curve in self.curves])[:, None, :]
        grid = torch.cartesian_prod(noise, noise)
        log_prob = self.log_prob(points + self.std * grid)  # (K nodes, noise nodes)
        means = log_prob @ torch.outer(noise_weights, noise_weights).flatten()
        return -float(means @ weights.repeat(len(self.curves))) / len(self.curves)


def _graded_rule(panels: int, *, order: int, levels: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre rule on [0, 1]: equal panels, those at both ends graded down by 4**levels."""
    ends = np.concatenate([[0.0], 4.0 ** np.arange(-levels, 0)]) / panels
    edges = np.concatenate([ends, np.arange(1, panels) / panels, 1 - ends[::-1]])
    nodes, weights = np.polynomial.legendre.leggauss(order)
    width = np.diff(edges)[:, None]
    u = edges[:-1, None] + width * (nodes + 1) / 2
    # From NumPy, on the CPU whatever torch's default device is; moved to the points' device later.
    return torch.from_numpy(u.ravel()), torch.from_numpy((width * weights / 2).ravel())


def _moons() -> NoisyCurve:
    """scikit-learn's two half circles with noise 0.01, times 2, minus (1, 0.2)."""

    def outer(u: Tensor) -> Tensor:
        angle = math.pi * u
        return torch.stack([2 * angle.cos() - 1, 2 * angle.sin() - 0.2], -1)

    def inner(u: Tensor) -> Tensor:
        angle = math.pi * u
        return torch.stack([1 - 2 * angle.cos(), 0.8 - 2 * angle.sin()], -1)

    return NoisyCurve("moons", [outer, inner], std=0.02)


def _swissroll() -> NoisyCurve:
    """t = 1.5π (1 + 2u), (t cos t, t sin t) + N(0, 1), divided by 5."""

    def roll(u: Tensor) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * u)
        return torch.stack([t * t.cos(), t * t.sin()], -1) / 5

    return NoisyCurve("swissroll", [roll], std=0.2, panels=32)


_LAWS: dict[str, Callable[[], NoisyCurve]] = {"moons": _moons, "swissroll": _swissroll}
NAMES = tuple(_LAWS)


def get(name: str) -> NoisyCurve:
    """Return the law called `name`, one of `NAMES`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _LAWS:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    return _LAWS[name]()
