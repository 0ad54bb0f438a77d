r"""How far a model is from a law, and whether it copies its training points.

The divergence is the one that eq. (14) relates to cross-entropy and entropy,
:math:`\mathcal D_{KL}(\mu \| \pi) = -\mathcal E(\mu) + \mathcal H(\mu, \pi)`. Every estimate comes with
its standard error, every test with its p-value.

Chapter: *Algorithm 1* (``book/algorithm.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu
from torch import Tensor

from wpo_notes._checks import checked_points, make_generator
from wpo_notes._optional import needed
from wpo_notes._shapes import Float

__all__ = [
    "Estimate",
    "Law",
    "Memorisation",
    "PiecewiseLaw",
    "classifier_test",
    "energy_test",
    "fisher_divergence",
    "kl_divergence",
    "memorisation",
    "mmd",
    "sliced_wasserstein",
    "wasserstein",
    "weight_error",
]

# This many distances are computed at a time.
_BLOCK_ELEMENTS = 2**22


class Estimate(NamedTuple):
    """A number and its standard error (or, for quadrature, its error estimate)."""

    value: float  #: the number
    error: float  #: its standard error, or the quadrature's


@runtime_checkable
class Law(Protocol):
    """What a metric needs of a law: samples and the exact log-density (see `wpo_notes.datasets`)."""

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """N independent points, (n, d)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (..., d) -> (...)."""


@runtime_checkable
class PiecewiseLaw(Protocol):
    """What `weight_error` needs of a law: its pieces (see `wpo_notes.datasets.PlanarLaw`)."""

    @property
    def weights(self) -> Tensor:
        """Probability of each piece, (K,)."""

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each piece, (..., d) -> (..., K)."""


