r"""Nine laws with exact densities: the data sets of Section 5.

Each planar law is a mixture of K pieces of equal weight, so that the log-density, its gradient (the true
score) and the weight of each piece of a model can be compared with the truth. A piece is one of

- a random point on a curve, or at a centre, plus Gaussian noise (`NoisyCurve`, `NoisyArcs`, `NoisyPoints`);
- a random point of a square, that may move along a curve (`Checkerboard`, `TwoSpirals`);
- a normal law, bent (`Pinwheel`).

All is computed in float64, whatever the dtype of the points: a density this narrow needs it.

Chapter: *Algorithm 1* (``book/algorithm.md``).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wpo_notes._checks import checked_points, checked_positive, make_generator
from wpo_notes._shapes import Float, Int
from wpo_notes.metrics import Estimate

__all__ = [
    "NAMES",
    "PLANAR",
    "Arc",
    "Checkerboard",
    "Marginal",
    "Nearest",
    "NoisyArcs",
    "NoisyCurve",
    "NoisyPoints",
    "Pinwheel",
    "PlanarLaw",
    "Swissroll6d",
    "TwoSpirals",
    "get",
    "moons",
]

# This many exponents (points times quadrature nodes) are computed at a time: they stay in cache.
_BLOCK_ELEMENTS = 2**15
# Autograd keeps up to this many exponents and recomputes those of more.
_KEPT_ELEMENTS = 2**22
# Quadrature leaves out what is smaller than exp(-25) of the integrand's maximum.
_CUTOFF = 25.0


class Nearest(NamedTuple):
    """Where the noiseless curves come nearest to each point."""

    point: Float[Tensor, "*batch 2"]  #: of a curve
    tangent: Float[Tensor, "*batch 2"]  #: there, of length one
    piece: Int[Tensor, "*batch"]  #: number of the curve


class _Random(NamedTuple):
    """A source of randomness with the dtype and device of what it draws."""

    generator: torch.Generator
    dtype: torch.dtype | None
    device: torch.device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, **self._asdict())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, **self._asdict())

    def pieces(self, count: int, n: int) -> Tensor:
        return torch.randint(count, (n,), generator=self.generator, device=self.device)


class _Law(ABC):
    """What all laws share: drawing with a generator, and evaluating block by block in float64."""

    name: str
    dim: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Float[Tensor, "n d"]:
        """Independent points, (n, d).

        Args:
            n: how many, at least 1.
            generator: source of randomness; a fresh one if None.
            dtype: torch's default if None.
            device: the generator's if None, or torch's default without a generator.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if device is None:
            device = generator.device if generator is not None else torch.get_default_device()
        return self._draw(n, _Random(make_generator(generator, device), dtype, device))

    @abstractmethod
    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-density, (..., d) -> (...), differentiable: autograd gives the exact score."""

    @abstractmethod
    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error."""

    @abstractmethod
    def _draw(self, n: int, random: _Random) -> Tensor: ...


