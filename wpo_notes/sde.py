r"""Noising processes, and samplers that need only a score: eqs. (1) and (2).

The noising process is linear (Remark 4.3; the paper's own is Brownian noising, a = 0 and constant β),

.. math:: \mathrm dY = -a(s)\,Y\,\mathrm ds + \beta(s)\,\mathrm dW, \qquad Y(0) \sim \pi,
          \qquad s \in [0, T],

so its transition kernel is Gaussian, :math:`Y(s) \mid Y(0) \sim N(m(s) Y(0), v(s) I)`, and the law of
Y(s) is π scaled by m and convolved with :math:`N(0, v I)`. A score is a callable ``score(y, s)`` of
points (..., d) and one *noising* time s, a float: 0 is the data, T the noise. The paper's denoising
time is t = T - s.

Chapter: *Score-based models* (``book/score-based-models.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from wpo_notes._checks import checked_points, checked_positive, make_generator
from wpo_notes._optional import needed
from wpo_notes._shapes import Float
from wpo_notes.mixture import GaussianMixture

__all__ = [
    "LinearSDE",
    "Score",
    "log_prob_probability_flow",
    "sample_probability_flow",
    "sample_reverse_sde",
]

Score = Callable[[Tensor, float], Tensor]
_State = TypeVar("_State", Tensor, tuple[Tensor, Tensor])

# Gauss-Legendre nodes and weights on [-1, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
# Relative and absolute tolerance of the adaptive ODE solver.
_TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-9, 1e-10)}
# Steps of the reverse SDE are even in s^(1/3): each is at most its own s, so that an explicit step
# with the score -y / (beta^2 s) of a point contracts towards the point and never overshoots it.
_GRID_POWER = 3


@dataclass(frozen=True)
class LinearSDE:
    r"""Linear noising process :math:`\mathrm dY = -a(s) Y \mathrm ds + \beta(s)\,\mathrm dW` on [0, T].

    The named constructors have closed-form moments; without `moments` they are computed by
    Gauss-Legendre quadrature, exact to rounding for smooth a and β.

    Args:
        drift_rate: a, in 1 / time: maps a tensor of times to a tensor of the same shape.
        diffusion: β > 0, in data units per square root of time: maps like `drift_rate`.
        horizon: T > 0.
        moments: closed form of s -> (m(s), v(s)), if there is one.

    Raises:
        ValueError: a horizon that is not positive, an a that is not finite or a β that is not
            positive somewhere on [0, T].

    Examples:
        >>> from wpo_notes.sde import LinearSDE
        >>> sde = LinearSDE.brownian(beta=2.0, horizon=1.0)
        >>> sde.mean_factor(0.5), sde.variance(0.5)
        (1.0, 2.0)
    """

    drift_rate: Callable[[Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]
    horizon: float
    moments: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        checked_positive("horizon", self.horizon)
        times = torch.linspace(0, self.horizon, 101, dtype=torch.float64, device="cpu")
        rate, beta = self.drift_rate(times), self.diffusion(times)
        for name, value in (("drift_rate", rate), ("diffusion", beta)):
            if value.shape != times.shape:
                raise ValueError(
                    f"{name} must map times of shape {tuple(times.shape)} to the same shape, got "
                    f"{tuple(value.shape)}: for a constant c write lambda s: torch.full_like(s, c)"
                )
        if not bool(torch.isfinite(rate).all()):
            bad = float(times[~torch.isfinite(rate)][0])
            raise ValueError(f"drift_rate must be finite on [0, T], but is not at s = {bad:g}")
        if not bool((torch.isfinite(beta) & (beta > 0)).all()):
            bad = int((~(torch.isfinite(beta) & (beta > 0))).nonzero()[0])
            raise ValueError(
                f"diffusion must be positive and finite on [0, T], got {float(beta[bad]):g} at "
                f"s = {float(times[bad]):g}"
            )

    @classmethod
    def brownian(cls, beta: float, horizon: float) -> LinearSDE:
        r"""The paper's noising: :math:`\mathrm dY = \beta\,\mathrm dW`; m = 1, v = β²s."""
        checked_positive("beta", beta)
        return cls(
            torch.zeros_like,
            lambda s: torch.full_like(s, beta),
            horizon,
            lambda s: (torch.ones_like(s), beta**2 * s),
        )

    @classmethod
    def ornstein_uhlenbeck(cls, rate: float, beta: float, horizon: float) -> LinearSDE:
        r""":math:`\mathrm dY = -aY\,\mathrm ds + \beta\,\mathrm dW`, constant `rate` a > 0.

        .. math:: m(s) = e^{-as}, \qquad v(s) = \beta^2\,\frac{1 - e^{-2as}}{2a} .
        """
        checked_positive("rate", rate)
        checked_positive("beta", beta)
        return cls(
            lambda s: torch.full_like(s, rate),
            lambda s: torch.full_like(s, beta),
            horizon,
            lambda s: (torch.exp(-rate * s), -(beta**2) * torch.expm1(-2 * rate * s) / (2 * rate)),
        )

    @classmethod
    def variance_preserving(
        cls, beta_min: float, beta_max: float, horizon: float = 1.0
    ) -> LinearSDE:
        r""":math:`\mathrm dY = -\tfrac12 b(s) Y\,\mathrm ds + \sqrt{b(s)}\,\mathrm dW` of Song et al. (2021).

        b rises linearly from `beta_min` to `beta_max` (they call it β(t); it is our β²), and

        .. math:: m(s) = e^{-B(s)/2}, \qquad v(s) = 1 - e^{-B(s)}, \qquad B(s) = \int_0^s b .
        """
        checked_positive("beta_min", beta_min)
        checked_positive("beta_max", beta_max)
        slope = (beta_max - beta_min) / checked_positive("horizon", horizon)

        def moments(s: Tensor) -> tuple[Tensor, Tensor]:
            integral = s * (beta_min + 0.5 * slope * s)
            return torch.exp(-0.5 * integral), -torch.expm1(-integral)

        return cls(
            lambda s: 0.5 * (beta_min + slope * s),
            lambda s: torch.sqrt(beta_min + slope * s),
            horizon,
            moments,
        )

    @classmethod
    def variance_exploding(cls, std_min: float, std_max: float, horizon: float = 1.0) -> LinearSDE:
        r""":math:`\mathrm dY = \beta(s)\,\mathrm dW` of Song et al. (2021): the noise grows geometrically.

        .. math:: m = 1, \qquad v(s) = \sigma_{\min}^2\bigl(r^{2s/T} - 1\bigr), \qquad
                  r = \sigma_{\max} / \sigma_{\min}, \qquad \beta^2 = v' .

        The same laws as Brownian noising, at times that suit a solver from the narrow to the wide.
        """
        checked_positive("std_min", std_min)
        if not std_max > std_min:
            raise ValueError(f"std_max must be larger than std_min = {std_min:g}, got {std_max:g}")
        rate = 2 * math.log(std_max / std_min) / checked_positive("horizon", horizon)
        return cls(
            torch.zeros_like,
            lambda s: std_min * math.sqrt(rate) * torch.exp(0.5 * rate * s),
            horizon,
            lambda s: (torch.ones_like(s), std_min**2 * torch.expm1(rate * s)),
        )

    # ---- the transition kernel ----------------------------------------------------------------

    @overload
    def mean_factor(self, s: float) -> float: ...
    @overload
    def mean_factor(self, s: Tensor) -> Tensor: ...
    def mean_factor(self, s: float | Tensor) -> float | Tensor:
        r""":math:`m(s) = \exp(-\int_0^s a)`: E[Y(s) | Y(0)] = m Y(0). A number for a number s."""
        return self._moments_at(s)[0]

    @overload
    def variance(self, s: float) -> float: ...
    @overload
    def variance(self, s: Tensor) -> Tensor: ...
    def variance(self, s: float | Tensor) -> float | Tensor:
        r""":math:`v(s) = m(s)^2\int_0^s \beta^2/m^2`: Cov[Y(s) | Y(0)] = v I. A number for a number s."""
        return self._moments_at(s)[1]

    def noise(
        self,
        x0: Float[Tensor, "*batch d"],
        s: float | Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch d"]:
        r"""Draw Y(s) given Y(0) = x0: :math:`m x_0 + \sqrt v\,\xi`, exact at any s.

        Args:
            x0: (..., d).
            s: a noising time in [0, T], or one a point, of shape (...).
            generator: source of randomness on x0's device; a fresh one if None.

        Raises:
            ValueError: a time outside [0, T], or times that are not one a point.
        """
        x0 = checked_points("x0", x0)
        if isinstance(s, Tensor) and s.ndim and s.shape != x0.shape[:-1]:
            raise ValueError(
                f"s must be a number or have shape {tuple(x0.shape[:-1])}, one time a point, "
                f"got shape {tuple(s.shape)}"
            )
        mean_factor, variance = (
            torch.as_tensor(moment, dtype=x0.dtype, device=x0.device)[..., None]
            for moment in self._moments_at(s)
        )
        generator = make_generator(generator, x0.device)
        white = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        return mean_factor * x0 + variance.sqrt() * white

    def diffuse(self, law: GaussianMixture | Tensor, s: float | Tensor) -> GaussianMixture:
        """Law of Y(s): `law` scaled by m(s) and convolved with N(0, v(s) I), eqs. (22), (26).

        Args:
            law: the law of Y(0): a mixture, or points (N, d) that stand for their empirical
                distribution (22), whose law at s is the kernel density estimate of variance v(s).
            s: a noising time (differentiable if a 0-d tensor); for points, positive.
        """
        mean_factor, variance = self._moments_at(s)
        if isinstance(law, Tensor):
            if not variance > 0:
                raise ValueError(
                    f"s must be positive for an empirical distribution, got {float(s):g}: "
                    "point masses have no density"
                )
            return GaussianMixture.from_variance(mean_factor * law, variance)
        scaled = GaussianMixture(
            mean_factor * law.centers,
            law.precision_tril / mean_factor,
            log_weights=law.log_weights,
            validate_args=law._validate_args,
        )
        return scaled.diffuse(variance)

    def score(self, law: GaussianMixture | Tensor) -> Score:
        r"""Exact score :math:`\nabla\log\eta(y, s)` of the noised `law`, as a callable (y, s).

        For points it is the empirical score (23), defined for s > 0 only.
        """
        return lambda y, s: self.diffuse(law, s).score(y)

    # ---- moments -------------------------------------------------------------------------------

    def _moments_at(self, s: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """m(s) and v(s), computed in float64 and returned in the kind of number that s is."""
        moments = self.moments or self._quadrature
        if isinstance(s, Tensor):
            mean_factor, variance = moments(self._checked_time(s).double())
            return mean_factor.to(s.dtype), variance.to(s.dtype)
        time = torch.tensor(s, dtype=torch.float64, device="cpu")
        mean_factor, variance = moments(self._checked_time(time))
        return float(mean_factor), float(variance)

    def _quadrature(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """m(s) and v(s) by Gauss-Legendre, the inner integral of a by the same rule at each node."""
        node, weight = (
            torch.as_tensor(part, dtype=s.dtype, device=s.device) for part in (_NODES, _WEIGHTS)
        )
        node, weight = 0.5 * (1 + node), 0.5 * weight  # on [0, 1]

        def integral_of_rate(upper: Tensor) -> Tensor:
            return upper * (self.drift_rate(upper[..., None] * node) * weight).sum(-1)

        total = integral_of_rate(s)
        times = s[..., None] * node
        decay = torch.exp(2 * (integral_of_rate(times) - total[..., None]))
        variance = s * (self.diffusion(times).square() * decay * weight).sum(-1)
        return torch.exp(-total), variance

    def _checked_time(self, s: Tensor) -> Tensor:
        # Rounding T to the dtype of s may carry it past T.
        slack = 4 * torch.finfo(s.dtype).eps * self.horizon
        inside = (s >= 0) & (s <= self.horizon + slack)
        if not bool(inside.all()):
            bad = float(s[~inside].flatten()[0])
            raise ValueError(
                f"s must be a noising time in [0, T] = [0, {self.horizon:g}], got {bad:g}: "
                "denoising times t convert by s = T - t"
            )
        return s


# ---- samplers -----------------------------------------------------------------------------------


@torch.no_grad()
def sample_reverse_sde(
    sde: LinearSDE,
    score: Score,
    start: Float[Tensor, "*batch d"],
    *,
    steps: int,
    stop: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch d"]:
    r"""Simulate the reverse process (2) from s = T down to s = `stop` by Euler-Maruyama.

    .. math:: \mathrm dX = \bigl[a X + \beta^2\,\nabla\log\eta(X, s)\bigr]\mathrm dt + \beta\,\mathrm dW,
              \qquad s = T - t .

    The steps are even in :math:`s^{1/3}`: they shrink as s does, because a score may grow like 1/s.
    The weak error is of order 1 / `steps`.

    Args:
        sde: the noising process to reverse.
        score: score(y, s), evaluated at times in (stop, T] only.
        start: (..., d), draws from the law of Y(T), or from a normal law that is close to it.
        steps: number of steps, at least 1.
        stop: noising time at which to stop, in [0, T); early stopping is stop = ε > 0.
        generator: source of randomness on start's device; a fresh one if None.

    Returns:
        Draws of X(T - stop), (..., d).

    Raises:
        ValueError: no step, a stop outside [0, T), a score of the wrong shape.

    Examples:
        From noise to 1000 draws of a law with two modes, by its exact score.

        >>> import torch
        >>> from wpo_notes.mixture import GaussianMixture
        >>> from wpo_notes.sde import LinearSDE, sample_reverse_sde
        >>> law = GaussianMixture.from_variance(torch.tensor([[-2.0], [2.0]]), 0.1)
        >>> sde = LinearSDE.brownian(beta=1.0, horizon=10.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = sde.diffuse(law, 10.0).sample((1000,), generator=generator)
        >>> draws = sample_reverse_sde(sde, sde.score(law), start, steps=100, generator=generator)
        >>> draws.shape, bool((draws.abs() - 2).abs().max() < 2)
        (torch.Size([1000, 1]), True)
    """
    x = checked_points("start", start)
    _check_stop(sde, stop)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = make_generator(generator, x.device)
    root = np.linspace(sde.horizon ** (1 / _GRID_POWER), stop ** (1 / _GRID_POWER), steps + 1)
    times = [sde.horizon, *(float(time) for time in root[1:-1] ** _GRID_POWER), stop]
    for s, s_next in pairwise(times):
        white = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = _euler_maruyama_step(sde, score, x, s, s - s_next, white)
    return x


def _euler_maruyama_step(
    sde: LinearSDE, score: Score, x: Tensor, s: float, step: float, white: Tensor
) -> Tensor:
    rate, beta = _coefficients(sde, s)
    drift = rate * x + beta**2 * _evaluate(score, x, s)
    return x + step * drift + beta * step**0.5 * white


@torch.no_grad()
def sample_probability_flow(
    sde: LinearSDE,
    score: Score,
    start: Float[Tensor, "*batch d"],
    *,
    stop: float = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Float[Tensor, "*batch d"]:
    r"""Transport `start` from s = T down to s = `stop` along the probability-flow ODE.

    .. math:: \frac{\mathrm dX}{\mathrm ds} = -a(s) X - \tfrac12\beta(s)^2\,\nabla\log\eta(X, s)

    moves the law of Y(T) to that of Y(stop), like the reverse process, without noise.

    Args:
        sde: the noising process.
        score: score(y, s), evaluated at times in [stop, T]; it must exist at `stop`.
        start: (..., d), draws from the law of Y(T).
        stop: noising time at which to stop, in [0, T).
        rtol: relative tolerance of the adaptive solver (dopri5); if None, 1e-9 in float64 and
            1e-5 in float32.
        atol: absolute tolerance, in the data's units; if None, a tenth of the default `rtol`.
    """
    x = checked_points("start", start)
    _check_stop(sde, stop)
    return _solve(_velocity(sde, score, stop), x, (sde.horizon, stop), rtol, atol)


@torch.no_grad()
def log_prob_probability_flow(
    sde: LinearSDE,
    score: Score,
    x: Float[Tensor, "*batch d"],
    terminal_log_prob: Callable[[Tensor], Tensor],
    *,
    stop: float = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Log-likelihood of x under the probability-flow ODE of `score`, from s = `stop` up to s = T.

    .. math:: \log\eta(x, s_0) &= \log\eta(X(T), T) + \int_{s_0}^T \nabla\cdot v(X(s), s)\,\mathrm ds, \\
              v &= -aX - \tfrac12\beta^2\,\nabla\log\eta, \quad X(s_0) = x,

    with the exact divergence: d backward passes an evaluation, so for small d.

    Args:
        sde: the noising process.
        score: score(y, s), differentiable in y.
        x: (..., d).
        terminal_log_prob: log-density of the law at s = T, (..., d) -> (...).
        stop: the time s_0 of the law whose density is asked for, in [0, T).
        rtol: as in `sample_probability_flow`.
        atol: as in `sample_probability_flow`.
    """
    x = checked_points("x", x)
    _check_stop(sde, stop)
    velocity = _velocity(sde, score, stop)

    def augmented(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _with_divergence(lambda y: velocity(s, y), state[0])

    start = (x, torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device))
    end, change = _solve(augmented, start, (stop, sde.horizon), rtol, atol)
    return terminal_log_prob(end) + change


def _velocity(sde: LinearSDE, score: Score, stop: float) -> Callable[[Tensor, Tensor], Tensor]:
    def velocity(s: Tensor, x: Tensor) -> Tensor:
        # The solver steps past the end and interpolates back; and it rounds times to x's dtype.
        time = min(max(float(s), stop), sde.horizon)
        rate, beta = _coefficients(sde, time)
        return -rate * x - 0.5 * beta**2 * _evaluate(score, x, time)

    return velocity


def _with_divergence(field: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Field and divergence at x from one evaluation: the solver needs both, `pde.divergence` is one."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = field(x)
        columns = value.flatten(0, -2).sum(0)  # each row of the field depends on its own point only
        gradients = [torch.autograd.grad(column, x, retain_graph=True)[0] for column in columns]
    total: Any = sum(gradient[..., k] for k, gradient in enumerate(gradients))
    return value.detach(), total


def _solve(
    function: Callable[..., Any],
    start: _State,
    times: tuple[float, float],
    rtol: float | None,
    atol: float | None,
) -> _State:
    """Solve the ODE between the two times with dopri5; return the state at the end."""
    x = start if isinstance(start, Tensor) else start[0]
    default_rtol, default_atol = _TOLERANCE[x.dtype]
    rtol = default_rtol if rtol is None else checked_positive("rtol", rtol)
    atol = default_atol if atol is None else checked_positive("atol", atol)
    grid = torch.tensor(times, dtype=x.dtype, device=x.device)
    odeint = needed("torchdiffeq").odeint
    path = odeint(function, start, grid, rtol=rtol, atol=atol, method="dopri5")
    return path[-1] if isinstance(start, Tensor) else (path[0][-1], path[1][-1])


def _coefficients(sde: LinearSDE, s: float) -> tuple[float, float]:
    time = torch.tensor(s, dtype=torch.float64, device="cpu")
    return float(sde.drift_rate(time)), float(sde.diffusion(time))


def _evaluate(score: Score, x: Tensor, s: float) -> Tensor:
    value = score(x, s)
    if value.shape != x.shape:
        raise ValueError(
            f"score(y, s) must have the shape {tuple(x.shape)} of y, got {tuple(value.shape)}"
        )
    return value


def _check_stop(sde: LinearSDE, stop: float) -> None:
    if not 0 <= stop < sde.horizon:
        raise ValueError(
            f"stop must be a noising time in [0, T) = [0, {sde.horizon:g}), got {stop:g}"
        )
