"""The kernel formula, its inverse and its objective against Gaussian closed forms and identities."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from wpo_notes import proximal
from wpo_notes.mixture import GaussianMixture
from wpo_notes.proximal import (
    inverse_kernel_formula,
    kernel_formula,
    mean_field_objective,
    value_function,
)

FLOAT64 = {"dtype": torch.float64, "device": "cpu"}


def line(half_width: float, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-half_width, half_width, n, **FLOAT64)
    return x[:, None], torch.full((n,), float(x[1] - x[0]), **FLOAT64)


def square(half_width: float, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-half_width, half_width, n, **FLOAT64)
    return torch.cartesian_prod(x, x), torch.full((n * n,), float(x[1] - x[0]) ** 2, **FLOAT64)


def normal(points: torch.Tensor, mean, covariance) -> torch.Tensor:
    law = torch.distributions.MultivariateNormal(
        torch.as_tensor(mean, **FLOAT64), torch.as_tensor(covariance, **FLOAT64)
    )
    return law.log_prob(points).exp()


def double_well(points: torch.Tensor) -> torch.Tensor:
    return (points[:, 0] ** 2 - 1) ** 2


# ---- closed forms -----------------------------------------------------------------------------
# For V(x) = (x - m)'A(x - m)/2 the law of x given y has log-density
# -(x - m)'A(x - m)/4γ - |x - y|²/4γT: precision (A + I/T)/2γ and mean (A + I/T)^-1 (A m + y/T).


@pytest.mark.parametrize(("horizon", "gamma"), [(0.7, 0.2), (2.0, 0.05)])
def test_gaussian_step_in_one_dimension(horizon, gamma):
    a, m, mean0, var0 = 1.5, 0.4, -0.8, 0.5
    points, weights = line(7.0, 400)
    rho0 = normal(points, [mean0], [[var0]])
    result = kernel_formula(
        rho0, 0.5 * a * (points[:, 0] - m) ** 2, points, weights, horizon=horizon, gamma=gamma
    )
    shrink = 1 / (1 + a * horizon)
    mean = shrink * (a * horizon * m + mean0)
    var = shrink**2 * var0 + shrink * 2 * gamma * horizon
    # The trapezoidal rule is spectrally accurate here; 1e-10 leaves room for rounding only.
    torch.testing.assert_close(result, normal(points, [mean], [[var]]), rtol=0, atol=1e-10)


def test_gaussian_step_in_two_dimensions():
    horizon, gamma = 0.8, 0.3
    matrix = torch.tensor([[2.0, 0.6], [0.6, 1.0]], **FLOAT64)
    center = torch.tensor([0.3, -0.2], **FLOAT64)
    mean0 = torch.tensor([-0.5, 0.4], **FLOAT64)
    cov0 = torch.tensor([[0.5, -0.2], [-0.2, 0.4]], **FLOAT64)
    points, weights = square(4.5, 34)
    offset = points - center
    potential = 0.5 * torch.einsum("ni,ij,nj->n", offset, matrix, offset)
    result = kernel_formula(
        normal(points, mean0, cov0), potential, points, weights, horizon=horizon, gamma=gamma
    )
    shrink = torch.linalg.inv(torch.eye(2, **FLOAT64) + horizon * matrix)
    mean = shrink @ (horizon * matrix @ center + mean0)
    covariance = shrink @ cov0 @ shrink + 2 * gamma * horizon * shrink
    # Trapezoidal rule: spacing below the narrowest standard deviation, range above five of them.
    torch.testing.assert_close(result, normal(points, mean, covariance), rtol=0, atol=1e-8)


def test_value_function_of_a_quadratic_potential():
    # e^{-U/2γ} is a Gaussian integral: U = a x²/2(1 + aT) + γ log(1 + aT).
    a, horizon, gamma = 1.2, 0.9, 0.25
    points, weights = line(8.0, 800)
    x = torch.linspace(-2, 2, 30, **FLOAT64).reshape(5, 6, 1)
    u = value_function(
        0.5 * a * points[:, 0] ** 2, points, weights, x, horizon=horizon, gamma=gamma
    )
    exact = 0.5 * a * x[..., 0] ** 2 / (1 + a * horizon) + gamma * math.log(1 + a * horizon)
    assert u.shape == (5, 6)
    torch.testing.assert_close(u, exact, rtol=0, atol=1e-10)


def test_value_function_of_a_double_well_against_quadrature():
    horizon, gamma, at = 0.4, 0.15, 0.3
    points, weights = line(4.0, 600)
    u = value_function(
        double_well(points),
        points,
        weights,
        torch.tensor([at], **FLOAT64),
        horizon=horizon,
        gamma=gamma,
    )
    density = torch.distributions.Normal(
        torch.tensor(at, **FLOAT64), math.sqrt(2 * gamma * horizon)
    )

    def integrand(z: float) -> float:
        kernel = density.log_prob(torch.tensor(z, **FLOAT64)).exp()
        return float(kernel) * math.exp(-((z * z - 1) ** 2) / (2 * gamma))

    expected = -2 * gamma * math.log(quad(integrand, -4, 4, epsabs=1e-13)[0])
    assert float(u) == pytest.approx(expected, abs=1e-10)


def test_small_gamma_tends_to_the_push_forward_by_the_proximal_map():
    # For V = x²/2 the proximal map is x -> x/(1 + T); between centred normal laws W2 is the
    # difference of standard deviations, here δ/2σ with δ = 2γT/(1 + T): first order in γ.
    horizon = 1.0
    points, weights = line(5.0, 1200)
    rho0 = normal(points, [0.0], [[1.0]])
    gammas = [0.02, 0.01, 0.005]
    distances = []
    for gamma in gammas:
        rho = kernel_formula(
            rho0, 0.5 * points[:, 0] ** 2, points, weights, horizon=horizon, gamma=gamma
        )
        std = math.sqrt(float((weights * rho * points[:, 0] ** 2).sum()))
        distances.append(abs(std - 1 / (1 + horizon)))
    slope = np.polyfit(np.log(gammas), np.log(distances), 1)[0]
    # The second-order term δ²/8σ³ bends the line by less than 2 % at the largest gamma.
    assert slope == pytest.approx(1.0, abs=0.03)
    assert distances[-1] < 0.005 * 1.05


# ---- identities ---------------------------------------------------------------------------------


def test_mass_is_conserved_on_scattered_points():
    # Any points and weights: each column of the transition matrix is a discrete law by construction.
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 5, generator=generator, **FLOAT64)
    weights = torch.rand(300, generator=generator, **FLOAT64) + 0.1
    rho0 = torch.rand(300, generator=generator, **FLOAT64)
    potential = 50 * torch.randn(300, generator=generator, **FLOAT64)
    result = kernel_formula(rho0, potential, points, weights, horizon=0.01, gamma=0.1)
    assert float(weights @ result) == pytest.approx(float(weights @ rho0), rel=1e-12)


def test_forward_after_inverse_returns_the_target():
    mixture = GaussianMixture.from_variance(
        torch.tensor([[-1.5], [0.0], [1.0]], **FLOAT64),
        torch.tensor([0.05, 0.02, 0.2], **FLOAT64),
    )
    beta, horizon = 1.3, 0.8
    points, weights = line(12.0, 1200)
    potential = -(beta**2) * mixture.log_prob(points)
    setting = {"horizon": horizon, "gamma": beta**2 / 2}
    noised = inverse_kernel_formula(potential, points, weights, **setting)
    diffused = mixture.diffuse(beta**2 * horizon).log_prob(points).exp()
    torch.testing.assert_close(noised, diffused, rtol=0, atol=1e-9)
    result = kernel_formula(noised, potential, points, weights, **setting)
    torch.testing.assert_close(result, mixture.log_prob(points).exp(), rtol=0, atol=1e-6)


def test_semigroup_of_value_functions():
    # U(., T - a - b) from V is U from the potential U(., T - a) over b.
    points, weights = line(6.0, 400)
    x = torch.linspace(-1, 1, 7, **FLOAT64)[:, None]
    half = value_function(double_well(points), points, weights, points, horizon=0.3, gamma=0.2)
    twice = value_function(half, points, weights, x, horizon=0.5, gamma=0.2)
    once = value_function(double_well(points), points, weights, x, horizon=0.8, gamma=0.2)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-9)


def test_zero_density_and_infinite_potential():
    points, weights = line(3.0, 200)
    inside = points[:, 0].abs() < 1
    rho0 = inside.double().requires_grad_()
    potential = torch.where(inside, 0.0, math.inf).double()
    result = kernel_formula(rho0, potential, points, weights, horizon=0.5, gamma=0.5)
    assert bool((result[~inside] == 0).all())
    assert bool((result[inside] > 0).all())
    result.square().sum().backward()
    assert bool(torch.isfinite(rho0.grad).all())


def test_far_points_stay_finite():
    # Heat-kernel exponents of order 1e5, whose exponentials are all zero in floating point.
    points = torch.tensor([[0.0], [1.0], [400.0]], **FLOAT64)
    weights = torch.ones(3, **FLOAT64)
    potential = torch.tensor([0.0, 0.0, math.inf], **FLOAT64)
    rho0 = torch.tensor([0.0, 0.0, 1.0], **FLOAT64)
    result = kernel_formula(rho0, potential, points, weights, horizon=0.5, gamma=0.5)
    # The nearer end is preferred by exp((400² - 399²)/4γT) to one.
    torch.testing.assert_close(result, torch.tensor([0.0, 1.0, 0.0], **FLOAT64), rtol=0, atol=1e-15)


def test_blocks_do_not_change_result_or_gradient(monkeypatch):
    points, weights = square(2.0, 12)
    potential = (points.square().sum(-1) - 1) ** 2
    rho0 = normal(points, [0.0, 0.5], [[0.3, 0.0], [0.0, 0.3]])

    def run():
        v = potential.clone().requires_grad_()
        rho = kernel_formula(rho0, v, points, weights, horizon=0.3, gamma=0.2)
        (rho.square() @ weights).backward()
        inverse = inverse_kernel_formula(potential, points, weights, horizon=0.3, gamma=0.2)
        return rho.detach(), v.grad, inverse

    whole = run()
    monkeypatch.setattr(proximal, "_BLOCK_ELEMENTS", 7 * points.numel())
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradients():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(6, 2, generator=generator, **FLOAT64).requires_grad_()
    weights = (torch.rand(6, generator=generator, **FLOAT64) + 0.5).requires_grad_()
    potential = torch.randn(6, generator=generator, **FLOAT64).requires_grad_()
    rho0 = torch.rand(6, generator=generator, **FLOAT64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: kernel_formula(*tensors, horizon=0.7, gamma=0.4),
        (rho0, potential, points, weights),
    )


def test_float32_stays_close_to_float64():
    points, weights = line(4.0, 300)
    rho0, potential = normal(points, [0.5], [[0.2]]), double_well(points)
    setting = {"horizon": 0.5, "gamma": 0.1}
    exact = kernel_formula(rho0, potential, points, weights, **setting)
    single = kernel_formula(
        rho0.float(), potential.float(), points.float(), weights.float(), **setting
    )
    assert single.dtype == torch.float32
    # Exponents of the entries that matter are below 100: 100 times 6e-8.
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_device_comes_from_the_inputs():
    # A tensor made without device= would land on meta and fail.
    points, weights = line(3.0, 60)
    rho0, potential = normal(points, [0.0], [[0.3]]), double_well(points)
    setting = {"horizon": 0.5, "gamma": 0.3}
    torch.set_default_device("meta")
    try:
        rho = kernel_formula(rho0, potential, points, weights, **setting)
        noised = inverse_kernel_formula(potential, points, weights, **setting)
        u = value_function(potential, points, weights, points, **setting)
        j = mean_field_objective(rho, rho0, potential, points, weights, **setting)
    finally:
        torch.set_default_device(None)
    assert {t.device.type for t in (rho, noised, u, j)} == {"cpu"}


# ---- the objective ------------------------------------------------------------------------------


def setup_objective():
    points, weights = line(2.5, 120)
    rho0 = normal(points, [0.4], [[0.15]])
    setting = {"horizon": 0.6, "gamma": 0.2}
    return rho0, double_well(points), points, weights, setting


def test_objective_at_the_minimum_is_the_mean_of_the_value_function():
    rho0, potential, points, weights, setting = setup_objective()
    rho = kernel_formula(rho0, potential, points, weights, **setting)
    least = mean_field_objective(rho, rho0, potential, points, weights, **setting)
    u = value_function(potential, points, weights, points, **setting)
    assert float(least) == pytest.approx(float((weights * rho0) @ u), abs=1e-10)


def test_kernel_formula_minimises_the_objective():
    rho0, potential, points, weights, setting = setup_objective()
    rho = kernel_formula(rho0, potential, points, weights, **setting)
    least = mean_field_objective(rho, rho0, potential, points, weights, **setting)
    for direction in (torch.sin(3 * points[:, 0]), torch.tanh(points[:, 0]), points[:, 0] ** 2):
        centred = direction - (weights * rho) @ direction / (weights @ rho)
        gains = []
        for size in (0.04, -0.04, 0.02, -0.02):
            perturbed = rho * (1 + size * centred / centred.abs().max())
            assert float(weights @ perturbed) == pytest.approx(float(weights @ rho), rel=1e-12)
            j = mean_field_objective(perturbed, rho0, potential, points, weights, **setting)
            gains.append(float(j - least))
        assert min(gains) > 1e-7  # Sinkhorn's error is of order 1e-11
        # Even part: second order, a factor of 4 (the next even term is of fourth order);
        # odd part: no first-order term, the rest is of third order.
        assert (gains[0] + gains[1]) / (gains[2] + gains[3]) == pytest.approx(4, abs=0.02)
        assert abs(gains[0] - gains[1]) < 0.05 * (gains[0] + gains[1])


def test_kinetic_energy_between_normal_laws():
    # V = 0 leaves the Schrödinger problem between N(0, p) and N(0, q), whose optimal plan is the
    # normal law with correlation term c = (sqrt(σ⁴ + 4pq) - σ²)/2, σ² = 2γT.
    p, q, horizon, gamma = 0.3, 0.5, 0.8, 0.15
    points, weights = line(6.0, 250)
    rho0, terminal = normal(points, [0.0], [[p]]), normal(points, [0.0], [[q]])
    j = mean_field_objective(
        terminal,
        rho0,
        torch.zeros_like(rho0),
        points,
        weights,
        horizon=horizon,
        gamma=gamma,
    )
    s2 = 2 * gamma * horizon
    c = 0.5 * (math.sqrt(s2**2 + 4 * p * q) - s2)
    # KL(plan | N(0, p) ⊗ heat kernel): entropies of a bivariate normal plus the mean of |x-y|²/2σ².
    divergence = -0.5 * math.log((p * q - c * c) / (p * s2)) - 1 + 0.5 + (p + q - 2 * c) / (2 * s2)
    assert float(j) == pytest.approx(2 * gamma * divergence, abs=1e-9)


def test_objective_is_infinite_where_the_potential_is():
    rho0, potential, points, weights, setting = setup_objective()
    walled = torch.where(points[:, 0] > 1, math.inf, potential)
    j = mean_field_objective(rho0, rho0, walled, points, weights, **setting)
    assert float(j) == math.inf
    rho = kernel_formula(rho0, walled, points, weights, **setting)
    least = mean_field_objective(rho, rho0, walled, points, weights, **setting)
    u = value_function(walled, points, weights, points, **setting)
    assert float(least) == pytest.approx(float((weights * rho0) @ u), abs=1e-10)


# ---- errors -------------------------------------------------------------------------------------


@pytest.fixture
def _no_jaxtyping(monkeypatch):
    # Users run without run-time type checks: test the package's own messages.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def valid():
    points, weights = line(2.0, 8)
    return {
        "rho0": torch.ones(8, **FLOAT64),
        "potential": double_well(points),
        "points": points,
        "weights": weights,
        "horizon": 0.5,
        "gamma": 0.5,
    }


def with_entry(name: str, index: int, value: float) -> dict:
    tensor = valid()[name].clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"horizon": 0.0}, ValueError, "horizon must be a positive finite number, got 0.0"),
        ({"gamma": -1.0}, ValueError, "gamma must be a positive"),
        ({"gamma": math.nan}, ValueError, "gamma must be a positive"),
        ({"points": torch.ones(8, **FLOAT64)}, ValueError, r"use points\[:, None\]"),
        ({"points": torch.ones(8, 1, dtype=torch.int64)}, TypeError, "points must have dtype"),
        ({"rho0": torch.ones(7, **FLOAT64)}, ValueError, r"rho0 must have shape \(8,\)"),
        ({"rho0": torch.ones(8, dtype=torch.float32)}, TypeError, "points' dtype and device"),
        ({"rho0": torch.zeros(8, **FLOAT64)}, ValueError, "rho0 must have positive mass"),
        ({"rho0": [1.0] * 8}, TypeError, "rho0 must be a torch tensor"),
        (with_entry("rho0", 3, -0.5), ValueError, "rho0 must be a density.*got -0.5"),
        (with_entry("rho0", 3, math.nan), ValueError, "rho0 must be finite"),
        (with_entry("weights", 2, 0.0), ValueError, "weights must be positive, got 0"),
        (with_entry("weights", 2, math.inf), ValueError, "weights must be finite"),
        (with_entry("potential", 4, math.nan), ValueError, r"potential\[4\] is nan"),
        (with_entry("potential", 4, -math.inf), ValueError, r"potential\[4\] is -inf"),
        ({"potential": torch.full((8,), math.inf, **FLOAT64)}, ValueError, "all of it is"),
    ],
)
@pytest.mark.usefixtures("_no_jaxtyping")
def test_errors_of_the_kernel_formula(change, error, message):
    with pytest.raises(error, match=message):
        kernel_formula(**(valid() | change))


@pytest.mark.usefixtures("_no_jaxtyping")
def test_errors_of_the_others():
    arguments = valid()
    rho0 = arguments.pop("rho0")
    with pytest.raises(ValueError, match=r"event size 1"):
        value_function(x=torch.zeros(3, 2, **FLOAT64), **arguments)
    with pytest.raises(TypeError, match="points' dtype"):
        value_function(x=torch.zeros(3, 1, dtype=torch.float32), **arguments)
    with pytest.raises(ValueError, match="weights must have shape"):
        inverse_kernel_formula(**(arguments | {"weights": rho0[:3]}))
    with pytest.raises(ValueError, match="terminal must have the mass of rho0"):
        mean_field_objective(1.01 * rho0, rho0, **arguments)
    with pytest.raises(ValueError, match="terminal must be a density"):
        mean_field_objective(-rho0, rho0, **arguments)


def test_sinkhorn_that_does_not_converge_says_so(monkeypatch):
    rho0, potential, points, weights, setting = setup_objective()
    monkeypatch.setattr(proximal, "_SINKHORN_STEPS", 3)
    with pytest.raises(RuntimeError, match=r"Sinkhorn's iteration missed .* after 3 steps"):
        mean_field_objective(rho0, rho0.flip(0), potential, points, weights, **setting)
