"""Density estimators beside the kernel model: from samples and a seed to a log-density.

Each chooses its own size without the points on which it is measured: a fifth of the data, at most 2000
points, validates.

Chapter: *Less data, less time* (``book/less-data.md``).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.experiments.denoising import denoiser_log_prob
from wpo_notes.experiments.figure6 import best_variance
from wpo_notes.fit import fit, fit_kernel_model
from wpo_notes.mixture import GaussianMixture

__all__ = ["ESTIMATORS", "Estimator", "Fitted", "bic_mixture", "denoiser", "kde", "kernel_model"]

COMPONENTS = (1, 2, 5, 10, 20, 40, 80, 160)
DENOISING_STEPS = (1000, 4000, 16_000, 64_000)
NOISE = (0.005, 20.0)


class Fitted(NamedTuple):
    """An estimate of a density, and what it took."""

    log_prob: Callable[[Tensor], Tensor]
    seconds: float  # wall time, the choice of its size included
    chosen: float  # what was chosen: a variance, a number of components or of steps


Estimator = Callable[[Tensor, int], Fitted]


def validation_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The points that are fitted, and those that validate."""
    held_out = min(len(x) // 5, 2000)
    return x[held_out:], x[:held_out]


def kernel_model(x: Tensor, seed: int) -> Fitted:
    """`fit_kernel_model` with its defaults."""
    started = time.perf_counter()
    generator = torch.Generator(x.device).manual_seed(seed)
    mixture = fit_kernel_model(x, generator=generator, progress=False)()
    return Fitted(mixture.log_prob, time.perf_counter() - started, len(mixture.centers))


def kde(x: Tensor, seed: int) -> Fitted:
    """Isotropic kernel density estimate, its variance chosen on the validation points."""
    started = time.perf_counter()
    fitted, held_out = validation_split(x)
    variance = best_variance(fitted, held_out)
    mixture = GaussianMixture.from_variance(x, variance)
    return Fitted(mixture.log_prob, time.perf_counter() - started, variance)


def bic_mixture(x: Tensor, seed: int) -> Fitted:
    """Gaussian mixture by expectation maximisation (scikit-learn), its size by Schwarz's criterion."""
    started = time.perf_counter()
    points = x.double().cpu().numpy()
    candidates = []
    with warnings.catch_warnings():
        # At the iteration limit the mixture is used as it is; the criterion judges it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in COMPONENTS:
            if count > len(x) // 5:
                break
            found = SklearnMixture(count, max_iter=200, random_state=seed).fit(points)
            candidates.append((found.bic(points), count, found))
    best = min(candidates, key=lambda candidate: candidate[0])[2]
    parts = (
        torch.as_tensor(part, device=x.device)
        for part in (best.means_, best.covariances_, best.weights_)
    )
    means, covariances, weights = (part.to(x.dtype) for part in parts)
    covariances = 0.5 * (covariances + covariances.mT)
    mixture = GaussianMixture.from_covariance(means, covariances, log_weights=weights.log())
    return Fitted(mixture.log_prob, time.perf_counter() - started, len(means))


def denoiser(x: Tensor, seed: int) -> Fitted:
    """Denoising score matching, as in Figure 2; its number of steps by the validation likelihood."""
    started = time.perf_counter()
    fitted, held_out = validation_split(x)
    best = None
    for steps in DENOISING_STEPS:
        network = train_denoiser(fitted, seed, steps=steps)
        likelihood = float(denoiser_log_prob(network, held_out, *NOISE).mean())
        if best is None or likelihood > best[0]:
            best = (likelihood, steps, network)
    return Fitted(
        lambda y: denoiser_log_prob(best[2], y, *NOISE), time.perf_counter() - started, best[1]
    )


def train_denoiser(x: Tensor, seed: int, *, steps: int) -> ScoreNetwork:
    """A network of the paper's size, trained as in Figure 2."""
    generator = torch.Generator(x.device).manual_seed(seed)
    network = ScoreNetwork(
        x.shape[1],
        data_std=float(x.std(0).mean()),
        dtype=x.dtype,
        device=x.device,
        generator=generator,
    )
    fit(
        network,
        x,
        steps=steps,
        batch_size=64,
        lr=3e-3,
        loss=denoising_loss(*NOISE),
        generator=generator,
        progress=False,
    )
    return network


ESTIMATORS: dict[str, Estimator] = {
    "kernel model": kernel_model,
    "denoising": denoiser,
    "kde": kde,
    "mixture": bic_mixture,
}
