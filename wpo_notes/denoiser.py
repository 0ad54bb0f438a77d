r"""The baseline: a score network trained by denoising score matching, eq. (5).

Its hidden layers are those of the paper's :math:`\psi_\theta` (Section 5.1), and its inputs and outputs
are preconditioned as in Karras et al. (2022).

Chapter: *Score-based models* (``book/score-based-models.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wpo_notes._checks import checked_points, checked_positive, make_generator
from wpo_notes._network import perceptron
from wpo_notes._shapes import Float
from wpo_notes.losses import denoising_score_matching
from wpo_notes.sde import LinearSDE, Score

__all__ = ["ScoreNetwork", "denoising_loss"]


class ScoreNetwork(nn.Module):
    r"""Score of data with noise of standard deviation σ added, for all σ > 0.

    A denoiser D(y; σ) gives the score (D - y) / σ². With the preconditioning of Karras et al. (2022)

    .. math:: D &= c_{\mathrm{skip}}\,y + c_{\mathrm{out}}\,F_\theta\bigl(c_{\mathrm{in}}\,y,
              \tfrac14\log\sigma\bigr), \\
              c_{\mathrm{skip}} &= \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
              c_{\mathrm{out}} = \frac{\sigma\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
              c_{\mathrm{in}} = \frac1{\sqrt{\sigma^2 + \sigma_d^2}}

    the network's part of the score is :math:`c_{\mathrm{out}} F / \sigma^2`, and the rest,
    :math:`-y / (\sigma^2 + \sigma_d^2)`, is the score of normal data of variance
    :math:`\sigma_d^2`. The last layer starts at zero, so training starts from that score.

    Args:
        dim: d.
        hidden: widths of the hidden layers, each followed by a GELU.
        data_std: σ_d, standard deviation of a coordinate of the data, whose mean should be near zero.
        dtype: of the parameters; torch's default if None.
        device: of the parameters; the processor if None.
        generator: source of the initial weights, on `device`; a fresh one if None.

    Raises:
        ValueError: a dimension or width below 1, or a data_std that is not positive.

    Examples:
        Before training it is the score of normal data, -y / (σ² + σ_d²).

        >>> import torch
        >>> from wpo_notes.denoiser import ScoreNetwork
        >>> model = ScoreNetwork(2, data_std=1.0)
        >>> model(torch.tensor([[1.0, -2.0]]), std=1.0).detach()
        tensor([[-0.5000,  1.0000]])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (64,) * 5,
        data_std: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(dim, *hidden) < 1:
            raise ValueError(
                f"dim and the widths in hidden must be at least 1, got {dim} and {tuple(hidden)}"
            )
        self.dim = dim
        self.data_std = checked_positive("data_std", data_std)
        device = torch.device("cpu") if device is None else torch.device(device)
        self.network = perceptron(
            dim + 1,
            hidden,
            dim,
            generator=make_generator(generator, device),
            dtype=dtype or torch.get_default_dtype(),
            device=device,
        )

    def forward(
        self, y: Float[Tensor, "*batch d"], std: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        """Score at y, (..., d) -> (..., d), for noise of standard deviation `std`.

        Args:
            y: (..., d), noisy points.
            std: σ > 0, a number or one a point, of shape (...).

        Raises:
            ValueError: a wrong event size, a std that is not positive or not one a point.
        """
        y = checked_points("y", y, self.dim, finite=False)
        std = torch.as_tensor(std, dtype=y.dtype, device=y.device)
        if std.ndim and std.shape != y.shape[:-1]:
            raise ValueError(
                f"std must be a number or have shape {tuple(y.shape[:-1])}, one a point, "
                f"got shape {tuple(std.shape)}"
            )
        if not bool((std > 0).all()):
            raise ValueError(
                f"std must be positive, got {float(std.detach().min()):g}: without noise the network "
                "has no score; stop the reverse process early"
            )
        std = std[..., None].expand(*y.shape[:-1], 1)
        return preconditioned(self.network, y, std, self.data_std)

    def score(self, sde: LinearSDE) -> Score:
        r"""Score of the noised data as a callable (y, s) of the noising time, for any linear process.

        Y(s) = m (Y(0) + (√v / m) ξ) is noisy data scaled by m, so the score is
        :math:`s_\theta(y / m;\, \sqrt v / m) / m`; Brownian noising has m = 1 and σ = β √s.
        """

        def at_time(y: Tensor, s: float) -> Tensor:
            mean_factor = sde.mean_factor(s)
            std = math.sqrt(sde.variance(s)) / mean_factor
            return self(y / mean_factor, std) / mean_factor

        return at_time


def preconditioned(
    network: Callable[[Tensor], Tensor], y: Tensor, std: Tensor, data_std: float | Tensor
) -> Tensor:
    """Score of Karras et al. (2022) from a network: y is (..., d), std (..., 1), both unchecked."""
    total = std.square() + data_std**2
    inputs = torch.cat([y * total.rsqrt(), 0.25 * std.log()], -1)
    return data_std / std * total.rsqrt() * network(inputs) - y / total


def denoising_loss(
    std_min: float, std_max: float
) -> Callable[[Callable[..., Tensor], Tensor, Tensor | None, torch.Generator | None], Tensor]:
    r"""Denoising score matching (5) as a loss for `wpo_notes.fit.fit`: log σ uniform in a range.

    Each point of the batch has its own σ; with the weight σ² the levels count alike.

    Args:
        std_min: smallest σ > 0, in the data's units.
        std_max: largest σ > std_min; for Brownian noising up to T it is β √T.

    Returns:
        loss(model, x, index, generator); the index is not used.
    """
    low = math.log(checked_positive("std_min", std_min))
    high = math.log(checked_positive("std_max", std_max))
    if not low < high:
        raise ValueError(f"std_max must be larger than std_min, got {std_max:g} <= {std_min:g}")

    def loss(
        model: Callable[..., Tensor],
        x: Tensor,
        index: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        generator = make_generator(generator, x.device)
        uniform = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        std = torch.exp(low + (high - low) * uniform)
        return denoising_score_matching(model, x, std=std, generator=generator)

    return loss
