"""Score-matching objectives against automatic differentiation, quadrature and each other."""

import jaxtyping
import pytest
import torch

from wpo_notes.losses import (
    denoising_score_matching,
    explicit_score_matching,
    implicit_score_matching,
)
from wpo_notes.mixture import GaussianMixture


def random_mixture(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n, d, generator=generator, dtype=dtype)
    tril = 0.4 * torch.randn(n, d, d, generator=generator, dtype=dtype).tril(-1)
    diagonal = 1 + torch.rand(n, d, generator=generator, dtype=dtype)
    log_weights = torch.randn(n, generator=generator, dtype=dtype)
    return GaussianMixture(
        centers, tril + torch.diag_embed(diagonal), log_weights=log_weights, validate_args=False
    )


def test_shapes_are_checked_where_they_are_promised():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"x[\s\S]*Float"):
        implicit_score_matching(random_mixture(3, 2), torch.zeros(2))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_implicit_objective_equals_automatic_differentiation(d):
    mixture = random_mixture(7, d)
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    independent = mixture.to_torch()
    score = torch.func.grad(lambda y: independent.log_prob(y))
    divergence = torch.func.vmap(lambda y: torch.func.jacrev(score)(y).trace())(x)
    expected = (torch.func.vmap(score)(x).square().sum(-1) + 2 * divergence).mean()
    torch.testing.assert_close(
        implicit_score_matching(mixture, x), expected, rtol=1e-11, atol=1e-11
    )


def quadrature(mixture, bound=12.0, n=4001):
    x = torch.linspace(-bound, bound, n, dtype=torch.float64)[:, None]
    return x, mixture.log_prob(x).exp() * (x[1, 0] - x[0, 0])


def test_explicit_minus_implicit_is_the_data_s_fisher_information():
    data, model = random_mixture(4, 1, seed=2), random_mixture(3, 1, seed=3)
    x, weight = quadrature(data)
    explicit = (weight * (model.score(x) - data.score(x)).square()[:, 0]).sum()
    pointwise = torch.func.vmap(lambda point: implicit_score_matching(model, point[None]))(x)
    implicit = (weight * pointwise).sum()
    fisher = (weight * data.score(x).square()[:, 0]).sum()
    torch.testing.assert_close(explicit - implicit, fisher, rtol=1e-9, atol=1e-9)


def test_excluded_centres_do_not_score_themselves():
    mixture = random_mixture(6, 2)
    index = torch.tensor([2, -1, 5])
    x = torch.stack([mixture.centers[2], torch.zeros(2, dtype=torch.float64), mixture.centers[5]])
    parts = []
    for point, left_out in zip(x, index.tolist(), strict=True):
        keep = [i for i in range(6) if i != left_out]
        smaller = GaussianMixture(
            mixture.centers[keep],
            mixture.precision_tril[keep],
            log_weights=mixture.log_weights[keep],
        )
        parts.append(implicit_score_matching(smaller, point[None]))
    torch.testing.assert_close(
        implicit_score_matching(mixture, x, exclude=index), torch.stack(parts).mean()
    )


def test_a_centre_scored_at_itself_makes_the_objective_unbounded_below():
    # Send one precision to infinity: the point on it contributes -2 Tr Gamma, the others nothing.
    centers = random_mixture(5, 2).centers
    x = centers[:1]
    values = []
    for scale in (1e1, 1e2, 1e3):
        tril = torch.eye(2, dtype=torch.float64).repeat(5, 1, 1)
        tril[0] *= scale
        values.append(implicit_score_matching(GaussianMixture(centers, tril), x))
    torch.testing.assert_close(
        values[-1], torch.tensor(-4e6, dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert values[0] > values[1] > values[2]


def test_explicit_objective_vanishes_at_the_score_and_counts_squares():
    mixture = random_mixture(3, 2)
    x = mixture.sample((10,), generator=torch.Generator().manual_seed(0))
    assert explicit_score_matching(mixture.score, x, mixture.score(x)) == 0
    shifted = explicit_score_matching(lambda y: mixture.score(y) + 2, x, mixture.score(x))
    torch.testing.assert_close(shifted, torch.tensor(8.0, dtype=torch.float64))


def test_denoising_objective_is_least_at_the_noised_score():
    # E|sigma s + xi|^2 = sigma^2 E|s - score|^2 + constant: the difference of two models' objectives
    # under the same noise estimates the difference of their explicit objectives.
    data = random_mixture(4, 2, seed=5)
    std = 0.5
    noised = data.diffuse(std**2)
    x = data.sample((200_000,), generator=torch.Generator().manual_seed(0))

    def objective(score):
        return denoising_score_matching(
            score, x, std=std, generator=torch.Generator().manual_seed(1)
        )

    best = objective(lambda y, _: noised.score(y))
    worse = objective(lambda y, _: noised.score(y) + 0.3)
    # The explicit difference is std^2 * 2 * 0.3^2; the cross term's standard error is 4e-4.
    assert abs(float(worse - best) - std**2 * 2 * 0.3**2) < 2e-3


def test_denoising_objective_passes_one_std_a_point():
    x = torch.zeros(3, 2, dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    # The score of a point mass at zero noised by std is -y / std^2: the objective is exactly zero.
    value = denoising_score_matching(
        lambda y, s: -y / s[:, None].square(), x, std=std, generator=torch.Generator()
    )
    torch.testing.assert_close(value, torch.zeros((), dtype=torch.float64))


def test_denoising_objective_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    denoising_score_matching(lambda y, s: -y, torch.zeros(3, 2), std=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input():
    with pytest.raises(ValueError, match="std must be a positive finite number, got 0"):
        denoising_score_matching(lambda y, s: y, torch.zeros(3, 2), std=0.0)


def test_no_tensor_is_made_on_the_default_device():
    mixture = random_mixture(4, 2)
    x = torch.zeros(3, 2, dtype=torch.float64)
    exclude = torch.tensor([0, -1, 2])
    with torch.device("meta"):
        values = [
            implicit_score_matching(mixture, x, exclude=exclude),
            explicit_score_matching(mixture.score, x, x),
            denoising_score_matching(lambda y, s: y, x, std=0.5),
        ]
    assert all(value.device.type == "cpu" and torch.isfinite(value) for value in values)
