r"""Does denoising score matching memorise? A score network beside the empirical score (23) and the law's.

On n training points the minimiser of the objective (5) is the score of the points with noise, eq. (23). For
noised training points, and for noised fresh ones, the mean squared distances to that score and to the law's

.. math:: \E\,|\mathbf s_\theta(Y, \sigma) - \nabla\log\hat\eta_\sigma(Y)|^2, \qquad
          \E\,|\mathbf s_\theta(Y, \sigma) - \nabla\log\eta_\sigma(Y)|^2

are recorded while a network trains, with its divergence and the memorisation panel of its samples.

Chapter: *Does denoising score matching memorise?* (``book/denoiser-memorises.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wpo_notes import datasets, metrics
from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.experiments.denoising import denoiser_samples
from wpo_notes.experiments.estimators import stiff_log_prob
from wpo_notes.experiments.figure6 import leave_one_out_variance
from wpo_notes.experiments.runs import Case, Result
from wpo_notes.fit import fit
from wpo_notes.mixture import GaussianMixture

__all__ = ["LAWS", "LEVELS", "NARROW", "SIZES", "WIDE", "DenoiserRun", "cases", "law_score"]

LAWS = ("swissroll", "moons")  # laws that can be diffused exactly
SIZES = (100, 300, 1000)
LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0)
NARROW, WIDE = (64,) * 5, (128,) * 5  # the paper's network, and one of four times its parameters


@dataclass(frozen=True)
class DenoiserRun:
    """Settings of one network's training on few points.

    Args:
        data: name of a law that can be diffused.
        n: number of training points.
        hidden: widths of the hidden layers.
        steps: number of Adam steps, with a cosine schedule.
        seed: of the data, the initial weights, the batches and the noise.
        batch_size: points a step.
        lr: learning rate at the start.
        std_min: σ at which sampling stops, and the smallest in training.
        std_max: largest σ.
        levels: the σ at which scores are compared.
        record_every: first step that is measured; then its double and triple, each doubled on and on.
        compared: number of noised points at which scores are compared.
        measured: number of fresh points for the KL.
        samples: number of samples for the memorisation panel.
        shown: first step from which samples are kept for the figure; the other is the last.
    """

    data: str
    n: int
    hidden: tuple[int, ...]
    steps: int
    seed: int
    batch_size: int = 512
    lr: float = 5e-3
    std_min: float = 0.005
    std_max: float = 20.0
    levels: tuple[float, ...] = LEVELS
    record_every: int = 250
    compared: int = 2000
    measured: int = 400
    samples: int = 1000
    shown: int = 1000

    def __post_init__(self) -> None:
        if self.steps % self.record_every:
            raise ValueError(
                f"steps must be a multiple of record_every ({self.record_every}), got {self.steps}"
            )

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Train and measure; with a checkpoint, go on from it if it exists."""
        generator = torch.Generator(device).manual_seed(self.seed)
        law = datasets.get(self.data)
        x = law.sample(self.n, generator=generator, dtype=torch.float32)
        network = ScoreNetwork(
            law.dim,
            hidden=self.hidden,
            data_std=float(x.std(0).mean()),
            dtype=x.dtype,
            device=device,
            generator=generator,
        )
        watch = _Watch(self, law, x)
        watch.attach(network)
        result = fit(
            network,
            x,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            loss=denoising_loss(self.std_min, self.std_max),
            measure=watch,
            record_every=self.record_every,
            checkpoint=checkpoint,
            checkpoint_every=self.record_every,
            generator=generator,
            progress=progress,
        )
        history = [
            {"step": record.step, "objective": record.objective} | record.measured
            for record in result.history
            if record.measured
        ]
        arrays = {"training": x, "early": network.early, "late": watch.draw(network)}
        arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
        return Result(watch.references(), history, arrays, result.seconds)


