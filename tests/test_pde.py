"""Residuals against closed forms that do and do not solve the equations; solvers against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from wpo_notes import pde
from wpo_notes.mixture import GaussianMixture

DTYPE = torch.float64
BETA = 1.3
HORIZON = 0.8
GAMMA = 0.3


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def heat_kernel(x: Tensor, variance: Tensor | float) -> Tensor:
    """N(0, variance I) at x."""
    variance = torch.as_tensor(variance, dtype=x.dtype)
    d = x.shape[-1]
    return torch.exp(-x.square().sum(-1) / (2 * variance)) / (2 * math.pi * variance) ** (d / 2)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    root = points(7, 2, 2, seed=1)
    return GaussianMixture.from_covariance(
        points(7, 2, seed=2),
        root @ root.mT + 0.3 * torch.eye(2, dtype=DTYPE),
        log_weights=points(7, seed=3),
    )


# ---- derivatives ----------------------------------------------------------------------------------


def test_gradient_is_the_mixtures_score(mixture):
    x = points(3, 4, 2)
    torch.testing.assert_close(pde.gradient(mixture.log_prob, x), mixture.score(x))


def test_divergence_is_the_trace_of_the_jacobian():
    matrix = points(5, 5, seed=4)

    def field(x: Tensor) -> Tensor:
        return torch.tanh(x @ matrix) * x.square().sum(-1, keepdim=True)

    x = points(6, 5)
    jacobian = torch.stack([torch.func.jacrev(field)(row) for row in x])
    expected = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(pde.divergence(field, x), expected)


def test_laplacian_is_the_trace_of_the_hessian_and_the_closed_form(mixture):
    x = points(6, 2)
    expected = mixture.laplacian_ratio(x) * mixture.log_prob(x).exp()
    torch.testing.assert_close(pde.laplacian(lambda y: mixture.log_prob(y).exp(), x), expected)
    z = points(6, 3)
    torch.testing.assert_close(
        pde.laplacian(lambda y: y.prod(-1) + y.pow(4).sum(-1), z), 12 * z.square().sum(-1)
    )


def test_derivatives_nest_and_leave_no_graph():
    x = points(4, 3)
    bilaplacian = pde.laplacian(lambda y: pde.laplacian(lambda z: z.pow(4).sum(-1), y), x)
    torch.testing.assert_close(bilaplacian, torch.full((4,), 72.0, dtype=DTYPE))
    assert not bilaplacian.requires_grad


def test_derivatives_of_a_constant_are_zero():
    x = points(4, 3)
    assert (pde.laplacian(lambda y: torch.ones_like(y[..., 0]), x) == 0).all()


def test_derivatives_are_differentiable_in_parameters():
    x = points(4, 3)
    scale = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    pde.laplacian(lambda y: scale**2 * y.square().sum(-1), x).sum().backward()
    torch.testing.assert_close(scale.grad, torch.tensor(4.0 * 2 * 3 * 4, dtype=DTYPE))


def test_time_derivative_takes_one_time_or_one_for_each_point():
    x, t = points(5, 2), points(5, seed=6)

    def f(y: Tensor, time: Tensor) -> Tensor:
        return torch.sin(time) * y[..., 0] + time**2

    torch.testing.assert_close(pde.time_derivative(f, x, t), t.cos() * x[..., 0] + 2 * t)
    torch.testing.assert_close(pde.time_derivative(f, x, 0.3), math.cos(0.3) * x[..., 0] + 0.6)


# ---- residuals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_residuals_vanish_for_the_heat_kernel(d):
    def eta(x: Tensor, s: Tensor) -> Tensor:
        return heat_kernel(x, 0.4 + BETA**2 * s)

    def u(x: Tensor, t: Tensor) -> Tensor:
        return -(BETA**2) * eta(x, HORIZON - t).log()

    def rho(x: Tensor, t: Tensor) -> Tensor:
        return eta(x, HORIZON - t)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -(BETA**2) * x / (0.4 + BETA**2 * (HORIZON - t))

    x = points(20, d)
    for t in (0.0, 0.35, HORIZON):
        assert pde.heat_residual(eta, x, t, beta=BETA).abs().max() < 1e-13
        assert pde.hjb_residual(u, x, t, beta=BETA).abs().max() < 1e-12
        assert pde.fokker_planck_residual(rho, drift, x, t, beta=BETA).abs().max() < 1e-13


def test_residuals_vanish_for_a_diffused_mixture(mixture):
    def eta(x: Tensor, s: Tensor) -> Tensor:
        return mixture.diffuse(BETA**2 * s).log_prob(x).exp()

    def u(x: Tensor, t: Tensor) -> Tensor:
        return -(BETA**2) * mixture.diffuse(BETA**2 * (HORIZON - t)).log_prob(x)

    def rho(x: Tensor, t: Tensor) -> Tensor:
        return eta(x, HORIZON - t)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return BETA**2 * mixture.diffuse(BETA**2 * (HORIZON - t)).score(x)

    x = 2 * points(30, 2)
    for t in (0.0, 0.35, 0.79):
        assert pde.heat_residual(eta, x, t, beta=BETA).abs().max() < 1e-12
        assert pde.hjb_residual(u, x, t, beta=BETA).abs().max() < 1e-10
        assert pde.fokker_planck_residual(rho, drift, x, t, beta=BETA).abs().max() < 1e-12


def test_hjb_residual_of_the_quadratic_closed_form_with_a_time_for_each_point():
    """V = |x|^2 / (2 a) gives U = |x|^2 / (2 (a + T - t)) + gamma d log((a + T - t) / a)."""

    def u(x: Tensor, t: Tensor) -> Tensor:
        scale = 0.6 + HORIZON - t
        entropy = 0.5 * BETA**2 * x.shape[-1] * torch.log(scale / 0.6)
        return x.square().sum(-1) / (2 * scale) + entropy

    x = points(9, 3)
    t = torch.linspace(0, HORIZON, 9, dtype=DTYPE)
    assert pde.hjb_residual(u, x, t, beta=BETA).abs().max() < 1e-12


def test_residuals_of_wrong_solutions_are_what_theory_says():
    x = points(20, 2)
    s = 0.5

    def too_fast(x: Tensor, s: Tensor) -> Tensor:
        return heat_kernel(x, 0.4 + 2 * BETA**2 * s)

    lap = pde.laplacian(lambda y: too_fast(y, s), x)
    residual = pde.heat_residual(too_fast, x, s, beta=BETA)
    torch.testing.assert_close(residual, 0.5 * BETA**2 * lap)
    assert residual.abs().max() > 0.01

    def eta(x: Tensor, s: Tensor) -> Tensor:
        return heat_kernel(x, 0.4 + BETA**2 * s)

    # Without the factor of beta^2 in U = -beta^2 log eta, beta^2 - 1 of the half square remains.
    residual = pde.hjb_residual(lambda y, t: -eta(y, HORIZON - t).log(), x, s, beta=BETA)
    square = (x / (0.4 + BETA**2 * (HORIZON - s))).square().sum(-1)
    torch.testing.assert_close(residual, 0.5 * (1 - BETA**2) * square)
    assert residual.abs().max() > 0.01

    # Without it in the drift, div(eta grad log eta) = lap eta remains, beta^2 - 1 times.
    residual = pde.fokker_planck_residual(
        lambda y, t: eta(y, HORIZON - t),
        lambda y, t: -y / (0.4 + BETA**2 * (HORIZON - t)),
        x,
        s,
        beta=BETA,
    )
    lap = pde.laplacian(lambda y: eta(y, HORIZON - s), x)
    torch.testing.assert_close(residual, (1 - BETA**2) * lap)
    assert residual.abs().max() > 0.01


# ---- grids ------------------------------------------------------------------------------------------


def centres(n: int, half_width: float) -> tuple[Tensor, float]:
    spacing = 2 * half_width / n
    return -half_width + spacing * (torch.arange(n, dtype=DTYPE) + 0.5), spacing


def wavy(x: Tensor, half_width: float) -> Tensor:
    """A potential whose normal derivative is zero at the walls, so that its mirror image is smooth."""
    angle = math.pi * x / half_width
    return torch.cos(angle) + 0.5 * torch.cos(2 * angle)


def cole_hopf(potential: Tensor, spacing: float, remaining: float) -> Tensor:
    heat = pde.heat_semigroup(torch.exp(-potential / (2 * GAMMA)), spacing, 2 * GAMMA * remaining)
    return -2 * GAMMA * heat.log()


def kernel_formula(potential: Tensor, initial: Tensor, spacing: float, horizon: float) -> Tensor:
    """Terminal density of (11): e^{-V/2 gamma} times the flow of rho_0 over the flow of that factor."""
    gibbs = torch.exp(-potential / (2 * GAMMA))
    variance = 2 * GAMMA * horizon
    ratio = initial / pde.heat_semigroup(gibbs, spacing, variance)
    return gibbs * pde.heat_semigroup(ratio, spacing, variance)


def observed_order(errors: list[float]) -> list[float]:
    """Order between successive grids, each twice as fine."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("mode", [0, 1, 5])
