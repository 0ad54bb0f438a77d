"""Where a kernel model starts: clusters keep the points' moments, and none is a single point."""

import torch

from wpo_notes._clusters import _PRIOR_FACTOR, _PRIOR_POINTS, clusters


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mixture_has_the_points_moments():
    x = torch.randn(400, 3, dtype=torch.float64, generator=rng()) @ torch.randn(
        3, 3, dtype=torch.float64, generator=rng(1)
    )
    start = clusters(x, 10, generator=rng(2))
    torch.testing.assert_close(start.mean, x.mean(0))
    # Undo the prior, and the law of total covariance gives the points' own.
    number = 400 * start.log_weights.exp()
    weights = start.log_weights.exp()
    within = torch.cholesky_inverse(start.precision_tril)
    between = torch.einsum("n,ni,nj->ij", weights, *(2 * (start.centers - start.mean,)))
    total = x.T.cov(correction=0)
    # trace of the scatter within, from the total and the part between
    mean_square = (total - between).trace() / 3
    prior = _PRIOR_POINTS * _PRIOR_FACTOR * mean_square * torch.eye(3, dtype=x.dtype)
    scatter = within * (number + _PRIOR_POINTS)[:, None, None] - prior
    torch.testing.assert_close(scatter.sum(0) / 400 + between, total, rtol=1e-8, atol=1e-8)


def test_single_points_do_not_become_centres():
    x = torch.randn(200, 2, dtype=torch.float64, generator=rng())
    far = torch.tensor([[50.0, 50.0], [-50.0, 50.0]], dtype=torch.float64)
    start = clusters(torch.cat([x, far]), 6, generator=rng(1))
    assert 2 <= len(start.centers) <= 6
    assert torch.cdist(start.centers, torch.cat([x, far])).min() > 0
    assert (202 * start.log_weights.exp()).round().min() > 3


def test_device_and_seed():
    x = torch.randn(100, 2, dtype=torch.float32, generator=rng())
    state = torch.get_rng_state()
    with torch.device("meta"):
        one, other = (clusters(x, 5, generator=rng(3)) for _ in range(2))
    assert torch.equal(one.centers, other.centers)
    assert one.centers.dtype == torch.float32
    assert one.centers.device == x.device
    assert torch.equal(state, torch.get_rng_state())
