"""Density estimators beside the kernel model: from samples and a seed to a log-density.

Each chooses its own size without the points on which it is measured: where points must validate, a fifth
of the data does, at most 2000, and what was chosen is then fitted to all points.

Chapter: *Less data, less time* (``book/less-data.md``).
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from wpo_notes._optional import needed
from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.experiments.denoising import variance_exploding
from wpo_notes.experiments.figure6 import best_variance
from wpo_notes.fit import fit, fit_algorithm_1, fit_kernel_model
from wpo_notes.mixture import GaussianMixture
from wpo_notes.sde import log_prob_probability_flow

__all__ = [
    "COMPONENTS",
    "DENOISING_STEPS",
    "ESTIMATORS",
    "KERNEL_STEPS",
    "NOISE",
    "Estimator",
    "Fitted",
    "Stopwatch",
    "algorithm_1",
    "bic_mixture",
    "denoiser",
    "kde",
    "kernel_model",
    "stiff_log_prob",
]

COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
DENOISING_STEPS = (250, 500, 1000, 2000, 4000, 8000)
KERNEL_STEPS = (0, 12, 25, 50, 100, 200)  # of which the last is the default
NOISE = (0.005, 20.0)  # as in Figure 2

LogProb = Callable[[Tensor], Tensor]

# Here and not where they are used: the time of the import would count as that of an estimate.
ConvergenceWarning = needed("sklearn.exceptions").ConvergenceWarning
SklearnMixture = needed("sklearn.mixture").GaussianMixture


class Fitted(NamedTuple):
    """An estimate of a density."""

    log_prob: LogProb
    chosen: float  # a number of kernels, of steps or of components, or a variance


class Stopwatch:
    """Time that an estimate takes; and, while the clock stands, the divergences of others on the way to it.

    Time is the processor's, with one thread: that of a wall clock on a core of one's own, not lengthened by what
    else the machine does; `wall` keeps the other.

    Args:
        divergence: of a log-density; None if only the time is asked for.
    """

    def __init__(self, divergence: Callable[[LogProb], dict] | None = None) -> None:
        self.divergence = divergence
        self.history: list[dict] = []
        self._started, self._wall = time.process_time(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        return time.process_time() - self._started

    @property
    def wall(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._wall

    def note(self, log_prob: LogProb, seconds: float) -> None:
        """Note the divergence of an estimate that took these seconds."""
        self.aside(lambda: log_prob, seconds)

    def aside(self, estimate: Callable[[], LogProb], seconds: float | None = None) -> None:
        """Make an estimate and note its divergence, with the seconds that it took if they are not given."""
        if self.divergence is None:
            return
        began, wall = self.seconds, self.wall
        log_prob = estimate()
        seconds = self.seconds - began if seconds is None else seconds
        self.history.append({"processor_seconds": seconds} | self.divergence(log_prob))
        self._started += self.seconds - began
        self._wall += self.wall - wall


Estimator = Callable[[Tensor, int, Stopwatch], Fitted]


def validation_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The points that are fitted, and those that validate."""
    held_out = min(len(x) // 5, 2000)
    return x[held_out:], x[:held_out]


def kernel_model(x: Tensor, seed: int, watch: Stopwatch) -> Fitted:
    """`fit_kernel_model` with its defaults.

    Noted are fits of as many kernels with fewer steps, without the choice of their number.
    """

    def estimate(**options) -> GaussianMixture:
        generator = torch.Generator(x.device).manual_seed(seed)
        model = fit_kernel_model(x, generator=generator, progress=False, **options)
        with torch.no_grad():
            return model()

    mixture = estimate()
    count = len(mixture.centers)
    for steps in KERNEL_STEPS:
        watch.aside(lambda steps=steps: estimate(centers=count, steps=steps).log_prob)
    return Fitted(mixture.log_prob, count)


def algorithm_1(x: Tensor, seed: int, watch: Stopwatch) -> Fitted:
    """The paper's algorithm, with each centre left out at itself.

    Its share of centres, a tenth of the points, but at most 1000 and at least 10.
    """
    model = fit_algorithm_1(
        x,
        centers=min(max(len(x) // 10, 10), 1000),
        leave_one_out=True,
        generator=torch.Generator(x.device).manual_seed(seed),
        progress=False,
    )
    with torch.no_grad():
        mixture = model()
    return Fitted(mixture.log_prob, len(mixture.centers))


def kde(x: Tensor, seed: int, watch: Stopwatch) -> Fitted:
    """Isotropic kernel density estimate, its variance chosen by the validation likelihood."""
    variance = best_variance(*validation_split(x))
    return Fitted(GaussianMixture.from_variance(x, variance).log_prob, variance)


def bic_mixture(x: Tensor, seed: int, watch: Stopwatch) -> Fitted:
    """Gaussian mixture by expectation maximisation (scikit-learn), its size by Schwarz's criterion.

    The search ends when two sizes in a row are no better than the best, or a component would have
    fewer than five points.
    """
    points = x.double().cpu().numpy()
    best, worse = None, 0
    with warnings.catch_warnings():
        # At the iteration limit the mixture is used as it is; the criterion judges it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in COMPONENTS:
            if worse == 2 or count > len(x) // 5:
                break
            found = SklearnMixture(count, max_iter=200, random_state=seed).fit(points)
            criterion = found.bic(points)
            if best is None or criterion < best[0]:
                best, worse = (criterion, found), 0
            else:
                worse += 1
    found = best[1]
    means, covariances, weights = (
        torch.as_tensor(part, device=x.device).to(x.dtype)
        for part in (found.means_, found.covariances_, found.weights_)
    )
    covariances = 0.5 * (covariances + covariances.mT)
    mixture = GaussianMixture.from_covariance(means, covariances, log_weights=weights.log())
    return Fitted(mixture.log_prob, len(means))


def denoiser(x: Tensor, seed: int, watch: Stopwatch) -> Fitted:
    """Denoising score matching, its number of steps by the likelihood of the validation points.

    The numbers are tried in increasing order until the likelihood falls: longer training memorises.
    Each trained network's divergence is noted with the time of its own training.
    """
    fitted, held_out = validation_split(x)
    best = None
    for steps in DENOISING_STEPS:
        began = watch.seconds
        log_prob = _trained_denoiser(fitted, seed, steps=steps)
        watch.note(log_prob, watch.seconds - began)
        likelihood = float(log_prob(held_out).mean())
        if best is not None and likelihood < best[0]:
            break
        best = (likelihood, steps)
    return Fitted(_trained_denoiser(x, seed, steps=best[1]), best[1])


def _trained_denoiser(x: Tensor, seed: int, *, steps: int) -> LogProb:
    """Log-likelihood of a network of the paper's size, trained by denoising score matching.

    Batches of 512 at the rate 5e-3 reach the likelihood of Figure 2's settings (64, 3e-3) in less time.
    """
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
        batch_size=512,
        lr=5e-3,
        loss=denoising_loss(*NOISE),
        generator=generator,
        progress=False,
    )
    return lambda y: stiff_log_prob(network, y, *NOISE)


def stiff_log_prob(network: ScoreNetwork, x: Tensor, std_min: float, std_max: float) -> Tensor:
    """`denoising.denoiser_log_prob` of a network that may have memorised, (n, d) -> (n,).

    Its flow is stiff between the training points, and the solver's steps underflow in float32: so in
    float64, at a relative tolerance of 1e-4.
    """
    network = copy.deepcopy(network).double()
    sde, stop = variance_exploding(std_min, std_max)
    terminal = Normal(0.0, math.hypot(std_max, network.data_std))
    log_prob = log_prob_probability_flow(
        sde,
        network.score(sde),
        x.double(),
        lambda y: terminal.log_prob(y).sum(-1),
        stop=stop,
        rtol=1e-4,
        atol=1e-5,
    )
    return log_prob.to(x.dtype)


ESTIMATORS: dict[str, Estimator] = {
    "kernel model": kernel_model,
    "algorithm 1": algorithm_1,
    "denoising": denoiser,
    "kde": kde,
    "mixture": bic_mixture,
}
