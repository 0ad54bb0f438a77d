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


def test_best_variance_has_no_better_neighbour():
    law = datasets.get("swissroll")
    centers = law.sample(300, generator=rng(), dtype=torch.float64)
    points = law.sample(500, generator=rng(1), dtype=torch.float64)
    best = best_variance(centers, points)

    def likelihood(variance):
        return float(GaussianMixture.from_variance(centers, variance).log_prob(points).mean())

    for factor in (0.1, 0.5, 0.9, 1.1, 2.0, 10.0):
        assert likelihood(factor * best) < likelihood(best) + 1e-4
