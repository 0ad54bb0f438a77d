from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Independent, Normal

from wpo_notes import datasets
from wpo_notes.metrics import (
    Estimate,
    classifier_test,
    energy_test,
    fisher_divergence,
    kl_divergence,
    memorisation,
    mmd,
    sliced_wasserstein,
    wasserstein,
    weight_error,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(mean: float, std: float, dim: int = 2) -> Independent:
    options = {"dtype": torch.float64}
    return Independent(
        Normal(torch.full((dim,), mean, **options), torch.full((dim,), std, **options)), 1
    )


class NormalLaw:
    """N(0, I) in the plane."""

    def sample(self, n, *, generator=None):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x):
        return normal(0.0, 1.0).log_prob(x)


def cloud(n: int, seed: int, dim: int = 2) -> torch.Tensor:
    return torch.randn(n, dim, generator=generator(seed), dtype=torch.float64)


# ---- Kullback-Leibler divergence --------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (0.0, 1.4), (-1.0, 0.8)])
def test_kl_divergence_of_normals_is_the_closed_form(mean, std):
    exact = 2 * (math.log(std) + (1 + mean**2) / (2 * std**2) - 0.5)
    estimate = kl_divergence(
        NormalLaw(), normal(mean, std).log_prob, n=20_000, generator=generator()
    )
    assert isinstance(estimate, Estimate)
    # Four standard errors: fails with probability 6e-5 for a right estimator.
    assert estimate.value == pytest.approx(exact, abs=4 * estimate.error)
    assert estimate.error < 0.1 * exact


def test_standard_error_of_the_divergence_is_the_spread_of_its_estimates():
    model = normal(0.5, 1.0).log_prob
    estimates = [
        kl_divergence(NormalLaw(), model, n=400, generator=generator(k)) for k in range(300)
    ]
    spread = np.std([e.value for e in estimates])
    # A standard deviation from 300 values is known to 4 %, so this allows four of its errors.
    assert np.mean([e.error for e in estimates]) == pytest.approx(spread, rel=0.17)


def test_divergence_of_a_law_from_itself_is_zero_without_error():
    estimate = kl_divergence(NormalLaw(), NormalLaw().log_prob, n=50, generator=generator())
    assert estimate == Estimate(0.0, 0.0)


def test_divergence_is_infinite_where_the_model_has_no_mass():
    def half_plane(x):
        return torch.where(x[:, 0] > 0, math.log(2) + normal(0.0, 1.0).log_prob(x), -math.inf)

    assert kl_divergence(NormalLaw(), half_plane, n=50, generator=generator()).value == math.inf


def test_divergence_errors_say_what_to_do():
    with pytest.raises(ValueError, match="n must be at least 2 for a standard error, got 1"):
        kl_divergence(NormalLaw(), NormalLaw().log_prob, n=1)
    with pytest.raises(
        ValueError, match=r"log_prob must map points \(5, 2\) to values \(5,\), got \(5, 2\)"
    ):
        kl_divergence(NormalLaw(), lambda x: x, n=5)
    with pytest.raises(ValueError, match="5 values are NaN"):
        kl_divergence(NormalLaw(), lambda x: x[:, 0] * math.nan, n=5)


# ---- energy test --------------------------------------------------------------------------------


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    def mean_distance(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def test_p_value_tends_to_that_of_all_splits():
    """Seven points have 35 splits into 3 and 4: enumerate them with the definition."""
    x, y = cloud(3, 0), cloud(4, 1) + 0.8
    pooled = torch.cat([x, y]).numpy()
    observed = energy_distance(x.numpy(), y.numpy())
    larger = [
        energy_distance(pooled[list(k)], np.delete(pooled, k, 0)) >= observed - 1e-12
        for k in combinations(range(7), 3)
    ]
    p = energy_test(x, y, permutations=20_000, generator=generator())
    exact = np.mean(larger)
    # Binomial: four standard errors.
    assert 0 < exact < 1
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_distance_agrees_with_scipy_on_the_line():
    """SciPy's one-dimensional energy distance (a square root) gives the same permutation p-value."""
    x, y = cloud(12, 2, 1), cloud(15, 3, 1) + 0.7
    reference = stats.permutation_test(
        (x[:, 0].numpy(), y[:, 0].numpy()),
        stats.energy_distance,
        alternative="greater",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    )
    p = energy_test(x, y, permutations=4000, generator=generator())
    # Two binomial proportions near 0.1, four standard errors of their difference: 0.027.
    assert 0.01 < reference.pvalue < 0.5
    assert p == pytest.approx(reference.pvalue, abs=0.045)


def test_p_values_are_uniform_under_the_null_hypothesis():
    values = [
        energy_test(cloud(20, 2 * k), cloud(30, 2 * k + 1), permutations=99, generator=generator(k))
        for k in range(300)
    ]
    # Each p-value is uniform on 0.01, ..., 1. The test's level at 0.1 is 30 of 300 with standard
    # deviation 5.2: four of them.
    assert abs(sum(p <= 0.1 for p in values) - 30) < 21
    assert stats.kstest(values, stats.uniform.cdf).pvalue > 1e-3
    assert min(values) >= 0.01


def test_power_against_a_shift_a_change_of_scale_and_a_rotation():
    """In the plane with 200 points each; 20 repetitions, so at level 0.05 chance gives 1."""

    def rejections(change):
        return sum(
            energy_test(
                cloud(200, 100 + 2 * k),
                change(cloud(200, 101 + 2 * k)),
                permutations=99,
                generator=generator(k),
            )
            <= 0.05
            for k in range(20)
        )

    correlate = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64)
    assert rejections(lambda y: y + torch.tensor([0.5, 0.0])) >= 18
    assert rejections(lambda y: 1.5 * y) >= 18
    # Marginals stay N(0, 1): only their dependence changes.
    assert rejections(lambda y: y @ correlate) >= 18
    assert rejections(lambda y: y) <= 5


