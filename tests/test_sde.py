"""Noising processes and samplers, eqs. (1)-(2), against quadrature, ODEs for moments and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

from wpo_notes.metrics import energy_test
from wpo_notes.mixture import GaussianMixture
from wpo_notes.pde import time_derivative
from wpo_notes.sde import (
    LinearSDE,
    log_prob_probability_flow,
    sample_probability_flow,
    sample_reverse_sde,
)

BROWNIAN = LinearSDE.brownian(1.3, 0.8)
ORNSTEIN_UHLENBECK = LinearSDE.ornstein_uhlenbeck(0.7, 1.3, 2.0)
VARIANCE_PRESERVING = LinearSDE.variance_preserving(0.1, 8.0)
GENERAL = LinearSDE(lambda s: torch.sin(3 * s) - 0.2, lambda s: 1 + s**2, 1.5)
VARIANCE_EXPLODING = LinearSDE.variance_exploding(0.1, 3.0)
NAMED = [BROWNIAN, ORNSTEIN_UHLENBECK, VARIANCE_PRESERVING, VARIANCE_EXPLODING]
ALL = [*NAMED, GENERAL]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planar_mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    centers = torch.tensor([[-1.0, 0.5], [1.2, 0.0], [0.3, -1.1]], dtype=dtype)
    covariance = torch.tensor(
        [[[0.2, 0.08], [0.08, 0.3]], [[0.4, 0.0], [0.0, 0.2]], [[0.3, -0.1], [-0.1, 0.3]]],
        dtype=dtype,
    )
    log_weights = torch.tensor([0.5, 0.3, 0.2], dtype=dtype).log()
    return GaussianMixture.from_covariance(centers, covariance, log_weights=log_weights)


def line_mixture() -> GaussianMixture:
    centers = torch.tensor([[-1.0], [0.4], [1.5]], dtype=torch.float64)
    variance = torch.tensor([0.1, 0.3, 0.1], dtype=torch.float64)
    log_weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()
    return GaussianMixture.from_variance(centers, variance, log_weights=log_weights)


def line_cdf(mixture: GaussianMixture, x: torch.Tensor) -> np.ndarray:
    weights = mixture.log_weights.exp().numpy()
    std = 1 / mixture.precision_tril[:, 0, 0].numpy()
    return norm.cdf((x.numpy() - mixture.centers[:, 0].numpy()) / std) @ weights


# ---- moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL)
def test_moments_solve_their_differential_equations(sde):
    """m' = -a m and v' = -2 a v + β², from m = 1 and v = 0: Itô's formula, solved by SciPy."""

    def slope(s, state):
        time = torch.tensor(s, dtype=torch.float64)
        rate, beta = float(sde.drift_rate(time)), float(sde.diffusion(time))
        return [-rate * state[0], -2 * rate * state[1] + beta**2]

    times = np.linspace(0, sde.horizon, 5)
    solution = solve_ivp(slope, (0, sde.horizon), [1, 0], t_eval=times, rtol=1e-10, atol=1e-12)
    for s, mean_factor, variance in zip(times, *solution.y, strict=True):
        assert sde.mean_factor(float(s)) == pytest.approx(mean_factor, rel=1e-7)
        assert sde.variance(float(s)) == pytest.approx(variance, rel=1e-7, abs=1e-14)


@pytest.mark.parametrize("sde", NAMED)
def test_closed_forms_agree_with_quadrature(sde):
    by_quadrature = LinearSDE(sde.drift_rate, sde.diffusion, sde.horizon)
    s = torch.linspace(0, sde.horizon, 17, dtype=torch.float64)
    torch.testing.assert_close(sde.mean_factor(s), by_quadrature.mean_factor(s), rtol=1e-13, atol=0)
    torch.testing.assert_close(sde.variance(s), by_quadrature.variance(s), rtol=1e-12, atol=1e-16)