def test_semigroup_damps_each_cosine_by_its_exact_factor(mode):
    x, spacing = centres(40, 2.0)
    wavenumber = mode * math.pi / 4.0
    wave = torch.cos(wavenumber * (x + 2.0))
    expected = math.exp(-0.5 * 0.7 * wavenumber**2) * wave
    torch.testing.assert_close(pde.heat_semigroup(wave, spacing, 0.7), expected, rtol=0, atol=1e-14)


def test_semigroup_of_a_gaussian_away_from_the_walls():
    x, spacing = centres(200, 8.0)
    flowed = pde.heat_semigroup(heat_kernel(x[:, None], 0.25), spacing, 0.5)
    torch.testing.assert_close(flowed, heat_kernel(x[:, None], 0.75), rtol=0, atol=1e-14)


def test_semigroup_in_the_plane_is_scipys_cosine_transform():
    values = points(12, 17)
    spacing, variance = 0.3, 0.2
    spectrum = dctn(values.numpy(), type=2)
    square = sum(
        np.reshape((math.pi * np.arange(n) / (n * spacing)) ** 2, shape)
        for n, shape in ((12, (-1, 1)), (17, (1, -1)))
    )
    expected = torch.from_numpy(idctn(np.exp(-0.5 * variance * square) * spectrum, type=2))
    torch.testing.assert_close(pde.heat_semigroup(values, spacing, variance), expected)


