"""The exact denoiser against posterior means, automatic differentiation, known flows and diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from wpo_notes.diffusion import Denoiser, NoisePredictor
from wpo_notes.metrics import energy_test
from wpo_notes.mixture import GaussianMixture
from wpo_notes.structured import LowRankGaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(n: int = 5, d: int = 2, *, dtype=F64):
    """Centres, covariances with axes from about 0.2 to 0.7, unequal log-weights."""
    about = {"generator": seeded(7), "dtype": F64}
    root = 0.5 * torch.randn(n, d, d, **about)
    covariance = root @ root.mT + 0.05 * torch.eye(d, dtype=F64)
    centers = 2 * torch.randn(n, d, **about)
    return tuple(part.to(dtype) for part in (centers, covariance, torch.randn(n, **about)))


def make(n: int = 5, d: int = 2, *, dtype=F64) -> GaussianMixture:
    centers, covariance, log_weights = parameters(n, d, dtype=dtype)
    return GaussianMixture.from_covariance(centers, covariance, log_weights=log_weights)


def posterior_mean(x, sigma: float, centers, covariance, log_weights) -> torch.Tensor:
    """Sum of responsibilities times the mean of X under each component, with dense inverses."""
    d = centers.shape[1]
    noisy = covariance + sigma**2 * torch.eye(d, dtype=F64)
    components = torch.distributions.MultivariateNormal(centers, noisy)
    weights = (log_weights + components.log_prob(x[:, None])).softmax(1)
    gain = covariance @ torch.linalg.inv(noisy)
    means = centers + torch.einsum("nij,mnj->mni", gain, x[:, None] - centers)
    return (weights[..., None] * means).sum(1)


# ---- the denoiser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 80.0])
def test_denoiser_is_the_posterior_mean(d, sigma):
    given = parameters(d=d)
    denoiser = make(d=d).as_denoiser()
    x = (2 + sigma) * torch.randn(40, d, generator=seeded(1), dtype=F64)
    expected = posterior_mean(x, sigma, *given)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        denoiser.noise(x, sigma), (x - expected) / sigma, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_denoiser_matches_autograd_of_the_log_density(sigma):
    mixture = make()
    covariance = mixture.to_torch().component_distribution.covariance_matrix
    noisy = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.log_weights),
        torch.distributions.MultivariateNormal(
            mixture.centers, covariance + sigma**2 * torch.eye(2, dtype=F64)
        ),
    )
    x = (2 + sigma) * torch.randn(40, 2, generator=seeded(1), dtype=F64)
    x.requires_grad_()
    (score,) = torch.autograd.grad(noisy.log_prob(x).sum(), x)
    denoiser = mixture.as_denoiser()
    torch.testing.assert_close(denoiser.score(x, sigma), score, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(denoiser(x, sigma), x + sigma**2 * score, rtol=1e-9, atol=1e-9)


def test_denoiser_minimises_the_denoising_error():
    # The least error is E Tr Cov[X | x] = sigma^2 (d + sigma^2 E div score), and each D + e h exceeds it
    # by e^2 E|h|^2, as D - X is orthogonal to functions of x.
    mixture, sigma, n = make(), 0.7, 100_000
    denoiser = mixture.as_denoiser()
    clean = mixture.sample((n,), generator=seeded(2))
    x = clean + sigma * torch.randn(n, 2, generator=seeded(3), dtype=F64)
    error = denoiser(x, sigma) - clean
    loss = error.square().sum(1)
    divergence = mixture.diffuse(sigma**2).score_divergence(x)
    difference = loss - sigma**2 * (2 + sigma**2 * divergence)
    # five standard errors of means of n; measured: 0.9 and at most 1.2 of them
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / n**0.5
    for direction in (x.sin(), denoiser(x, sigma), x[:, [1, 0]]):
        inner = (error * direction).sum(1)
        assert abs(float(inner.mean())) < 5 * float(inner.std()) / n**0.5
        wrong = (error + 0.1 * direction).square().sum(1) - loss
        assert float(wrong.mean()) > 5 * float(wrong.std()) / n**0.5


def test_empirical_denoiser_is_a_softmax_average_of_the_points():
    points = torch.randn(30, 3, generator=seeded(1), dtype=F64)
    x = torch.randn(8, 3, generator=seeded(2), dtype=F64)
    for sigma in (0.05, 0.5, 50.0):
        weights = (-torch.cdist(x, points).square() / (2 * sigma**2)).softmax(1)
        torch.testing.assert_close(
            Denoiser(points)(x, sigma), weights @ points, rtol=1e-9, atol=1e-9
        )


def test_denoiser_of_low_rank_covariances():
    about = {"generator": seeded(1), "dtype": F64}
    centers, factor = torch.randn(4, 6, **about), torch.randn(4, 6, 2, **about)
    variance = 0.1 + torch.rand(4, 6, **about)
    low_rank = LowRankGaussianMixture(centers, variance, factor)
    full = GaussianMixture.from_covariance(centers, torch.diag_embed(variance) + factor @ factor.mT)
    x, sigma = torch.randn(9, 6, **about), torch.tensor([0.0, 0.3, 4.0], dtype=F64).repeat(3)
    torch.testing.assert_close(
        low_rank.as_denoiser()(x, sigma), full.as_denoiser()(x, sigma), rtol=1e-9, atol=1e-9
    )


def test_limits_of_the_noise():
    mixture = make()
    denoiser = mixture.as_denoiser()
    x = torch.randn(5, 2, generator=seeded(1), dtype=F64)
    assert torch.equal(denoiser(x, 0.0), x)
    torch.testing.assert_close(denoiser.score(x, 0), mixture.score(x))
    assert torch.equal(denoiser.noise(x, 0), torch.zeros_like(x))
    # D - mean is about the covariance times (x - mean) / sigma^2
    far = denoiser(1e4 * x, 1e4) - mixture.mean
    assert float(far.abs().max()) < 1e-2


@pytest.mark.parametrize("law", ["mixture", "points"])
def test_one_sigma_a_point(law, monkeypatch):
    denoiser = Denoiser(make() if law == "mixture" else make().sample((50,), generator=seeded(4)))
    x = 3 * torch.randn(4, 25, 2, generator=seeded(1), dtype=F64)
    levels = torch.tensor([3.0, 0.1, 80.0, 0.7], dtype=F64)
    sigma = levels[torch.randint(4, (4, 25), generator=seeded(2))]
    calls = []
    noisy = Denoiser._noisy
    monkeypatch.setattr(
        Denoiser, "_noisy", lambda self, level: calls.append(level) or noisy(self, level)
    )
    together = [denoiser(x, sigma), denoiser.score(x, sigma), denoiser.noise(x, sigma)]
    assert len(calls) == 3 * 4  # once a distinct level, not a point
    for row in range(4):
        for column in range(25):
            own = (x[row, column], float(sigma[row, column]))
            expected = denoiser(*own), denoiser.score(*own), denoiser.noise(*own)
            for got, value in zip(together, expected, strict=True):
                torch.testing.assert_close(got[row, column], value, rtol=1e-9, atol=1e-9)
    assert denoiser(x[:, :0], sigma[:, :0]).shape == (4, 0, 2)
    torch.testing.assert_close(denoiser(x[0, 0], sigma[0, 0]), together[0][0, 0])


@pytest.mark.parametrize("sigma", [0.02, 1.0, 80.0])
def test_float32(sigma):
    mixture = make(dtype=torch.float32)
    x = (2 + sigma) * torch.randn(200, 2, generator=seeded(1))
    denoised = mixture.as_denoiser()(x, sigma)
    assert denoised.dtype == torch.float32
    given = [part.double() for part in parameters(dtype=torch.float32)]
    expected = posterior_mean(x.double(), sigma, *given)
    # x is rounded to 6e-8 of up to 300, and added to sigma^2 times the score. Measured: 3e-5 at sigma = 80.
    assert float((denoised.double() - expected).abs().max()) < 1e-5 * (1 + sigma)
    predictor = mixture.as_denoiser().noise_predictor(torch.linspace(0.99, 0.01, 10))
    assert predictor(x, torch.full((200,), 3)).dtype == torch.float32


def test_gradients():
    given = [part.requires_grad_() for part in parameters(3)]
    x = torch.randn(4, 2, generator=seeded(1), dtype=F64, requires_grad=True)
    each = torch.tensor([0.3, 1.0, 0.3, 2.0], dtype=F64)

    def denoised(x, sigma, *given):
        mixture = GaussianMixture.from_covariance(
            given[0], 0.5 * (given[1] + given[1].mT), log_weights=given[2]
        )
        return mixture.as_denoiser()(x, sigma)

    assert torch.autograd.gradcheck(denoised, (x, each, *given))
    sigma = torch.tensor(0.6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(denoised, (x, sigma, *given))


def test_nothing_is_made_on_the_default_device():
    mixture = make()
    x = torch.randn(6, 2, generator=seeded(1), dtype=F64)
    sigma = torch.tensor([0.1, 2.0, 0.1, 0.5, 0.5, 0.1], dtype=F64)
    levels = torch.linspace(0.99, 0.01, 10, dtype=F64)
    steps = torch.tensor([0, 3, 3, 9, 1, 0])
    with torch.device("meta"):
        denoiser = mixture.as_denoiser()
        predictor = denoiser.noise_predictor(levels)
        for value in (denoiser(x, sigma), denoiser(x, 0.3), predictor(x, steps), predictor(x, 2)):
            assert value.device.type == "cpu"


# ---- scaled points and time steps ------------------------------------------------------------------


def test_noise_predictor_is_the_noise_of_the_scaled_law():
    mixture = make()
    levels = torch.linspace(0.99, 0.01, 10, dtype=F64)
    predictor = mixture.as_denoiser().noise_predictor(levels)
    x = torch.randn(30, 2, generator=seeded(1), dtype=F64)
    steps = torch.arange(30) % 10
    together = predictor(x, steps)
    for step in range(10):
        scale, variance = levels[step].sqrt(), 1 - levels[step]
        # law of scale X + sqrt(variance) noise, from the moments of each component
        covariance = torch.linalg.inv(mixture.precision_tril @ mixture.precision_tril.mT)
        noisy = GaussianMixture.from_covariance(
            scale * mixture.centers,
            scale**2 * covariance + variance * torch.eye(2, dtype=F64),
            log_weights=mixture.log_weights,
        )
        expected = -variance.sqrt() * noisy.score(x)
        torch.testing.assert_close(predictor(x, step), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            together[steps == step], expected[steps == step], rtol=1e-9, atol=1e-9
        )


def test_fractional_time_steps_interpolate_sigma_linearly():
    denoiser = make().as_denoiser()
    levels = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    sigmas = ((1 - levels) / levels).sqrt()
    x = torch.randn(4, 2, generator=seeded(1), dtype=F64)
    sigma = float(0.25 * sigmas[1] + 0.75 * sigmas[2])
    torch.testing.assert_close(
        denoiser.noise_predictor(levels)(x, 1.75),
        denoiser.noise(x * math.sqrt(1 + sigma**2), sigma),
    )


# ---- schedulers --------------------------------------------------------------------------------------
# Driven as a pipeline drives them, with the predictor in the network's place.

SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False, "timestep_spacing": "trailing"},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip(
        "diffusers", reason="the schedulers are diffusers', an optional extra"
    )


def drive(scheduler, predictor, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples from white noise x, (n, d)."""
    scheduler.set_timesteps(steps)
    options = {"generator": seeded(9)} if type(scheduler).__name__ == "DDPMScheduler" else {}
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = predictor(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(noise, t, x, **options).prev_sample
    return x


def scheduler_of(diffusers, name: str):
    return getattr(diffusers, name)(**SCHEDULERS[name])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_samples_have_the_law_of_direct_samples(diffusers, name):
    mixture = make()
    scheduler = scheduler_of(diffusers, name)
    white = torch.randn(1000, 2, generator=seeded(5), dtype=F64)
    direct = mixture.sample((1000,), generator=seeded(6))

    def p_value(law: GaussianMixture) -> float:
        predictor = law.as_denoiser().noise_predictor(scheduler.alphas_cumprod)
        steps = 250 if name == "DDPMScheduler" else 60
        samples = drive(scheduler, predictor, white, steps)
        assert samples.shape == white.shape
        return energy_test(samples, direct, permutations=199, generator=seeded(8))

    # Equal laws fail this with probability 0.01, once for the fixed seeds.
    assert p_value(mixture) > 0.01
    # A denoiser that is wrong in its weights alone is found out.
    uniform = GaussianMixture(mixture.centers, mixture.precision_tril)
    assert p_value(uniform) < 0.01


@pytest.mark.parametrize(
    ("name", "order"),
    [("DDIMScheduler", 1), ("EulerDiscreteScheduler", 1), ("DPMSolverMultistepScheduler", 2)],
)
def test_scheduler_converges_to_the_known_flow_of_a_normal_law(diffusers, name, order):
    # For N(m, c) the probability flow takes m + sqrt(c + sigma^2) y to m + sqrt(c) y along each axis.
    mean = torch.tensor([[0.7, -0.4]], dtype=F64)
    variance = torch.tensor([0.5, 2.0], dtype=F64)
    law = GaussianMixture.from_covariance(mean, variance.diag())
    scheduler = scheduler_of(diffusers, name)
    predictor = law.as_denoiser().noise_predictor(scheduler.alphas_cumprod)
    top = float(predictor.sigmas[-1])
    white = torch.randn(50, 2, generator=seeded(1), dtype=F64)
    start = white * (top if name == "EulerDiscreteScheduler" else math.sqrt(1 + top**2))
    exact = mean + (start - mean) * (variance / (variance + top**2)).sqrt()

    def observed_order(predict) -> float:
        coarse, fine = (
            float((drive(scheduler, predict, white, steps) - exact).abs().max())
            for steps in (40, 200)
        )
        return math.log(coarse / fine) / math.log(5)

    # Measured 0.99, 1.00 and 2.10; with the time one step of a thousand late 0.78, 0.79 and -0.6, as then
    # the samples do not converge to the flow.
    assert observed_order(predictor) > order - 0.05
    assert observed_order(lambda x, t: predictor(x, min(float(t) + 1, 999.0))) < order - 0.1


def test_euler_with_any_spacing_by_its_own_sigmas(diffusers):
    mixture = make()
    denoiser = mixture.as_denoiser()
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(60)
    white = torch.randn(1000, 2, generator=seeded(5), dtype=F64)
    x = white * scheduler.init_noise_sigma
    by_hand = x
    for t, sigma, after in zip(
        scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False
    ):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(denoiser.noise(x, sigma), t, x).prev_sample
        by_hand = by_hand + (after - sigma) * denoiser.noise(by_hand, sigma)
    assert float((x - by_hand).abs().max()) < 1e-3  # the scheduler computes in float32
    direct = mixture.sample((1000,), generator=seeded(6))
    assert energy_test(x, direct, permutations=199, generator=seeded(8)) > 0.01


# ---- bad input -----------------------------------------------------------------------------------------


def test_errors(unchecked_shapes):
    mixture = make()
    denoiser = mixture.as_denoiser()
    x = torch.zeros(4, 2, dtype=F64)
    cases = [
        (ValueError, r"x must have event size 2 .* shape \(4, 3\)", torch.zeros(4, 3, dtype=F64), 1.0),
        (TypeError, "mixture's dtype torch.float64, got torch.float32", x.float(), 1.0),
        (ValueError, r"x must be finite.*first at index \(0, 0\)", x * math.nan, 1.0),
        (ValueError, r"sigma must be a number or have shape \(4,\), one a point, got shape \(3,\)", x, torch.ones(3)),
        (ValueError, r"got shape \(4, 1\)", x, torch.ones(4, 1)),
        (ValueError, "sigma must be non-negative but its least value is -0.5", x, -0.5),
        (ValueError, "sigma must be non-negative but its least value is -1", x, torch.tensor([1.0, 2, -1, 0])),
        (ValueError, "sigma must be finite", x, math.inf),
        (ValueError, r"sigma must be finite.*first at index \(2,\)", x, torch.tensor([1, 1, math.nan, 1])),
        (ValueError, "sigma must not require a gradient", x, torch.ones(4, requires_grad=True)),
    ]  # fmt: skip
    for error, message, points, sigma in cases:
        for method in (denoiser, denoiser.score, denoiser.noise):
            with pytest.raises(error, match=message):
                method(points, sigma)
    with pytest.raises(ValueError, match="sigma must be positive, as point masses have no density"):
        Denoiser(x)(x, 0.0)
    with pytest.raises(ValueError, match=r"a mixture or points \(N, d\), got shape \(2,\)"):
        Denoiser(x[0])
    with pytest.raises(TypeError, match="law must have dtype float32 or float64"):
        Denoiser(x.long())
    with pytest.raises(ValueError, match="law must be finite"):
        Denoiser(x / 0)


def test_noise_predictor_errors(unchecked_shapes):
    denoiser = make().as_denoiser()
    levels = torch.linspace(0.9, 0.1, 5, dtype=F64)
    x = torch.zeros(4, 2, dtype=F64)
    betas = torch.linspace(1e-4, 0.02, 5)
    for bad in (betas, levels[None], levels - 0.1, 2 * levels):
        with pytest.raises(ValueError, match="pass a scheduler's alphas_cumprod"):
            NoisePredictor(denoiser, bad)
    predictor = NoisePredictor(denoiser, levels)
    for bad in (-1, 4.5, 5, torch.tensor([0, 1, 2, 5]), math.nan):
        with pytest.raises(ValueError, match="timestep must be from 0 to 4, got"):
            predictor(x, bad)
    with pytest.raises(ValueError, match=r"timestep must be a number or have shape \(4,\)"):
        predictor(x, torch.tensor([0, 1]))
