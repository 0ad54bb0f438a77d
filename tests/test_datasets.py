from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import i0e
from sklearn.datasets import make_moons, make_swiss_roll

from wpo_notes import datasets
from wpo_notes.datasets import NAMES, PLANAR, NoisyCurve, get

TWO_PI = 2 * math.pi
# The two whose definition is written down again below, for adaptive quadrature
CURVES = ("moons", "swissroll")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(name: str, n: int, seed: int = 0) -> torch.Tensor:
    return get(name).sample(n, generator=generator(seed), dtype=torch.float64)


def circle(u: torch.Tensor) -> torch.Tensor:
    return 2 * torch.stack([(TWO_PI * u).cos(), (TWO_PI * u).sin()], -1)


# ---- the laws, written down independently of the package ------------------------------------


def moons_points(theta):
    """Both half circles in the coordinates of the design: times 2, minus (1, 0.2)."""
    outer = np.stack([np.cos(theta), np.sin(theta)], -1)
    inner = np.stack([1 - np.cos(theta), 1 - np.sin(theta) - 0.5], -1)
    return [2 * outer - (1, 0.2), 2 * inner - (1, 0.2)]


def swissroll_points(t):
    return [np.stack([t * np.cos(t), t * np.sin(t)], -1) / 5]


PARAMETRISED = {
    "moons": (moons_points, (0.0, math.pi), 0.02),
    "swissroll": (swissroll_points, (1.5 * math.pi, 4.5 * math.pi), 0.2),
}


def log_prob_by_quad(name: str, x: np.ndarray) -> float:
    """SciPy's adaptive quadrature around the integrand's maximum, to ten digits."""
    points, (low, high), std = PARAMETRISED[name]
    grid = np.linspace(low, high, 20001)
    square = [((p - x) ** 2).sum(-1) for p in points(grid)]
    top = -0.5 * min(s.min() for s in square) / std**2
    total = 0.0
    for k, on_grid in enumerate(square):
        nearest = grid[on_grid.argmin()]
        widths = np.array([1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3])
        breaks = np.concatenate([nearest - widths, [nearest], nearest + widths])
        breaks = np.concatenate(
            [[low], np.unique(breaks[(breaks > low) & (breaks < high)]), [high]]
        )

        def integrand(theta, k=k):
            return math.exp(-0.5 * ((points(theta)[k] - x) ** 2).sum() / std**2 - top)

        for left, right in pairwise(breaks):
            total += quad(integrand, left, right, epsabs=0, epsrel=1e-10, limit=200)[0]
    weight = len(square) * (high - low)
    return top + math.log(total / weight) - math.log(TWO_PI * std**2)


def points_to_check(name: str) -> torch.Tensor:
    """Near the data, beyond the ends of the curve, and up to 10 units from the origin."""
    law = get(name)
    near = sample(name, 6)
    ends = torch.cat([curve(torch.tensor([0.0, 1.0], dtype=torch.float64)) for curve in law.curves])
    noise = torch.randn(ends.shape, generator=generator(1), dtype=torch.float64)
    angle = torch.linspace(0, 5.5, 6, dtype=torch.float64)
    radius = torch.tensor([0.1, 1, 3, 5, 8, 10], dtype=torch.float64)
    far = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([near, ends, ends + 3 * law.std * noise, ends + 0.5 * noise, far])


@pytest.mark.parametrize("name", CURVES)
def test_log_prob_agrees_with_adaptive_quadrature(name):
    x = points_to_check(name)
    reference = torch.tensor([log_prob_by_quad(name, p) for p in x.numpy()], dtype=torch.float64)
    # 1e-6 is the contract; at a log-density of -1e5 adaptive quadrature itself keeps 1e-8.
    assert float((get(name).log_prob(x) - reference).abs().max()) < 1e-7