def test_semigroup_adds_variances_keeps_the_sum_and_starts_at_the_identity():
    values = points(20, 30)
    twice = pde.heat_semigroup(pde.heat_semigroup(values, 0.1, 0.02), 0.1, 0.05)
    torch.testing.assert_close(pde.heat_semigroup(values, 0.1, 0.07), twice)
    torch.testing.assert_close(twice.sum(), values.sum())
    torch.testing.assert_close(pde.heat_semigroup(values, 0.1, 0.0), values)


def test_hjb_converges_to_the_cole_hopf_solution_with_order_two():
    times = torch.tensor([0.0, 0.5, 1.0], dtype=DTYPE)
    errors = []
    for n in (25, 50, 100):
        x, spacing = centres(n, 5.0)
        potential = wavy(x, 5.0)
        solution = pde.solve_hjb(potential, spacing, times, gamma=GAMMA)
        torch.testing.assert_close(solution[-1], potential, rtol=0, atol=0)
        errors.append(float((solution[0] - cole_hopf(potential, spacing, 1.0)).abs().max()))
    # 1.99 and 2.00 were measured; the integrator's error is 1e-4 of the last grid's.
    assert min(observed_order(errors)) > 1.9
    assert errors[-1] < 1e-3


def test_hjb_does_not_depend_on_what_memory_held(monkeypatch: pytest.MonkeyPatch, recwarn):
    """SciPy's BDF leaves differences unset that its first step subtracts."""
    x, spacing = centres(20, 5.0)
    times = torch.tensor([0.0, 1.0], dtype=DTYPE)
    expected = pde.solve_hjb(wavy(x, 5.0), spacing, times, gamma=GAMMA)
    empty = np.empty

    def signalling(shape, dtype=float, **options):
        """NaN on which every operation is invalid, wherever nothing is written."""
        values = empty(shape, dtype, **options)
        if values.dtype == np.float64:
            values.view(np.int64)[...] = 0x7FF0000000000001
        return values

    monkeypatch.setattr(np, "empty", signalling)
    solution = pde.solve_hjb(wavy(x, 5.0), spacing, times, gamma=GAMMA)
    torch.testing.assert_close(solution, expected, rtol=0, atol=0)
    assert not recwarn.list


