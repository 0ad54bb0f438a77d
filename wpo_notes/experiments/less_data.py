"""Less data, less time: divergence against the number of training points and against the time it took.

Chapter: *Less data, less time* (``book/less-data.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wpo_notes import datasets
from wpo_notes.experiments.estimators import ESTIMATORS, LogProb, Stopwatch
from wpo_notes.experiments.runs import Case, Result

__all__ = ["LAWS", "SEEDS", "SIZES", "WATCHED", "EstimatorRun", "cases"]

LAWS = ("moons", "swissroll", "pinwheel")
SIZES = (100, 1000, 10_000, 100_000)
SEEDS = (0, 1, 2)
WATCHED = 10_000  # number of points at which the divergence is measured as training goes on


@dataclass(frozen=True)
class EstimatorRun:
    """Settings of one estimate of a law's density.

    Args:
        method: name of the estimator, see `ESTIMATORS`.
        data: name of the law.
        n: number of points that it is given, for validation too.
        seed: of the data and the estimator.
        watched: measure the divergence also as training goes on.
        measured: number of fresh points for the KL; two fifths of them as training goes on.
    """

    method: str
    data: str
    n: int
    seed: int
    watched: bool = False
    measured: int = 5000

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Fit and measure; it takes minutes at most, so it starts anew after a kill."""
        law = datasets.get(self.data)
        x, fresh = (
            law.sample(n, generator=torch.Generator(device).manual_seed(k), dtype=torch.float32)
            for n, k in ((self.n, self.seed), (self.measured, 10_000 + self.seed))
        )
        log_law = law.log_prob(fresh)
        few = 2 * len(fresh) // 5
        watch = Stopwatch(
            (lambda log_prob: _divergence(log_law[:few], log_prob, fresh[:few]))
            if self.watched
            else None
        )
        fitted = ESTIMATORS[self.method](x, self.seed, watch)
        about = {"chosen": fitted.chosen, "processor_seconds": watch.seconds}
        seconds = watch.wall
        about |= _divergence(log_law, fitted.log_prob, fresh)
        return Result(about, watch.history, {}, seconds)


@torch.no_grad()
def _divergence(log_law: Tensor, log_prob: LogProb, fresh: Tensor) -> dict:
    difference = log_law - log_prob(fresh)
    error = difference.std() / len(difference) ** 0.5
    return {"kl": float(difference.mean()), "kl_error": float(error)}


def cases(scale: str, *, data: str | None = None, seed: int | None = None) -> list[Case]:
    """Every estimator on every law, size and seed; at quick scale what takes seconds, on one law.

    At paper scale also denoising score matching of `WATCHED` points on the other planar laws, which the chapter
    *Performance* sets beside the time of the kernel model.
    """
    if scale == "quick":
        few = [(method, SIZES[0]) for method in ESTIMATORS]
        few += [("kde", SIZES[1]), ("mixture", SIZES[1])]  # the others take longer
        return [_case(method, data or LAWS[1], n, seed or SEEDS[0]) for method, n in few]
    seeds = SEEDS if seed is None else (seed,)
    others = () if data else [name for name in datasets.PLANAR if name not in LAWS]
    return [
        *(
            _case(method, name, n, k)
            for k in seeds
            for name in ((data,) if data else LAWS)
            for method in ESTIMATORS
            for n in SIZES
        ),
        *(_case("denoising", name, WATCHED, k) for k in seeds for name in others),
    ]


def _case(method: str, name: str, n: int, seed: int) -> Case:
    trained = method in ("kernel model", "denoising")
    return Case(
        "less_data",
        f"{name}-{method.replace(' ', '-')}-{n}-seed{seed}",
        EstimatorRun(method=method, data=name, n=n, seed=seed, watched=trained and n == WATCHED),
    )
