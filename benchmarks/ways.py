"""The problem that is timed, and the ways to solve it: log-density and score, and one training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

from wpo_notes.losses import implicit_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel


def problem(n: int, m: int, d: int, *, offset: float = 0.0) -> tuple[GaussianMixture, Tensor]:
    """Kernels along a closed curve with |x| about 3, of width 0.02 across it and 0.1 along it, and points."""
    generator = torch.Generator().manual_seed(d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mode = torch.arange(1.0, 4.0, dtype=torch.float64)
    amplitude = normal(2, 3, d) / mode[:, None]
    amplitude *= 3 / (amplitude.square().sum() / 2).sqrt()
    angle = 2 * math.pi * torch.rand(n, 1, generator=generator, dtype=torch.float64) * mode
    centers = angle.cos() @ amplitude[0] + angle.sin() @ amplitude[1]
    tangent = (-mode * angle.sin()) @ amplitude[0] + (mode * angle.cos()) @ amplitude[1]
    tangent = torch.nn.functional.normalize(tangent, dim=1)[..., None]
    identity = torch.eye(d, dtype=torch.float64)
    precision = identity / 0.02**2 + (1 / 0.1**2 - 1 / 0.02**2) * tangent @ tangent.mT
    mixture = GaussianMixture((centers + offset).float(), torch.linalg.cholesky(precision).float())
    return mixture, mixture.sample((m,), generator=generator)


class Exact(NamedTuple):
    """Log-density (m,), score (m, d) and Laplacian ratio (m,)."""

    log_prob: Tensor
    score: Tensor
    laplacian_ratio: Tensor


def exact(mixture: GaussianMixture, x: Tensor) -> Exact:
    """By differences in float64, a few points at a time."""
    return Exact(*differences(mixture, x.double(), torch.float64, laplacian=True))


def differences(
    mixture: GaussianMixture, x: Tensor, dtype: torch.dtype, *, laplacian: bool = False
) -> list[Tensor]:
    """The formulas as they stand, by einsum over differences x - Z, a chunk of points at a time."""
    centers, tril = mixture.centers.to(dtype), mixture.precision_tril.to(dtype)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = math.log(len(centers)) + centers.shape[1] / 2 * math.log(2 * math.pi)
    parts = []
    for part in x.split(max(1, 2**22 // centers.numel())):
        difference = part[:, None] - centers  # (b, N, d)
        white = torch.einsum("nkl,bnk->bnl", tril, difference)
        log_terms = log_det - white.square().sum(-1) / 2
        pull = torch.einsum("nkl,bnl->bnk", tril, white)
        weights = log_terms.softmax(-1)
        results = [log_terms.logsumexp(-1) - constant, -(weights[..., None] * pull).sum(1)]
        if laplacian:
            excess = pull.square().sum(-1) - tril.square().sum((1, 2))
            results.append((weights * excess).sum(1))
        parts.append(results)
    return [torch.cat(result) for result in zip(*parts, strict=True)]


def torch_distributions(mixture: GaussianMixture) -> Callable:
    """Log-density and score by torch.distributions and automatic differentiation."""
    distribution = mixture.to_torch()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, scores = [], []
        for part in x.detach().split(100):  # all at once would take the machine's memory
            part = part.requires_grad_()
            log_prob = distribution.log_prob(part)
            log_probs.append(log_prob.detach())
            scores.append(torch.autograd.grad(log_prob.sum(), part)[0])
        return torch.cat(log_probs), torch.cat(scores)

    return run


def scikit_learn(mixture: GaussianMixture) -> Callable:
    """Log-density alone by scikit-learn, whose fitted attributes are set by hand."""
    n, _ = mixture.centers.shape
    sklearn = SklearnMixture(n)
    sklearn.weights_ = np.full(n, 1 / n)
    sklearn.means_ = mixture.centers.double().numpy()
    sklearn.precisions_cholesky_ = mixture.precision_tril.double().numpy()
    return lambda x: (torch.as_tensor(sklearn.score_samples(x.double().numpy())), None)


def pykeops(mixture: GaussianMixture) -> Callable | None:
    """Log-density and score by PyKeOps; None where it is not installed."""
    try:
        from pykeops.torch import LazyTensor
    except ImportError:
        return None
    n, d = mixture.centers.shape
    tril = LazyTensor(mixture.precision_tril.reshape(1, n, d * d))
    centers = LazyTensor(mixture.centers[None])
    log_det = mixture.precision_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_scale = LazyTensor((mixture.log_weights + log_det)[None, :, None])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = LazyTensor(x[:, None]) - centers
        white = difference.vecmatmult(tril)
        log_terms = log_scale - (white**2).sum(-1) / 2
        pull = tril.matvecmult(white)
        log_prob = log_terms.logsumexp(1)[:, 0]
        score = (-(log_terms - LazyTensor(log_prob[:, None, None])).exp() * pull).sum(1)
        return log_prob - d / 2 * math.log(2 * math.pi), score

    return run


def ways(mixture: GaussianMixture) -> dict[str, tuple[Callable, int]]:
    """Each way with the factor by which it gets fewer points than the others."""
    found = {
        "wpo_notes": (mixture.log_prob_and_score, 1),
        "torch.distributions and autograd": (torch_distributions(mixture), 50),
        "scikit-learn, log-density alone, float64": (scikit_learn(mixture), 50),
        "einsum over differences": (lambda x: differences(mixture, x, x.dtype), 20),
    }
    keops = pykeops(mixture)
    return found if keops is None else found | {"PyKeOps": (keops, 20)}


def training_step(n: int, d: int, batch: int, *, closed_form: str) -> Callable:
    """Forward and backward pass of implicit score matching with the paper's network on all centres."""
    mixture, x = problem(n, batch, d)
    model = KernelModel(mixture.centers, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model.zero_grad()
        law = model()
        if closed_form == "wpo_notes":
            objective = implicit_score_matching(law, x)
        elif closed_form == "einsum over differences":
            _, score, ratio = differences(law, x, x.dtype, laplacian=True)
            objective = (2 * ratio - score.square().sum(-1)).mean()
        else:  # the network alone
            objective = law.precision_tril.sum()
        objective.backward()

    return run