def test_named_cases():
    assert BROWNIAN.mean_factor(0.5) == 1
    assert BROWNIAN.variance(0.5) == pytest.approx(1.3**2 * 0.5, rel=1e-15)
    # The Ornstein-Uhlenbeck process with β² = 2a keeps the standard normal law.
    sde = LinearSDE.ornstein_uhlenbeck(0.6, math.sqrt(1.2), 3.0)
    assert sde.mean_factor(1.7) ** 2 + sde.variance(1.7) == pytest.approx(1, rel=1e-14)
    # A slow Ornstein-Uhlenbeck process is Brownian noising; expm1 keeps the digits.
    slow = LinearSDE.ornstein_uhlenbeck(1e-12, 1.3, 0.8)
    assert slow.variance(0.5) == pytest.approx(BROWNIAN.variance(0.5), rel=1e-11)
    sde = VARIANCE_PRESERVING
    assert sde.mean_factor(0.4) ** 2 + sde.variance(0.4) == pytest.approx(1, rel=1e-14)
    # B(1) is the mean of b's ends; with b of horizon 1.
    assert sde.mean_factor(1.0) == pytest.approx(math.exp(-0.25 * (0.1 + 8.0)), rel=1e-14)


def test_moments_keep_the_kind_of_number():
    assert isinstance(BROWNIAN.variance(0.5), float)
    # float32 rounds 0.8 up: the horizon itself must stay a legal time.
    s = torch.tensor([0.0, 0.8], dtype=torch.float32)
    assert float(s[1]) > BROWNIAN.horizon
    assert BROWNIAN.variance(s).dtype == torch.float32


