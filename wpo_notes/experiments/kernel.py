"""Training the kernel model as Section 5 does, watched: the runs behind Figures 2 to 6.

The centres are a random subset of the training points. ``literal`` trains on all points, so that a
centre is scored at itself; ``leave one out`` leaves the centre out of the mixture there; ``disjoint``
trains on the other points.

Chapter: *Does the paper's own setting memorise?* (``book/self-scoring.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wpo_notes import datasets, metrics
from wpo_notes.experiments.runs import Result
from wpo_notes.fit import TrainingStopped, constant, cosine, fit, kernel_loss
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel

__all__ = ["MODES", "KernelRun", "kernel_model", "widths"]

MODES = ("literal", "leave one out", "disjoint")
SCHEDULES = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class KernelRun:
    """Settings of one training run.

    Args:
        data: name of the law.
        mode: one of `MODES`.
        n: number of training points.
        centers: how many of them are centres.
        steps: number of Adam steps.
        seed: of the data, the centres, the initial weights and the batches.
        batch_size: points a step.
        lr: learning rate.
        schedule: of the learning rate, "constant" or "cosine".
        hidden: widths of the network's hidden layers.
        dtype: "float32" or "float64".
        record_every: steps between measurements.
        measured: number of fresh points for the KL, and of points each for the objective's parts.
        samples: number of samples kept for the figure.
    """

    data: str
    mode: str
    n: int
    centers: int
    steps: int
    seed: int
    batch_size: int = 64
    lr: float = 2e-3
    schedule: str = "constant"
    hidden: tuple[int, ...] = (64,) * 5
    dtype: str = "float32"
    record_every: int = 1000
    measured: int = 5000
    samples: int = 2500

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Train, measure and sample; a run whose objective overflows is kept until there."""
        generator = torch.Generator(device).manual_seed(self.seed)
        law = datasets.get(self.data)
        x = law.sample(self.n, generator=generator, dtype=getattr(torch, self.dtype))
        model = KernelModel(x[: self.centers], hidden=self.hidden, generator=generator)
        exclude = torch.full_like(x[:, 0], -1, dtype=torch.int64)
        if self.mode == "leave one out":
            exclude[: self.centers] = torch.arange(self.centers, device=device)
        first = self.centers if self.mode == "disjoint" else 0
        watch = _Watch(self, law, x, exclude, first)
        stopped = None
        try:
            result = fit(
                model,
                x[first:],
                steps=self.steps,
                batch_size=self.batch_size,
                lr=self.lr,
                loss=kernel_loss(exclude[first:]),
                schedule=SCHEDULES[self.schedule],
                measure=watch,
                record_every=self.record_every,
                checkpoint=checkpoint,
                checkpoint_every=self.record_every,
                generator=generator,
                progress=progress,
            )
            history, times = result.history, (result.seconds, result.cpu_seconds)
        except TrainingStopped as error:
            history, times = error.history, (error.seconds, error.cpu_seconds)
            stopped = str(error)
        final = watch(model) | {"stopped": stopped}
        samples = model().sample((self.samples,), generator=watch.generator())
        arrays = {"samples": _array(samples.float())}
        arrays |= {f"model.{name}": _array(value) for name, value in model.state_dict().items()}
        return Result(final, [flat(record) for record in history], arrays, *times)


def flat(record) -> dict:
    """A record of `fit` as one dictionary."""
    about = record._asdict()
    return about | (about.pop("measured") or {})


class _Watch:
    """Measurements of a kernel model while it trains, on points that it never trains on."""

    def __init__(self, settings: KernelRun, law, x: Tensor, exclude: Tensor, first: int) -> None:
        self.settings, self.x = settings, x
        self.fresh = law.sample(settings.measured, generator=self.generator(), dtype=x.dtype)
        self.log_law = law.log_prob(self.fresh)
        centers = settings.centers
        # Equal numbers of points that are centres, where they are trained on, and of points that are not.
        self.parts = {"others": slice(centers, centers + settings.measured)}
        if first == 0:
            self.parts["centers"] = slice(0, min(centers, settings.measured))
        self.exclude = exclude

    def generator(self) -> torch.Generator:
        """Source of the evaluation's randomness: apart from the training's, the same each time."""
        return torch.Generator(self.x.device).manual_seed(10_000 + self.settings.seed)

    @torch.no_grad()
    def __call__(self, model: KernelModel) -> dict:
        mixture = model()
        difference = self.log_law - mixture.log_prob(self.fresh)
        typical, narrowest = widths(mixture)
        panel = metrics.memorisation(
            mixture.sample((self.settings.measured,), generator=self.generator()),
            self.x,
            self.fresh,
        )
        measured = {
            "kl": float(difference.mean()),
            "kl_error": float(difference.std() / len(difference) ** 0.5),
            "typical_width": float(typical.median()),
            "median_narrow_width": float(narrowest.median()),
            "narrowest_width": float(narrowest.min()),
            "memorisation": panel._asdict(),
        }
        for name, part in self.parts.items():
            score, ratio = mixture.score_and_laplacian_ratio(
                self.x[part], exclude=self.exclude[part]
            )
            measured[f"objective_{name}"] = float((2 * ratio - score.square().sum(-1)).mean())
        return measured


def widths(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    r"""Widths of the kernels: :math:`(\det\Gamma_i)^{-1/2d}`, and the least standard deviation, (N,) each."""
    tril = mixture.precision_tril
    typical = (-tril.diagonal(dim1=-2, dim2=-1).log().mean(-1)).exp()
    return typical, 1 / torch.linalg.matrix_norm(tril, 2)


def kernel_model(arrays: dict[str, np.ndarray], hidden: tuple[int, ...]) -> KernelModel:
    """The trained model of a record's arrays."""
    state = {
        name.removeprefix("model."): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("model.")
    }
    model = KernelModel(state["centers"], hidden=hidden, initial_std=float(state["initial_std"]))
    model.load_state_dict(state)
    return model


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
