r"""Section 6.2: the score as an attention layer, its parameters tied or free, and tensors for networks.

Chapter: *Section 6.2: the score as an attention layer* (``book/bespoke-network.md``).

The objects here are for comparison. `wpo_notes.mixture` evaluates the tied layer without the
cancellation that a lift about one origin has.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wpo_notes._checks import checked_positive, make_generator
from wpo_notes._shapes import Float
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel

__all__ = [
    "AttentionLayer",
    "CanonicalPolyadic",
    "TensorKernelModel",
    "UntiedLayer",
    "WeightedKernelModel",
    "layer_score_matching",
    "lift",
]


def lift(x: Float[Tensor, "B d"]) -> Float[Tensor, "B m"]:
    r"""Lifted points :math:`\mathcal T(x) = (x \otimes x, x)`, eq. (32) with all d² products.

    Examples:
        >>> import torch
        >>> from wpo_notes.bespoke import lift
        >>> lift(torch.tensor([[2.0, 3.0]]))
        tensor([[4., 6., 6., 9., 2., 3.]])
    """
    return torch.cat([(x[:, :, None] * x[:, None]).flatten(1), x], 1)


class AttentionLayer(NamedTuple):
    r"""One head of softmax attention on lifted points, with output affine in x: eq. (34).

    .. math:: s(x) &= \sum_i \sigma_i(x)\, u_i(x), \qquad u_i(x) = v_i - M_i x , \\
              \sigma(x) &= \operatorname{softmax}\bigl(\mathbf A\,\mathcal T(x) + \mathbf b\bigr) .

    It is the score of a kernel model if :math:`\mathbf A_i = (-\tfrac12\operatorname{vec}\Gamma_i,
    \Gamma_i Z_i)`, :math:`M_i = \Gamma_i` and :math:`v_i = \Gamma_i Z_i`; `from_mixture` makes that one.
    Everything is lifted about the origin, so float32 loses digits where kernels are narrow.

    Args:
        key: (N, d² + d), the rows of A.
        bias: (N,), b.
        value: (N, d² + d), vec M_i and v_i.
    """

    key: Float[Tensor, "N m"]
    bias: Float[Tensor, " N"]
    value: Float[Tensor, "N m"]

    @classmethod
    def from_mixture(cls, mixture: GaussianMixture) -> AttentionLayer:
        """Layer whose output is the mixture's score and whose log-sum-exp its log-density, eq. (33)."""
        centers, tril = mixture.centers, mixture.precision_tril
        precision = tril @ tril.mT
        pulled = (precision * centers[:, None]).sum(-1)  # Gamma_i Z_i
        value = torch.cat([precision.flatten(1), pulled], 1)
        key = torch.cat([-0.5 * precision.flatten(1), pulled], 1)
        bias = _log_scale(mixture) - 0.5 * (pulled * centers).sum(-1)
        return cls(key, bias, value)

    def exponents(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B N"]:
        """Return y(x) = A T(x) + b, whose softmax is the layer's attention, (B, d) -> (B, N)."""
        return torch.addmm(self.bias, lift(x), self.key.mT)

    def log_sum_exp(self, x: Float[Tensor, "B d"]) -> Float[Tensor, " B"]:
        """Log of the softmax's normaliser, (B, d) -> (B,): the log-density if the layer is a mixture's."""
        return self.exponents(x).logsumexp(1)

    def score(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """Output s(x), (B, d) -> (B, d)."""
        return _affine(self.exponents(x).softmax(1) @ self.value, x)

    def score_and_divergence(
        self, x: Float[Tensor, "B d"]
    ) -> tuple[Float[Tensor, "B d"], Float[Tensor, " B"]]:
        r"""Output and its divergence, by matrix products and without automatic differentiation.

        .. math:: \nabla\cdot s = \sum_i \sigma_i \bigl(\nabla y_i\cdot u_i - \Tr M_i\bigr)
                  - \bar g\cdot s, \qquad \bar g = \sum_i \sigma_i \nabla y_i .

        Each bracket is a quadratic polynomial of x, so its mean is one more value to attend to.
        """
        d = x.shape[1]
        quadratic, linear = _matrix_and_vector(self.key, d)
        slope, offset = _matrix_and_vector(self.value, d)
        twice = quadratic + quadratic.mT  # grad y_i = twice_i x + linear_i
        trace = slope.diagonal(dim1=-2, dim2=-1).sum(-1)
        bracket = torch.cat(
            [
                -(twice.mT @ slope).flatten(1),
                (twice @ offset[..., None] - slope.mT @ linear[..., None])[..., 0],
                ((linear * offset).sum(-1) - trace)[:, None],
            ],
            1,
        )
        gradient = torch.cat([-twice.flatten(1), linear], 1)
        lifted = lift(x)
        weight = torch.addmm(self.bias, lifted, self.key.mT).softmax(1)
        widths = (self.value.shape[1], gradient.shape[1], bracket.shape[1])
        mean = weight @ torch.cat([self.value, gradient, bracket], 1)
        value, gradient, bracket = mean.split(widths, 1)
        score = _affine(value, x)
        mean_bracket = (bracket[:, :-1] * lifted).sum(1) + bracket[:, -1]
        return score, mean_bracket - (_affine(gradient, x) * score).sum(1)


def layer_score_matching(layer: AttentionLayer, x: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    r"""Implicit score matching of any layer, eq. (4) at one time, in closed form.

    .. math:: \frac1B \sum_b \bigl( 2\,\nabla\cdot s(x_b) + |s(x_b)|^2 \bigr)

    For a layer that is a mixture's this is `wpo_notes.losses.implicit_score_matching`.
    """
    score, divergence = layer.score_and_divergence(x)
    return (2 * divergence + score.square().sum(-1)).mean()


class UntiedLayer(nn.Module):
    r"""Attention layer whose keys, biases and values are all free, each relative to where it starts.

    In the coordinates :math:`\xi = B_i^\top (x - Z_i)` of the kernel that centre i starts from,

    .. math:: y_i = \xi^\top q_i\, \xi + h_i\cdot\xi + b_i, \qquad u_i = B_i (v_i - m_i\, \xi),

    with :math:`q_i = -\tfrac12 I`, :math:`m_i = I` and :math:`h_i = v_i = 0` at the start, where the
    layer is the mixture's. Nothing keeps it a gradient field, or its exponents bounded above.

    Args:
        start: the mixture to start from.
    """

    centers: Tensor
    tril: Tensor

    def __init__(self, start: GaussianMixture) -> None:
        super().__init__()
        self.register_buffer("centers", start.centers.detach().clone())
        self.register_buffer("tril", start.precision_tril.detach().clone())
        identity = torch.eye(self.centers.shape[1]).to(self.tril).expand_as(self.tril)
        self.quadratic = nn.Parameter(-0.5 * identity)
        self.linear = nn.Parameter(torch.zeros_like(self.centers))
        self.bias = nn.Parameter(_log_scale(start).detach().clone())
        self.slope = nn.Parameter(identity.clone())
        self.offset = nn.Parameter(torch.zeros_like(self.centers))

    def forward(self) -> AttentionLayer:
        """Layer with the current parameters, lifted about the origin."""
        z, b = self.centers[..., None], self.tril
        quadratic = b @ self.quadratic @ b.mT
        quadratic = 0.5 * (quadratic + quadratic.mT)
        own = b @ self.linear[..., None]
        linear = own - 2 * quadratic @ z
        bias = self.bias + (z.mT @ (quadratic @ z - own))[:, 0, 0]
        slope = b @ self.slope @ b.mT
        offset = b @ self.offset[..., None] + slope @ z
        return AttentionLayer(
            torch.cat([quadratic.flatten(1), linear[..., 0]], 1),
            bias,
            torch.cat([slope.flatten(1), offset[..., 0]], 1),
        )

    def departure(self) -> Float[Tensor, " N"]:
        r"""How far each centre is from the relations of (34), in its own coordinates, (N,).

        .. math:: \bigl(\|m_i + q_i + q_i^\top\|_F^2 + |v_i - h_i|^2\bigr)^{1/2},

        zero for all if and only if :math:`u_i = \nabla y_i`, so that s is the gradient of the
        log-sum-exp. For scale: the identity, where m starts, has norm :math:`\sqrt d`.
        """
        matrix = self.slope + self.quadratic + self.quadratic.mT
        vector = self.offset - self.linear
        return (matrix.square().sum((1, 2)) + vector.square().sum(1)).sqrt()


class WeightedKernelModel(nn.Module):
    """A kernel model with weights of its own, which are learned too.

    Args:
        kernels: module whose call gives the mixture of centres and precisions.
        log_weights: (N,), the weights' logarithms at the start. To keep them as they are, turn their
            ``requires_grad`` off.
    """

    def __init__(self, kernels: KernelModel, log_weights: Float[Tensor, " N"]) -> None:
        super().__init__()
        self.kernels = kernels
        self.log_weights = nn.Parameter(log_weights.detach().clone())

    def forward(self) -> GaussianMixture:
        """Mixture with the current centres, precisions and weights."""
        kernels = self.kernels()
        return GaussianMixture(
            kernels.centers,
            kernels.precision_tril,
            log_weights=self.log_weights,
            validate_args=False,  # valid by construction; NaN is met by the training loop
        )


class CanonicalPolyadic(nn.Module):
    r"""Functions of d coordinates as sums of R products of functions of one coordinate.

    .. math:: \ell_e(z) = \sum_{r=1}^R c_{er} \prod_{k=1}^d f_{rk}(z_k), \qquad
              f_{rk}(z) = \sum_{m=0}^p a_{rkm}\, T_m(z / Z_k),

    with Chebyshev polynomials T_m; on a grid, a tensor of canonical (CP) rank R. It starts at zero, as
    `KernelModel`'s network does, and has R (d (p + 1) + outputs) parameters.

    Args:
        bound: (d,), Z: the functions are polynomials on [-Z, Z], and constant outside.
        outputs: number of functions.
        rank: R.
        degree: p.
        generator: source of the initial coefficients; a fresh one if None.

    Raises:
        ValueError: outputs, rank or degree below one.
    """

    bound: Tensor

    def __init__(
        self,
        bound: Float[Tensor, " d"],
        outputs: int,
        *,
        rank: int,
        degree: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("outputs", outputs), ("rank", rank), ("degree", degree)):
            checked_positive(name, value)
        self.register_buffer("bound", bound.detach().clone())
        generator = make_generator(generator, bound.device)
        coefficients = torch.empty(
            rank, len(bound), degree + 1, dtype=bound.dtype, device=bound.device
        )
        coefficients.normal_(0, (degree + 1) ** -0.5, generator=generator)
        self.coefficients = nn.Parameter(coefficients)
        self.combination = nn.Parameter(bound.new_zeros(outputs, rank))

    def forward(self, z: Float[Tensor, "M d"]) -> Float[Tensor, "M e"]:
        """Values of the functions, (M, d) -> (M, outputs)."""
        z = (z / self.bound).clamp(-1, 1)
        degrees = torch.arange(self.coefficients.shape[-1], device=z.device)
        basis = torch.special.chebyshev_polynomial_t(z[..., None], degrees)  # (M, d, p + 1)
        factors = torch.einsum("mkp,rkp->mrk", basis, self.coefficients)
        return factors.prod(-1) @ self.combination.mT


class TensorKernelModel(KernelModel):
    r"""`KernelModel` with a low-rank tensor in place of the network :math:`\psi_\theta`.

    Args:
        centers: (N, d), as for `KernelModel`.
        rank, degree: of `CanonicalPolyadic`.
        generator: source of the initial coefficients; a fresh one if None.
    """

    def __init__(
        self,
        centers: Float[Tensor, "N d"],
        *,
        rank: int = 8,
        degree: int = 7,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(centers, hidden=())
        d = self.centers.shape[1]
        self.network = CanonicalPolyadic(  # type: ignore[assignment]
            ((self.centers - self.offset) / self.scale).abs().amax(0),
            d * (d + 1) // 2,
            rank=rank,
            degree=degree,
            generator=generator,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raise an error: `KernelModel.load` knows the network only."""
        raise TypeError(
            "a TensorKernelModel cannot be saved as a KernelModel: save its state_dict(), or its "
            "mixture's centres and precision_tril"
        )


def _log_scale(mixture: GaussianMixture) -> Tensor:
    """Log of weight times normalisation of each component, (N,)."""
    log_det = mixture.precision_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return mixture.log_weights + log_det - 0.5 * mixture.centers.shape[1] * math.log(2 * math.pi)


def _matrix_and_vector(rows: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Split rows (N, d² + d) into matrices (N, d, d) and vectors (N, d)."""
    return rows[:, : d * d].reshape(-1, d, d), rows[:, d * d :]


def _affine(rows: Tensor, x: Tensor) -> Tensor:
    """Vector minus matrix times x, for each row (vec of the matrix, vector): (B, d² + d) -> (B, d)."""
    matrix, vector = _matrix_and_vector(rows, x.shape[1])
    return vector - (matrix * x[:, None]).sum(-1)