@torch.no_grad()
def kl_divergence(
    law: Law,
    log_prob: Callable[[Tensor], Tensor],
    *,
    n: int,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Kullback-Leibler divergence of a model from a law, in nats, by Monte Carlo.

    .. math:: \mathcal D_{KL}(\pi \| \hat\pi) &= \E_\pi[\log\pi(X) - \log\hat\pi(X)] \\
              &\approx \frac1n \sum_{i=1}^n \bigl(\log\pi(X_i) - \log\hat\pi(X_i)\bigr), \qquad X_i \sim \pi .

    The estimate is infinite if the model's density is zero at one of the points.

    Args:
        law: the law :math:`\pi`.
        log_prob: the model's log-density, (n, d) -> (n,).
        n: number of points, at least 2.
        generator: source of randomness; a fresh one if None.

    Raises:
        ValueError: n below 2, or a log-density of the wrong shape or with a NaN.

    Examples:
        >>> import torch
        >>> from wpo_notes.datasets import get
        >>> from wpo_notes.metrics import kl_divergence
        >>> law = get("moons")
        >>> estimate = kl_divergence(law, lambda x: law.log_prob(x) - 1, n=100)
        >>> round(estimate.value, 6), round(estimate.error, 6)
        (1.0, 0.0)
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard error, got {n}")
    x = law.sample(n, generator=generator)
    model = log_prob(x)
    if model.shape != (n,):
        raise ValueError(
            f"log_prob must map points {tuple(x.shape)} to values ({n},), got {tuple(model.shape)}"
        )
    if bool(model.isnan().any()):
        raise ValueError(
            f"log_prob must be a number, but {int(model.isnan().sum())} values are NaN"
        )
    return _mean(law.log_prob(x) - model)


@torch.no_grad()
def energy_test(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    permutations: int = 499,
    generator: torch.Generator | None = None,
) -> float:
    r"""p-value of the two-sample permutation test on the energy distance (Székely and Rizzo 2013).

    .. math:: \mathcal E(x, y) &= \frac{2}{nm}\sum_{ij}|x_i - y_j| - \frac{1}{n^2}\sum_{ij}|x_i - x_j|
              - \frac{1}{m^2}\sum_{ij}|y_i - y_j| \\
              &= -w^\top D w ,

    with D the distances of the pooled points and w = 1/n on x, -1/m on y. Under the null hypothesis
    that x and y have one law, permuting w changes nothing: with B permutations
    :math:`p = (1 + \#\{b : \mathcal E_b \ge \mathcal E\}) / (1 + B)` is at most a with probability at
    most a.

    Time grows as (n + m)² (B + d); memory as (n + m) B.

    Args:
        x: (n, d), the first sample.
        y: (m, d), the second.
        permutations: B.
        generator: source of randomness on the samples' device; a fresh one if None.

    Raises:
        ValueError: samples that are not matrices of equal width, empty, or not finite; B below 1.
    """
    _check_samples(x=x, y=y)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    generator = make_generator(generator, x.device)
    # In double precision equal splits of the pooled points have equal statistics up to rounding.
    pooled = torch.cat([x, y]).double()
    count = len(pooled)
    weights = torch.cat(
        [pooled.new_full((len(x),), 1 / len(x)), pooled.new_full((len(y),), -1 / len(y))]
    )
    order = torch.rand(permutations, count, generator=generator, device=x.device).argsort(1)
    splits = torch.cat([weights[None], weights[order]]).mT.contiguous()  # (n + m, 1 + B)
    energy = pooled.new_zeros(1 + permutations)
    rows = max(1, _BLOCK_ELEMENTS // count)
    for block, block_splits in zip(pooled.split(rows), splits.split(rows), strict=True):
        distance = torch.cdist(block, pooled, compute_mode="donot_use_mm_for_euclid_dist")
        energy -= (block_splits * (distance @ splits)).sum(0)
    as_large = int((energy[1:] >= energy[0] - 1e-12 * energy[0].abs()).sum())
    return (1 + as_large) / (1 + permutations)


@torch.no_grad()
def fisher_divergence(score: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Estimate:
    r"""Fisher divergence of a model from a law, from both scores at points of the law, eq. (3).

    .. math:: \E_\pi|s(X) - \nabla\log\pi(X)|^2

    For a law with noise of variance v added, take points and scores of the diffused law: the divergence
    at that noise level. It has units 1 / length squared.

    Args:
        score: (n, d), the model's score at n points of the law, n at least 2.
        target: (n, d), the law's.
    """
    _check_samples(score=score, target=target)
    if len(score) != len(target) or len(score) < 2:
        raise ValueError(
            "score and target must be at the same points, at least 2 for a standard error, got "
            f"{len(score)} and {len(target)}"
        )
    return _mean((score - target).square().sum(-1))


def wasserstein(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    r"""Exact Wasserstein-2 distance between two samples, by POT's network simplex.

    The distance between two samples of the same law is not 0: give that null beside it. Time grows
    about as n³.

    Examples:
        >>> import torch
        >>> from wpo_notes.metrics import wasserstein
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> wasserstein(x, x + torch.tensor([3.0, 4.0]))
        5.0
    """
    _check_samples(x=x, y=y)
    ot = needed("ot")
    cost = ot.dist(_array(x), _array(y), metric="sqeuclidean")
    return float(np.sqrt(max(float(ot.emd2([], [], cost, numItermax=10_000_000)), 0.0)))


def sliced_wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    projections: int = 500,
    generator: torch.Generator | None = None,
) -> float:
    r"""Sliced Wasserstein-2 distance (Bonneel et al. 2015), by POT.

    .. math:: \Bigl(\E_u\,W_2^2(u\cdot x, u\cdot y)\Bigr)^{1/2}, \qquad u \text{ uniform on the sphere} .

    Args:
        x: (n, d), the first sample.
        y: (m, d), the second.
        projections: number of directions u.
        generator: source of the directions; a fresh one if None.
    """
    _check_samples(x=x, y=y)
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    generator = make_generator(generator, x.device)
    u = torch.randn(
        x.shape[1], projections, generator=generator, dtype=torch.float64, device=x.device
    )
    directions = _array(u / u.norm(dim=0))
    distance = needed("ot").sliced_wasserstein_distance
    return float(distance(_array(x), _array(y), projections=directions))


@torch.no_grad()
def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    r"""Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), Gaussian kernel.

    .. math:: & \frac{\sum_{i\ne j} k(x_i, x_j)}{n(n-1)} + \frac{\sum_{i\ne j} k(y_i, y_j)}{m(m-1)}
              - \frac{2\sum_{ij} k(x_i, y_j)}{nm}, \\
              & k(a, b) = e^{-|a - b|^2 / 2\ell^2}

    with ℓ the median distance between points of the two samples. Its mean is 0 for equal laws, so single
    values can be negative.
    """
    _check_samples(x=x, y=y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must have at least 2 points each, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    scale = torch.cdist(x[:2000], y[:2000]).median()

    def total(a: Tensor, b: Tensor) -> float:
        rows = max(1, _BLOCK_ELEMENTS // len(b))
        return sum(
            float(torch.exp(-0.5 * (torch.cdist(part, b) / scale).square()).sum())
            for part in a.split(rows)
        )

    n, m = len(x), len(y)
    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def classifier_test(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, folds: int = 5
) -> Estimate:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): accuracy in telling x from y.

    Cross-validated accuracy of nearest neighbours (their number the root of the points), chosen because it
    is consistent for any pair of laws and has no training to fail. 0.5 for equal laws and equal
    numbers of points.

    Args:
        x: (n, d), the first sample.
        y: (n, d), the second, of as many points.
        folds: of the cross-validation.
    """
    _check_samples(x=x, y=y)
    if len(x) != len(y) or len(x) < 2 * folds:
        raise ValueError(
            f"x and y must have equally many points, at least {2 * folds} for {folds} folds, got "
            f"{len(x)} and {len(y)}"
        )
    points = np.concatenate([_array(x), _array(y)])
    label = np.repeat([0, 1], [len(x), len(y)])
    # Interleaved, so that each fold of consecutive points has as many of both.
    order = np.arange(len(label)).reshape(2, -1).T.ravel()
    classifier = needed("sklearn.neighbors").KNeighborsClassifier(round(len(label) ** 0.5))
    scores = needed("sklearn.model_selection").cross_val_score
    accuracy = scores(classifier, points[order], label[order], cv=folds).mean()
    return Estimate(float(accuracy), float((accuracy * (1 - accuracy) / len(label)) ** 0.5))


@torch.no_grad()
def weight_error(law: PiecewiseLaw, x: Float[Tensor, "n d"]) -> float:
    r"""Error of the modes' weights in a sample: total variation distance from the law's.

    .. math:: \tfrac12 \sum_k \Bigl|w_k - \frac1n\sum_i \P(k \mid x_i)\Bigr|

    with the law's own posterior. For n points of the law itself it is about
    :math:`\tfrac12\sum_k\sqrt{2 w_k(1 - w_k)/\pi n}` where the pieces are separated, not 0.

    Args:
        law: the law, with K pieces.
        x: (n, d), the sample.
    """
    _check_samples(x=x)
    log_prob = law.component_log_prob(x)
    weights = law.weights.to(log_prob)
    posterior = torch.softmax(log_prob + weights.log(), -1)
    # A point where no piece has mass counts for none.
    return 0.5 * float((weights - posterior.nan_to_num().mean(0)).abs().sum())


class Memorisation(NamedTuple):
    """Does a model copy? Each number means little without its value for fresh draws; see `memorisation`."""

    share_near: float  #: share of samples with d1 < d2 / 3 (Yoon et al. 2023)
    authenticity: float  #: share farther from a training point than that from its own nearest
    copying_score: float  #: C_T of Meehan et al. (2020), a z-score
    nearest_distance: list[float]  #: 10, 50 and 90 % quantiles of the distance to training points


def memorisation(
    samples: Float[Tensor, "n d"],
    training: Float[Tensor, "m d"],
    held_out: Float[Tensor, "k d"],
) -> Memorisation:
    r"""Memorisation panel: how samples lie to the points that the model was trained on.

    - `share_near`: share of samples with :math:`d_1 < d_2/3`, the distances to the nearest and second
      nearest training point (Yoon et al. 2023). For fresh draws it is about :math:`3^{-d}`.
    - `authenticity`: share of samples farther from their nearest training point than that is from
      its own nearest (Alaa et al. 2022). For fresh draws below one half, about 0.42 in the plane:
      training points that lie apart are more often the nearest.
    - `copying_score`: :math:`C_T` of Meehan et al. (2020) in its global form, the z-score of
      Mann-Whitney's U between the samples' and held-out points' distances to the training points:
      about N(0, 1) for fresh draws, very negative for copies.
    - `nearest_distance`: the distances' 10, 50 and 90 % quantiles.

    Copies with enough noise pass all of these: read them together with a divergence, and beside
    their values for fresh draws and for noisy copies.

    Args:
        samples: (n, d), of the model.
        training: (m, d), at least 2 distinct points.
        held_out: (k, d), fresh draws of the law.
    """
    _check_samples(samples=samples, training=training, held_out=held_out)
    if len(training) < 2:
        raise ValueError("training must have at least 2 points, got 1")
    tree = KDTree(_array(training))
    distance, index = _two_nearest(tree, _array(samples))
    spacing = tree.query(tree.data, k=2)[0][:, 1]
    fresh = tree.query(_array(held_out))[0]
    n, k = len(distance), len(fresh)
    rank = mannwhitneyu(distance[:, 0], fresh).statistic
    deviation = (n * k * (n + k + 1) / 12) ** 0.5
    return Memorisation(
        float((distance[:, 0] < distance[:, 1] / 3).mean()),
        float((distance[:, 0] > spacing[index]).mean()),
        float((rank - n * k / 2) / deviation),
        [float(value) for value in np.quantile(distance[:, 0], (0.1, 0.5, 0.9))],
    )


def _two_nearest(tree: KDTree, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the two nearest points of the tree, (n, 2), and the nearest one's index, (n,).

    A model that has broken down has samples far from all points. There nearly all are candidates, and one pass over
    them is faster than the tree.
    """
    distance, index = np.empty((len(x), 2)), np.empty(len(x), dtype=np.intp)
    outside = np.linalg.norm(x - x.clip(tree.mins, tree.maxes), axis=1)
    far = outside > 0.1 * np.linalg.norm(tree.maxes - tree.mins)
    distance[~far], both = tree.query(x[~far], k=2)
    index[~far] = both[:, 0]
    for k in np.flatnonzero(far):
        every = cdist(x[k : k + 1], tree.data)[0]
        index[k] = nearest = every.argmin()
        distance[k, 0], every[nearest] = every[nearest], np.inf
        distance[k, 1] = every.min()
    return distance, index


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _check_samples(**samples: Tensor) -> None:
    """Check matrices of points of equal width, each with a point."""
    width = None
    for name, value in samples.items():
        checked_points(name, value, width)
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} must be a matrix (n, d) with at least one point, got {tuple(value.shape)}"
            )
        width = value.shape[1]