def test_hjb_of_a_quadratic_potential_away_from_the_walls():
    x, spacing = centres(200, 6.0)
    times = torch.tensor([0.2, 1.0], dtype=DTYPE)
    solution = pde.solve_hjb(x.square() / 2, spacing, times, gamma=GAMMA)
    expected = x.square() / (2 * 1.8) + GAMMA * math.log(1.8)
    inside = x.abs() < 3
    # The face differences of x^2/2 square to (x -+ h/2)^2: an error of h^2/8 at first order.
    torch.testing.assert_close(solution[0, inside], expected[inside], rtol=0, atol=spacing**2)


def test_hjb_in_the_plane_is_a_sum_of_lines_for_a_sum_of_potentials():
    (x, spacing), y = centres(32, 4.0), centres(16, 2.0)[0]
    times = torch.tensor([0.0, 0.5], dtype=DTYPE)
    first, second = wavy(x, 4.0), torch.cos(math.pi * y / 2)
    plane = pde.solve_hjb(first[:, None] + second, spacing, times, gamma=GAMMA)
    lines = [pde.solve_hjb(part, spacing, times, gamma=GAMMA) for part in (first, second)]
    torch.testing.assert_close(plane, lines[0][..., None] + lines[1][:, None], rtol=0, atol=1e-6)


def test_hjb_in_the_plane_converges_to_the_cole_hopf_solution():
    times = torch.tensor([0.0, 0.5], dtype=DTYPE)
    errors = []
    for n in (16, 32):
        x, spacing = centres(n, 4.0)
        potential = wavy(x, 4.0)[:, None] * torch.cos(math.pi * x / 4)
        solution = pde.solve_hjb(potential, spacing, times, gamma=GAMMA)[0]
        errors.append(float((solution - cole_hopf(potential, spacing, 0.5)).abs().max()))
    assert observed_order(errors)[0] > 1.7  # 1.9 was measured


def optimal_drift(potential: Tensor, spacing: float, horizon: float):
    def drift(t: float) -> Tensor:
        value = cole_hopf(potential, spacing, horizon - t)
        slopes = torch.gradient(value, spacing=spacing, edge_order=2)
        return -torch.stack(slopes, -1)

    return drift


def test_fokker_planck_converges_to_the_kernel_formula_with_order_two_and_keeps_the_mass():
    times = torch.tensor([0.0, 0.4, 1.0], dtype=DTYPE)
    errors = []
    for n in (50, 100, 200):
        x, spacing = centres(n, 5.0)
        potential = wavy(x, 5.0)
        initial = heat_kernel(x[:, None] - 0.5, 0.5)
        drift = optimal_drift(potential, spacing, 1.0)
        solution = pde.solve_fokker_planck(initial, drift, spacing, times, gamma=GAMMA)
        torch.testing.assert_close(solution[0], initial, rtol=0, atol=0)
        mass = solution.sum(1) * spacing
        assert (mass - mass[0]).abs().max() < 1e-12
        expected = kernel_formula(potential, initial, spacing, 1.0)
        errors.append(float((solution[-1] - expected).abs().sum() * spacing))
    # 1.9 to 2.0 were measured.
    assert min(observed_order(errors)) > 1.8


