r"""As good as it can be: the default kernel model beside other estimators, and with one thing changed at a time.

Chapter: *As good as it can be* (``book/as-good-as-it-can-be.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wpo_notes import datasets
from wpo_notes._clusters import clusters
from wpo_notes._shapes import Float
from wpo_notes.bespoke import WeightedKernelModel
from wpo_notes.datasets import PLANAR
from wpo_notes.experiments.estimators import Stopwatch, bic_mixture
from wpo_notes.experiments.figure6 import best_variance, leave_one_out_variance
from wpo_notes.experiments.kernel import widths
from wpo_notes.experiments.runs import Case, Result
from wpo_notes.fit import Loss, TrainingStopped, constant, cosine, fit, fit_kernel_model
from wpo_notes.losses import implicit_score_matching, negative_log_likelihood
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, KernelModel

__all__ = [
    "LAWS",
    "METHODS",
    "PLANAR",
    "SEEDS",
    "VARIANTS",
    "Ablation",
    "Comparison",
    "Variant",
    "case",
    "cases",
    "pooled",
    "train",
]

LAWS = ("moons", "swissroll", "pinwheel", "checkerboard")  # of the ablations
SEEDS = (0, 1, 2)
_POINTS = 30_000  # plus the seed: training points on which nothing was settled
_FRESH = 40_000  # plus the seed: the points on which the divergence is measured
_WEIGHT_STEPS = 20  # of expectation maximisation, for the weights alone


# ---- one thing changed at a time


@dataclass(frozen=True)
class Variant:
    """How the members of a kernel model are made; as it stands, what `fit_kernel_model` does.

    Args:
        centers: kernels of a member.
        members: mixtures that are pooled; a single one is fitted to all points.
        steps, batch_size, lr: of Adam.
        schedule: "cosine" or "constant".
        objective: "score matching" or "likelihood".
        noise: standard deviations of the noise under which scores are matched, in median narrow widths of
            the start; 0 is the terminal time. Each is weighted by its variance, unless there is one.
        start: "clusters" or "points": random training points with equal widths and weights.
        own: at a training point that is a centre that centre is "scored", "left out", or the point is not
            trained on ("disjoint"). For the start from points.
        precisions: "free", or by the "network" of `KernelModel`, which keeps the centres.
        moving: train the centres too.
        reweighed: afterwards, weights by the mean responsibilities, iterated.
        standardised: all in standardised coordinates.
        floor: least standard deviation of a kernel, in median narrow widths of the start.
        ceiling: largest one, in standard deviations of the data; none if None.
    """

    centers: int = 48
    members: int = 5
    steps: int = 200
    batch_size: int = 512
    lr: float = 1e-2
    schedule: str = "cosine"
    objective: str = "score matching"
    noise: tuple[float, ...] = (0.0,)
    start: str = "clusters"
    own: str = "scored"
    precisions: str = "free"
    moving: bool = True
    reweighed: bool = False
    standardised: bool = True
    floor: float = 0.0
    ceiling: float | None = None


VARIANTS: dict[str, dict] = {
    "default": {},
    # the start
    "start only": {"steps": 0},
    "points, left out": {"start": "points", "own": "left out"},
    "points, disjoint": {"start": "points", "own": "disjoint"},
    "points, scored": {"start": "points", "own": "scored"},
    # the family
    "16 centres": {"centers": 16},
    "96 centres": {"centers": 96},
    "one member": {"members": 1},
    "one member, 240 centres": {"members": 1, "centers": 240},
    "fixed centres": {"moving": False},
    "network": {"precisions": "network"},
    "network, rate 0.002": {"precisions": "network", "steps": 400, "lr": 2e-3},
    "weights by EM": {"reweighed": True},
    "floor": {"floor": 0.5},
    "ceiling": {"ceiling": 0.5},
    # the optimiser
    "batch 64": {"batch_size": 64},
    "batch 2048": {"batch_size": 2048},
    "rate 0.003": {"lr": 3e-3},
    "rate 0.03": {"lr": 3e-2},
    "constant rate": {"schedule": "constant"},
    "800 steps": {"steps": 800},
    # the objective
    "noise of half a width": {"noise": (0.5,)},
    "noise of one width": {"noise": (1.0,)},
    "noise of 1, 4, 16 widths": {"noise": (1.0, 4.0, 16.0)},
    "likelihood": {"objective": "likelihood"},
    "likelihood, 96 centres": {"objective": "likelihood", "centers": 96},
    # the units: one coordinate is multiplied by ten
    "raw units": {"standardised": False},
}


def train(
    x: Float[Tensor, "n d"], variant: Variant, *, generator: torch.Generator
) -> list[GaussianMixture]:
    """Members of a kernel model of the points x, in the units of x.

    Raises:
        TrainingStopped: the objective was not finite any more, as it happens where centres are scored.
    """
    fold = torch.randperm(len(x), generator=generator, device=x.device) % variant.members
    offset, scale = (
        (x.mean(0), x.std(0))
        if variant.standardised
        else (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    )
    points = (x - offset) / scale
    members = []
    for k in range(variant.members):
        mixture = _member(points if variant.members == 1 else points[fold != k], variant, generator)
        members.append(
            GaussianMixture(
                mixture.centers * scale + offset,
                mixture.precision_tril / scale[:, None],
                log_weights=mixture.log_weights,
            )
        )
    return members


def pooled(members: list[GaussianMixture]) -> GaussianMixture:
    """Mixture of the members with equal weights."""
    return GaussianMixture(
        torch.cat([member.centers for member in members]),
        torch.cat([member.precision_tril for member in members]),
        log_weights=torch.cat([member.log_weights for member in members]),
    )


def _member(seen: Tensor, variant: Variant, generator: torch.Generator) -> GaussianMixture:
    exclude = None
    if variant.start == "clusters":
        start = clusters(seen, variant.centers, generator=generator)
    else:
        order = torch.randperm(len(seen), generator=generator, device=seen.device)
        chosen, others = order[: variant.centers], order[variant.centers :]
        centers = seen[chosen]
        distance = torch.cdist(centers, centers).fill_diagonal_(math.inf).amin(1)
        start = GaussianMixture.from_variance(centers, distance.median().square())
        if variant.own == "left out":
            exclude = torch.full_like(order, -1)
            exclude[chosen] = torch.arange(len(chosen), device=seen.device)
        elif variant.own == "disjoint":
            seen = seen[others]
    if variant.precisions == "network":
        network = KernelModel(start.centers, generator=generator)
        model: nn.Module = WeightedKernelModel(network, start.log_weights)
        model.log_weights.requires_grad_(False)
    else:
        model = FreeKernelModel(start)
        model.shift.requires_grad_(variant.moving)
    bounded = _bounds(start, variant)
    fit(
        model,
        seen,
        steps=variant.steps,
        batch_size=variant.batch_size,
        lr=variant.lr,
        loss=_loss(variant, start, bounded, exclude),
        schedule={"cosine": cosine, "constant": constant}[variant.schedule],
        generator=generator,
        progress=False,
    )
    with torch.no_grad():
        mixture = bounded(model())
        return _reweighed(mixture, seen) if variant.reweighed else mixture


def _bounds(
    start: GaussianMixture, variant: Variant
) -> Callable[[GaussianMixture], GaussianMixture]:
    """Bounds on the widths: the covariance plus floor^2 I, before that the precision plus I / ceiling^2."""
    floor = variant.floor * float(widths(start)[1].median())

    def bounded(mixture: GaussianMixture) -> GaussianMixture:
        if variant.ceiling is not None:
            tril = mixture.precision_tril
            identity = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
            tril = torch.linalg.cholesky(tril @ tril.mT + identity / variant.ceiling**2)
            mixture = GaussianMixture(mixture.centers, tril, log_weights=mixture.log_weights)
        return mixture.diffuse(floor**2) if floor else mixture

    return bounded


def _loss(
    variant: Variant,
    start: GaussianMixture,
    bounded: Callable[[GaussianMixture], GaussianMixture],
    exclude: Tensor | None,
) -> Loss:
    width = float(widths(start)[1].median())
    variances = [(factor * width) ** 2 for factor in variant.noise]

    def loss(
        model: nn.Module, x: Tensor, index: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        mixture = bounded(model())
        if variant.objective == "likelihood":
            return negative_log_likelihood(mixture, x)
        own = None if exclude is None or index is None else exclude[index]
        if variances == [0.0]:
            return implicit_score_matching(mixture, x, exclude=own)
        total = x.new_zeros(())
        for variance in variances:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            noised = x + variance**0.5 * noise
            # the weight of (4): the increment of the variance, on a geometric grid its own size
            total = total + variance * implicit_score_matching(mixture.diffuse(variance), noised)
        return total / sum(variances)

    return loss


def _reweighed(mixture: GaussianMixture, x: Tensor) -> GaussianMixture:
    for _ in range(_WEIGHT_STEPS):
        weights = mixture.responsibilities(x).mean(0).clamp(min=torch.finfo(x.dtype).tiny)
        mixture = GaussianMixture(
            mixture.centers, mixture.precision_tril, log_weights=weights.log()
        )
    return mixture


@dataclass(frozen=True)
class Ablation:
    """Settings of one kernel model with one thing changed.

    Args:
        data: name of the law.
        seed: of the points, the training, and the points on which the divergence is measured.
        variant: what is changed.
        n: number of training points.
        measured: number of fresh points for the KL.
        stretch: factor of the first coordinate; the divergence does not change under it.
    """

    data: str
    seed: int
    variant: Variant
    n: int = 10_000
    measured: int = 10_000
    stretch: float = 1.0

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Train and measure; it takes seconds, so it starts anew after a kill."""
        x, fresh, log_law, generator = _points(self, device)
        factor = torch.ones_like(x[0])
        factor[0] = self.stretch
        watch = Stopwatch()
        try:
            members = train(x * factor, self.variant, generator=generator)
        except TrainingStopped as error:
            metrics = {"stopped": str(error), "processor_seconds": watch.seconds}
            return Result(metrics, [], {}, watch.wall)
        metrics = {"stopped": None, "processor_seconds": watch.seconds}
        seconds = watch.wall
        mixture = pooled(members)
        jacobian = math.log(self.stretch)
        log_probs = [part.log_prob(fresh * factor) + jacobian for part in (mixture, *members)]
        metrics |= _divergence(log_law, log_probs[0])
        metrics["members_kl"] = [_divergence(log_law, value)["kl"] for value in log_probs[1:]]
        metrics["median_narrow_width"] = float(widths(mixture)[1].median())
        return Result(metrics, [], {}, seconds)