@pytest.mark.parametrize("name", CURVES)
def test_log_prob_in_float32_rounds_as_documented(name):
    x = points_to_check(name).float()
    exact = get(name).log_prob(x.double())
    error = (get(name).log_prob(x).double() - exact).abs() / (1 + exact.abs())
    assert get(name).log_prob(x).dtype == torch.float32
    assert float(error.max()) < 3e-6


def test_log_prob_of_a_full_circle_is_a_bessel_function():
    law = NoisyCurve("circle", [circle], std=0.05, panels=80)
    r = torch.tensor([0.0, 0.5, 1.9, 2.0, 2.1, 3.0, 5.0], dtype=torch.float64)
    x = r[:, None] * torch.tensor([0.6, -0.8], dtype=torch.float64)
    s2 = 0.05**2
    # i0e(z) = exp(-z) I0(z)
    expected = -0.5 * (r - 2) ** 2 / s2 + torch.from_numpy(np.log(i0e(2 * r.numpy() / s2)))
    expected -= math.log(TWO_PI * s2)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CURVES)
def test_density_has_mass_one(name):
    law = get(name)
    # The trapezoidal rule converges faster than any power of h once h resolves std:
    # with h = std it leaves exp(-2 pi^2) = 3e-9.
    if name == "moons":
        x = torch.arange(-3.2, 3.2, 0.02, dtype=torch.float64)
        y = torch.arange(-1.4, 2.0, 0.02, dtype=torch.float64)
    else:
        x = y = torch.arange(-4.4, 4.4, 0.2, dtype=torch.float64)
    grid = torch.cartesian_prod(x, y)
    # The moons fill 1 % of the rectangle: leave out what is further than 6 std from them (mass 2e-8).
    curve = torch.cat([c(torch.linspace(0, 1, 500, dtype=torch.float64)) for c in law.curves])
    grid = grid[torch.cdist(grid, curve).amin(1) < 6 * law.std]
    cell = float((x[1] - x[0]) * (y[1] - y[0]))
    assert float(law.log_prob(grid).exp().sum()) * cell == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("name", CURVES)
def test_score_by_autograd_is_the_posterior_mean_formula(name):
    """The gradient is (E[c(u) | x] - x) / std^2, with the posterior mean from a plain fine grid."""
    points, (low, high), std = PARAMETRISED[name]
    x = sample(name, 40).requires_grad_()
    (score,) = torch.autograd.grad(get(name).log_prob(x).sum(), x)
    theta = low + (high - low) * (np.arange(40000) + 0.5) / 40000
    curve = torch.from_numpy(np.concatenate(points(theta)))
    weights = torch.softmax(-0.5 * torch.cdist(x.detach(), curve).square() / std**2, 1)
    expected = (weights @ curve - x.detach()) / std**2
    # The midpoint rule with 40000 points has error 1e-4 of an end point's weight.
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3 / std)


def test_gradients_through_recomputed_blocks_are_the_same(monkeypatch):
    x = sample("swissroll", 30).requires_grad_()
    (expected,) = torch.autograd.grad(get("swissroll").log_prob(x).sum(), x)
    monkeypatch.setattr(datasets, "_KEPT_ELEMENTS", 2**12)
    (score,) = torch.autograd.grad(get("swissroll").log_prob(x).sum(), x)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)


def test_log_prob_keeps_the_batch_shape():
    x = sample("swissroll", 12)
    law = get("swissroll")
    torch.testing.assert_close(law.log_prob(x.reshape(3, 4, 2)), law.log_prob(x).reshape(3, 4))
    assert law.log_prob(x[0]).shape == ()


# ---- samplers --------------------------------------------------------------------------------