def test_fokker_planck_of_the_ornstein_uhlenbeck_process():
    times = torch.tensor([0.0, 0.7], dtype=DTYPE)
    decay = math.exp(-0.7)
    errors = []
    for n in (50, 100, 200):
        x, spacing = centres(n, 5.0)
        grid = x[:, None]
        start = heat_kernel(grid - 1.5, 0.2)
        solution = pde.solve_fokker_planck(
            start, lambda t, grid=grid: -grid, spacing, times, gamma=GAMMA
        )[-1]
        expected = heat_kernel(grid - 1.5 * decay, 0.2 * decay**2 + GAMMA * (1 - decay**2))
        errors.append(float((solution - expected).abs().sum() * spacing))
    # 1.97 and 1.99 were measured.
    assert min(observed_order(errors)) > 1.8
    assert errors[-1] < 5e-3


def test_fokker_planck_keeps_the_gibbs_density_and_stays_positive_where_drift_dominates():
    """With b = -V' and V quadratic the fitted flux vanishes exactly at e^{-V/gamma}."""
    x, spacing = centres(30, 3.0)
    gamma = 0.02  # drift times spacing is up to thirty times gamma
    times = torch.tensor([0.0, 1.0], dtype=DTYPE)
    gibbs = torch.exp(-x.square() / (2 * gamma))
    kept = pde.solve_fokker_planck(gibbs, lambda t: -x[:, None], spacing, times, gamma=gamma)[-1]
    torch.testing.assert_close(kept, gibbs, rtol=0, atol=1e-12)
    box = (x.abs() < 1).to(DTYPE)
    moved = pde.solve_fokker_planck(box, lambda t: -x[:, None], spacing, times, gamma=gamma)[-1]
    assert moved.min() > -1e-9  # the integrator's tolerance; central differences give -0.1


def test_fokker_planck_in_the_plane_is_a_product_of_lines():
    (x, spacing), y = centres(40, 4.0), centres(30, 3.0)[0]
    times = torch.tensor([0.0, 0.3, 0.5], dtype=DTYPE)
    first, second = heat_kernel(x[:, None] - 1, 0.4), heat_kernel(y[:, None], 0.3)

    def drift(t: float) -> Tensor:
        return torch.stack(torch.broadcast_tensors(-x[:, None], (1 - t) * torch.sin(y)), -1)

    plane = pde.solve_fokker_planck(first[:, None] * second, drift, spacing, times, gamma=GAMMA)
    lines = [
        pde.solve_fokker_planck(first, lambda t: -x[:, None], spacing, times, gamma=GAMMA),
        pde.solve_fokker_planck(
            second, lambda t: (1 - t) * torch.sin(y)[:, None], spacing, times, gamma=GAMMA
        ),
    ]
    torch.testing.assert_close(plane, lines[0][..., None] * lines[1][:, None], rtol=0, atol=1e-7)
    mass = plane.sum((1, 2)) * spacing**2
    assert (mass - mass[0]).abs().max() < 1e-12


def test_drift_as_values_at_the_times_is_joined_by_a_spline():
    x, spacing = centres(60, 5.0)
    times = torch.linspace(0, 1, 21, dtype=DTYPE)
    initial = heat_kernel(x[:, None], 0.5)
    drift = optimal_drift(wavy(x, 5.0), spacing, 1.0)
    values = torch.stack([drift(float(t)) for t in times])
    joined = pde.solve_fokker_planck(initial, values, spacing, times, gamma=GAMMA)
    called = pde.solve_fokker_planck(initial, drift, spacing, times, gamma=GAMMA)
    torch.testing.assert_close(joined, called, rtol=0, atol=1e-5)


# ---- dtype, device, errors --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_come_from_the_inputs(dtype):
    default = torch.get_default_device()
    x = torch.linspace(-2, 2, 20, dtype=dtype)
    times = torch.tensor([0.0, 0.1], dtype=dtype)
    grid = x[:, None].clone()
    torch.set_default_device("meta")
    try:
        results = [
            pde.heat_semigroup(x, 0.2, 0.1),
            pde.solve_hjb(x, 0.2, times, gamma=1.0),
            pde.solve_fokker_planck(x.square(), lambda t: -grid, 0.2, times, gamma=1.0),
            pde.heat_residual(heat_kernel_plus, grid, 0.1, beta=1.0),
            pde.hjb_residual(heat_kernel_plus, grid, 0.1, beta=1.0),
            pde.fokker_planck_residual(heat_kernel_plus, lambda y, t: -y, grid, 0.1, beta=1.0),
        ]
    finally:
        torch.set_default_device(default)
    for result in results:
        assert result.dtype == dtype
        assert result.device.type == "cpu"
        assert torch.isfinite(result).all()