@pytest.mark.parametrize("sde", ALL)
def test_noise_has_the_moments_of_the_transition_kernel(sde):
    # 40000 draws: five standard errors of the mean, sqrt(v / n), and of the variance, v sqrt(2 / n).
    n, s = 40_000, 0.6 * sde.horizon
    x0 = torch.tensor([1.5, -2.0], dtype=torch.float64)
    y = sde.noise(x0.expand(n, 2), s, generator=rng())
    variance = sde.variance(s)
    assert (y.mean(0) - sde.mean_factor(s) * x0).abs().max() < 5 * math.sqrt(variance / n)
    assert (y.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert y.mT.corrcoef()[0, 1].abs() < 5 / math.sqrt(n)


def test_noise_takes_a_time_for_each_point():
    times = torch.tensor([0.0, 0.2, 0.8], dtype=torch.float64).repeat(20_000, 1)
    y = BROWNIAN.noise(torch.zeros(20_000, 3, 1, dtype=torch.float64), times, generator=rng())
    assert (y[:, 0] == 0).all()
    expected = 1.3**2 * torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert (y[:, 1:, 0].var(0) / expected - 1).abs().max() < 5 * math.sqrt(2 / 20_000)


# ---- the law of Y(s) ----------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL)
def test_diffuse_is_the_integral_of_the_transition_kernel(sde):
    mixture, s = line_mixture(), 0.5 * sde.horizon
    std, mean_factor = math.sqrt(sde.variance(s)), sde.mean_factor(s)
    noised = sde.diffuse(mixture, s)
    for y in (-1.3, 0.6):

        def integrand(x, y=y):
            density = float(mixture.log_prob(torch.tensor([x], dtype=torch.float64)).exp())
            return density * norm.pdf(y, mean_factor * x, std)

        expected, _ = quad(integrand, -4, 4, epsabs=1e-9, epsrel=1e-9)
        value = float(noised.log_prob(torch.tensor([y], dtype=torch.float64)).exp())
        assert value == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("sde", [BROWNIAN, ORNSTEIN_UHLENBECK])
def test_diffuse_is_a_semigroup_when_the_coefficients_are_constant(sde):
    mixture, x = planar_mixture(), torch.randn(20, 2, dtype=torch.float64, generator=rng())
    twice = sde.diffuse(sde.diffuse(mixture, 0.3), 0.4)
    once = sde.diffuse(mixture, 0.7)
    torch.testing.assert_close(twice.log_prob(x), once.log_prob(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sde", ALL)
def test_law_solves_the_fokker_planck_equation(sde):
    r"""∂_s log η = a d + a y·∇log η + ½ β² Δη/η, the equation of (1) divided by η."""
    mixture, s = planar_mixture(), 0.37 * sde.horizon
    y = torch.randn(20, 2, dtype=torch.float64, generator=rng())
    change = time_derivative(lambda y, s: sde.diffuse(mixture, s).log_prob(y), y, s)
    time = torch.tensor(s, dtype=torch.float64)
    rate, beta = float(sde.drift_rate(time)), float(sde.diffusion(time))
    score, ratio = sde.diffuse(mixture, s).score_and_laplacian_ratio(y)
    expected = 2 * rate + rate * (y * score).sum(-1) + 0.5 * beta**2 * ratio
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)


def test_points_stand_for_their_empirical_distribution():
    points = torch.randn(7, 2, dtype=torch.float64, generator=rng())
    y = torch.randn(5, 2, dtype=torch.float64, generator=rng(1))
    # Eq. (23) with Gaussian weights, written out.
    variance = 1.3**2 * 0.3
    offset = y[:, None] - points
    weights = torch.softmax(-offset.square().sum(-1) / (2 * variance), -1)
    expected = -(weights[..., None] * offset).sum(1) / variance
    torch.testing.assert_close(BROWNIAN.score(points)(y, 0.3), expected, rtol=1e-12, atol=1e-12)
    scaled = ORNSTEIN_UHLENBECK.diffuse(points, 0.9)
    torch.testing.assert_close(scaled.centers, math.exp(-0.63) * points)


# ---- samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", NAMED)
def test_reverse_sde_ends_at_the_data(sde):
    mixture = planar_mixture()
    start = sde.diffuse(mixture, sde.horizon).sample((400,), generator=rng(1))
    x = sample_reverse_sde(sde, sde.score(mixture), start, steps=80, generator=rng(2))
    # Fixed seeds; under equal laws p < 0.01 has probability 0.01.
    assert energy_test(x, mixture.sample((400,), generator=rng(3)), generator=rng(4)) > 0.01
    # Power: samples displaced by 0.25, a third of a standard deviation, are told apart.
    assert energy_test(x + 0.25, mixture.sample((400,), generator=rng(3)), generator=rng(4)) < 0.01


def test_reverse_sde_has_weak_order_one():
    """Variance of the result against its exact value, for a normal law, whose score is linear."""
    sde = LinearSDE.ornstein_uhlenbeck(0.5, 1.0, 1.0)
    law = GaussianMixture.from_variance(torch.zeros(1, 1, dtype=torch.float64), 0.25)
    n, steps = 100_000, [4, 8, 16]
    start = sde.diffuse(law, 1.0).sample((n,), generator=rng(0))
    errors = [
        float(
            sample_reverse_sde(sde, sde.score(law), start, steps=k, generator=rng(k)).var() - 0.25
        )
        for k in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]
    # The smallest error is ten times the standard error 0.25 sqrt(2 / n).
    assert abs(errors[-1]) > 10 * 0.25 * math.sqrt(2 / n)
    assert slope == pytest.approx(-1, abs=0.2)


def test_reverse_sde_stops_where_told():
    points = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    start = BROWNIAN.diffuse(points, 0.8).sample((10_000,), generator=rng(0))
    x = sample_reverse_sde(
        BROWNIAN, BROWNIAN.score(points), start, steps=100, stop=0.02, generator=rng(1)
    )
    nearest = torch.cdist(x, points).argmin(1)
    variance = float((x - points[nearest]).square().mean())
    # Near its point the score is -(y - z) / (β² s), and Euler-Maruyama's variance has a recursion.
    grid = np.linspace(0.8 ** (1 / 3), 0.02 ** (1 / 3), 101) ** 3
    expected = 1.3**2 * 0.8
    for s, s_next in pairwise(grid):
        expected = ((s_next / s) ** 2) * expected + 1.3**2 * (s - s_next)
    # Four standard errors from 2 * 10000 normal numbers; the limit, variance β² stop, is near.
    assert variance == pytest.approx(expected, rel=4 * math.sqrt(2 / 20_000))
    assert variance == pytest.approx(1.3**2 * 0.02, rel=0.1)


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_reverse_sde_with_a_singular_score_does_not_overshoot(steps):
    # One training point: the score is -(y - z) / (β² s). The last step of the grid, from
    # s = T / steps³ to 0, lands on the point, up to its own noise β √s: seven deviations.
    z = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    times = []

    def score(y, s):
        times.append(s)
        return BROWNIAN.score(z)(y, s)

    start = BROWNIAN.diffuse(z, 0.8).sample((300,), generator=rng(0))
    x = sample_reverse_sde(BROWNIAN, score, start, steps=steps, generator=rng(1))
    assert (x - z).abs().max() < 7 * 1.3 * math.sqrt(0.8 / steps**3)
    assert times[0] == 0.8
    assert len(times) == steps
    assert all(later < earlier for earlier, later in pairwise(times))
    assert times[-1] == pytest.approx(0.8 / steps**3)


@pytest.mark.parametrize("sde", [BROWNIAN, GENERAL])
def test_probability_flow_keeps_quantiles(sde):
    """On the line the flow is increasing, so it maps quantile to quantile."""
    mixture = line_mixture()
    noised = sde.diffuse(mixture, sde.horizon)
    start = noised.sample((40,), generator=rng())
    x = sample_probability_flow(sde, sde.score(mixture), start)
    np.testing.assert_allclose(line_cdf(mixture, x), line_cdf(noised, start), atol=1e-6)


def test_probability_flow_of_a_normal_law_is_linear():
    mean = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    sde = ORNSTEIN_UHLENBECK
    law = GaussianMixture.from_variance(mean, 0.3)
    start = torch.randn(10, 2, dtype=torch.float64, generator=rng())
    for stop in (0.0, 0.4):

        def moments(s):
            factor = sde.mean_factor(s)
            return factor * mean, math.sqrt(0.3 * factor**2 + sde.variance(s))

        (mean_end, std_end), (mean_start, std_start) = moments(stop), moments(sde.horizon)
        expected = mean_end + std_end / std_start * (start - mean_start)
        x = sample_probability_flow(sde, sde.score(law), start, stop=stop)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sde", ALL)
def test_log_likelihood_along_the_flow_is_the_exact_one(sde):
    mixture = planar_mixture()
    x = mixture.sample((4, 5), generator=rng())
    terminal = sde.diffuse(mixture, sde.horizon)
    value = log_prob_probability_flow(sde, sde.score(mixture), x, terminal.log_prob)
    torch.testing.assert_close(value, mixture.log_prob(x), rtol=0, atol=1e-6)


def test_log_likelihood_of_the_law_stopped_early():
    mixture = planar_mixture()
    x = mixture.sample((20,), generator=rng())
    terminal = BROWNIAN.diffuse(mixture, BROWNIAN.horizon)
    value = log_prob_probability_flow(
        BROWNIAN, BROWNIAN.score(mixture), x, terminal.log_prob, stop=0.2
    )
    expected = BROWNIAN.diffuse(mixture, 0.2).log_prob(x)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_float32():
    mixture = planar_mixture(torch.float32)
    score = BROWNIAN.score(mixture)
    terminal = BROWNIAN.diffuse(mixture, BROWNIAN.horizon)
    x = mixture.sample((20,), generator=rng())
    value = log_prob_probability_flow(BROWNIAN, score, x, terminal.log_prob)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mixture.log_prob(x), rtol=0, atol=5e-3)
    flow = sample_probability_flow(BROWNIAN, score, x)
    exact = sample_probability_flow(BROWNIAN, BROWNIAN.score(planar_mixture()), x.double())
    assert flow.dtype == torch.float32
    torch.testing.assert_close(flow.double(), exact, rtol=0, atol=1e-3)
    assert sample_reverse_sde(BROWNIAN, score, x, steps=3).dtype == torch.float32
    assert BROWNIAN.noise(x, 0.3).dtype == torch.float32


def test_looser_tolerances_are_looser():
    mixture = planar_mixture()
    x = mixture.sample((10,), generator=rng())
    terminal = BROWNIAN.diffuse(mixture, BROWNIAN.horizon).log_prob
    errors = [
        (
            log_prob_probability_flow(
                BROWNIAN, BROWNIAN.score(mixture), x, terminal, rtol=tol, atol=tol
            )
            - mixture.log_prob(x)
        )
        .abs()
        .max()
        for tol in (1e-3, 1e-6)
    ]
    assert errors[0] > 10 * errors[1]


# ---- randomness, device, errors -----------------------------------------------------------------


def test_randomness_comes_from_the_generator_alone():
    mixture = planar_mixture()
    start = mixture.sample((5,), generator=rng())
    state = torch.get_rng_state()

    def draw(seed):
        generator = None if seed is None else rng(seed)
        noised = BROWNIAN.noise(start, 0.3, generator=generator)
        score = BROWNIAN.score(mixture)
        return noised, sample_reverse_sde(BROWNIAN, score, start, steps=4, generator=generator)

    for first, again, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert not torch.equal(draw(None)[0], draw(None)[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sde", ALL)
def test_no_tensor_lands_on_the_default_device(sde):
    mixture = planar_mixture()
    x = mixture.sample((5,), generator=rng())
    generator = rng()
    torch.set_default_device("meta")
    try:
        score = sde.score(mixture)
        results = [
            sde.noise(x, 0.3, generator=generator),
            sde.diffuse(x, 0.3).score(x),
            sample_reverse_sde(sde, score, x, steps=2, generator=generator),
            sample_probability_flow(sde, score, x, rtol=1e-3, atol=1e-3),
            log_prob_probability_flow(sde, score, x, mixture.log_prob, rtol=1e-3, atol=1e-3),
        ]
    finally:
        torch.set_default_device(None)
    assert all(result.device.type == "cpu" for result in results)


@pytest.mark.parametrize("name", ["rate", "beta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_named_cases_want_positive_numbers(name, value):
    arguments = {"rate": 1.0, "beta": 1.0, "horizon": 1.0} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive finite number, got"):
        LinearSDE.ornstein_uhlenbeck(**arguments)


def test_errors_say_what_is_wrong():
    ones = torch.ones_like
    with pytest.raises(ValueError, match="beta must be a positive finite number, got 0"):
        LinearSDE.brownian(0.0, 1.0)
    with pytest.raises(ValueError, match="horizon must be a positive finite number, got -1"):
        LinearSDE.brownian(1.0, -1.0)
    with pytest.raises(ValueError, match="beta_min must be a positive finite number"):
        LinearSDE.variance_preserving(0.0, 1.0)
    with pytest.raises(ValueError, match=r"std_max must be larger than std_min = 0.5, got 0.5"):
        LinearSDE.variance_exploding(0.5, 0.5)
    with pytest.raises(ValueError, match=r"diffusion must be positive .* got -0.5 at s = 0.5"):
        LinearSDE(ones, lambda s: torch.where(s < 0.5, 1.0, -0.5), 1.0)
    with pytest.raises(ValueError, match=r"drift_rate must be finite .* not at s = 0"):
        LinearSDE(lambda s: 1 / s, ones, 1.0)
    with pytest.raises(ValueError, match=r"drift_rate must map times .* lambda s: torch.full_like"):
        LinearSDE(lambda s: torch.tensor(1.0), ones, 1.0)


@pytest.mark.parametrize("s", [-0.1, 0.9, torch.tensor([0.1, 0.9])])
def test_times_outside_the_horizon_are_refused(s):
    with pytest.raises(ValueError, match=r"noising time in \[0, T\] = \[0, 0.8\].*s = T - t"):
        BROWNIAN.variance(s)


def test_sampler_errors_say_what_is_wrong():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"s must be a number or have shape \(3,\)"):
        BROWNIAN.noise(x, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"s must be positive for an empirical distribution"):
        BROWNIAN.diffuse(x, 0.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sample_reverse_sde(BROWNIAN, BROWNIAN.score(x), x, steps=0)
    with pytest.raises(
        ValueError, match=r"score\(y, s\) must have the shape \(3, 2\) of y, got \(3,\)"
    ):
        sample_reverse_sde(BROWNIAN, lambda y, s: y[:, 0], x, steps=1)
    for sampler in (
        lambda stop: sample_reverse_sde(BROWNIAN, BROWNIAN.score(x), x, steps=1, stop=stop),
        lambda stop: sample_probability_flow(BROWNIAN, BROWNIAN.score(x), x, stop=stop),
        lambda stop: log_prob_probability_flow(
            BROWNIAN, BROWNIAN.score(x), x, lambda y: y[:, 0], stop=stop
        ),
    ):
        for stop in (-0.1, 0.8):
            with pytest.raises(ValueError, match=r"stop must be a noising time in \[0, T\)"):
                sampler(stop)
    with pytest.raises(ValueError, match="rtol must be a positive finite number"):
        sample_probability_flow(BROWNIAN, BROWNIAN.score(x), x, stop=0.1, rtol=0.0)
    with pytest.raises(ValueError, match="start must be finite"):
        sample_probability_flow(BROWNIAN, BROWNIAN.score(x), x / 0)


def test_probability_flow_asks_for_no_score_before_the_stop():
    # A score may not exist there; the adaptive solver itself steps past the end of its interval.
    mixture, sde, stop = planar_mixture(), BROWNIAN, 0.3
    times = []

    def score(y, s):
        times.append(s)
        return sde.score(mixture)(y, s)

    x = mixture.sample((3,), generator=rng())
    sample_probability_flow(sde, score, x, stop=stop)
    log_prob_probability_flow(sde, score, x, mixture.log_prob, stop=stop)
    assert min(times) == stop
    assert max(times) == sde.horizon