def test_result_does_not_depend_on_blocks(monkeypatch):
    x, y = cloud(37, 4), cloud(50, 5) + 0.3
    expected = energy_test(x, y, generator=generator())
    monkeypatch.setattr("wpo_notes.metrics._BLOCK_ELEMENTS", 400)
    assert energy_test(x, y, generator=generator()) == expected


def test_float32_samples_and_global_state():
    state = torch.get_rng_state()
    x, y = cloud(30, 6), cloud(30, 7)
    p = energy_test(x, y, generator=generator())
    # A split's statistic would have to lie within rounding of the observed one to be counted otherwise.
    assert energy_test(x.float(), y.float(), generator=generator()) == pytest.approx(p, abs=0.002)
    assert 0 < energy_test(x, y) <= 1
    assert torch.equal(torch.get_rng_state(), state)


def test_no_tensor_is_made_on_the_default_device():
    x, y = cloud(10, 8), cloud(10, 9)
    torch.set_default_device("meta")
    try:
        assert 0 < energy_test(x, y, generator=generator()) <= 1
    finally:
        torch.set_default_device(None)


def test_energy_test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        energy_test(cloud(5, 0), cloud(5, 1), permutations=0)
    with pytest.raises(ValueError, match=r"y must be a matrix \(n, d\) with at least one point"):
        energy_test(cloud(5, 0), cloud(0, 1))
    with pytest.raises(ValueError, match="y must be finite"):
        energy_test(cloud(5, 0), cloud(5, 1) * math.nan)


def test_samples_of_different_widths_are_an_error(unchecked_shapes):
    with pytest.raises(ValueError, match="y must have event size 2"):
        energy_test(cloud(5, 0), cloud(5, 1, 3))


# ---- distances between samples, and scores ------------------------------------------------------


