"""Print two Markdown tables: evaluating a mixture, and one training step.

The mixture has N = 5000 centres with full precisions. Ways that are slow get fewer points, and their time
is scaled to the points of the others: all are linear in the points. Errors are the largest
difference from exact differences in float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor
from torch.utils.benchmark import Timer

from wpo_notes.losses import implicit_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel


def problem(n: int, m: int, d: int) -> tuple[GaussianMixture, Tensor]:
    """A mixture along a curved surface with local standard deviations from 0.05 to 0.5, and points."""
    generator = torch.Generator().manual_seed(d)
    plane = torch.randn(n, 2, generator=generator)
    centers = 2 * (plane @ torch.randn(2, d, generator=generator)).sin()
    tril = torch.randn(n, d, d, generator=generator).tril(-1)
    width = 0.05 * 10 ** torch.rand(n, d, generator=generator)
    mixture = GaussianMixture(centers, tril + torch.diag_embed(1 / width))
    return mixture, mixture.sample((m,), generator=generator)


def exact(mixture: GaussianMixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density and score by differences in float64, a few points at a time."""
    centers, tril = mixture.centers.double(), mixture.precision_tril.double()
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_probs, scores = [], []
    for part in x.double().split(8):
        difference = part[:, None] - centers  # (b, N, d)
        white = torch.einsum("nkl,bnk->bnl", tril, difference)
        log_terms = log_det - white.square().sum(-1) / 2
        pull = -torch.einsum("nkl,bnl->bnk", tril, white)
        scores.append((log_terms.softmax(-1)[..., None] * pull).sum(1))
        log_probs.append(log_terms.logsumexp(-1))
    constant = math.log(len(centers)) + centers.shape[1] / 2 * math.log(2 * math.pi)
    return torch.cat(log_probs) - constant, torch.cat(scores)


def torch_distributions(mixture: GaussianMixture) -> Callable:
    """Log-density and score by torch.distributions and autograd."""
    distribution = mixture.to_torch()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        log_prob = distribution.log_prob(x)
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), x)[0]

    return run


def scikit_learn(mixture: GaussianMixture) -> Callable:
    """Log-density alone by scikit-learn, whose fitted attributes are set by hand."""
    n, _ = mixture.centers.shape
    sklearn = SklearnMixture(n)
    sklearn.weights_ = np.full(n, 1 / n)
    sklearn.means_ = mixture.centers.double().numpy()
    sklearn.precisions_cholesky_ = mixture.precision_tril.double().numpy()
    return lambda x: (torch.as_tensor(sklearn.score_samples(x.double().numpy())), None)


def milliseconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    """Median time of run(x) on one thread, over at least one second."""
    timer = Timer("run(x)", globals={"run": run, "x": x}, num_threads=1)
    return 1e3 * timer.blocked_autorange(min_run_time=1.0).median


def evaluation(n: int, m: int) -> None:
    """Print the table of log-density and score."""
    print(f"Log-density and score, N = {n} centres, {m} points, float32, ms\n")
    print("| way | d | points timed | ms | error of log-density | relative error of score |")
    print("|---|---|---|---|---|---|")
    for d in (2, 6, 16):
        mixture, x = problem(n, m, d)
        log_prob, score = exact(mixture, x[:200])
        ways = {
            "wpo_notes": (mixture.log_prob_and_score, m),
            "torch.distributions and autograd": (torch_distributions(mixture), m // 25),
            "scikit-learn, log-density only, float64": (scikit_learn(mixture), m // 25),
        }
        for name, (way, points) in ways.items():
            time = milliseconds(way, x[:points]) * m / points
            found_log_prob, found_score = way(x[:200])
            error = float((found_log_prob - log_prob).abs().max())
            relative = "-"
            if found_score is not None:
                relative = f"{float((found_score - score).norm() / score.norm()):.0e}"
            print(
                f"| {name} | {d} | {points} | {time:.0f} | {error:.0e} | {relative} |", flush=True
            )


def training(n: int) -> None:
    """Print the table of one training step: forward, closed-form objective, backward."""
    print(f"\nOne training step of the kernel model, {n} centres, float32, ms\n")
    print("| d | batch 64 | batch 512 |")
    print("|---|---|---|")
    for d in (2, 6):
        mixture, x = problem(n, 512, d)
        model = KernelModel(mixture.centers, generator=torch.Generator().manual_seed(0))

        def step(batch: Tensor, model: KernelModel = model) -> None:
            model.zero_grad()
            implicit_score_matching(model(), batch).backward()

        times = [milliseconds(step, x[:batch]) for batch in (64, 512)]
        print(f"| {d} | {times[0]:.0f} | {times[1]:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times of wpo_notes beside other libraries.")
    parser.add_argument("--centers", type=int, default=5000)
    parser.add_argument("--points", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    evaluation(arguments.centers, arguments.points)
    training(arguments.centers)