def moments_differ_by(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of first and second moments, in standard errors."""
    features = [
        np.stack([z[:, 0], z[:, 1], z[:, 0] ** 2, z[:, 0] * z[:, 1], z[:, 1] ** 2], 1)
        for z in (a, b)
    ]
    error = np.sqrt(sum(f.var(0) / len(f) for f in features))
    return float((np.abs(features[0].mean(0) - features[1].mean(0)) / error).max())


# Five moments at 4.5 standard errors: a right sampler fails with probability 3e-5.
MARGIN = 4.5


def test_moons_have_scikit_learns_moments():
    # scikit-learn spaces the angles evenly, so its moments have less than a sample's error.
    reference = 2 * make_moons(40_000, noise=0.01, random_state=0)[0] - (1, 0.2)
    assert moments_differ_by(sample("moons", 40_000).numpy(), reference) < MARGIN


def test_swissroll_has_scikit_learns_moments():
    cloud = make_swiss_roll(40_000, noise=1.0, random_state=0)[0][:, [0, 2]] / 5
    assert moments_differ_by(sample("swissroll", 40_000).numpy(), cloud) < MARGIN


@pytest.mark.parametrize("name", CURVES)
def test_noise_is_a_standard_deviation_of_the_scaled_data(name):
    """Away from the ends, the distance to the curve has the noise's second moment."""
    law = get(name)
    x = sample(name, 4000)
    curve = torch.cat([c(torch.linspace(0, 1, 4000, dtype=torch.float64)) for c in law.curves])
    distance = torch.cdist(x, curve)
    nearest = distance.argmin(1) % 4000
    inside = (nearest > 200) & (nearest < 3800)
    square = distance.amin(1)[inside].square() / {"moons": 0.02, "swissroll": 0.2}[name] ** 2
    # Mean of chi-squared: standard error sqrt(2 / 3600) = 0.024; curvature and the next arm move it by < 0.02.
    assert float(square.mean()) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(("name", "angle"), [("moons", 0.4), ("swissroll", 1.1)])
def test_sampler_and_density_agree_on_a_projection(name, angle):
    """Kolmogorov-Smirnov: samples against the CDF of the density integrated over lines."""
    law = get(name)
    direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    # On the projection, noise stays N(0, std^2) and the curve's points weigh as in the law: the
    # CDF is a mean of normal CDFs over the curve.
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    projected = (torch.cat([curve(u) for curve in law.curves]) @ direction).numpy()

    def cdf(z):
        return stats.norm.cdf((z[:, None] - projected) / law.std).mean(1)

    x = (sample(name, 2000) @ direction).numpy()
    assert stats.kstest(x, cdf).pvalue > 1e-3
    # The test has power: 2000 points see a shift of 0.3, whose statistic is 0.08.
    assert stats.kstest(x + 0.3, cdf).pvalue < 1e-6


@pytest.mark.parametrize("name", CURVES)
def test_entropy_agrees_with_monte_carlo(name):
    entropy = get(name).entropy()
    log_prob = get(name).log_prob(sample(name, 4000, seed=3))
    error = float(log_prob.std()) / 4000**0.5
    assert entropy.value == pytest.approx(-float(log_prob.mean()), abs=4 * error)
    assert 0 < entropy.error < 2e-4


def test_entropy_of_a_full_circle_is_a_radial_integral():
    law = NoisyCurve("circle", [circle], std=0.3, panels=32)
    s2 = 0.3**2

    def integrand(r):
        log_p = -0.5 * (r - 2) ** 2 / s2 + math.log(i0e(2 * r / s2)) - math.log(TWO_PI * s2)
        return -TWO_PI * r * math.exp(log_p) * log_p

    exact = quad(integrand, 0, 6, epsabs=1e-12, points=[2.0])[0]
    entropy = law.entropy()
    assert abs(entropy.value - exact) <= 3 * entropy.error < 1e-3


def test_diffused_density_is_the_convolution_with_a_normal():
    """Mean of N(x; X, v I) over samples X of the law, with its Monte Carlo error."""
    law, variance = get("moons"), 0.3
    x = torch.tensor([[0.0, 0.0], [1.0, -1.2], [-2.0, 2.0]], dtype=torch.float64)
    square = torch.cdist(x, sample("moons", 40_000)).square()
    kernel = (-0.5 * square / variance).exp() / (TWO_PI * variance)
    error = kernel.std(1) / 40_000**0.5
    density = law.diffuse(variance).log_prob(x).exp()
    assert bool((error < 0.015 * density).all())
    assert bool(((density - kernel.mean(1)).abs() < 4 * error).all())
    torch.testing.assert_close(law.diffuse(0.0).log_prob(x), law.log_prob(x))


# ---- all laws --------------------------------------------------------------------------------


def points_of(law, n, seed=0):
    return law.sample(n, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_minus_the_mean_log_density_of_samples(name):
    """A sampler and a density of different laws give a cross-entropy, which is larger."""
    law = get(name)
    log_prob = law.log_prob(points_of(law, 20_000))
    entropy = law.entropy()
    error = float(log_prob.std()) / 20_000**0.5
    assert entropy.value == pytest.approx(-float(log_prob.mean()), abs=4.5 * error + 1e-9)
    assert 0 <= entropy.error < 2e-4


# Side of a square that holds the law, and the step of the trapezoidal rule on it: at most the
# smallest standard deviation; the pinwheel's density has a ridge where its arms fold.
GRIDS = {
    "8gaussians": (6.0, 0.15, 1e-7),
    "pinwheel": (7.0, 0.04, 1e-5),
    "circles": (5.0, 0.12, 1e-7),
    "2spirals": (6.0, 0.08, 1e-6),
    # Constant on each little square around a point of the grid, so that the sum is exact.
    "checkerboard": (5 + 1 / 32, 1 / 16, 1e-12),
    "rings": (4.0, 0.06, 1e-7),
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_piece_has_mass_one(name):
    law = get(name)
    extent, step, error = GRIDS[name]
    axis = torch.arange(-extent, extent, step, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    near = grid[torch.cdist(grid[::7], points_of(law, 500)).amin(1).argsort()[:1]]
    masses = law.component_log_prob(grid).exp().sum(0) * step**2
    torch.testing.assert_close(masses, torch.ones_like(masses), rtol=0, atol=error)
    assert float(law.weights.sum()) == pytest.approx(1)
    joined = torch.logsumexp(law.component_log_prob(near) + law.weights.log(), -1)
    torch.testing.assert_close(law.log_prob(near), joined)


def moments_by_density(law, extent, step):
    axis = torch.arange(-extent, extent, step, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = law.log_prob(grid).exp() * step**2
    return (mass[:, None] * grid).sum(0), torch.einsum("n,ni,nj->ij", mass, grid, grid)


@pytest.mark.parametrize("name", GRIDS)
def test_samples_have_the_density_s_second_moments(name):
    law = get(name)
    mean, second = moments_by_density(law, *GRIDS[name][:2])
    x = points_of(law, 40_000)
    products = torch.einsum("ni,nj->nij", x, x).reshape(-1, 4)
    for values, expected in ((x, mean), (products, second.flatten())):
        error = values.std(0) / len(x) ** 0.5
        # Six moments at 4.5 standard errors. The rule's own error is far below: the largest is the
        # checkerboard's, step^2 / 12 = 3e-4 of a second moment, whose standard error is 0.024.
        assert bool(((values.mean(0) - expected).abs() < MARGIN * error).all())


@pytest.mark.parametrize(
    ("name", "second"),
    [
        # E|x|^2: sum of independent squares, from the table of the design
        ("8gaussians", 8 + 2 * 0.125),
        ("circles", (9 + 2.25) / 2 + 2 * 0.24**2),
        ("rings", 9 * (1 + 9 / 16 + 1 / 4 + 1 / 16) / 4 + 2 * 0.08**2),
        ("pinwheel", 4 * (1 + 0.3**2 + 0.1**2)),  # rotations keep the length
        ("checkerboard", 2 * 16 / 3),
        # n = 3 pi sqrt(u): E n^2 = 9 pi^2 / 2; cross terms of sin and cos with u', u'' below
        ("2spirals", None),
    ],
)
def test_second_moment_is_that_of_the_definition(name, second):
    if second is None:
        n = quad_mean(lambda n: n**2 + n * (np.sin(n) - np.cos(n)) / 2)
        second = (n + 2 * 0.25 / 3) / 9 + 2 * 0.01
    square = points_of(get(name), 40_000).square().sum(1)
    error = float(square.std()) / 40_000**0.5
    assert float(square.mean()) == pytest.approx(second, abs=MARGIN * error)


def quad_mean(function):
    """Mean over n = 3 pi sqrt(u), whose density is 2 n / (3 pi)^2."""
    top = 3 * math.pi
    return quad(lambda n: function(n) * 2 * n / top**2, 0, top)[0]


@pytest.mark.parametrize("name", NAMES)
def test_score_by_autograd_is_the_slope_of_the_log_density(name):
    law = get(name)
    x = points_of(law, 20, seed=4).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    h = 1e-5
    for k in range(law.dim):
        step = h * torch.eye(law.dim, dtype=torch.float64)[k]
        slope = (law.log_prob(x + step) - law.log_prob(x - step)).detach() / (2 * h)
        # Rounding of 1e-12 over 2 h, and h^2 times the third derivative, at most 1 / std^3.
        torch.testing.assert_close(score[:, k], slope, rtol=1e-4, atol=1e-3)


def test_two_spirals_by_quadrature_over_all_its_variables():
    x = points_of(get("2spirals"), 5)
    # Gauss-Legendre in sqrt(u) and both uniforms of the box
    node, weight = np.polynomial.legendre.leggauss(400)
    n, wn = 1.5 * math.pi * (1 + node), weight / 2
    box, wb = np.polynomial.legendre.leggauss(24)
    box, wb = (1 + box) / 2, wb / 2
    n, a, b = np.meshgrid(n, box, box, indexing="ij")
    mass = wn[:, None, None] * wb[:, None] * wb * 2 * n / (3 * math.pi)
    arm = np.stack([-n * np.cos(n) + a / 2, n * np.sin(n) + b / 2], -1).reshape(-1, 2) / 3
    for point, found in zip(x.numpy(), get("2spirals").log_prob(x).tolist(), strict=True):
        density = 0.0
        for sign in (1, -1):
            square = ((point - sign * arm) ** 2).sum(1)
            density += 0.5 * (mass.ravel() * np.exp(-square / 0.02)).sum() / (TWO_PI * 0.01)
        assert found == pytest.approx(math.log(density), abs=1e-6)


def test_pinwheel_is_its_definition_binned():
    """Counts of an independent sampler against the density's mass in cells: chi-squared."""
    rng = np.random.default_rng(0)
    count = 100_000
    radial = 1 + 0.3 * rng.standard_normal(count)
    tangential = 0.1 * rng.standard_normal(count)
    angle = TWO_PI * rng.integers(5, size=count) / 5 + 0.25 * np.exp(radial)
    x = 2 * np.stack(
        [
            radial * np.cos(angle) - tangential * np.sin(angle),
            radial * np.sin(angle) + tangential * np.cos(angle),
        ],
        1,
    )
    edges = np.linspace(-5, 5, 21)
    counts = np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))[0].ravel()
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    middle = 0.5 * (axis[1:] + axis[:-1])
    mass = get("pinwheel").log_prob(torch.cartesian_prod(middle, middle)).exp() * 0.025**2
    mass = mass.reshape(20, 20, 20, 20).sum((1, 3)).flatten().numpy()
    kept = mass * count > 10
    expected = mass[kept] * counts[kept].sum() / mass[kept].sum()
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-3


@pytest.mark.parametrize("name", ["moons", "circles", "rings", "swissroll"])
def test_nearest_point_is_the_nearest_of_many(name):
    law = get(name)
    x = points_of(law, 200)
    nearest = law.nearest(x)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    curves = torch.stack([curve(u) for curve in law.curves])
    distance = torch.stack([torch.cdist(x, curve).amin(1) for curve in curves])
    found = (x - nearest.point).norm(dim=1)
    # The grid's points are up to 1e-3 apart: its distances are too large by (5e-4)^2 / 2 d.
    torch.testing.assert_close(found, distance.amin(0), rtol=0, atol=6e-4)
    torch.testing.assert_close(nearest.piece, distance.argmin(0))
    torch.testing.assert_close(nearest.tangent.norm(dim=1), torch.ones(200, dtype=torch.float64))
    inside = torch.cdist(nearest.point, curves[:, [0, -1]].reshape(-1, 2)).amin(1) > 0.01
    across = ((x - nearest.point) * nearest.tangent).sum(1)
    closed = name in ("circles", "rings")
    assert float(across[inside | closed].abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["8gaussians", "circles", "rings", "swissroll"])
def test_every_noisy_law_diffuses_to_the_convolution(name):
    law, variance = get(name), 0.4
    x = torch.tensor([[0.5, 0.3], [1.0, -1.2], [-2.0, 2.0]], dtype=torch.float64)
    square = torch.cdist(x, points_of(law, 40_000)).square()
    kernel = (-0.5 * square / variance).exp() / (TWO_PI * variance)
    error = kernel.std(1) / 40_000**0.5
    density = law.diffuse(variance).log_prob(x).exp()
    assert bool(((density - kernel.mean(1)).abs() < 4 * error).all())


def test_moons_with_less_noise():
    law = datasets.moons(noise=0.001)
    assert law.std == pytest.approx(0.002)
    x = points_of(law, 20_000)
    distance = (x - law.nearest(x).point).norm(dim=1)
    # sqrt(mean square) of the normal part, and of the ends' tangential part: 1 % of the points
    assert float(distance.median()) == pytest.approx(0.6745 * 0.002, rel=0.05)
    log_prob = law.log_prob(x)
    error = float(log_prob.std()) / 20_000**0.5
    assert law.entropy().value == pytest.approx(-float(log_prob.mean()), abs=4.5 * error)


# (a, b) to all six coordinates, and the deviations of the last four given (a, b), from the table of the design
LIFT = torch.tensor([[1, 0], [0, 1], [2, 0], [1, 1], [1, -2], [0, 0]], dtype=torch.float64)
NOISE = torch.tensor([0.1, 0.1, 0.1, 1.0], dtype=torch.float64)


def test_samples_of_the_six_dimensional_swissroll_have_the_lifted_second_moments():
    curve = torch.from_numpy(swissroll_points(4.5 * np.pi * np.linspace(1 / 3, 1, 20_001))[0])
    planar = curve.T @ curve / len(curve) + 0.2**2 * torch.eye(2, dtype=torch.float64)
    expected = LIFT @ planar @ LIFT.T
    expected[2:, 2:] += NOISE.square().diag()
    x = points_of(get("swissroll6d"), 40_000)
    # Noise of variance 0.01 is lost in the errors of these moments, up to 0.04: so also the moments of the noise.
    rest = x[:, 2:] - x[:, :2] @ LIFT[2:].T
    for values, second in ((x, expected), (rest, NOISE.square().diag())):
        products = torch.einsum("ni,nj->nij", values, values)
        error = products.std(0) / len(x) ** 0.5
        # 31 moments at 4.5 standard errors
        assert bool(((products.mean(0) - second).abs() < MARGIN * error).all())


def test_density_of_the_six_dimensional_swissroll_has_mass_one():
    """Importance sampling: the mean of p / q over draws of a law q that is wider everywhere."""
    count, wide = 40_000, 1.25
    white = torch.randn(count, 6, generator=generator(), dtype=torch.float64)
    scale = torch.cat([torch.full((2,), 2.0, dtype=torch.float64), wide * NOISE])
    x = white * scale
    x[:, 2:] += x[:, :2] @ LIFT[2:].T
    log_q = (-0.5 * white.square() - (scale * math.sqrt(TWO_PI)).log()).sum(1)
    ratio = (get("swissroll6d").log_prob(x) - log_q).exp()
    error = float(ratio.std()) / count**0.5
    # q's tails are the wider ones, so that the ratio is bounded, by about 10 * 1.25^4, and its mean nearly normal.
    # A mass that is wrong by a tenth would be seen.
    assert error < 0.012
    assert float(ratio.mean()) == pytest.approx(1, abs=MARGIN * error)


def test_marginals_of_the_six_dimensional_swissroll():
    law = get("swissroll6d")
    x = points_of(law, 20_000)
    torch.testing.assert_close(
        law.marginal((0, 1)).log_prob(x[:50, :2]),
        law.planar.log_prob(x[:50, :2]),
        rtol=0,
        atol=1e-6,
    )
    for dims in ((2, 4), (1, 5), (3,)):
        marginal = law.marginal(dims)
        log_prob = marginal.log_prob(x[:, list(dims)])
        error = float(log_prob.std()) / 20_000**0.5
        assert marginal.entropy().value == pytest.approx(-float(log_prob.mean()), abs=4.5 * error)
        y = points_of(marginal, 20_000, seed=1)
        difference = (y.square().mean(0) - x[:, list(dims)].square().mean(0)).abs()
        spread = x[:, list(dims)].square().std(0) * (2 / 20_000) ** 0.5
        assert bool((difference < MARGIN * spread).all())
    with pytest.raises(
        ValueError, match=r"dims must be distinct coordinates from 0 to 5, got \(1, 1\)"
    ):
        law.marginal((1, 1))


# ---- conduct ---------------------------------------------------------------------------------


def test_names_and_dimensions():
    assert PLANAR == (
        "swissroll",
        "8gaussians",
        "pinwheel",
        "circles",
        "moons",
        "2spirals",
        "checkerboard",
        "rings",
    )
    assert (*PLANAR, "swissroll6d") == NAMES
    assert [get(name).name for name in NAMES] == list(NAMES)
    assert [get(name).dim for name in NAMES] == [2] * 8 + [6]
    assert repr(get("swissroll")) == "NoisyCurve('swissroll', std=0.2)"


def test_samples_follow_the_generator_and_leave_global_state_alone():
    state = torch.get_rng_state()
    a, b, c = sample("moons", 50), sample("moons", 50), sample("moons", 50, seed=1)
    free = get("moons").sample(50)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert free.dtype == torch.get_default_dtype()
    assert not torch.equal(free, get("moons").sample(50))


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_made_on_the_default_device(name):
    torch.set_default_device("meta")
    try:
        law = get(name)
        x = law.sample(4, generator=generator(), dtype=torch.float32)
        assert x.device.type == "cpu"
        assert law.log_prob(x).device.type == "cpu"
        assert torch.isfinite(law.log_prob(x)).all()
    finally:
        torch.set_default_device(None)


def test_entropy_does_not_depend_on_the_default_device():
    expected = get("swissroll").entropy()
    torch.set_default_device("meta")
    try:
        assert get("swissroll").entropy() == expected
    finally:
        torch.set_default_device(None)


def test_errors_say_what_to_do():
    with pytest.raises(
        ValueError, match=r"name must be one of \('swissroll', '8gaussians', .*\), got 'moon'"
    ):
        get("moon")
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        get("moons").sample(0)
    with pytest.raises(ValueError, match="std must be a positive finite number, got 0"):
        NoisyCurve("line", [circle], std=0.0)
    with pytest.raises(ValueError, match="variance must be a non-negative finite number, got -1"):
        get("moons").diffuse(-1.0)
    with pytest.raises(ValueError, match="x must be finite"):
        get("moons").log_prob(torch.tensor([[math.nan, 0.0]]))
