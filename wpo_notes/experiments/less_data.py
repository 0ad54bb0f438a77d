"""Less data, less time: divergence against the number of training points and against wall time.

Chapter: *Less data, less time* (``book/less-data.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from wpo_notes import datasets, metrics
from wpo_notes.experiments.estimators import ESTIMATORS
from wpo_notes.experiments.runs import Case, Result

__all__ = ["LAWS", "SEEDS", "SIZES", "EstimatorRun", "cases"]

LAWS = ("moons", "swissroll", "pinwheel")
SIZES = {"paper": (100, 316, 1000, 3162, 10_000, 31_623, 100_000), "quick": (100, 1000)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class EstimatorRun:
    """Settings of one estimate of a law's density.

    Args:
        method: name of the estimator, see `ESTIMATORS`.
        data: name of the law.
        n: number of points that it is given, for validation too.
        seed: of the data and the estimator.
        measured: number of fresh points for the KL.
    """

    method: str
    data: str
    n: int
    seed: int
    measured: int = 5000

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Fit and measure; it takes minutes at most, so it starts anew after a kill."""
        law = datasets.get(self.data)
        generator = torch.Generator(device).manual_seed(self.seed)
        x = law.sample(self.n, generator=generator, dtype=torch.float32)
        fitted = ESTIMATORS[self.method](x, self.seed)
        fresh = law.sample(
            self.measured,
            generator=torch.Generator(device).manual_seed(10_000 + self.seed),
            dtype=x.dtype,
        )
        with torch.no_grad():
            difference = law.log_prob(fresh) - fitted.log_prob(fresh)
        kl = metrics.Estimate(
            float(difference.mean()), float(difference.std() / len(difference) ** 0.5)
        )
        measured = {"kl": kl.value, "kl_error": kl.error, "chosen": fitted.chosen}
        return Result(measured, [], {}, fitted.seconds)


def cases(scale: str, *, data: str | None = None, seed: int | None = None) -> list[Case]:
    """Every estimator on every law, size and seed."""
    return [
        Case(
            "less_data",
            f"{name}-{method.replace(' ', '-')}-{n}-seed{k}",
            EstimatorRun(method=method, data=name, n=n, seed=k),
        )
        for k in (SEEDS if seed is None else (seed,))
        for name in ((data,) if data else LAWS)
        for method in ESTIMATORS
        for n in SIZES[scale]
    ]
