r"""The partial differential equations of the mean-field game: residuals, and solvers on grids.

Equations (11), (16), (17) and (21). Chapters: *The mean-field game and its decoupling*
(``book/mean-field-game.md``) and *Reversing the heat equation* (``book/reversing-heat.md``).

**Residuals** of any callable at any points, by automatic differentiation. Callables take points
(..., d), treat each row by itself and return (...) or, for vector fields, (..., d).

**Grid solvers** in one and two dimensions, as evidence that uses no formula of the paper: the HJB
equation is solved without the Cole-Hopf transformation. All of them work on a box of cells of equal
width `spacing`, hold the values at the cells' centres, and have reflecting walls: no flux of density
leaves, and the normal derivative of U is zero. On a box that is large enough the walls do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.integrate import BDF, solve_ivp
from scipy.interpolate import CubicSpline
from scipy.special import exprel
from torch import Tensor

from wpo_notes._checks import (
    checked_finite,
    checked_floating,
    checked_points,
    checked_positive,
)
from wpo_notes._shapes import Float

__all__ = [
    "divergence",
    "fokker_planck_residual",
    "gradient",
    "heat_residual",
    "heat_semigroup",
    "hjb_residual",
    "laplacian",
    "solve_fokker_planck",
    "solve_hjb",
    "time_derivative",
]

# The integrator's error per step, relative to the values and to the largest of them: below the
# error of any grid that is used here, so that what remains is the grid's.
_RELATIVE_TOLERANCE = 1e-8
_ABSOLUTE_TOLERANCE = 1e-10

Function = Callable[[Tensor], Tensor]
Evolution = Callable[[Tensor, Any], Tensor]  # the time as it was given: a number or a tensor


# ---- derivatives and residuals ------------------------------------------------------------------


def gradient(f: Function, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    r"""Gradient :math:`\nabla f` at each point, by reverse-mode differentiation.

    Args:
        f: (..., d) -> (...), each row by itself.
        x: (..., d).

    Raises:
        ValueError: f returns another shape than (...).
    """
    checked_points("x", x)
    return torch.func.grad(lambda y: _checked_shape("f", f(y), y.shape[:-1]).sum())(x)


def divergence(field: Function, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    r"""Divergence :math:`\nabla\cdot v` at each point: d forward-mode derivatives.

    Args:
        field: (..., d) -> (..., d), each row by itself.
        x: (..., d).

    Raises:
        ValueError: the field returns another shape than (..., d).
    """
    checked_points("x", x)
    total = torch.zeros_like(x[..., 0])
    for k in range(x.shape[-1]):
        direction = torch.zeros_like(x)
        direction[..., k] = 1
        value, derivative = torch.func.jvp(field, (x,), (direction,))  # type: ignore[misc]
        _checked_shape("field", value, x.shape)
        total = total + derivative[..., k]
    return total


def laplacian(f: Function, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    r"""Laplacian :math:`\Delta f = \nabla\cdot\nabla f` at each point; arguments as for `gradient`.

    Examples:
        >>> import torch
        >>> from wpo_notes.pde import laplacian
        >>> laplacian(lambda x: x.square().sum(-1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([4., 4.])
    """
    return divergence(lambda y: gradient(f, y), x)


def time_derivative(f: Evolution, x: Float[Tensor, "*batch d"], t: float | Tensor) -> Tensor:
    r"""Derivative :math:`\partial_t f(x, t)` at each point, by forward-mode differentiation.

    Args:
        f: (x, t) -> (...).
        x: (..., d).
        t: one time for all points (a number or 0-d tensor), or (...), a time for each.

    Raises:
        ValueError: t has another shape, or f returns another shape than (...).
    """
    checked_points("x", x)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.ndim and t.shape != x.shape[:-1]:
        raise ValueError(
            f"t must be one time or have shape {tuple(x.shape[:-1])}, a time for each point, "
            f"got {tuple(t.shape)}"
        )
    one = torch.ones_like(t)
    value, derivative = torch.func.jvp(lambda s: f(x, s), (t,), (one,))  # type: ignore[misc]
    _checked_shape("f", value, x.shape[:-1])
    return derivative


def heat_residual(
    eta: Evolution, x: Float[Tensor, "*batch d"], s: float | Tensor, *, beta: float
) -> Float[Tensor, "*batch"]:
    r"""Residual of the heat equation in (17): :math:`\partial_s\eta - \tfrac{\beta^2}{2}\Delta\eta`.

    Args:
        eta: (x, s) -> (...), the candidate.
        x: (..., d), where the residual is wanted.
        s: noising time, one for all points or (...).
        beta: diffusion coefficient of eq. (1).
    """
    gamma = 0.5 * checked_positive("beta", beta) ** 2
    return time_derivative(eta, x, s) - gamma * laplacian(lambda y: eta(y, s), x)


def hjb_residual(
    u: Evolution, x: Float[Tensor, "*batch d"], t: float | Tensor, *, beta: float
) -> Float[Tensor, "*batch"]:
    r"""Residual of the HJB equation in (16) and (21).

    .. math:: -\partial_t U + \tfrac12 |\nabla U|^2 - \tfrac{\beta^2}{2}\Delta U .

    Args:
        u: (x, t) -> (...), the candidate.
        x: (..., d), where the residual is wanted.
        t: denoising time, one for all points or (...).
        beta: diffusion coefficient; eq. (11) has :math:`\gamma = \beta^2/2`.

    Examples:
        A linear function with the right speed solves the equation.

        >>> import torch
        >>> from wpo_notes.pde import hjb_residual
        >>> hjb_residual(lambda x, t: 2 * x.sum(-1) + 2 * t, torch.tensor([[0.5], [1.0]]), 0.3, beta=1.0)
        tensor([0., 0.])
    """
    gamma = 0.5 * checked_positive("beta", beta) ** 2
    slope = gradient(lambda y: u(y, t), x)
    return (
        -time_derivative(u, x, t)
        + 0.5 * slope.square().sum(-1)
        - gamma * laplacian(lambda y: u(y, t), x)
    )


def fokker_planck_residual(
    rho: Evolution,
    drift: Evolution,
    x: Float[Tensor, "*batch d"],
    t: float | Tensor,
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    r"""Residual of the controlled Fokker-Planck equation in (16) and (17).

    .. math:: \partial_t \rho + \nabla\cdot(\rho\, b) - \tfrac{\beta^2}{2}\Delta\rho ,

    where the drift b is :math:`-\nabla U` in (16) and :math:`\beta^2\nabla\log\eta` in (17).

    Args:
        rho: (x, t) -> (...), the candidate density.
        drift: (x, t) -> (..., d).
        x: (..., d), where the residual is wanted.
        t: denoising time, one for all points or (...).
        beta: diffusion coefficient.
    """
    gamma = 0.5 * checked_positive("beta", beta) ** 2

    def flux(y: Tensor) -> Tensor:
        return rho(y, t)[..., None] * drift(y, t)

    return (
        time_derivative(rho, x, t) + divergence(flux, x) - gamma * laplacian(lambda y: rho(y, t), x)
    )


def _checked_shape(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(
            f"{name} must return shape {tuple(shape)} for these points, got {tuple(value.shape)}"
        )
    return value


# ---- solvers on grids ---------------------------------------------------------------------------


def heat_semigroup(
    values: Float[Tensor, "*grid"], spacing: float, variance: float
) -> Float[Tensor, "*grid"]:
    r"""Heat flow on the grid, :math:`e^{\frac v2 \Delta}`, spectrally: eq. (12) on a box.

    The values are mirrored at the walls and their Fourier modes damped by
    :math:`e^{-v k^2 / 2}`, so what the grid resolves is flowed exactly and the sum is kept. Rounding
    is relative to the largest value: where the result is 1e-16 of that, it is noise.

    Args:
        values: (n,) or (n, m), at the cells' centres.
        spacing: width of the cells.
        variance: v >= 0, :math:`\beta^2 s` or :math:`2\gamma s`.

    Raises:
        ValueError: a negative variance (see *Reversing the heat equation*), or values that are not a
            finite array of one or two dimensions.
    """
    _check_grid("values", values)
    checked_positive("spacing", spacing)
    checked_positive("variance", variance, zero=True)
    axes = list(range(values.ndim))
    mirrored = values
    for axis in axes:
        mirrored = torch.cat([mirrored, mirrored.flip(axis)], axis)
    spectrum = torch.fft.fftn(mirrored)
    for axis in axes:
        frequency = torch.fft.fftfreq(
            mirrored.shape[axis], spacing, dtype=values.dtype, device=values.device
        )
        damping = torch.exp(-0.5 * variance * (2 * math.pi * frequency) ** 2)
        spectrum = spectrum * damping.reshape([-1 if k == axis else 1 for k in axes])
    flowed = torch.fft.ifftn(spectrum).real
    return flowed[tuple(slice(n) for n in values.shape)]


def solve_hjb(
    terminal: Float[Tensor, "*grid"], spacing: float, times: Float[Tensor, " k"], *, gamma: float
) -> Float[Tensor, " k *grid"]:
    r"""Solve the HJB equation of (11) backwards from its terminal value, on a grid.

    .. math:: -\partial_t U + \tfrac12 |\nabla U|^2 = \gamma \Delta U, \qquad U(\cdot, T) = V .

    Second-order central differences and a stiff integrator (SciPy's BDF); no Cole-Hopf
    transformation. The spacing times the slope of U should stay below 2 gamma: central differences
    do not select the viscosity solution by themselves. With G the differences at the faces between cells (zero at the walls) and A the
    average of a cell's faces, :math:`\partial_t U = \tfrac12 A (G U)^2 + \gamma G^\top G U`.

    Args:
        terminal: V at the cells' centres, (n,) or (n, m).
        spacing: width of the cells.
        times: (k,), increasing; the last one is T.
        gamma: diffusion constant; :math:`\beta^2/2` in (16).

    Returns:
        U at each of the times, (k, n) or (k, n, m); the last is `terminal`.

    Raises:
        ValueError: values or times that are not as said above.
        RuntimeError: the integrator failed, with its reason.
    """
    _check_grid("terminal", terminal)
    _check_numbers(spacing, gamma)
    clock = _checked_times(times)
    left, right = _faces(terminal.shape)
    difference = (right - left) / spacing
    average = _average((left, right)).T
    diffusion = -gamma * (difference.T @ difference)

    def velocity(_: float, u: np.ndarray) -> np.ndarray:
        return diffusion @ u - 0.5 * average @ (difference @ u) ** 2

    def jacobian(_: float, u: np.ndarray) -> sparse.csc_matrix:
        slope = sparse.diags_array(difference @ u)
        return sparse.csc_matrix(diffusion - average @ slope @ difference)

    remedy = "refine the grid: spacing times the slope of U should stay below 2 gamma"
    backwards = _integrate(velocity, jacobian, terminal, clock[-1] - clock[::-1], remedy)
    return _to_torch(backwards[::-1], terminal)


def solve_fokker_planck(
    initial: Float[Tensor, "*grid"],
    drift: Callable[[float], Tensor] | Tensor,
    spacing: float,
    times: Float[Tensor, " k"],
    *,
    gamma: float,
) -> Float[Tensor, " k *grid"]:
    r"""Solve the Fokker-Planck equation of (11) forwards, on a grid.

    .. math:: \partial_t \rho + \nabla\cdot(\rho\, b) = \gamma \Delta \rho, \qquad
              \rho(\cdot, 0) = \rho_0 .

    Finite volumes with the exponentially fitted flux of Scharfetter and Gummel and a stiff integrator
    (SciPy's BDF): second order, keeps the mass to rounding whatever the drift, and does not
    oscillate where drift times spacing exceeds gamma.

    Args:
        initial: the density at the cells' centres, (n,) or (n, m).
        drift: b as a function of time, float -> (n, 1) or (n, m, 2), at the cells' centres; or its
            values at `times`, (k, n, 1) or (k, n, m, 2), joined by a cubic spline in time.
        spacing: width of the cells.
        times: (k,), increasing; the first one is that of `initial`.
        gamma: diffusion constant; :math:`\beta^2/2` in (16).

    Returns:
        The density at each of the times, (k, n) or (k, n, m); the first is `initial`.

    Raises:
        ValueError: values, times or a drift that are not as said above.
        RuntimeError: the integrator failed, with its reason.
    """
    _check_grid("initial", initial)
    _check_numbers(spacing, gamma)
    clock = _checked_times(times)
    field = _checked_drift(drift, initial, clock)
    left, right = _faces(initial.shape)
    inflow = (right - left).T / spacing  # what a cell gains from the fluxes at its faces
    across = [_average(_faces(initial.shape, axis)) for axis in range(initial.ndim)]
    cells = initial.numel()

    def weights(t: float) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the two neighbours in the flux at each face."""
        components = field(t).reshape(cells, initial.ndim).T
        at_faces = [average @ part for average, part in zip(across, components, strict=True)]
        peclet = np.concatenate(at_faces) * spacing / gamma
        return gamma / spacing / exprel(-peclet), gamma / spacing / exprel(peclet)

    def velocity(t: float, rho: np.ndarray) -> np.ndarray:
        outgoing, incoming = weights(t)
        return inflow @ (outgoing * (left @ rho) - incoming * (right @ rho))

    def jacobian(t: float, _: np.ndarray) -> sparse.csc_matrix:
        outgoing, incoming = (sparse.diags_array(part) for part in weights(t))
        return sparse.csc_matrix(inflow @ (outgoing @ left - incoming @ right))

    remedy = "look at the drift there"
    return _to_torch(_integrate(velocity, jacobian, initial, clock, remedy), initial)


def _faces(shape: tuple[int, ...], axis: int | None = None) -> tuple[sparse.csr_array, ...]:
    """Matrices that pick, for each inner face, the cell before and the cell behind it.

    Faces across `axis`, or across each axis in turn if None.
    """
    if axis is None:
        pairs = [_faces(shape, k) for k in range(len(shape))]
        return tuple(sparse.vstack(part).tocsr() for part in zip(*pairs, strict=True))
    n = shape[axis]
    before, behind = (sparse.eye_array(n - 1, n, k=k) for k in (0, 1))
    outer = sparse.eye_array(math.prod(shape[:axis]))
    inner = sparse.eye_array(math.prod(shape[axis + 1 :]))
    return tuple(sparse.kron(sparse.kron(outer, part), inner).tocsr() for part in (before, behind))


def _average(faces: tuple[sparse.csr_array, ...]) -> sparse.csr_array:
    return 0.5 * (faces[0] + faces[1])


class _BDF(BDF):
    """SciPy's BDF, whose first step subtracts differences that it has not set.

    Their place is overwritten before it is read again, so the solution is right; but what memory happened to hold
    may overflow, or be a NaN, and then NumPy warns of it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.D[2:] = 0.0


def _integrate(
    velocity: Callable[..., Any],
    jacobian: Callable[..., Any],
    start: Tensor,
    clock: np.ndarray,
    remedy: str,
) -> np.ndarray:
    """Values at the times of `clock`, (k, *grid)."""
    values = _to_numpy(start)
    solution = solve_ivp(
        velocity,
        (clock[0], clock[-1]),
        values.reshape(-1),
        method=_BDF,
        t_eval=clock,
        jac=jacobian,
        rtol=_RELATIVE_TOLERANCE,
        atol=_ABSOLUTE_TOLERANCE * max(np.abs(values).max(), np.finfo(float).tiny),
    )
    if not solution.success:
        reached = len(solution.t)
        raise RuntimeError(
            f"the integrator stopped between its times {clock[reached - 1]:g} and "
            f"{clock[reached]:g} ({solution.message}): {remedy}"
        )
    return solution.y.T.reshape(len(clock), *values.shape)


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _to_torch(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values.copy(), dtype=like.dtype, device=like.device)


def _check_grid(name: str, values: Tensor) -> None:
    checked_floating(name, values)
    if values.ndim not in (1, 2) or min(values.shape) < 2:
        raise ValueError(
            f"{name} must be a grid of shape (n,) or (n, m) with at least two cells a side, "
            f"got shape {tuple(values.shape)}"
        )
    checked_finite(name, values)


def _check_numbers(spacing: float, gamma: float) -> None:
    checked_positive("spacing", spacing)
    checked_positive("gamma", gamma)


def _checked_times(times: Tensor) -> np.ndarray:
    checked_floating("times", times)
    checked_finite("times", times)
    clock = _to_numpy(times)
    if clock.ndim != 1 or len(clock) < 2 or not (np.diff(clock) > 0).all():
        raise ValueError(
            f"times must be at least two increasing numbers, shape (k,), got {clock.tolist()}"
        )
    return clock


def _checked_drift(
    drift: Callable[[float], Tensor] | Tensor, initial: Tensor, clock: np.ndarray
) -> Callable[[float], np.ndarray]:
    shape = (*initial.shape, initial.ndim)
    if isinstance(drift, Tensor):
        if drift.shape != (len(clock), *shape):
            raise ValueError(
                f"drift must have shape {(len(clock), *shape)}, its values at the times, "
                f"got {tuple(drift.shape)}"
            )
        return CubicSpline(clock, _to_numpy(checked_finite("drift", drift)))

    def field(t: float) -> np.ndarray:
        values = drift(float(t))
        if values.shape != shape:
            raise ValueError(
                f"drift must return shape {shape}, a vector for each cell, "
                f"got {tuple(values.shape)}"
            )
        return _to_numpy(checked_finite("drift", values))

    return field