class PlanarLaw(_Law):
    """Mixture of K pieces with equal weights; subclasses give `_draw` and `_component_log_prob`.

    The log-density is right to 1e-6 within 10 units of the origin.
    """

    dim = 2
    pieces: int

    # Exponents that one point needs.
    @property
    @abstractmethod
    def _nodes(self) -> int: ...

    @property
    def weights(self) -> Float[Tensor, " K"]:
        """Probability of each piece, (K,), in float64 on the CPU."""
        return torch.full((self.pieces,), 1 / self.pieces, dtype=torch.float64, device="cpu")

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-density, (..., d) -> (...), differentiable: autograd gives the exact score."""
        log_prob = torch.logsumexp(self._evaluate(x), -1) - math.log(self.pieces)
        return log_prob.to(x.dtype)

    def component_log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch K"]:
        """Log-density of each piece, of mass one, (..., d) -> (..., K)."""
        return self._evaluate(x).to(x.dtype)

    def _evaluate(self, x: Tensor) -> Tensor:
        x = checked_points("x", x, self.dim)
        points = x.reshape(-1, self.dim).double()
        rows = max(1, _BLOCK_ELEMENTS // self._nodes)
        recompute = points.requires_grad and len(points) * self._nodes > _KEPT_ELEMENTS
        blocks = [
            checkpoint(
                self._component_log_prob, block, use_reentrant=False, preserve_rng_state=False
            )
            if recompute
            else self._component_log_prob(block)
            for block in points.split(rows)
        ]
        return torch.cat(blocks).reshape(*x.shape[:-1], self.pieces)

    @abstractmethod
    def _component_log_prob(self, points: Tensor) -> Tensor:
        """Log-density of each piece in float64, (n, d) -> (n, K)."""

    def _grid_entropy(self, extent: float, step: float) -> Estimate:
        """Trapezoidal rule for the plane; the error is the difference from twice the step.

        For a smooth density the rule converges faster than any power of the step.
        """
        count = math.ceil(extent / step)
        axis = step * torch.arange(-count, count + 1, dtype=torch.float64, device="cpu")
        log_prob = self.log_prob(torch.cartesian_prod(axis, axis))
        # x log x = 0 at 0; where the exponential underflows, nothing is lost.
        values = -torch.special.xlogy(log_prob.exp(), log_prob.exp()).reshape(2 * (len(axis),))
        fine, coarse = (float(values[::k, ::k].sum()) * (k * step) ** 2 for k in (1, 2))
        return Estimate(fine, abs(fine - coarse))


class NoisyCurve(PlanarLaw):
    r"""Law of :math:`c_k(u) + \sigma\varepsilon`, with k and u uniform and ε normal.

    .. math:: \pi(x) = \frac1K \sum_{k=1}^K \int_0^1 \mathcal N\bigl(x; c_k(u), \sigma^2 I\bigr) \,\d u

    by composite Gauss-Legendre quadrature in log space, with panels that shrink geometrically towards
    the curve's ends, where the integrand has boundary layers.

    Args:
        name: the law's name.
        curves: the K pieces c_k, each a function of u in [0, 1], (m,) -> (m, d).
        std: the noise's standard deviation σ, in the data's units.
        panels: panels of the quadrature in u; a panel should be at most 4 σ long.
        dim: the dimension d.
    """

    def __init__(
        self,
        name: str,
        curves: Sequence[Callable[[Tensor], Tensor]],
        *,
        std: float,
        panels: int = 80,
        dim: int = 2,
    ) -> None:
        self.name = name
        self.curves = tuple(curves)
        self.pieces = len(self.curves)
        self.std = checked_positive("std", std)
        self.panels = panels
        self.dim = dim

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, std={self.std:g})"

    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error.

        The mean over the noise is a product Gauss-Hermite rule, the one over the curve a graded
        Gauss-Legendre rule; the error is the difference from the rules of lower order.
        """
        coarse, fine = (self._entropy(order=order, noise_order=2 * order) for order in (4, 5))
        return Estimate(fine, abs(fine - coarse))

    def diffuse(self, variance: float) -> NoisyCurve:
        """Law of Y(s) when Y(0) has this law, eq. (17): variance β²s is added to the noise's."""
        return _diffused(self, variance)

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "*batch d"]) -> Nearest:
        """Nearest point of the noiseless curves, the unit tangent there, and the piece it is on.

        The nearest of 1000 points of each curve starts Newton's method.
        """
        x = checked_points("x", x, self.dim)
        points = x.reshape(-1, self.dim).double()
        u = torch.linspace(0, 1, 1000, dtype=points.dtype, device=points.device)
        distances, candidates = [], []
        for curve in self.curves:
            start = u[torch.cdist(points, curve(u)).argmin(1)]
            point, tangent = _closest(curve, points, start)
            distances.append((points - point).norm(dim=1))
            candidates.append(torch.stack([point, tangent]))
        piece = torch.stack(distances).argmin(0)
        point, tangent = torch.stack(candidates, 2)[
            :, torch.arange(len(piece), device=x.device), piece
        ]
        return Nearest(
            point.reshape(x.shape).to(x.dtype),
            tangent.reshape(x.shape).to(x.dtype),
            piece.reshape(x.shape[:-1]),
        )

    def _draw(self, n: int, random: _Random) -> Tensor:
        u, piece, noise = (
            random.uniform(n),
            random.pieces(self.pieces, n),
            random.normal(n, self.dim),
        )
        points = torch.stack([curve(u) for curve in self.curves], 1)  # (n, K, d)
        return points.take_along_dim(piece[:, None, None], 1)[:, 0] + self.std * noise

    @property
    def _nodes(self) -> int:
        return self.pieces * len(self._quadrature[0])

    @cached_property
    def _quadrature(self) -> tuple[Tensor, list[Tensor]]:
        """Logarithms of the weights, (nodes,), and each curve's points, K times (nodes, d)."""
        u, weights = _graded_rule(self.panels, order=16, levels=6)
        return weights.log(), [curve(u) for curve in self.curves]

    def _component_log_prob(self, points: Tensor) -> Tensor:
        log_weights, curves = self._quadrature
        log_weights = log_weights.to(points.device)
        return torch.stack(
            [
                _log_mean_normal(points, centers.to(points.device), log_weights, self.std)
                for centers in curves
            ],
            1,
        )

    def _entropy(self, *, order: int, noise_order: int) -> float:
        u, weights = _graded_rule(8, order=order, levels=4)
        noise, noise_weights = (
            torch.as_tensor(part, device=u.device)
            for part in np.polynomial.hermite_e.hermegauss(noise_order)
        )
        noise_weights = noise_weights / noise_weights.sum()
        points = torch.cat([curve(u) for curve in self.curves])[:, None, :]
        grid = torch.cartesian_prod(*[noise] * self.dim).reshape(-1, self.dim)
        grid_weights = torch.cartesian_prod(*[noise_weights] * self.dim).reshape(-1, self.dim)
        log_prob = self.log_prob(points + self.std * grid)  # (K nodes, noise nodes)
        means = log_prob @ grid_weights.prod(1)
        return -float(means @ weights.repeat(self.pieces)) / self.pieces


