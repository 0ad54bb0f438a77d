"""Where a kernel model starts: clusters of the points, their shares and their covariances."""

from __future__ import annotations

import torch
from torch import Tensor

from wpo_notes._optional import needed
from wpo_notes.mixture import GaussianMixture

__all__ = ["clusters"]

# A cluster's covariance is averaged with this many points of the isotropic mean covariance, times
# the factor: few points have too narrow a covariance, or a singular one.
_PRIOR_POINTS, _PRIOR_FACTOR = 2.0, 0.1


def clusters(points: Tensor, count: int, *, generator: torch.Generator) -> GaussianMixture:
    """Mixture of at most `count` normal laws, one a cluster of k-means (scikit-learn): (n, d).

    Clusters of at most d + 1 points are given up and their points join the nearest others, so that no
    centre is a training point, at which it would be scored. If fewer than two are left, as with an outlier,
    the clusters are the halves of the points along their longest axis.
    """
    array = points.cpu().numpy()
    seed = int(torch.randint(2**31, (), generator=generator, device=points.device))
    k_means = needed("sklearn.cluster").KMeans(count, n_init=1, max_iter=30, random_state=seed)
    found = k_means.fit(array)
    centers = torch.from_numpy(found.cluster_centers_).to(points)
    label = torch.from_numpy(found.labels_).to(points.device, torch.int64)
    d = points.shape[1]
    large = torch.bincount(label, minlength=count) > d + 1
    if count > 1 and int(large.sum()) < 2:
        centers, label = centers[:2], _halves(points)
    elif not bool(large.all()):
        centers = centers[large]
        label = torch.cdist(points, centers).argmin(1)
    number = torch.bincount(label, minlength=len(centers)).to(points)
    centers = torch.zeros_like(centers).index_add(0, label, points) / number[:, None]
    offset = points - centers[label]
    scatter = points.new_zeros(len(centers), d, d)
    scatter = scatter.index_add(0, label, offset[:, :, None] * offset[:, None, :])
    prior = _PRIOR_POINTS * _PRIOR_FACTOR * offset.square().mean()
    identity = torch.eye(d, dtype=points.dtype, device=points.device)
    covariance = (scatter + prior * identity) / (number + _PRIOR_POINTS)[:, None, None]
    return GaussianMixture.from_covariance(centers, covariance, log_weights=number.log())


def _halves(points: Tensor) -> Tensor:
    """Label of each point, 0 or 1: the lower or the upper half along the first principal axis."""
    offset = points - points.mean(0)
    axis = torch.linalg.svd(offset, full_matrices=False).Vh[0]
    label = torch.ones(len(points), dtype=torch.int64, device=points.device)
    label[(offset @ axis).argsort(stable=True)[: len(points) // 2]] = 0
    return label