def heat_kernel_plus(x: Tensor, s: Tensor) -> Tensor:
    return torch.exp(-x.square().sum(-1) / (1 + s))


def test_residuals_check_shapes_and_beta():
    x = points(5, 2)
    with pytest.raises(ValueError, match=r"f must return shape \(5,\).*got \(5, 2\)"):
        pde.gradient(lambda y: y, x)
    with pytest.raises(ValueError, match=r"field must return shape \(5, 2\).*got \(5,\)"):
        pde.divergence(lambda y: y.sum(-1), x)
    with pytest.raises(ValueError, match=r"f must return shape \(5,\).*got \(5, 2\)"):
        pde.time_derivative(lambda y, t: t * y, x, 0.1)
    with pytest.raises(ValueError, match=r"t must be one time or have shape \(5,\).*got \(4,\)"):
        pde.heat_residual(heat_kernel_plus, x, points(4), beta=1.0)
    with pytest.raises(ValueError, match="beta must be a positive finite number, got 0"):
        pde.hjb_residual(heat_kernel_plus, x, 0.1, beta=0.0)


def test_grids_check_their_input():
    x, spacing = centres(10, 1.0)
    times = torch.tensor([0.0, 1.0], dtype=DTYPE)
    with pytest.raises(ValueError, match=r"values must be a grid .* got shape \(2, 2, 2\)"):
        pde.heat_semigroup(points(2, 2, 2), 0.1, 0.1)
    with pytest.raises(ValueError, match=r"terminal must be a grid .* at least two cells"):
        pde.solve_hjb(x[:1], spacing, times, gamma=1.0)
    with pytest.raises(ValueError, match="initial must be finite, but 1 of its 10"):
        pde.solve_fokker_planck(
            x.where(x < 0.8, torch.nan), lambda t: x[:, None], spacing, times, gamma=1.0
        )
    with pytest.raises(
        ValueError, match=r"variance must be a non-negative finite number, got -0.1"
    ):
        pde.heat_semigroup(x, spacing, -0.1)
    with pytest.raises(ValueError, match="spacing must be a positive"):
        pde.heat_semigroup(x, 0.0, 0.1)
    with pytest.raises(ValueError, match="gamma must be a positive"):
        pde.solve_hjb(x, spacing, times, gamma=-1.0)
    with pytest.raises(ValueError, match="times must be at least two increasing numbers"):
        pde.solve_hjb(x, spacing, times.flip(0), gamma=1.0)


def test_drifts_are_checked():
    x, spacing = centres(10, 1.0)
    times = torch.tensor([0.0, 1.0], dtype=DTYPE)
    with pytest.raises(ValueError, match=r"drift must return shape \(10, 1\), .* got \(10,\)"):
        pde.solve_fokker_planck(x, lambda t: x, spacing, times, gamma=1.0)
    with pytest.raises(ValueError, match=r"drift must have shape \(2, 10, 1\), .* got \(10, 1\)"):
        pde.solve_fokker_planck(x, x[:, None], spacing, times, gamma=1.0)
    with pytest.raises(ValueError, match="drift must be finite"):
        pde.solve_fokker_planck(x, lambda t: x[:, None] / 0, spacing, times, gamma=1.0)


def test_a_solution_that_blows_up_is_an_error():
    """Without enough diffusion for the grid, central differences deepen a minimum without end."""
    terminal = torch.ones(10, dtype=DTYPE)
    terminal[5] = 0
    times = torch.tensor([0.0, 2.0], dtype=DTYPE)
    with pytest.raises(RuntimeError, match=r"stopped between its times 0 and 2 .* refine the grid"):
        pde.solve_hjb(terminal, 0.2, times, gamma=1e-4)