# ---- beside other estimators


@dataclass(frozen=True)
class Comparison:
    """Settings of one estimate of a law's density.

    Args:
        method: name of the estimator, see `METHODS`.
        data: name of the law.
        seed: of the points, the estimator, and the points on which the divergence is measured.
        n: number of training points.
        measured: number of fresh points for the KL.
    """

    method: str
    data: str
    seed: int
    n: int = 10_000
    measured: int = 10_000

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Fit and measure; it takes less than a minute, so it starts anew after a kill."""
        x, fresh, log_law, generator = _points(self, device)
        watch = Stopwatch()
        log_prob, chosen = METHODS[self.method](x, fresh, self.seed, generator)
        metrics = {"chosen": chosen, "processor_seconds": watch.seconds}
        seconds = watch.wall
        with torch.no_grad():
            metrics |= _divergence(log_law, log_prob(fresh))
        return Result(metrics, [], {}, seconds)


def _kernel_model(
    x: Tensor, fresh: Tensor, seed: int, generator: torch.Generator, loss: Loss | None = None
):
    model = fit_kernel_model(x, loss=loss, generator=generator, progress=False)
    with torch.no_grad():
        mixture = model()
    return mixture.log_prob, len(mixture.centers)


def _likelihood(x: Tensor, fresh: Tensor, seed: int, generator: torch.Generator):
    """The default's procedure, its search for the number of centres too, with the other objective."""

    def loss(model: nn.Module, batch: Tensor, *_) -> Tensor:
        return negative_log_likelihood(model(), batch)

    return _kernel_model(x, fresh, seed, generator, loss)


