r"""Regularised Wasserstein proximal operator of a linear energy by its kernel formula: eqs. (6)-(13) and (18).

The potential-energy functional (6) has a regularised proximal step that needs no optimisation
(Li, Liu and Osher, 2023): with the heat kernel :math:`G_{\gamma,T}` of eq. (12),

.. math:: \rho_T(x) = e^{-V(x)/2\gamma} \int
          \frac{G_{\gamma,T}(x, y)\, \rho_0(y)}{(G_{\gamma,T} * e^{-V/2\gamma})(y)} \, dy .

Integrals are sums over quadrature points with positive weights, in any dimension, in log space.
The potential may be :math:`+\infty` at points outside the support of the Gibbs density.

Chapters: *Wasserstein proximal operators* (``book/wasserstein-proximal.md``) and *Forward, inverse
and the classes β²T = h* (``book/forward-inverse.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wpo_notes._checks import (
    checked_finite,
    checked_floating,
    checked_points,
    checked_positive,
)
from wpo_notes._optional import needed
from wpo_notes._shapes import Float

__all__ = [
    "inverse_kernel_formula",
    "kernel_formula",
    "mean_field_objective",
    "value_function",
]

# This many coordinates of differences x - y exist at a time.
_BLOCK_ELEMENTS = 2**22
# Sinkhorn stops when its column sums miss the terminal masses by less than this share of the mass.
_SINKHORN_TOLERANCE = 1e-11
_SINKHORN_STEPS = 20_000


def kernel_formula(
    rho0: Float[Tensor, " M"],
    potential: Float[Tensor, " M"],
    points: Float[Tensor, "M d"],
    weights: Float[Tensor, " M"],
    *,
    horizon: float,
    gamma: float,
) -> Float[Tensor, " M"]:
    r"""Density after one regularised proximal step: the solution :math:`\rho(\cdot, T)` of eq. (11).

    .. math:: \rho_T(x_i) = \sum_j \frac{e^{-V_i/2\gamma} G_{\gamma,T}(x_i, x_j)}
              {\sum_k w_k e^{-V_k/2\gamma} G_{\gamma,T}(x_k, x_j)} \, w_j \rho_0(x_j) .

    The denominator is the same quadrature as the numerator's mass, so that
    :math:`\sum_i w_i \rho_T(x_i) = \sum_j w_j \rho_0(x_j)` holds to rounding on any points. The
    result is linear in rho0 and differentiable in all tensors.

    Args:
        rho0: (M,), the density before the step at the points; zeros are allowed.
        potential: (M,), the potential V at the points; +inf where no mass may end.
        points: (M, d), quadrature points.
        weights: (M,), positive quadrature weights (for a grid, the volume of a cell).
        horizon: T > 0, the time of the step.
        gamma: γ > 0, the regularisation; V and γ have units of points² / time.

    Raises:
        TypeError: a tensor that is not float32 or float64, or tensors of different dtypes.
        ValueError: wrong shapes, NaN, infinite or negative densities, a potential that is NaN,
            -inf or nowhere finite, weights that are not positive, horizon or gamma not positive.

    Examples:
        A normal law takes a step towards a narrow one. Both stay normal, so the variance is known: 0.2 + 0.28 / 0.9.

        >>> import torch
        >>> from wpo_notes.proximal import kernel_formula
        >>> x = torch.linspace(-8, 8, 801, dtype=torch.float64)
        >>> weights = torch.full_like(x, 0.02)
        >>> rho0 = torch.exp(-0.5 * x**2) / (2 * torch.pi) ** 0.5
        >>> rho = kernel_formula(rho0, 0.5 * x**2, x[:, None], weights, horizon=0.5, gamma=0.1)
        >>> [round(float(weights @ (rho * x**power)), 6) for power in (0, 2)]
        [1.0, 0.511111]
    """
    _check_grid(potential, points, weights, horizon, gamma)
    _check_density("rho0", rho0, points)
    log_gibbs = -potential / (2 * gamma)
    log_normaliser = _log_heat(log_gibbs + weights.log(), points, points, gamma * horizon)
    mass = weights * rho0

    def block(x: Tensor, log_gibbs_x: Tensor) -> Tensor:
        log_kernel = _log_kernel(x, points, gamma * horizon)
        return (log_gibbs_x[:, None] + log_kernel - log_normaliser).exp() @ mass

    return _by_block(block, points, points, log_gibbs)


def inverse_kernel_formula(
    potential: Float[Tensor, " M"],
    points: Float[Tensor, "M d"],
    weights: Float[Tensor, " M"],
    *,
    horizon: float,
    gamma: float,
) -> Float[Tensor, " M"]:
    r"""Density whose proximal step is the Gibbs density :math:`e^{-V/2\gamma}/Z`: the inverse in eq. (18).

    .. math:: \rho_0 = \frac{G_{\gamma,T} * e^{-V/2\gamma}}{Z}, \qquad Z = \int e^{-V/2\gamma} .

    It cancels the denominator of the kernel formula. With :math:`V = -\beta^2\log\pi` and
    :math:`\gamma = \beta^2/2` the Gibbs density is π and this is :math:`\eta(\cdot, T)`, the law
    of the noising process. Arguments and errors as in `kernel_formula`.
    """
    _check_grid(potential, points, weights, horizon, gamma)
    log_mass = weights.log() - potential / (2 * gamma)
    log_density = _log_heat(log_mass, points, points, gamma * horizon)
    return (log_density - torch.logsumexp(log_mass, 0)).exp()


def value_function(
    potential: Float[Tensor, " M"],
    points: Float[Tensor, "M d"],
    weights: Float[Tensor, " M"],
    x: Float[Tensor, "*batch d"],
    *,
    horizon: float,
    gamma: float,
) -> Float[Tensor, "*batch"]:
    r"""Solution of the Hamilton-Jacobi-Bellman equation at x, (..., d) -> (...), eq. (13).

    .. math:: U(x, T - \tau) = -2\gamma \log \bigl(G_{\gamma,\tau} * e^{-V/2\gamma}\bigr)(x)

    Args:
        potential: (M,), V at the points; +inf is allowed.
        points: (M, d), quadrature points.
        weights: (M,), positive quadrature weights.
        x: (..., d), where to evaluate; differentiable.
        horizon: τ = T - t > 0, the time that remains.
        gamma: γ > 0, the regularisation.

    Raises:
        TypeError: as in `kernel_formula`.
        ValueError: as in `kernel_formula`, or x of the wrong event size.
    """
    _check_grid(potential, points, weights, horizon, gamma)
    checked_points("x", x, points.shape[1])
    _check_like("x", x, points)
    log_mass = weights.log() - potential / (2 * gamma)
    log_heat = _log_heat(log_mass, points, x.reshape(-1, x.shape[-1]), gamma * horizon)
    return -2 * gamma * log_heat.reshape(x.shape[:-1])


@torch.no_grad()
def mean_field_objective(
    terminal: Float[Tensor, " M"],
    rho0: Float[Tensor, " M"],
    potential: Float[Tensor, " M"],
    points: Float[Tensor, "M d"],
    weights: Float[Tensor, " M"],
    *,
    horizon: float,
    gamma: float,
) -> Float[Tensor, ""]:
    r"""Mean-field objective of eq. (11) for a given terminal density μ; `kernel_formula` minimises it.

    .. math:: J(\mu) = \int V \mu + \inf_{\rho, v} \Bigl\{ & \int_0^T\!\!\int \tfrac12 |v|^2 \rho \;:\;
              \partial_t\rho + \nabla\cdot(v\rho) = \gamma\Delta\rho, \\
              & \rho(\cdot,0) = \rho_0,\; \rho(\cdot,T) = \mu \Bigr\} .

    By Girsanov's theorem the least kinetic energy is :math:`2\gamma` times the Kullback-Leibler
    divergence of the cheapest plan from the free Brownian one (Schrödinger's problem),

    .. math:: & \min_P \; 2\gamma \sum_{ji} P_{ji} \log \frac{P_{ji}}
              {w_j \rho_0(x_j)\, G_{\gamma,T}(x_j, x_i)\, w_i}, \\
              & \sum_i P_{ji} = w_j \rho_0(x_j), \quad \sum_j P_{ji} = w_i \mu(x_i),

    entropic optimal transport, solved by POT in float64. J is taken from the dual potentials, so
    its error is of second order in Sinkhorn's remaining error. At the minimum
    :math:`J = -2\gamma \sum_j w_j\rho_0(x_j) \log (G_{\gamma,T} * e^{-V/2\gamma})(x_j)
    = \int \rho_0\, U(\cdot, 0)`. The matrix of costs, (M, M), is held in memory.

    Args:
        terminal: (M,), the terminal density μ, of the mass of rho0.
        rho0: (M,), the density at time 0.
        potential: (M,), V at the points; +inf is allowed.
        points: (M, d), quadrature points.
        weights: (M,), positive quadrature weights.
        horizon: T > 0.
        gamma: γ > 0.

    Returns:
        J(μ), a 0-d tensor without gradient; +inf if μ has mass where V = +inf.

    Raises:
        TypeError: as in `kernel_formula`.
        ValueError: as in `kernel_formula`, or if the masses of terminal and rho0 differ.
        RuntimeError: Sinkhorn's iteration did not converge.
    """
    _check_grid(potential, points, weights, horizon, gamma)
    _check_density("rho0", rho0, points)
    _check_density("terminal", terminal, points)
    terminal, rho0, potential, grid, weights = (
        part.double() for part in (terminal, rho0, potential, points, weights)
    )
    start, end = weights * rho0, weights * terminal
    _check_masses(start.sum(), end.sum(), points.dtype)
    end = end * (start.sum() / end.sum())
    j, i = start > 0, end > 0  # outside, the plan is zero
    if bool(torch.isinf(potential[i]).any()):
        return points.new_tensor(math.inf)
    log_kernel = _log_kernel(grid[j], grid[i], gamma * horizon)
    log_u, log_v = _sinkhorn(start[j], end[i], -2 * gamma * log_kernel, 2 * gamma)
    # log P = log_u + log_kernel + log_v
    divergence = start[j] @ (log_u - start[j].log()) + end[i] @ (log_v - weights[i].log())
    return (end[i] @ potential[i] + 2 * gamma * divergence).to(points.dtype)


def _sinkhorn(start: Tensor, end: Tensor, cost: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """Logarithms of the scalings of the entropic plan between two mass vectors."""
    tolerance = _SINKHORN_TOLERANCE * float(start.sum())
    _, log = needed("ot").bregman.sinkhorn_log(
        start, end, cost, reg, numItermax=_SINKHORN_STEPS, stopThr=tolerance, log=True, warn=False
    )
    if not log["err"][-1] < tolerance:
        raise RuntimeError(
            f"Sinkhorn's iteration missed the terminal masses by {float(log['err'][-1]):.2g} after "
            f"{_SINKHORN_STEPS} steps (tolerance {tolerance:.2g}): gamma * horizon is small against "
            "the squared distances; take a larger one or points that lie closer together"
        )
    return log["log_u"], log["log_v"]


def _log_kernel(x: Tensor, y: Tensor, diffusion: float) -> Tensor:
    """Logarithm of the heat kernel (12) for γt = `diffusion`: (n, d), (m, d) -> (n, m)."""
    # From differences, nothing cancels; by coordinate, since sums over a short last axis are slow.
    squared: Any = sum((x[:, k, None] - y[:, k]).square() for k in range(x.shape[1]))  # (n, m)
    return -squared / (4 * diffusion) - 0.5 * x.shape[-1] * math.log(4 * math.pi * diffusion)


def _log_heat(log_mass: Tensor, points: Tensor, x: Tensor, diffusion: float) -> Tensor:
    """Logarithm of the heat flow at x of the masses exp(log_mass) at the points."""

    def block(x: Tensor) -> Tensor:
        return torch.logsumexp(log_mass + _log_kernel(x, points, diffusion), -1)

    return _by_block(block, points, x)


def _by_block(block: Callable[..., Tensor], points: Tensor, *rows: Tensor) -> Tensor:
    """Join block(part of rows), with parts small enough to meet all points at once."""
    size = max(1, _BLOCK_ELEMENTS // points.numel())
    parts = list(zip(*(row.split(size) for row in rows), strict=True))
    if torch.is_grad_enabled() and len(parts) > 1:
        # Autograd would keep the (M, M) matrix that the blocks avoid: recompute each instead.
        return torch.cat(
            [
                checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        )
    return torch.cat([block(*part) for part in parts])


def _check_grid(
    potential: Tensor, points: Tensor, weights: Tensor, horizon: float, gamma: float
) -> None:
    checked_positive("horizon", horizon)
    checked_positive("gamma", gamma)
    checked_points("points", points)
    if points.ndim != 2 or points.numel() == 0:
        raise ValueError(
            f"points must be a matrix (M, d), one quadrature point a row, got shape "
            f"{tuple(points.shape)}: for one coordinate use points[:, None]"
        )
    _check_values("weights", weights, points)
    checked_finite("weights", weights)
    if not bool((weights > 0).all()):
        raise ValueError(
            f"weights must be positive, got {float(weights.min()):.3g}: drop points without weight"
        )
    _check_values("potential", potential, points)
    if not bool((potential > -math.inf).all()):
        bad = int((~(potential > -math.inf)).nonzero()[0])
        raise ValueError(
            f"potential must be finite or +inf, but potential[{bad}] is {float(potential[bad])}"
        )
    if bool(torch.isinf(potential).all()):
        raise ValueError("potential must be finite at one point at least, but all of it is +inf")


def _check_density(name: str, value: Tensor, points: Tensor) -> None:
    _check_values(name, value, points)
    checked_finite(name, value)
    if not bool((value >= 0).all()):
        raise ValueError(
            f"{name} must be a density, non-negative at all points, got {float(value.min()):.3g}"
        )
    if not bool((value > 0).any()):
        raise ValueError(f"{name} must have positive mass, but it is zero at all points")


def _check_values(name: str, value: Tensor, points: Tensor) -> None:
    checked_floating(name, value)
    if value.shape != points.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({points.shape[0]},), one value a point, got shape "
            f"{tuple(value.shape)}"
        )
    _check_like(name, value, points)


def _check_like(name: str, value: Tensor, points: Tensor) -> None:
    if value.dtype != points.dtype or value.device != points.device:
        raise TypeError(
            f"{name} must have the points' dtype and device ({points.dtype}, {points.device}), "
            f"got {value.dtype}, {value.device}"
        )


def _check_masses(start: Tensor, end: Tensor, dtype: torch.dtype) -> None:
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    if not bool((end - start).abs() <= tolerance * start):
        raise ValueError(
            f"terminal must have the mass of rho0, {float(start):.9g}, got {float(end):.9g}: "
            "multiply it by the ratio"
        )
