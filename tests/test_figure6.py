"""Figure 6: isotropic kernels of a chosen variance."""

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV, LeaveOneOut
from sklearn.neighbors import KernelDensity

from wpo_notes import datasets
from wpo_notes.experiments.figure6 import best_variance, leave_one_out_variance
from wpo_notes.mixture import GaussianMixture


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["moons", "checkerboard"])
def test_cross_validated_variance_is_that_of_scikit_learn(name):
    x = datasets.get(name).sample(150, generator=rng(), dtype=torch.float64)
    variance = leave_one_out_variance(x)
    # Bandwidths on a grid with steps of 5 %, which the optimum lies within.
    bandwidths = variance**0.5 * 1.05 ** np.arange(-8, 9)
    search = GridSearchCV(
        KernelDensity(rtol=1e-8), {"bandwidth": bandwidths}, cv=LeaveOneOut(), n_jobs=1
    ).fit(x.numpy())
    assert search.best_params_["bandwidth"] ** 2 == pytest.approx(variance, rel=0.11)


def test_cross_validation_sees_how_far_a_point_is_from_the_others():
    # Each point's neighbour is at distance r = 2e-3: the sum of -log v - r^2 / 2v is largest at v = r^2 / 2. A fifth point
    # at distance R outweighs them: of -5 log v - R^2 / 2v that is v = R^2 / 10.
    pairs = torch.tensor([[-1e-3, 0], [1e-3, 0], [-1e-3, 1], [1e-3, 1]], dtype=torch.float64)
    assert leave_one_out_variance(pairs) == pytest.approx(2e-6, rel=0.02)
    for dtype in (torch.float64, torch.float32):
        alone = torch.cat([pairs, pairs.new_tensor([[0, 1e4]])]).to(dtype)
        assert leave_one_out_variance(alone) == pytest.approx(1e8 / 10, rel=0.02)


def test_best_variance_has_no_better_neighbour():
    law = datasets.get("swissroll")
    centers = law.sample(300, generator=rng(), dtype=torch.float64)
    points = law.sample(500, generator=rng(1), dtype=torch.float64)
    best = best_variance(centers, points)

    def likelihood(variance):
        return float(GaussianMixture.from_variance(centers, variance).log_prob(points).mean())

    for factor in (0.1, 0.5, 0.9, 1.1, 2.0, 10.0):
        assert likelihood(factor * best) < likelihood(best) + 1e-4