def _kde(x: Tensor, variance: float):
    return GaussianMixture.from_variance(x, variance).log_prob, variance


# From training points, fresh points (for the oracle alone), a seed and a generator to a log-density and
# a number of kernels, or a variance.
METHODS: dict[str, Callable] = {
    "kernel model": _kernel_model,
    "likelihood": _likelihood,
    "oracle KDE": lambda x, fresh, seed, generator: _kde(x, best_variance(x, fresh)),
    "KDE": lambda x, fresh, seed, generator: _kde(x, leave_one_out_variance(x)),
    "mixture": lambda x, fresh, seed, generator: bic_mixture(x, seed, Stopwatch()),
}


def _points(
    settings: Ablation | Comparison, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    law = datasets.get(settings.data)
    generator = torch.Generator(device).manual_seed(_POINTS + settings.seed)
    x = law.sample(settings.n, generator=generator, dtype=torch.float32)
    other = torch.Generator(device).manual_seed(_FRESH + settings.seed)
    fresh = law.sample(settings.measured, generator=other, dtype=torch.float32)
    return x, fresh, law.log_prob(fresh), generator


def _divergence(log_law: Tensor, log_prob: Tensor) -> dict:
    difference = (log_law - log_prob).double()
    error = difference.std() / len(difference) ** 0.5
    return {"kl": float(difference.mean()), "kl_error": float(error)}


def cases(scale: str, *, data: str | None = None, seed: int | None = None) -> list[Case]:
    """The comparison on all planar laws and the ablations on four; at quick scale a few, of a fifth of the points."""
    if scale == "quick":
        return [
            case(data or LAWS[0], name, seed=seed or SEEDS[0], n=2000, measured=2000)
            for name in ("default", "start only", "likelihood")
        ]
    seeds = SEEDS if seed is None else (seed,)
    return [
        Case(
            "ablation",
            f"comparison-{name}-{method.replace(' ', '-')}-seed{k}",
            Comparison(method, name, k),
        )
        for k in seeds
        for name in ((data,) if data else PLANAR)
        for method in METHODS
    ] + [
        case(name, variant, seed=k)
        for k in seeds
        for name in LAWS
        if data in (None, name)
        for variant in VARIANTS
    ]


def case(data: str, variant: str, *, seed: int, **options) -> Case:
    """The ablation of this name on one law, see `VARIANTS`; options are further settings of `Ablation`."""
    stretch = 10.0 if variant == "raw units" else 1.0
    settings = Ablation(data, seed, Variant(**VARIANTS[variant]), stretch=stretch, **options)
    title = variant.replace(",", "").replace(" ", "-")
    return Case("ablation", f"{data}-{title}-seed{seed}", settings)