class _Watch:
    """Measurements of a network while it trains, on points and noise that it never sees."""

    def __init__(
        self, settings: DenoiserRun, law: datasets.NoisyCurve | datasets.NoisyPoints, x: Tensor
    ) -> None:
        self.settings, self.x, self.law = settings, x, law
        generator = self.generator()
        self.fresh = law.sample(settings.compared, generator=generator, dtype=x.dtype)
        self.log_law = law.log_prob(self.fresh[: settings.measured])
        index = torch.randint(len(x), (settings.compared,), generator=generator, device=x.device)
        self.points = {
            where: [self._noised(points, std, generator=generator) for std in settings.levels]
            for where, points in (("training", x[index]), ("fresh", self.fresh))
        }

    def generator(self) -> torch.Generator:
        """Source of the evaluation's randomness: apart from the training's, the same each time."""
        return torch.Generator(self.x.device).manual_seed(10_000 + self.settings.seed)

    def _noised(
        self, points: Tensor, std: float, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points with noise, the empirical score (23) there, and the law's."""
        noise = torch.randn(
            points.shape, generator=generator, dtype=points.dtype, device=points.device
        )
        y = points + std * noise
        empirical = GaussianMixture.from_variance(self.x.double(), std**2).score(y.double())
        return y, empirical, law_score(self.law, y.double(), std)

    def attach(self, network: ScoreNetwork) -> ScoreNetwork:
        """Put what is counted and kept while training into the network's state, which a checkpoint holds."""
        network.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=self.x.device))
        network.register_buffer("early", self.x.new_zeros(self.settings.samples, self.law.dim))
        return network

    def draw(self, network: ScoreNetwork) -> Tensor:
        """Samples of the network, of the same noise each time."""
        settings = self.settings
        return denoiser_samples(
            network,
            settings.samples,
            settings.std_min,
            settings.std_max,
            generator=self.generator(),
        )

    def __call__(self, network: ScoreNetwork) -> dict:
        settings = self.settings
        network.calls += 1
        calls = int(network.calls)
        step = calls * settings.record_every
        odd = calls // (calls & -calls)
        if odd > 3 and step < settings.steps:
            return {}
        drawn = self.draw(network)
        if step == settings.shown:
            network.early.copy_(drawn)

        def log_prob(y: Tensor) -> Tensor:
            return stiff_log_prob(network, y, settings.std_min, settings.std_max)

        distances = {
            where: {
                "to_empirical": [
                    _mean_square(network(y, std) - empirical)
                    for std, (y, empirical, _) in zip(settings.levels, levels, strict=True)
                ],
                "to_law": [
                    _mean_square(network(y, std) - score)
                    for std, (y, _, score) in zip(settings.levels, levels, strict=True)
                ],
            }
            for where, levels in self.points.items()
        }
        return distances | self._judge(drawn, log_prob)

    def _judge(self, drawn: Tensor, log_prob: Callable[[Tensor], Tensor]) -> dict:
        """Memorisation panel of samples, and the divergence of a log-density."""
        panel = metrics.memorisation(drawn, self.x, self.fresh)
        difference = self.log_law - log_prob(self.fresh[: self.settings.measured])
        return {
            "memorisation": panel._asdict(),
            "kl": float(difference.mean()),
            "kl_error": float(difference.std() / len(difference) ** 0.5),
        }

    def references(self) -> dict:
        """What the numbers are to be read beside.

        The mean squares of the empirical score and of its difference from the law's; the panel for fresh draws, and
        panel and divergence for copies with noise: of std_min, which is what the exact empirical score
        generates, and of the deviation that makes the points likeliest when each is left out.
        """
        settings = self.settings
        scores = {
            where: {
                "empirical": [_mean_square(empirical) for _, empirical, _ in levels],
                "law_to_empirical": [
                    _mean_square(score - empirical) for _, empirical, score in levels
                ],
            }
            for where, levels in self.points.items()
        }
        fresh = self.law.sample(
            settings.samples,
            generator=torch.Generator(self.x.device).manual_seed(20_000 + settings.seed),
            dtype=self.x.dtype,
        )
        panel = metrics.memorisation(fresh, self.x, self.fresh)
        about = {"scores": scores, "fresh": {"memorisation": panel._asdict()}}
        blur = leave_one_out_variance(self.x.double()) ** 0.5
        for name, std in (("exact", settings.std_min), ("blurred", blur)):
            copies = GaussianMixture.from_variance(self.x, std**2)
            drawn = copies.sample((settings.samples,), generator=self.generator())
            about[name] = {"std": std} | self._judge(drawn, copies.log_prob)
        return about


def law_score(law: datasets.NoisyCurve | datasets.NoisyPoints, y: Tensor, std: float) -> Tensor:
    r"""Score :math:`\nabla\log\eta_\sigma` of a law with noise of deviation `std` added, (n, d) -> (n, d)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        log_prob = law.diffuse(std**2).log_prob(y)
        return torch.autograd.grad(log_prob.sum(), y)[0]


def _mean_square(vectors: Tensor) -> float:
    return float(vectors.square().sum(-1).mean())


def cases(scale: str, *, data: str | None = None, seed: int | None = None) -> list[Case]:
    """The paper's network on each law and size with three seeds; a wider one, twice as long, with the first."""
    laws = (data,) if data else LAWS
    seeds = (0, 1, 2) if seed is None else (seed,)
    if scale == "quick":
        return [_case(laws[0], 100, NARROW, 2000, seeds[0])]
    narrow = [_case(name, n, NARROW, 16_000, k) for k in seeds for name in laws for n in SIZES]
    wide = [_case(name, n, WIDE, 32_000, seeds[0]) for name in laws for n in (SIZES[0], SIZES[-1])]
    return narrow + wide


def _case(data: str, n: int, hidden: tuple[int, ...], steps: int, seed: int) -> Case:
    return Case(
        "denoiser_memorises",
        f"{data}-{n}-{len(hidden)}x{hidden[0]}-seed{seed}",
        DenoiserRun(data=data, n=n, hidden=hidden, steps=steps, seed=seed),
    )
