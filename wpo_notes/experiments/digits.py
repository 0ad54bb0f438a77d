r"""Real images: scikit-learn's 1797 handwritten digits of 8 × 8 pixels, and what a kernel model makes of them.

The 17 grey levels are dequantised, :math:`x = (k + u) / 17` with u uniform on [0, 1), so that the images have a
density on the unit cube. A model's score is the bits a pixel that it needs for images that nothing was fitted to,

.. math:: -\frac1{d \ln 2}\,\E\log\hat\pi(x) + \log_2 17 , \qquad d = 64 ,

an upper bound for the grey levels themselves; the uniform law on the cube has :math:`\log_2 17 = 4.09`.

Chapter: *Many dimensions: real images* (``book/digits.md``).
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wpo_notes import metrics
from wpo_notes._clusters import clusters
from wpo_notes._optional import needed
from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.experiments.denoising import denoiser_samples
from wpo_notes.experiments.estimators import ConvergenceWarning, SklearnMixture, stiff_log_prob
from wpo_notes.experiments.runs import Case, Result
from wpo_notes.fit import fit, kernel_loss
from wpo_notes.losses import implicit_score_matching, negative_log_likelihood
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, FreeLowRankKernelModel, KernelModel
from wpo_notes.structured import LowRankGaussianMixture, low_rank_clusters

__all__ = [
    "LEVELS",
    "METHODS",
    "SEEDS",
    "SIZES",
    "TEST",
    "DigitsRun",
    "MemoryRun",
    "Split",
    "bits",
    "cases",
    "split",
    "training_step_peak",
]

LEVELS = 17  # grey levels of a pixel
TEST = 397  # images that no run fits or validates on
SIZES = (100, 300, 1000)
SEEDS = (0, 1, 2)

# What is tried, the validation images decide.
KERNELS = (2, 5, 10, 20, 40, 80)
RANKS = (2, 4, 8)
VARIANCES = tuple(float(v) for v in np.geomspace(1e-4, 10, 61))
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# of free kernels, in standardised coordinates; the validation images are asked after each `every` steps
_TRAINING = {"steps": 100, "every": 20, "batch_size": 256, "lr": 1e-2}
DENOISING_STEPS = (125, 250, 500, 1000, 2000, 4000)
NOISE = (0.03, 20.0)  # of the denoiser, in standard deviations


class Split(NamedTuple):
    """Images, dequantised, one a row: (n, 64) in [0, 1)."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def _pixels() -> Tensor:
    return torch.from_numpy(needed("sklearn.datasets").load_digits().data)


