r"""Score-matching objectives: eqs. (3)-(5) at one time, and (27), (30)-(31) for the kernel model.

Chapters: *The terminal condition* (``book/terminal-condition.md``) and *Score-based models*
(``book/score-based-models.md``).

The integrals over time in (3)-(5) are sums of these over noise levels, weighted by
:math:`\beta^2\,\mathrm ds`, the increment of the variance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wpo_notes._checks import checked_points, checked_positive, make_generator
from wpo_notes._shapes import Float, Int
from wpo_notes.mixture import GaussianMixture

__all__ = [
    "denoising_score_matching",
    "explicit_score_matching",
    "implicit_score_matching",
    "negative_log_likelihood",
]


def implicit_score_matching(
    mixture: GaussianMixture,
    x: Float[Tensor, "B d"],
    *,
    exclude: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    r"""Implicit score matching in closed form, eqs. (30)-(31), without automatic differentiation.

    .. math:: \frac1B \sum_b \Bigl( 2\,\frac{\Delta\pi_\theta}{\pi_\theta}(x_b)
              - |\nabla\log\pi_\theta(x_b)|^2 \Bigr)

    Over x from π its mean is :math:`\E_\pi|\nabla\log\pi_\theta - \nabla\log\pi|^2 -
    \E_\pi|\nabla\log\pi|^2`. A point that equals a centre contributes about
    :math:`-2\Tr\Gamma_i`, unbounded below: exclude that centre there.

    Args:
        mixture: the model.
        x: (B, d), points of the data.
        exclude: (B,), the index of the centre that each point is, or -1; left out at that point.

    Examples:
        A standard normal law in the plane has :math:`2(|x|^2 - 2) - |x|^2` at x.

        >>> import torch
        >>> from wpo_notes.losses import implicit_score_matching
        >>> from wpo_notes.mixture import GaussianMixture
        >>> normal = GaussianMixture.from_variance(torch.zeros(1, 2), 1.0)
        >>> round(float(implicit_score_matching(normal, torch.tensor([[1.0, 0.0]]))), 5)
        -3.0
    """
    score, laplacian_ratio = mixture.score_and_laplacian_ratio(x, exclude=exclude)
    return (2 * laplacian_ratio - score.square().sum(-1)).mean()


def explicit_score_matching(
    score: Callable[[Tensor], Tensor], x: Float[Tensor, "B d"], target: Float[Tensor, "B d"]
) -> Float[Tensor, ""]:
    r"""Explicit score matching, eq. (3) at one time: mean of :math:`|s(x_b) - target_b|^2`.

    Args:
        score: the model, (B, d) -> (B, d).
        x: (B, d), points of the law whose score is known.
        target: (B, d), that score at x.
    """
    return (score(x) - target).square().sum(-1).mean()


def denoising_score_matching(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B d"],
    *,
    std: float | Float[Tensor, " B"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Denoising score matching, eq. (5), weighted by the variance so that noise levels compare.

    .. math:: \frac1B \sum_b \bigl| \sigma_b\, s(x_b + \sigma_b \xi_b, \sigma_b) + \xi_b \bigr|^2,
              \qquad \xi_b \sim N(0, I) .

    Args:
        score: the model, called with noised points (B, d) and standard deviations (B,).
        x: (B, d), points of the data.
        std: standard deviation of the noise, :math:`\beta\sqrt s`: a number, or (B,).
        generator: source of the noise; a fresh one if None.
    """
    checked_points("x", x, finite=False)
    if not isinstance(std, Tensor):
        std = torch.full_like(x[:, 0], checked_positive("std", std))
    noise = torch.randn(
        x.shape,
        generator=make_generator(generator, x.device),
        dtype=x.dtype,
        device=x.device,
    )
    scaled = std[:, None]
    return (scaled * score(x + scaled * noise, std) + noise).square().sum(-1).mean()


def negative_log_likelihood(mixture: GaussianMixture, x: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    r"""Mean of :math:`-\log\hat\pi(x_b)`, in nats: score matching (4) over all times, not at the terminal one."""
    return -mixture.log_prob(x).mean()