_Noisy = TypeVar("_Noisy", "NoisyCurve", "NoisyPoints")


def _diffused(law: _Noisy, variance: float) -> _Noisy:
    """A copy of the law with the variance added to its noise's."""
    checked_positive("variance", variance, zero=True)
    diffused = copy.copy(law)
    diffused.std = math.sqrt(law.std**2 + variance)
    return diffused


def _graded_rule(panels: int, *, order: int, levels: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre rule on [0, 1]: equal panels, those at both ends graded down by 4**levels."""
    ends = np.concatenate([[0.0], 4.0 ** np.arange(-levels, 0)]) / panels
    edges = np.concatenate([ends, np.arange(1, panels) / panels, 1 - ends[::-1]])
    nodes, weights = np.polynomial.legendre.leggauss(order)
    width = np.diff(edges)[:, None]
    u = edges[:-1, None] + width * (nodes + 1) / 2
    # From NumPy, on the CPU whatever torch's default device is; moved to the points' device later.
    return torch.from_numpy(u.ravel()), torch.from_numpy((width * weights / 2).ravel())


def _log_mean_normal(points: Tensor, centers: Tensor, log_weights: Tensor, std: float) -> Tensor:
    """Log of the weighted mean of N(x; c, std² I) over nodes c, shared or each point's own."""
    exponents, scale = log_weights, -0.5 / std**2
    for k in range(points.shape[1]):
        # Differences, not the expanded square, which cancels.
        difference = points[:, None, k] - centers[..., k]  # (points, nodes)
        exponents = torch.addcmul(exponents, difference, difference, value=scale)
    constant = -points.shape[1] * math.log(std * math.sqrt(2 * math.pi))
    return torch.logsumexp(exponents, 1) + constant


def _closest(curve: Callable[[Tensor], Tensor], points: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The curve's point and unit tangent where (c(u) - x) c'(u) = 0, or at an end, from u near it."""
    one = torch.ones_like(u)

    def velocity(u: Tensor) -> Tensor:
        return torch.func.jvp(curve, (u,), (one,))[1]

    for _ in range(4):
        tangent, bend = torch.func.jvp(velocity, (u,), (one,))  # type: ignore[misc]
        offset = curve(u) - points
        slope = (tangent.square() + offset * bend).sum(1)
        u = (u - (offset * tangent).sum(1) / slope).clamp(0, 1)
    tangent = velocity(u)
    return curve(u), tangent / tangent.norm(dim=1, keepdim=True)


class Arc(NamedTuple):
    """A circle about `center`, or its upper half; with a negative radius, the half is the lower one."""

    center: tuple[float, float]
    radius: float
    half: bool = False

    def __call__(self, u: Tensor) -> Tensor:
        """Points at the fractions u of the arc, (m,) -> (m, 2)."""
        angle = (math.pi if self.half else 2 * math.pi) * u
        x, y = self.center
        return torch.stack([x + self.radius * angle.cos(), y + self.radius * angle.sin()], -1)


class NoisyArcs(NoisyCurve):
    r"""Uniform points on circles and half circles plus Gaussian noise.

    At the distance r from the centre of a circle of radius R, with :math:`\kappa = r R / \sigma^2`,

    .. math:: \pi(x) = \frac1{2\pi\sigma^2} e^{-(r^2 + R^2) / 2\sigma^2} I_0(\kappa) .

    On a half circle the angle's integral is truncated; there Gauss-Legendre rules follow each
    point: one on either side of the integrand's maximum (or minimum, if that is nearer).

    Args:
        name: the law's name.
        arcs: the pieces.
        std: the noise's standard deviation σ, in the data's units.
    """

    curves: tuple[Arc, ...]  # type: ignore[assignment]  # an arc can be called

    def __init__(self, name: str, arcs: Sequence[Arc], *, std: float) -> None:
        super().__init__(name, arcs, std=std)  # type: ignore[arg-type]

    @property
    def _nodes(self) -> int:
        return 2 * _ARC_NODES * self.pieces

    def _component_log_prob(self, points: Tensor) -> Tensor:
        return torch.stack([self._arc_log_prob(points, arc) for arc in self.curves], 1)

    def _arc_log_prob(self, points: Tensor, arc: Arc) -> Tensor:
        offset = points - _vector(arc.center, points)
        if arc.half:
            log_weights, centers = _half_circle_rule(offset.detach(), arc.radius, self.std)
            return _log_mean_normal(offset, centers, log_weights, self.std)
        r = offset.norm(dim=1)
        # i0e(z) = exp(-z) I0(z), so that the exponents complete the square.
        bessel = torch.special.i0e(r * arc.radius / self.std**2).log()
        radial = -0.5 * ((r - arc.radius) / self.std) ** 2
        return radial + bessel - math.log(2 * math.pi * self.std**2)


_ARC_NODES = 20


def _half_circle_rule(x: Tensor, radius: float, std: float) -> tuple[Tensor, Tensor]:
    """Nodes on the half circle for each of the points x, and logarithms of their weights.

    The integrand exp(κ cos s), s the angle between node and point, falls with \\|s\\| until the antipode. So
    the half circle is cut at s = 0 or at the antipode; each part starts where the integrand is largest
    and stops at its end or where the integrand has fallen below the cutoff.
    """
    side = torch.where(x[:, 0] < 0, -1.0, 1.0)  # mirrored, so that the point is on the right
    upwards = radius * x[:, 1]
    off_axis = torch.atan2(abs(radius) * x[:, 0].abs(), upwards)  # from the half circle's middle
    quarter = math.pi / 2
    inside = off_axis < quarter
    starts = torch.stack(
        [(off_axis - quarter).clamp(min=0), torch.where(inside, 0.0, 3 * quarter - off_axis)], 1
    )
    stops = torch.stack(
        [
            (off_axis + quarter).clamp(max=math.pi),
            torch.where(inside, quarter - off_axis, math.pi),
        ],
        1,
    )
    kappa = x.norm(dim=1, keepdim=True) * abs(radius) / std**2
    cutoff = (starts.cos() - _CUTOFF / kappa).clamp(min=-1).acos()
    length = (torch.minimum(stops, cutoff) - starts).clamp(min=torch.finfo(x.dtype).tiny)
    nodes, weights = (
        torch.from_numpy(a).to(x.device) for a in np.polynomial.legendre.leggauss(_ARC_NODES)
    )
    s = starts[..., None] + length[..., None] * (nodes + 1) / 2  # (points, parts, nodes)
    direction = _vector([1.0, -1.0], x)[:, None]
    angle = (quarter - off_axis)[:, None, None] + direction * s
    log_weights = (length[..., None] * weights / (2 * math.pi)).log()
    centers = torch.stack(
        [side[:, None, None] * abs(radius) * angle.cos(), radius * angle.sin()], -1
    )
    return log_weights.flatten(1), centers.flatten(1, 2)


def _vector(values: Sequence[Any], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


class NoisyPoints(PlanarLaw):
    """One of K centres, plus Gaussian noise.

    Args:
        name: the law's name.
        centers: (K, 2).
        std: the noise's standard deviation, in the data's units.
    """

    def __init__(self, name: str, centers: Float[Tensor, "K 2"], *, std: float) -> None:
        self.name = name
        self.centers = centers.double()
        self.pieces = len(centers)
        self.std = checked_positive("std", std)

    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error."""
        return self._grid_entropy(float(self.centers.abs().max()) + 8 * self.std, self.std / 3)

    def diffuse(self, variance: float) -> NoisyPoints:
        """Law of Y(s) when Y(0) has this law, eq. (17): variance β²s is added to the noise's."""
        return _diffused(self, variance)

    @property
    def _nodes(self) -> int:
        return self.pieces

    def _draw(self, n: int, random: _Random) -> Tensor:
        piece, noise = random.pieces(self.pieces, n), random.normal(n, 2)
        return self.centers.to(noise)[piece] + self.std * noise

    def _component_log_prob(self, points: Tensor) -> Tensor:
        square = (points[:, None] - self.centers.to(points)).square().sum(-1)
        return -0.5 * square / self.std**2 - math.log(2 * math.pi * self.std**2)


def _log_blurred_box(offset: Tensor, width: float, std: float) -> Tensor:
    """Log-density of U + std ε at c + offset, (..., 2) -> (...), with U uniform on the square about c."""
    # By symmetry at the positive offsets, where both tails are upper ones and nothing cancels.
    near, far = ((offset.abs() + sign * width / 2) / std for sign in (-1, 1))
    upper, lower = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
    return (upper + torch.log1p(-(lower - upper).exp())).sum(-1) - 2 * math.log(width)


class TwoSpirals(PlanarLaw):
    r"""n = 3π√u; (-n cos n + u'/2, n sin n + u''/2) and its mirror image, / 3, plus N(0, 0.1²).

    The integral over u' and u'' is a product of differences of normal distribution functions; that over
    √u is a composite Gauss-Legendre rule, of which each point uses the panels that are nearest to it.
    """

    name = "2spirals"
    pieces = 2
    _width = 1 / 6
    _panels = 80
    _used = 16
    _nodes = 2 * 16 * 8

    def __init__(self) -> None:
        self.std = 0.1

    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error."""
        return self._grid_entropy(math.pi + self._width + 8 * self.std, self.std / 2)

    def _draw(self, n: int, random: _Random) -> Tensor:
        center = self._center(random.uniform(n).sqrt())
        box = self._width * (random.uniform(n, 2) - 0.5)
        sign = 1 - 2 * random.pieces(2, n)[:, None]
        return sign * (center + box) + self.std * random.normal(n, 2)

    def _center(self, v: Tensor) -> Tensor:
        """Centre of the square at n = 3πv, (m,) -> (m, 2)."""
        n = 3 * math.pi * v
        return torch.stack([-n * n.cos(), n * n.sin()], -1) / 3 + self._width / 2

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each panel, its middle, its nodes and the logarithms of their weights."""
        # Panels of about equal length along the spiral, those at its end graded down.
        squares = np.arange(self._panels) / self._panels
        last = 1 - 4.0 ** np.arange(-1, -4, -1) / self._panels
        edges = np.sqrt(np.concatenate([squares, last, [1.0]]))
        nodes, weights = np.polynomial.legendre.leggauss(8)
        width = np.diff(edges)[:, None]
        v = torch.from_numpy(edges[:-1, None] + width * (nodes + 1) / 2)
        # u = v², so du = 2v dv.
        log_weights = (torch.from_numpy(width * weights) * v).log()
        middles = self._center(torch.from_numpy((edges[1:] + edges[:-1]) / 2))
        return middles, self._center(v), log_weights

    def _component_log_prob(self, points: Tensor) -> Tensor:
        middles, nodes, log_weights = (part.to(points.device) for part in self._quadrature)
        points = torch.cat([points, -points])  # the mirror image at x is the first spiral at -x
        beyond = ((points.detach()[:, None] - middles).abs() - self._width / 2).clamp(min=0)
        panel = beyond.square().sum(-1).topk(self._used, largest=False, sorted=False).indices
        offset = points[:, None, None] - nodes[panel]  # (points, panels, nodes, 2)
        exponents = _log_blurred_box(offset, self._width, self.std) + log_weights[panel]
        return torch.logsumexp(exponents.flatten(1), 1).reshape(2, -1).T


class Checkerboard(PlanarLaw):
    """Uniform on the cells of [-4, 4]² whose row and column add up to an even number: 8 squares of side 2.

    As in FFJORD's toy data, the lower left cell is one of them. Cells are closed, so that rounding does not
    take a sample out of them.
    """

    name = "checkerboard"
    pieces = 8
    _nodes = 16

    def __init__(self) -> None:
        self.centers = torch.tensor(
            [
                [2 * i + 1, 2 * j + 1]
                for i in range(-2, 2)
                for j in range(-2, 2)
                if (i + j) % 2 == 0
            ],
            dtype=torch.float64,
            device="cpu",
        )

    def entropy(self) -> Estimate:
        """The logarithm of the area, 32."""
        return Estimate(math.log(32), 0.0)

    def _draw(self, n: int, random: _Random) -> Tensor:
        piece, within = random.pieces(8, n), 2 * random.uniform(n, 2) - 1
        return self.centers.to(within)[piece] + within

    def _component_log_prob(self, points: Tensor) -> Tensor:
        outside = (points[:, None] - self.centers.to(points)).abs().amax(-1) > 1
        inside = points.sum(1, keepdim=True) * 0 - math.log(4)  # of gradient zero
        return inside.masked_fill(outside, -math.inf)


class Pinwheel(PlanarLaw):
    r"""Five arms: a ~ N(1, 0.3²) along and t ~ N(0, 0.1²) across, rotated anticlockwise, times 2.

    .. math:: x = 2 R\bigl(\tfrac{2\pi k}5 + \theta(a)\bigr) (a, t)^\top, \qquad \theta(a) = \tfrac14 e^a

    has the Jacobian determinant :math:`4 (1 - \theta'(a)\, t)`. It vanishes on a fold, so that the density
    is the sum over all preimages. At :math:`r = |x|/2` they are :math:`(a, t) = r (\cos\varphi, \sin\varphi)` with

    .. math:: H(\varphi) = \varphi + \theta(r \cos\varphi) = \arg x - \tfrac{2\pi k}5 \pmod{2\pi} .

    H has at most three monotone branches, with one root for each multiple of 2π that they cross.
    """

    name = "pinwheel"
    pieces = 5
    _nodes = 32

    def entropy(self) -> Estimate:
        r"""Differential entropy :math:`-\E[\log\pi]` in nats, with the quadrature's error."""
        return self._grid_entropy(5.5, 0.05)

    def _draw(self, n: int, random: _Random) -> Tensor:
        arm, features = random.pieces(5, n), random.normal(n, 2)
        a, t = 1 + 0.3 * features[:, 0], 0.1 * features[:, 1]
        return 2 * _rotated(torch.stack([a, t], -1), 2 * math.pi / 5 * arm + a.exp() / 4)

    def _component_log_prob(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            row, arm, feature = self._preimages(points / 2)
        target = _rotated(points[row] / 2, -2 * math.pi / 5 * arm)
        a, t = feature.unbind(-1)
        # Newton's method, which also carries first and second derivatives with respect to the points.
        for _ in range(2):
            twist = a.exp() / 4  # θ and θ'
            residual = _rotated(target, -twist) - torch.stack([a, t], -1)
            along = residual[:, 0] / (1 - twist * t)
            a, t = a + along, t + residual[:, 1] - twist * a * along
        log_normal = -0.5 * (((a - 1) / 0.3) ** 2 + (t / 0.1) ** 2) - math.log(2 * math.pi * 0.03)
        log_density = log_normal - (4 * (1 - a.exp() / 4 * t).abs()).log()
        return _logsumexp_by_index(log_density, 5 * row + arm, 5 * len(points)).reshape(-1, 5)

    def _preimages(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All relevant (a, t) of the points, as a list: the point's index, the arm's, and (a, t)."""
        r, direction = z.norm(dim=1), torch.atan2(z[:, 1], z[:, 0])

        def slope(phi: Tensor) -> Tensor:
            return 1 - r * phi.sin() * (r * phi.cos()).exp() / 4

        # H falls between the two zeros of its slope, on either side of the slope's minimum, if any.
        steepest = (2 * r / (1 + (1 + 4 * r**2).sqrt())).acos()
        zero, pi = torch.zeros_like(r), torch.full_like(r, math.pi)
        fold = _bisect(lambda phi: -slope(phi), zero, steepest)
        unfold = _bisect(slope, steepest, pi)
        knots = torch.stack([-pi, zero, fold, unfold, pi], 1)
        turns = (knots + (r[:, None] * knots.cos()).exp() / 4)[:, None]  # (points, 1, knots)
        arms = torch.arange(5, device=z.device)
        base = direction[:, None] - 2 * math.pi / 5 * arms  # (points, arms)
        turns = (turns - base[..., None]) / (2 * math.pi)
        turns[..., 0] = turns[..., 4] - 1  # once around: without the rounding error
        low = torch.minimum(turns[..., :-1], turns[..., 1:])
        high = torch.maximum(turns[..., :-1], turns[..., 1:])
        # Up to three roots a branch: further ones are at larger |t|, and negligible within |x| < 14.
        root = high.floor()[..., None] - torch.arange(
            3, device=z.device
        )  # (points, arms, branches, 3)
        row, arm, branch, which = (root > low[..., None]).nonzero(as_tuple=True)
        level = base[row, arm] + 2 * math.pi * root[row, arm, branch, which]
        sign = 1 - 2 * (branch == 2).to(z.dtype)
        radius = r[row]
        phi = _bisect(
            lambda phi: sign * (phi + (radius * phi.cos()).exp() / 4 - level),
            knots[row, branch],
            knots[row, branch + 1],
        )
        return row, arm, radius[:, None] * torch.stack([phi.cos(), phi.sin()], -1)


def _bisect(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where an increasing function changes sign; at an end, if it does not."""
    for _ in range(52):
        middle = (low + high) / 2
        positive = function(middle) > 0
        low, high = torch.where(positive, low, middle), torch.where(positive, middle, high)
    return (low + high) / 2


def _rotated(z: Tensor, angle: Tensor) -> Tensor:
    cosine, sine = angle.cos(), angle.sin()
    x, y = z.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)


def _logsumexp_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Logarithms of the sums of exp(values) that share an index, (m,) -> (count,)."""
    empty = values.new_full((count,), -math.inf)
    top = empty.scatter_reduce(0, index, values.detach(), "amax")
    return torch.zeros_like(top).index_add(0, index, (values - top[index]).exp()).log() + top


class Swissroll6d(_Law):
    """(a, b) on the planar swissroll; (a, b, 2a + 0.1 n₁, a + b + 0.1 n₂, a - 2b + 0.1 n₃, n₄)."""

    name = "swissroll6d"
    dim = 6
    # The other four coordinates, given (a, b), are normal with these means and deviations.
    _rows = ((2.0, 0.0), (1.0, 1.0), (1.0, -2.0), (0.0, 0.0))
    _stds = (0.1, 0.1, 0.1, 1.0)

    def __init__(self) -> None:
        self.planar = _swissroll()

    def log_prob(self, x: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch"]:
        """Log-density, (..., 6) -> (...), differentiable: autograd gives the exact score."""
        y = checked_points("x", x, self.dim).double()
        stds = _vector(self._stds, y)
        noise = (y[..., 2:] - y[..., :2] @ _vector(self._rows, y).T) / stds
        log_normal = -0.5 * noise.square() - (stds * math.sqrt(2 * math.pi)).log()
        return (self.planar.log_prob(y[..., :2]) + log_normal.sum(-1)).to(x.dtype)

    def entropy(self) -> Estimate:
        """Entropy of the planar swissroll plus that of four normal variables."""
        planar = self.planar.entropy()
        normal = sum(math.log(std) + 0.5 * math.log(2 * math.pi * math.e) for std in self._stds)
        return Estimate(planar.value + normal, planar.error)

    def marginal(self, dims: Sequence[int]) -> Marginal:
        """Exact law of the coordinates `dims`, in their order.

        Raises:
            ValueError: coordinates that are repeated, or not from 0 to 5.
        """
        dims = tuple(int(k) for k in dims)
        if not dims or len(set(dims)) < len(dims) or not all(0 <= k < self.dim for k in dims):
            raise ValueError(f"dims must be distinct coordinates from 0 to 5, got {dims}")
        return Marginal(self, dims)

    def _draw(self, n: int, random: _Random) -> Tensor:
        planar = self.planar._draw(n, random)
        noise = random.normal(n, 4) * _vector(self._stds, planar)
        return torch.cat([planar, planar @ _vector(self._rows, planar).T + noise], 1)


class Marginal(_Law):
    r"""Some coordinates of the swissroll in six dimensions.

    Given the curve's parameter u they are normal, with mean :math:`A c(u)` and one covariance
    :math:`\Sigma = L L^\top`, so that :math:`L^{-1} x` is a `NoisyCurve` with noise N(0, I).
    """

    def __init__(self, joint: Swissroll6d, dims: tuple[int, ...]) -> None:
        self.joint, self.dims = joint, dims
        self.name = f"{joint.name}{list(dims)}"
        self.dim = len(dims)
        planar = joint.planar
        identity = torch.eye(2, dtype=torch.float64, device="cpu")
        rows = torch.cat([identity, _vector(joint._rows, identity)])
        own = torch.cat([_vector([0.0, 0.0], rows), _vector(joint._stds, rows).square()])
        covariance = planar.std**2 * rows @ rows.T + torch.diag(own)
        rows, covariance = rows[list(dims)], covariance[list(dims)][:, list(dims)]
        self._tril = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve_triangular(self._tril, rows, upper=False)

        def curve(u: Tensor) -> Tensor:
            return planar.curves[0](u) @ whitened.T

        self._whitened = NoisyCurve(self.name, [curve], std=1.0, panels=planar.panels, dim=self.dim)

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-density, (..., d) -> (...), differentiable: autograd gives the exact score."""
        y = checked_points("x", x, self.dim).double()
        tril = self._tril.to(y)
        white = torch.linalg.solve_triangular(tril, y.reshape(-1, self.dim).T, upper=False).T
        log_prob = self._whitened.log_prob(white) - tril.logdet()
        return log_prob.reshape(x.shape[:-1]).to(x.dtype)

    def entropy(self) -> Estimate:
        r"""Differential entropy in nats, with the quadrature's error; cheap for one or two coordinates."""
        white = self._whitened.entropy()
        return Estimate(white.value + float(self._tril.logdet()), white.error)

    def _draw(self, n: int, random: _Random) -> Tensor:
        return self.joint._draw(n, random)[:, list(self.dims)]


def _swissroll() -> NoisyCurve:
    """t = 1.5π (1 + 2u), (t cos t, t sin t) + N(0, 1), divided by 5."""

    def roll(u: Tensor) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * u)
        return torch.stack([t * t.cos(), t * t.sin()], -1) / 5

    return NoisyCurve("swissroll", [roll], std=0.2, panels=32)


def _eight_gaussians() -> NoisyPoints:
    """Centres at radius 4 on the octagon, standard deviation 0.5, divided by √2."""
    angle = torch.arange(8, dtype=torch.float64, device="cpu") * math.pi / 4
    centers = 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    return NoisyPoints("8gaussians", centers, std=0.5 / math.sqrt(2))


def moons(noise: float = 0.01) -> NoisyArcs:
    """scikit-learn's two half circles with this noise, times 2, minus (1, 0.2).

    Args:
        noise: its standard deviation before the scaling; the paper's *thin* moons have 0.01.

    Raises:
        ValueError: noise that is not positive.
    """
    arcs = [Arc((-1, -0.2), 2, half=True), Arc((1, 0.8), -2, half=True)]
    return NoisyArcs("moons", arcs, std=2 * checked_positive("noise", noise))


def _circles() -> NoisyArcs:
    """Radii 1 and 0.5 with noise 0.08, times 3."""
    return NoisyArcs("circles", [Arc((0, 0), 3), Arc((0, 0), 1.5)], std=0.24)


def _rings() -> NoisyArcs:
    """Radii 1, 0.75, 0.5 and 0.25 times 3, plus N(0, 0.08²)."""
    return NoisyArcs("rings", [Arc((0, 0), 3 * r) for r in (1, 0.75, 0.5, 0.25)], std=0.08)


_LAWS: dict[str, Callable[[], PlanarLaw | Swissroll6d]] = {
    "swissroll": _swissroll,
    "8gaussians": _eight_gaussians,
    "pinwheel": Pinwheel,
    "circles": _circles,
    "moons": moons,
    "2spirals": TwoSpirals,
    "checkerboard": Checkerboard,
    "rings": _rings,
    "swissroll6d": Swissroll6d,
}
NAMES = tuple(_LAWS)
PLANAR = NAMES[:-1]


def get(name: str) -> PlanarLaw | Swissroll6d:
    """Return the law called `name`, one of `NAMES`; those in `PLANAR` are mixtures in the plane.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> import torch
        >>> from wpo_notes.datasets import get
        >>> law = get("8gaussians")
        >>> x = law.sample(5, generator=torch.Generator().manual_seed(0))
        >>> x.shape, law.log_prob(x).shape, round(law.entropy().value, 2)
        (torch.Size([5, 2]), torch.Size([5]), 2.83)
    """
    if name not in _LAWS:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    return _LAWS[name]()