def test_fisher_divergence_of_normals_is_the_closed_form():
    # Scores -x and -x / 4 at x from N(0, I): E |3 x / 4|^2 = 9 / 8 in the plane.
    x = cloud(20_000, 0)
    estimate = fisher_divergence(-x / 4, -x)
    assert abs(estimate.value - 9 / 8) < 4 * estimate.error < 0.1
    assert fisher_divergence(-x, -x) == Estimate(0.0, 0.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_scores_at_different_points_are_refused():
    x = cloud(5, 0)
    with pytest.raises(ValueError, match="at the same points, at least 2"):
        fisher_divergence(-x, -x[1:])


def test_wasserstein_of_a_shift_is_its_length_and_on_a_line_that_of_the_sorted():
    x = cloud(200, 0)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert wasserstein(x, x + shift) == pytest.approx(0.5, rel=1e-9)
    line, other = cloud(300, 1, dim=1), 2 * cloud(300, 2, dim=1)
    expected = float((line.sort(0)[0] - other.sort(0)[0]).square().mean().sqrt())
    assert wasserstein(line, other) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_a_shift():
    # E (u . shift)^2 = |shift|^2 / d; 4000 directions leave 1 %.
    x = cloud(200, 0, dim=3)
    shift = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    value = sliced_wasserstein(x, x + shift, projections=4000, generator=generator())
    assert value == pytest.approx(1 / math.sqrt(3), rel=0.03)
    again = sliced_wasserstein(x, x + shift, projections=4000, generator=generator())
    assert value == again
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced_wasserstein(x, x, projections=0)


def test_mmd_is_its_definition_and_centred():
    x, y = cloud(30, 0), 1 + cloud(20, 1)
    scale = torch.cdist(x, y).median()

    def k(a, b):
        return math.exp(-0.5 * float(((a - b) / scale).square().sum()))

    def within(z):
        pairs = [(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(k(a, b) for a, b in pairs) / len(pairs)

    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    assert mmd(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-9)
    null = [mmd(cloud(100, 2 * k), cloud(100, 2 * k + 1)) for k in range(20)]
    assert abs(np.mean(null)) < 4 * np.std(null) / 20**0.5
    assert mmd(x, y) > 4 * np.std(null)
    with pytest.raises(ValueError, match="at least 2 points each, got 1 and 20"):
        mmd(x[:1], y)


def test_classifier_finds_a_difference_and_none_where_there_is_none():
    x = cloud(1000, 0)
    same = classifier_test(x, cloud(1000, 1))
    assert abs(same.value - 0.5) < 4 * same.error
    # The best classifier of N(0, I) and N((2, 0), I) has accuracy Phi(1) = 0.841.
    shifted = classifier_test(x, cloud(1000, 2) + torch.tensor([2.0, 0.0]).double())
    assert shifted.value == pytest.approx(stats.norm.cdf(1), abs=4 * shifted.error)
    with pytest.raises(ValueError, match="equally many points, at least 10 for 5 folds, got 1000"):
        classifier_test(x, x[:10])


def test_weight_error_is_the_share_that_moved():
    law = datasets.get("moons")
    x = law.sample(4000, generator=generator(), dtype=torch.float64)
    # Half of |2 (p - 1/2)| with p of standard deviation 0.008
    assert weight_error(law, x) < 4 * 0.008
    upper = law.component_log_prob(x).argmax(1) == 0
    kept = torch.cat([x[upper][:1500], x[~upper][:500]])
    assert weight_error(law, kept) == pytest.approx(0.25, abs=1e-6)


# ---- memorisation -------------------------------------------------------------------------------


def test_memorisation_of_fresh_draws_copies_and_noisy_copies():
    training, held_out, fresh = cloud(2000, 0), cloud(2000, 1), cloud(2000, 2)
    null = memorisation(fresh, training, held_out)
    # In the plane the share is about 1/9, with standard error 0.007; density varies over the balls.
    assert null.share_near == pytest.approx(1 / 9, abs=0.03)
    assert abs(null.copying_score) < 4
    # Below one half, since points that are far from the others are more often the nearest.
    assert null.authenticity == pytest.approx(0.42, abs=0.05)
    copies = memorisation(training[:1000] + 1e-9, training, held_out)
    assert copies.share_near == 1
    assert copies.authenticity == 0
    assert copies.copying_score < -30
    # The blind spot: copies with noise of the points' spacing look like fresh draws, or better.
    noisy = memorisation(training + 0.1 * cloud(2000, 3), training, held_out)
    assert noisy.share_near < null.share_near + 0.03
    assert noisy.copying_score > -4
    assert noisy.nearest_distance == sorted(noisy.nearest_distance)


def test_neighbours_of_far_samples():
    # Near the points, beyond them, and so far that distances differ in their last digits: all distances, sorted.
    training = cloud(500, 0)
    samples = torch.cat([cloud(20, 1), 10 * cloud(20, 2), 1e8 * cloud(20, 3)])
    every = torch.cdist(samples, training, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = every.topk(2, largest=False).values.T
    spacing = torch.cdist(training, training).topk(2, largest=False).values[:, 1]
    panel = memorisation(samples, training, cloud(20, 4))
    assert panel.share_near == float((first < second / 3).double().mean())
    assert panel.authenticity == float((first > spacing[every.argmin(1)]).double().mean())
    quantiles = first.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=first.dtype)).tolist()
    assert panel.nearest_distance == pytest.approx(quantiles, rel=1e-12)


def test_copying_score_is_normal_for_fresh_draws():
    scores = [
        memorisation(cloud(100, 3 * k), cloud(300, 3 * k + 1), cloud(100, 3 * k + 2)).copying_score
        for k in range(40)
    ]
    # Mean 0 and deviation 1 within 4 standard errors of 40 values
    assert abs(np.mean(scores)) < 4 / 40**0.5
    assert np.std(scores) == pytest.approx(1, abs=4 / 80**0.5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_memorisation_wants_two_training_points():
    with pytest.raises(ValueError, match="training must have at least 2 points"):
        memorisation(cloud(5, 0), cloud(1, 1), cloud(5, 2))
    with pytest.raises(ValueError, match="training must have event size 2"):
        memorisation(cloud(5, 0), cloud(5, 1, dim=3), cloud(5, 2))
