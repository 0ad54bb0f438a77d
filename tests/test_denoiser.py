"""The score network and its denoising objective, eq. (5)."""

from __future__ import annotations

import math

import pytest
import torch

from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.fit import fit
from wpo_notes.losses import denoising_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.sde import LinearSDE

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed(dim: int = 2, **options) -> ScoreNetwork:
    """A network whose last layer is not zero, so that its own part counts."""
    network = ScoreNetwork(dim, data_std=1.5, hidden=(8, 8), generator=rng(), **options)
    with torch.no_grad():
        network.network[-1].weight.normal_(generator=rng(1))
        network.network[-1].bias.normal_(generator=rng(2))
    return network


def test_without_its_network_it_is_the_score_of_normal_data():
    network = ScoreNetwork(3, data_std=1.5, dtype=F64, generator=rng())
    y = torch.randn(10, 3, dtype=F64, generator=rng(1))
    data = GaussianMixture.from_variance(torch.zeros(1, 3, dtype=F64), 1.5**2)
    for std in (1e-4, 0.3, 50.0):
        torch.testing.assert_close(network(y, std), data.diffuse(std**2).score(y))


def test_preconditioning_is_that_of_karras():
    """Score (D - y) / σ² with D from Table 1 of Karras et al. (2022), written out."""
    network = perturbed(dtype=F64)
    y = torch.randn(6, 2, dtype=F64, generator=rng(3))
    std = torch.tensor([0.05, 0.2, 0.7, 1.5, 4.0, 20.0], dtype=F64)[:, None]
    total = std**2 + 1.5**2
    skip, out, into = 1.5**2 / total, std * 1.5 / total.sqrt(), 1 / total.sqrt()
    denoised = skip * y + out * network.network(torch.cat([into * y, std.log() / 4], 1))
    torch.testing.assert_close(network(y, std[:, 0]), (denoised - y) / std**2)


def test_denoiser_tends_to_the_identity_and_to_the_mean():
    network = perturbed(dtype=F64)
    y = torch.randn(6, 2, dtype=F64, generator=rng(3))
    # D = y + σ² score. As σ -> 0, D -> y like σ; the score, like 1 / σ, stays finite.
    for std in (1e-3, 1e-6):
        assert (std**2 * network(y, std)).abs().max() < 10 * std
    assert torch.isfinite(network(y, 1e-150)).all()
    # As σ -> ∞, D stays of the order of σ_d while y grows like σ.
    assert (1e6 * y + 1e12 * network(1e6 * y, 1e6)).abs().max() < 20


def test_batches_of_any_shape_and_one_std_a_point():
    network = perturbed(dtype=F64)
    y = torch.randn(2, 3, 2, dtype=F64, generator=rng(3))
    std = torch.rand(2, 3, dtype=F64, generator=rng(4)) + 0.1
    expected = torch.stack(
        [network(y[i, j], float(std[i, j])) for i in range(2) for j in range(3)]
    ).reshape(y.shape)
    torch.testing.assert_close(network(y, std), expected)


def test_hidden_layers_are_the_papers():
    network = ScoreNetwork(2, data_std=1.0)
    widths = [layer.out_features for layer in network.network if hasattr(layer, "out_features")]
    assert widths == [64] * 5 + [2]


@pytest.mark.parametrize(
    "sde",
    [
        LinearSDE.brownian(1.3, 2.0),
        LinearSDE.ornstein_uhlenbeck(0.7, 1.1, 2.0),
        LinearSDE.variance_preserving(0.1, 5.0, 2.0),
    ],
)
def test_score_in_time_is_the_score_of_the_noised_law(sde):
    """For normal data, where the untrained network is exact at every noise level."""
    network = ScoreNetwork(2, data_std=1.5, dtype=F64)
    data = GaussianMixture.from_variance(torch.zeros(1, 2, dtype=F64), 1.5**2)
    y = torch.randn(5, 2, dtype=F64, generator=rng())
    for s in (0.1, 0.9, 2.0):
        torch.testing.assert_close(network.score(sde)(y, s), sde.score(data)(y, s))


