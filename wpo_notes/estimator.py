r"""The kernel model as a scikit-learn density estimator: a Gaussian mixture fitted by score matching.

Chapter: *Your own data* (``book/your-own-data.md``).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.covariance import ledoit_wolf
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from wpo_notes.fit import fewest_points, fit_kernel_model
from wpo_notes.mixture import GaussianMixture

__all__ = ["KernelScoreDensity"]

_LARGEST_SEED = np.iinfo(np.int32).max


class KernelScoreDensity(DensityMixin, BaseEstimator):
    r"""Kernel density with learned centres and anisotropic precisions, eq. (25), for scikit-learn.

    `fit_kernel_model` with scikit-learn's conventions: NumPy in and out, on the CPU, in the precision of X. Repeated
    rows are taken once, with a warning. With too few rows for a mixture, and no number of centres asked for, the
    density is one Gaussian with the covariance shrunk as by Ledoit and Wolf (2004), with a warning.

    Behind a `StandardScaler` in a `Pipeline` the density is that of the scaled data. It is not needed: the fit
    standardises, and densities are in the units of X.

    Args:
        centers: number of kernels in all; chosen by cross-validation if None.
        members: number of folds, and of mixtures that are pooled, at least 2.
        steps: Adam steps of each member.
        batch_size: points a step.
        lr: learning rate at the start.
        random_state: source of folds, clusters and batches: an int, a NumPy `RandomState`, or None.

    Attributes:
        mixture_: the fitted `GaussianMixture`; its score is the score model.
        n_features_in_: number of columns seen in `fit`.
        feature_names_in_: their names, if X was a data frame with text names.

    Raises:
        ValueError: from `fit`, if X is not finite, has a constant column or fewer than 2 distinct rows, or does not
            have rows enough for the `centers` that were asked for.

    Examples:
        >>> import numpy as np
        >>> from wpo_notes.estimator import KernelScoreDensity
        >>> X = np.random.default_rng(0).standard_normal((100, 2))
        >>> density = KernelScoreDensity(centers=10, steps=5, random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(3).shape
        ((100,), (3, 2))
    """

    mixture_: GaussianMixture

    def __init__(
        self,
        *,
        centers: int | None = None,
        members: int = 5,
        steps: int = 200,
        batch_size: int = 512,
        lr: float = 1e-2,
        random_state: int | np.integer | np.random.RandomState | None = None,
    ) -> None:
        self.centers = centers
        self.members = members
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> KernelScoreDensity:
        """Fit the density to the rows of X, (n, d); y is ignored."""
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        distinct = np.unique(X, axis=0, return_index=True)[1]
        if len(distinct) < len(X):
            warnings.warn(
                f"{len(X) - len(distinct)} of the {len(X)} rows repeat others and are left out",
                UserWarning,
                stacklevel=2,
            )
        x = torch.as_tensor(X[np.sort(distinct)])
        fewest = fewest_points(x.shape[1], self.members)
        if self.centers is None and len(x) < fewest and bool((x.amax(0) > x.amin(0)).all()):
            warnings.warn(
                f"{len(x)} distinct rows are too few for a mixture in {x.shape[1]} dimensions (at least "
                f"{fewest} for {self.members} members): the density is one Gaussian",
                UserWarning,
                stacklevel=2,
            )
            self.mixture_ = _gaussian(x)
            return self
        model = fit_kernel_model(
            x,
            centers=self.centers,
            members=self.members,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            generator=_generator(self.random_state),
            progress=False,
        )
        with torch.no_grad():
            self.mixture_ = model()
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-density at each row of X, (n, d) -> (n,), in nats and the units of the data that were fitted."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return self.mixture_.log_prob(torch.as_tensor(X).to(self.mixture_.centers)).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density over the rows of X, as scikit-learn's `GaussianMixture`; y is ignored."""
        return float(self.score_samples(X).mean())

    def sample(
        self,
        n_samples: int = 1,
        random_state: int | np.integer | np.random.RandomState | None = None,
    ) -> np.ndarray:
        """Independent samples of the density, (n_samples, d)."""
        check_is_fitted(self)
        return self.mixture_.sample((n_samples,), generator=_generator(random_state)).numpy()


def _generator(random_state: int | np.integer | np.random.RandomState | None) -> torch.Generator:
    """Torch's generator, seeded by NumPy's."""
    if random_state is None:
        random_state = np.random.RandomState()  # not NumPy's global one
    return torch.Generator().manual_seed(
        int(check_random_state(random_state).randint(_LARGEST_SEED))
    )


def _gaussian(x: torch.Tensor) -> GaussianMixture:
    """One Gaussian with the samples' mean and their shrunk covariance, in standardised coordinates."""
    offset, scale = x.mean(0), x.std(0)
    covariance, _ = ledoit_wolf(((x - offset) / scale).numpy())
    covariance = torch.as_tensor(covariance).to(x) * scale * scale[:, None]
    return GaussianMixture.from_covariance(offset[None], covariance)