def split(n: int, seed: int) -> Split:
    """Draw n images to train on and a quarter as many to validate on, of the 1400 that are not for the test.

    The test images and their noise are the same for all n and seeds.

    Raises:
        ValueError: fewer than four images, or more than there are.
    """
    pixels = _pixels()
    most = (len(pixels) - TEST) * 4 // 5
    if not 4 <= n <= most:
        raise ValueError(f"n must be from 4 to {most}, got {n}")
    fixed, own = (torch.Generator().manual_seed(k) for k in (12_345, seed))
    order = torch.randperm(len(pixels), generator=fixed)
    test = _dequantised(pixels[order[:TEST]], fixed)
    pool = order[TEST:]
    pool = pool[torch.randperm(len(pool), generator=own)[: n + n // 4]]
    points = _dequantised(pixels[pool], own)
    return Split(points[:n], points[n:], test)


def _dequantised(pixels: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(pixels.shape, generator=generator, dtype=pixels.dtype)
    return (pixels + noise) / LEVELS


def bits(log_prob: Tensor, dim: int = 64) -> Tensor:
    """Bits a pixel of grey levels from the log-density of dequantised images: the Jacobian is 17 a pixel."""
    return -log_prob / (dim * math.log(2)) + math.log2(LEVELS)


# ---- the models -----------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """A law of images, and what the validation images chose."""

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int, torch.Generator], Tensor]
    chosen: dict


Method = Callable[[Tensor, Tensor, torch.Generator], Fitted]
FactorAnalysis = needed("sklearn.decomposition").FactorAnalysis


def _fitted(mixture: GaussianMixture, **chosen) -> Fitted:
    def sample(n: int, generator: torch.Generator) -> Tensor:
        return mixture.sample((n,), generator=generator)

    return Fitted(torch.no_grad()(mixture.log_prob), sample, chosen)


class _Units(NamedTuple):
    """Standardised coordinates, in which models are trained."""

    offset: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Units:
        return cls(x.mean(0), x.std(0))

    def standardised(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def restored(self, mixture: LowRankGaussianMixture) -> LowRankGaussianMixture:
        """Return the mixture in the units of the data: its density has the Jacobian."""
        return LowRankGaussianMixture(
            mixture.centers * self.scale + self.offset,
            mixture.diagonal * self.scale.square(),
            mixture.factor * self.scale[:, None],
            log_weights=mixture.log_weights,
        )


@torch.no_grad()
def _likelihood(mixture: GaussianMixture, x: Tensor) -> float:
    return float(mixture.log_prob(x).mean())


class _Best:
    """Mixture of the greatest likelihood on the validation images so far; also a `measure` for `fit`."""

    def __init__(self, validation: Tensor) -> None:
        self.validation, self.value, self.mixture = validation, -math.inf, None
        self.about: dict = {}
        self.chosen: dict = {}

    def offer(self, mixture: GaussianMixture, **about) -> None:
        value = _likelihood(mixture, self.validation)
        if value > self.value:
            self.value, self.mixture, self.chosen = value, mixture, self.about | about

    def __call__(self, model: nn.Module) -> dict:
        self.about["steps"] += self.every
        self.offer(model())
        return {}

    def start_from(
        self,
        start: GaussianMixture,
        model: Callable[[GaussianMixture], nn.Module],
        x: Tensor,
        *,
        rank: int,
        objective: str | None,
        generator: torch.Generator,
    ) -> None:
        """Offer a start and, if it has kernels to train and an objective, its model as training goes on."""
        self.about = {"rank": rank, "kernels": len(start.centers)}
        if objective is None or len(start.centers) < 2:
            self.offer(start)
            return
        loss = _LOSSES[objective]
        self.train(model(start), x, about=self.about, loss=loss, generator=generator, **_TRAINING)

    def train(self, model: nn.Module, x: Tensor, *, every: int, about: dict, **options) -> None:
        """Train the model, offering its mixture at the start and after each `every` steps."""
        self.every, self.about = every, about | {"steps": 0}
        with torch.no_grad():
            self.offer(model())
        fit(model, x, measure=self, record_every=every, progress=False, **options)


def _negative_log_likelihood(model: nn.Module, x: Tensor, *_) -> Tensor:
    return negative_log_likelihood(model(), x)


_LOSSES = {"score matching": kernel_loss(), "likelihood": _negative_log_likelihood}


def clustered(
    train: Tensor,
    validation: Tensor,
    generator: torch.Generator,
    *,
    ranks: tuple[int, ...],
    objective: str | None,
) -> Fitted:
    """Kernels that start from clusters, with free centres and covariances; or, without objective, the clusters.

    The rank, the number of clusters and the number of steps (0, 20, ... 100) are chosen. The clusters are the same
    for all objectives and ranks.
    """
    units, seed = _Units.of(train), _drawn_seed(generator)
    x, best = units.standardised(train), _Best(units.standardised(validation))
    for rank in ranks:
        for count in KERNELS:
            if 4 * count > len(x):
                break
            same = torch.Generator().manual_seed(seed)
            start = low_rank_clusters(x, count, rank, generator=same)
            best.start_from(
                start,
                FreeLowRankKernelModel,
                x,
                rank=rank,
                objective=objective,
                generator=generator,
            )
    return _fitted(units.restored(best.mixture), **best.chosen)


def network(
    train: Tensor,
    validation: Tensor,
    generator: torch.Generator,
    *,
    precision: str,
    rank: int = 0,
) -> Fitted:
    """Algorithm 1 with structured precisions: every training image is a centre, left out at itself.

    All kernels start with the variance that makes the validation images likeliest; the steps (0, 50, ... 300) are chosen.
    """
    units = _Units.of(train)
    x, held_out = units.standardised(train), units.standardised(validation)
    model = KernelModel(
        x,
        precision=precision,
        rank=rank,
        initial_std=_best_variance(x, held_out) ** 0.5,
        generator=generator,
    )
    best = _Best(held_out)
    best.train(
        model,
        x,
        every=50,
        about={"rank": rank, "kernels": len(x)},
        steps=300,
        batch_size=128,
        lr=2e-3,
        loss=kernel_loss(torch.arange(len(x))),
        generator=generator,
    )
    return _fitted(units.restored(best.mixture), **best.chosen)


def full(train: Tensor, validation: Tensor, generator: torch.Generator) -> Fitted:
    """`clustered` by score matching, with full precisions; clusters of at most d + 1 images are given up."""
    units = _Units.of(train)
    x, best = units.standardised(train), _Best(units.standardised(validation))
    dim = x.shape[1]
    for count in KERNELS:
        if count * (dim + 1) > len(x):
            break
        start = clusters(x, count, generator=generator)
        best.start_from(
            start, FreeKernelModel, x, rank=dim, objective="score matching", generator=generator
        )
    mixture = GaussianMixture(
        best.mixture.centers * units.scale + units.offset,
        best.mixture.precision_tril / units.scale[:, None],
        log_weights=best.mixture.log_weights,
    )
    return _fitted(mixture, **best.chosen)


def _drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _best_variance(centers: Tensor, points: Tensor) -> float:
    def likelihood(variance: float) -> float:
        return _likelihood(LowRankGaussianMixture.from_variance(centers, variance), points)

    return max(VARIANCES, key=likelihood)


def kde(train: Tensor, validation: Tensor, generator: torch.Generator) -> Fitted:
    """Empirical score (23) stopped early: isotropic kernels on all training images, their variance chosen."""
    variance = _best_variance(train, validation)
    mixture = LowRankGaussianMixture.from_variance(train, variance)
    return _fitted(mixture, kernels=len(train), variance=variance)


def scaled_kde(train: Tensor, validation: Tensor, generator: torch.Generator) -> Fitted:
    """Kernel density estimate in standardised coordinates: a pixel's variance is in proportion to the data's."""
    units = _Units.of(train)
    x = units.standardised(train)
    variance = _best_variance(x, units.standardised(validation))
    mixture = LowRankGaussianMixture.from_variance(x, variance)
    return _fitted(units.restored(mixture), kernels=len(train), variance=variance)


def em(train: Tensor, validation: Tensor, generator: torch.Generator, *, covariance: str) -> Fitted:
    """Mixture by expectation maximisation (scikit-learn), its size and the ridge on its covariances chosen."""
    seed = _drawn_seed(generator)
    best = (-math.inf, None, {})
    with warnings.catch_warnings():
        # At the iteration limit the mixture is used as it is; the validation judges it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in (1, *KERNELS):
            if 4 * count > len(train):
                break
            for ridge in RIDGES:
                found = SklearnMixture(
                    count, covariance_type=covariance, reg_covar=ridge, random_state=seed
                ).fit(train.numpy())
                value = found.score(validation.numpy())
                if value > best[0]:
                    best = (value, found, {"kernels": count, "ridge": ridge})
    _, found, chosen = best
    means, covariances, weights = (
        torch.from_numpy(part) for part in (found.means_, found.covariances_, found.weights_)
    )
    log_weights = weights.clamp(min=1e-300).log()
    if covariance == "diag":
        none = means.new_zeros(*means.shape, 0)
        mixture: GaussianMixture = LowRankGaussianMixture(
            means, covariances, none, log_weights=log_weights
        )
    else:
        symmetric = 0.5 * (covariances + covariances.mT)
        mixture = GaussianMixture.from_covariance(means, symmetric, log_weights=log_weights)
    return _fitted(mixture, **chosen)


def factor_analysis(train: Tensor, validation: Tensor, generator: torch.Generator) -> Fitted:
    """One normal law, diagonal plus low rank, by maximum likelihood (scikit-learn), its rank chosen."""
    best = _Best(validation)
    for rank in (*RANKS, 16, 32):
        found = FactorAnalysis(rank).fit(train.numpy())
        parts = (found.mean_, found.noise_variance_, found.components_.T)
        mixture = LowRankGaussianMixture(*(torch.from_numpy(part.copy())[None] for part in parts))
        best.offer(mixture, rank=rank, kernels=1)
    return _fitted(best.mixture, **best.chosen)


def denoising(train: Tensor, validation: Tensor, generator: torch.Generator) -> Fitted:
    """Denoising score matching, its number of steps by the likelihood of at most 100 validation images.

    The likelihood is that of the probability-flow ODE with the exact divergence. The numbers are tried in increasing order, each
    training anew, until the likelihood falls. All in standardised coordinates, where its likelihood was higher on other
    draws of the images (seed 50).
    """
    units, seed = _Units.of(train), _drawn_seed(generator)
    x = units.standardised(train).float()

    def trained(steps: int) -> ScoreNetwork:
        own = torch.Generator().manual_seed(seed)
        network = ScoreNetwork(
            x.shape[1], hidden=(256,) * 3, data_std=1.0, dtype=x.dtype, generator=own
        )
        fit(
            network,
            x,
            steps=steps,
            batch_size=128,
            lr=2e-3,
            loss=denoising_loss(*NOISE),
            generator=own,
            progress=False,
        )
        return network

    def log_prob(network: ScoreNetwork, y: Tensor) -> Tensor:
        return stiff_log_prob(network, units.standardised(y), *NOISE) - units.scale.log().sum()

    best = (-math.inf, None, 0)
    for steps in DENOISING_STEPS:
        found = trained(steps)
        value = float(log_prob(found, validation[:100]).mean())
        if value < best[0]:
            break
        best = (value, found, steps)
    _, found, steps = best

    def sample(n: int, generator: torch.Generator) -> Tensor:
        drawn = denoiser_samples(found, n, *NOISE, generator=generator).double()
        return drawn * units.scale + units.offset

    return Fitted(partial(log_prob, found), sample, {"steps": steps})


METHODS: dict[str, Method] = {
    "clusters, diagonal": partial(clustered, ranks=(0,), objective=None),
    "clusters, low rank": partial(clustered, ranks=RANKS, objective=None),
    "score matching, diagonal": partial(clustered, ranks=(0,), objective="score matching"),
    "score matching, low rank": partial(clustered, ranks=RANKS, objective="score matching"),
    "likelihood, diagonal": partial(clustered, ranks=(0,), objective="likelihood"),
    "likelihood, low rank": partial(clustered, ranks=RANKS, objective="likelihood"),
    "network, diagonal": partial(network, precision="diagonal"),
    "network, low rank": partial(network, precision="lowrank", rank=4),
    "full": full,
    "early stopping": kde,
    "scaled KDE": scaled_kde,
    "EM, diagonal": partial(em, covariance="diag"),
    "EM, full": partial(em, covariance="full"),
    "factor analysis": factor_analysis,
    "DSM": denoising,
}


# ---- the runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitsRun:
    """Settings of one model of the digits.

    Args:
        method: name of the model, see `METHODS`.
        n: number of training images; a quarter as many validate.
        seed: of the images that are drawn, their noise, and the model.
        samples: number of samples for the memorisation panel.
        shown: number of samples that are kept for the figure.
    """

    method: str
    n: int
    seed: int
    samples: int = 400
    shown: int = 24

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Fit and measure, on the processor; it takes minutes at most, so it starts anew after a kill."""
        train, validation, test = split(self.n, self.seed)
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed)
        law = METHODS[self.method](train, validation, generator)
        seconds = time.perf_counter() - began
        drawn = law.sample(self.samples, torch.Generator().manual_seed(10_000 + self.seed))
        held_out = bits(law.log_prob(test))
        measured = {
            "bits": float(held_out.mean()),
            "bits_error": float(held_out.std()) / len(held_out) ** 0.5,
            "training_bits": float(bits(law.log_prob(train[:TEST])).mean()),
            "chosen": law.chosen,
            "memorisation": metrics.memorisation(drawn, train, test)._asdict(),
            # the same for real images: half of the test set as the samples
            "null": metrics.memorisation(test[::2], train, test[1::2])._asdict(),
        }
        arrays = {"samples": drawn[: self.shown].float().numpy()}
        return Result(measured, [], arrays, seconds)


@dataclass(frozen=True)
class MemoryRun:
    """Settings of a measurement of memory: training steps of a `KernelModel` on random points.

    Args:
        centers: N.
        dim: d.
        rank: r of the low-rank precisions.
        batch: points a step.
        steps: number of steps.
    """

    centers: int = 10_000
    dim: int = 784
    rank: int = 8
    batch: int = 64
    steps: int = 3

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Take the steps in a process of their own, on the processor, with the allocator's defaults."""
        began = time.perf_counter()
        program = (
            "import json, sys; from wpo_notes.experiments.digits import training_step_peak; "
            "print(json.dumps(training_step_peak(**json.loads(sys.argv[1]))))"
        )
        allocator = ("MALLOC_", "LD_PRELOAD")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(allocator)}
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(asdict(self))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return Result(json.loads(done.stdout), [], {}, time.perf_counter() - began)


def training_step_peak(*, centers: int, dim: int, rank: int, batch: int, steps: int) -> dict:
    """Peak of this process's memory over forward pass, backward pass and Adam step, in 10^6 bytes.

    The points are uniform on the cube, float32, and none is a centre; one thread.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    before = _peak()
    x = torch.rand(centers + batch, dim, generator=generator)
    model = KernelModel(x[:centers], precision="lowrank", rank=rank, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    objectives, seconds = [], []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        objective = implicit_score_matching(model(), x[centers:])
        objective.backward()
        optimizer.step()
        objectives.append(float(objective.detach()))
        seconds.append(time.perf_counter() - began)
    return {
        "peak": _peak(),
        "before": before,
        "objectives": objectives,
        "seconds_a_step": min(seconds),
    }


def _peak() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage would count the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS, in bytes


def cases(scale: str, *, seed: int | None = None) -> list[Case]:
    """Every model on every number of images and seed, and the memory; at quick scale what takes seconds."""
    if scale == "quick":
        quick = ("clusters, low rank", "early stopping", "scaled KDE", "factor analysis")
        return [_case(method, SIZES[1], seed or SEEDS[0]) for method in quick]
    memory = Case("digits", "memory", MemoryRun())
    return [memory] + [
        _case(method, n, k)
        for k in (SEEDS if seed is None else (seed,))
        for method in METHODS
        for n in SIZES
        if method != "full" or n > SIZES[0]  # fewer are too few for full precisions
    ]


def _case(method: str, n: int, seed: int) -> Case:
    name = method.replace(", ", "-").replace(" ", "-")
    return Case("digits", f"{name}-{n}-seed{seed}", DigitsRun(method=method, n=n, seed=seed))