def test_brownian_time_is_noise_level():
    network, sde = perturbed(dtype=F64), LinearSDE.brownian(1.3, 2.0)
    y = torch.randn(5, 2, dtype=F64, generator=rng())
    torch.testing.assert_close(network.score(sde)(y, 0.49), network(y, 1.3 * 0.7))


def test_loss_draws_the_logarithm_of_std_uniformly():
    seen = []

    def model(y, std):
        seen.append(std)
        return torch.zeros_like(y)

    x = torch.zeros(20_000, 1)
    denoising_loss(0.01, 2.0)(model, x, None, rng())
    low, high = math.log(0.01), math.log(2.0)
    uniform = (seen[0].log() - low) / (high - low)
    assert uniform.min() >= -1e-5
    assert uniform.max() <= 1 + 1e-5
    # Mean 1/2 and variance 1/12 of a uniform number: five standard errors.
    assert abs(float(uniform.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 20_000)
    assert abs(float(uniform.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / 20_000)


def test_training_beats_the_score_of_a_normal_law():
    law = GaussianMixture.from_variance(torch.tensor([[-1.0], [1.0]]), 0.04)
    x = law.sample((4000,), generator=rng())
    network = ScoreNetwork(1, data_std=1.0, hidden=(32, 32), generator=rng(1))
    loss = denoising_loss(0.05, 2.0)
    test = law.sample((20_000,), generator=rng(2))

    def objective(model):
        with torch.no_grad():
            return float(loss(model, test, None, rng(3)))

    def exact(y, std):
        variance = 0.04 + std[:, None] ** 2
        return (torch.tanh(y / variance) - y) / variance  # of two equal components at ±1

    before = objective(network)
    fit(network, x, loss=loss, steps=300, batch_size=256, lr=5e-3, generator=rng(4), progress=False)
    # Same noise in all three, so most of the variance cancels: at least 80 percent of the gap
    # between the normal law's score, where it starts, and the exact score is closed.
    assert objective(network) - objective(exact) < 0.2 * (before - objective(exact))


def test_loss_is_denoising_score_matching():
    network = perturbed()
    x = torch.randn(50, 2, generator=rng(5))
    value = denoising_loss(0.5, 0.5 * (1 + 1e-6))(network, x, None, rng(6))
    generator = rng(6)
    torch.rand(50, generator=generator)
    expected = denoising_score_matching(network, x, std=0.5, generator=generator)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)


def test_randomness_comes_from_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        ScoreNetwork(2, data_std=1.0, generator=rng(seed)).network[0].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ScoreNetwork(2, data_std=1.0)
    denoising_loss(0.1, 1.0)(perturbed(), torch.zeros(4, 2), None, rng())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_tensor_lands_on_the_default_device():
    torch.set_default_device("meta")
    try:
        network = ScoreNetwork(2, data_std=1.0)
        x = torch.zeros(4, 2, device="cpu")
        results = [
            network(x, 0.5),
            network.score(LinearSDE.brownian(1.0, 1.0))(x, 0.5),
            denoising_loss(0.1, 1.0)(network, x, None, rng()),
            *network.parameters(),
        ]
    finally:
        torch.set_default_device(None)
    assert all(result.device.type == "cpu" for result in results)


def test_errors_say_what_is_wrong():
    for arguments in ({"dim": 0}, {"dim": 2, "hidden": (8, 0)}):
        with pytest.raises(ValueError, match="dim and the widths in hidden must be at least 1"):
            ScoreNetwork(data_std=1.0, **arguments)
    with pytest.raises(ValueError, match="data_std must be a positive finite number, got 0"):
        ScoreNetwork(2, data_std=0.0)
    network, y = perturbed(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="y must have event size 2"):
        network(torch.zeros(3, 1), 0.1)
    with pytest.raises(ValueError, match=r"std must be a number or have shape \(3,\)"):
        network(y, torch.ones(2))
    with pytest.raises(ValueError, match=r"std must be positive, got 0: .* stop the reverse"):
        network(y, 0.0)
    with pytest.raises(ValueError, match=r"std_max must be larger than std_min, got 0.1 <= 0.2"):
        denoising_loss(0.2, 0.1)
    with pytest.raises(ValueError, match="std_min must be a positive finite number, got -1"):
        denoising_loss(-1.0, 0.1)
