r"""Gaussian mixtures with local precision matrices: eqs. (25), (26), (29) and (31).

Chapter: *The kernel model solves the HJB equation* (``book/kernel-model.md``).

The exponent of a Gaussian is linear in the lifted point of eq. (32),

.. math:: y_i(x) = A_i \cdot T(x) + b_i, \qquad T(x) = \bigl((x_k x_l)_{k \le l}, (x_k)_k\bigr),

so log-density, score and Laplacian are matrix products (eq. (34)), and no tensor of shape
(points, centres, d) exists. Multiplied out like this, the quadratic form cancels in floating point:
its absolute error is about :math:`\varepsilon\, r^2\, \lambda_{\max}(\Gamma)` for points within r of
the origin. The points are therefore grouped into cells, each lifted about an origin of its own, until
that bound is small; kernels too narrow for that are evaluated by differences. What neither cures is
:math:`\varepsilon\,\kappa(\Gamma)`, for kernels much longer than wide: in float32, prefer float64 where
the ratio of axes exceeds a few hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    constraints,
)
from torch.utils.checkpoint import checkpoint

from wpo_notes._checks import (
    checked_finite,
    checked_floating,
    checked_points,
    checked_positive,
    make_generator,
)

__all__ = ["GaussianMixture"]

# A row's exponents are clamped this far below its maximum: exp of anything smaller comes near the
# denormals, on which matrix products are ten times slower, and weighs nothing (1e-34 in float32).
_EXPONENT_FLOOR = {
    dtype: 0.9 * math.log(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)
}
# This many exponents (points times centres) are computed at a time: they should stay in cache.
_BLOCK_ELEMENTS = 2**20
# Autograd keeps the exponents of up to this many blocks and recomputes those of more.
_KEPT_BLOCKS = 16
# Bound on the rounding error of an exponent, in nats, that a cell may have.
_ROUNDING = {torch.float32: 3e-4, torch.float64: 1e-10}
_SMALLEST_CELL = 256


class GaussianMixture(Distribution):
    r"""Gaussian mixture given by its centres and the Cholesky factors of its precisions, eq. (25).

    .. math:: \pi(x) = \sum_{i=1}^N w_i \frac{\sqrt{\det\Gamma_i}}{(2\pi)^{d/2}}
              \exp\bigl(-\tfrac12 (x - Z_i)^\top \Gamma_i (x - Z_i)\bigr), \qquad
              \Gamma_i = L_i L_i^\top .

    The paper prints :math:`\det\Gamma_i`; with it the mass is not one and Proposition 4.1 fails
    (see the errata). Everything is differentiable in x and in the parameters.

    Args:
        centers: (N, d), the means Z_i, in the data's units.
        precision_tril: (N, d, d), lower triangular with positive diagonal, in 1 / units.
        log_weights: (N,), logarithms of positive weights, normalised here; uniform if None.
        validate_args: check parameters and arguments; None means torch's default (True).
            Turn it off inside ``torch.func.vmap``.

    Raises:
        TypeError: a tensor that is not float32 or float64, or parameters of different dtypes.
        ValueError: wrong shapes, no centre, NaN or infinite entries, a factor with entries above
            the diagonal or a diagonal that is not positive.
    """

    arg_constraints: ClassVar[dict] = {}  # checked in __init__, with messages that say what to do
    support = constraints.real_vector
    has_rsample = False

    centers: Float[Tensor, "N d"]
    precision_tril: Float[Tensor, "N d d"]
    log_weights: Float[Tensor, " N"]

    def __init__(
        self,
        centers: Tensor,
        precision_tril: Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_shapes(centers, precision_tril, "precision_tril")
        if log_weights is None:
            log_weights = centers.new_zeros(centers.shape[0])
        _check_log_weights(log_weights, centers)
        self.centers = centers
        self.precision_tril = precision_tril
        self.log_weights = log_weights - torch.logsumexp(log_weights, 0)
        super().__init__(torch.Size(), centers.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            checked_finite("centers", centers)
            _check_tril(precision_tril)
            checked_finite("log_weights", log_weights)

    @classmethod
    def from_covariance(
        cls,
        centers: Tensor,
        covariance: Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> GaussianMixture:
        """Mixture with covariances (N, d, d), or one (d, d) for all, symmetric positive definite.

        Raises:
            ValueError: a covariance that is not symmetric or not positive definite (none is repaired).
        """
        checked_floating("centers", centers)
        checked_floating("covariance", covariance)
        if covariance.ndim == 2 and centers.ndim == 2:
            covariance = covariance.expand(centers.shape[0], *covariance.shape)
        _check_shapes(centers, covariance, "covariance")
        if validate_args is not False:
            checked_finite("covariance", covariance)
            asymmetry = (covariance - covariance.mT).abs().amax((-2, -1))
            scale = covariance.abs().amax((-2, -1))
            bad = (asymmetry > 1e3 * torch.finfo(covariance.dtype).eps * scale).nonzero()[:, 0]
            if bad.numel():
                raise ValueError(
                    f"covariance must be symmetric, but covariance[{int(bad[0])}] differs from its "
                    f"transpose by {float(asymmetry[bad[0]].detach()):.3g}"
                )
        factor, info = _upper_cholesky(covariance)
        if bool((info != 0).any()):
            bad = int(info.nonzero()[0])
            smallest = float(torch.linalg.eigvalsh(covariance[bad].detach())[0])
            raise ValueError(
                f"covariance must be positive definite, but covariance[{bad}] has smallest "
                f"eigenvalue {smallest:.3g}"
            )
        return cls(
            centers,
            _invert_upper(factor).mT,
            log_weights=log_weights,
            validate_args=validate_args,
        )

    @classmethod
    def from_variance(
        cls,
        centers: Tensor,
        variance: float | Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> GaussianMixture:
        r"""Isotropic mixture: variance (a number or (N,)) times I around each centre.

        With the training points as centres and variance :math:`\beta^2\varepsilon` this is the
        empirical distribution (22) stopped early at :math:`T - \varepsilon`, eq. (23).
        """
        centers = checked_points("centers", centers, finite=False)
        variance = torch.as_tensor(variance, dtype=centers.dtype, device=centers.device)
        if variance.ndim > 1 or (variance.ndim == 1 and variance.shape != centers.shape[:1]):
            raise ValueError(
                f"variance must be a number or have shape ({centers.shape[0]},), one a centre, "
                f"got shape {tuple(variance.shape)}"
            )
        if validate_args is not False and not bool((variance > 0).all()):
            raise ValueError(
                f"variance must be positive, got {float(variance.min().detach()):.3g}: "
                "with variance 0 the mixture has no density"
            )
        identity = torch.eye(centers.shape[-1], dtype=centers.dtype, device=centers.device)
        scale = variance.rsqrt().expand(centers.shape[0])
        return cls(
            centers,
            scale[:, None, None] * identity,
            log_weights=log_weights,
            validate_args=validate_args,
        )

    # ---- densities and scores -------------------------------------------------------------

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-density at x, (..., d) -> (...), eq. (25)."""
        return self._evaluate(x)[0]

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""Score :math:`\nabla\log\pi` at x, (..., d) -> (..., d), eq. (29)."""
        return self._evaluate(x, score=True)[1]

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch d"]]:
        """Log-density and score from one pass over the centres."""
        log_prob, score = self._evaluate(x, score=True)
        return log_prob, score

    def laplacian_ratio(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""Laplacian ratio :math:`\Delta\pi / \pi` at x, eq. (31)."""
        return self._evaluate(x, laplacian=True)[1]

    def score_divergence(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""Divergence of the score, :math:`\Delta\log\pi = \Delta\pi/\pi - |\nabla\log\pi|^2`."""
        score, laplacian_ratio = self.score_and_laplacian_ratio(x)
        return laplacian_ratio - score.square().sum(-1)

    def score_and_laplacian_ratio(
        self, x: Float[Tensor, "*batch d"], *, exclude: Int[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Score and Laplacian ratio from one pass: what implicit score matching needs, eq. (30).

        Args:
            x: (..., d).
            exclude: (...), the index of a centre to leave out at each point, or -1 for none: the
                mixture without that centre, its other weights renormalised.

        Raises:
            ValueError: an index outside [-1, N), or the only centre excluded.
        """
        _, score, ratio = self._evaluate(x, score=True, laplacian=True, exclude=exclude)
        return score, ratio

    def responsibilities(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch N"]:
        """Posterior probability of each component at x, (..., d) -> (..., N): the softmax in (29)."""
        x = self._checked(x)
        (exponents,) = self._by_block(x, _exponents_block)
        return torch.softmax(exponents, -1)

    # ---- the mixture as a law ---------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape d"]:
        """Exact samples, without an SDE (Remark 4.3).

        Args:
            sample_shape: leading shape of the result.
            generator: source of randomness on the centres' device; a fresh one if None.
        """
        shape = torch.Size(sample_shape)
        generator = make_generator(generator, self.centers.device)
        n = shape.numel()
        d = self.centers.shape[-1]
        if n == 0:  # which multinomial refuses
            return self.centers.new_empty(*shape, d)
        component = torch.multinomial(
            self.log_weights.exp(), n, replacement=True, generator=generator
        )
        noise = torch.randn(
            n, d, 1, generator=generator, dtype=self.centers.dtype, device=self.centers.device
        )
        # Cov = L^-T L^-1, so L^-T times white noise has covariance Gamma^-1.
        offset = torch.linalg.solve_triangular(self.precision_tril[component].mT, noise, upper=True)
        return (self.centers[component] + offset[..., 0]).reshape(*shape, d)

    def diffuse(self, variance: float | Tensor) -> GaussianMixture:
        r"""Convolution with N(0, variance I): the heat flow of Proposition 4.1, eq. (26).

        .. math:: \Gamma_s = (\Gamma^{-1} + v I)^{-1} = L (I + v L^\top L)^{-1} L^\top,
                  \qquad v = \beta^2 s ,

        whose lower factor is :math:`L R^{-\top}` with :math:`R R^\top = I + v L^\top L`, R upper
        triangular; no precision is inverted, so variance 0 returns the mixture itself.

        Args:
            variance: v >= 0, a number or a 0-d tensor (differentiable), in the data's units squared.
        """
        if self._validate_args:
            number = variance.detach() if isinstance(variance, Tensor) else variance
            checked_positive("variance", float(number), zero=True)
        # float64, since v L'L + I loses in float32 the long axes of narrow kernels.
        tril = self.precision_tril.double()
        identity = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
        upper, _ = _upper_cholesky(identity + variance * (tril.mT @ tril))
        diffused = torch.linalg.solve_triangular(upper.mT, tril, upper=False, left=False)
        return self._like(self.centers, diffused.to(self.centers.dtype), self.log_weights)

    def marginal(self, dims: Sequence[int]) -> GaussianMixture:
        """Exact marginal law of the coordinates `dims`: sub-blocks of the covariances.

        A sub-block of a precision matrix is a conditional's precision, not a marginal's.
        """
        dims = self._checked_dims(dims)
        # Covariance = L^-T L^-1, so its sub-block is B B' for the rows `dims` of L^-T.
        rows = _invert_upper(self.precision_tril.mT)[:, dims]
        upper = _lower_factor(rows.flip(-2)).flip((-2, -1))
        return self._like(self.centers[:, dims], _invert_upper(upper).mT, self.log_weights)

    def conditional(self, dims: Sequence[int], values: Float[Tensor, " k"]) -> GaussianMixture:
        """Exact law of the other coordinates, in their order, given that x[dims] = values."""
        dims = self._checked_dims(dims)
        values = self._checked(values, "values", len(dims))
        if values.ndim != 1:
            raise ValueError(
                f"values must be one point of shape ({len(dims)},), got shape {tuple(values.shape)}"
            )
        rest = [k for k in range(self.centers.shape[-1]) if k not in dims]
        if not rest:
            raise ValueError("dims must leave at least one coordinate free")
        # Precision = L L', so its blocks are products of rows of L.
        free, given = self.precision_tril[:, rest], self.precision_tril[:, dims]
        tril = _lower_factor(free)
        offset = free @ (given.mT @ (values - self.centers[:, dims])[..., None])
        centers = self.centers[:, rest] - torch.cholesky_solve(offset, tril)[..., 0]
        (log_weights,) = self.marginal(dims)._by_block(values, _exponents_block)
        return self._like(centers, tril, log_weights)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the mixture, (d,)."""
        return self.log_weights.exp() @ self.centers

    @property
    def covariance_matrix(self) -> Float[Tensor, "d d"]:
        """Covariance of the mixture, (d, d): mean of the covariances plus covariance of the means."""
        weights = self.log_weights.exp()
        offset = self.centers - self.mean
        return torch.einsum("n,nij->ij", weights, self._covariances()) + torch.einsum(
            "n,ni,nj->ij", weights, offset, offset
        )

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Variance of each coordinate, (d,)."""
        return self.covariance_matrix.diagonal()

    def to_torch(self) -> MixtureSameFamily:
        """Return the same law as ``torch.distributions.MixtureSameFamily``."""
        components = MultivariateNormal(
            self.centers, covariance_matrix=self._covariances(), validate_args=self._validate_args
        )
        return MixtureSameFamily(
            Categorical(logits=self.log_weights), components, validate_args=self._validate_args
        )

    def __repr__(self) -> str:
        n, d = self.centers.shape
        return f"GaussianMixture({n} centres in {d} dimensions, {self.centers.dtype})"

    # ---- evaluation ---------------------------------------------------------------------------

    def _like(
        self, centers: Tensor, precision_tril: Tensor, log_weights: Tensor
    ) -> GaussianMixture:
        """Mixture whose parameters are valid by construction, with this one's validation."""
        mixture = GaussianMixture(
            centers, precision_tril, log_weights=log_weights, validate_args=False
        )
        mixture._validate_args = self._validate_args
        return mixture

    def _covariances(self) -> Tensor:
        return torch.cholesky_inverse(self.precision_tril)

    def _checked(self, x: Tensor, name: str = "x", dim: int | None = None) -> Tensor:
        x = checked_points(name, x, dim or self.centers.shape[-1], finite=self._validate_args)
        if x.dtype != self.centers.dtype:
            raise TypeError(
                f"{name} must have the mixture's dtype {self.centers.dtype}, got {x.dtype}: convert one"
            )
        return x

    def _checked_dims(self, dims: Sequence[int]) -> list[int]:
        d = self.centers.shape[-1]
        dims = [int(k) for k in dims]
        if not dims or len(set(dims)) < len(dims) or not all(0 <= k < d for k in dims):
            raise ValueError(f"dims must be distinct coordinates from 0 to {d - 1}, got {dims}")
        return dims

    def _evaluate(
        self,
        x: Tensor,
        *,
        score: bool = False,
        laplacian: bool = False,
        exclude: Tensor | None = None,
    ) -> list[Tensor]:
        """Log-density at x and, where asked for, score and Laplacian ratio, in that order."""
        return self._by_block(x, _evaluate_block, score, laplacian, exclude=exclude)

    def _by_block(
        self, x: Tensor, function: Callable, *options: bool, exclude: Tensor | None = None
    ) -> list[Tensor]:
        """Apply a function to x, cell by cell and block by block; join its results."""
        x = self._checked(x)
        points = x.reshape(-1, x.shape[-1])
        if exclude is not None:
            exclude = self._checked_exclude(exclude, x).reshape(-1)
        precision = {}  # in each dtype that a cell needs
        rows = max(1, _BLOCK_ELEMENTS // len(self.centers))
        # Autograd would keep every block's exponents: recompute them when there are many.
        recompute = torch.is_grad_enabled() and len(points) > _KEPT_BLOCKS * rows
        cells = _cells(points, self.precision_tril)
        blocks = []
        for cell in cells:
            if cell.dtype not in precision:
                tril = self.precision_tril.to(cell.dtype)
                precision[cell.dtype] = tril @ tril.mT
            side = (self._lift if cell.lifted else self._differ)(
                precision[cell.dtype], cell, *options
            )
            for index in cell.index.split(rows):
                excluded = None if exclude is None else exclude[index]
                arguments = (side, points[index].to(cell.dtype), excluded)
                blocks.append(
                    checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
                    if recompute
                    else function(*arguments)
                )
        joined = [
            (part[0] if len(part) == 1 else torch.cat(part)).to(x.dtype)
            for part in zip(*blocks, strict=True)
        ]
        if len(cells) > 1:
            order = torch.cat([cell.index for cell in cells]).argsort()
            joined = [part[order] for part in joined]
        return [part.reshape(x.shape[:-1] + part.shape[1:]) for part in joined]

    def _lift(
        self, precision: Tensor, cell: _Cell, score: bool = False, laplacian: bool = False
    ) -> _Lifted:
        """Centres' side of the lifted form about the cell's origin, eq. (33)."""
        centers = self.centers.to(cell.dtype) - cell.origin
        pulled = (precision * centers[:, None]).sum(-1)  # Gamma_i Z_i
        weight = torch.cat([-0.5 * _packed(precision), pulled], -1)
        bias = self._log_scale(cell.dtype) - 0.5 * (pulled * centers).sum(-1)
        values = []
        if score:
            values += [precision[:, *_packing(precision)], pulled]
        if laplacian:
            square = precision @ precision
            trace = precision.diagonal(dim1=-2, dim2=-1).sum(-1)
            values += [
                _packed(square),
                -2 * (precision * pulled[:, None]).sum(-1),
                (pulled.square().sum(-1) - trace)[:, None],
            ]
        value = torch.cat(values, -1) if values else None
        return _Lifted(cell.origin, weight, bias, value, score, laplacian)

    def _differ(
        self, precision: Tensor, cell: _Cell, score: bool = False, laplacian: bool = False
    ) -> _Differences:
        centers = self.centers.to(cell.dtype)
        return _Differences(centers, precision, self._log_scale(cell.dtype), score, laplacian)

    def _log_scale(self, dtype: torch.dtype) -> Tensor:
        """Log of weight times normalisation of each component, (N,)."""
        log_det = self.precision_tril.to(dtype).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.centers.shape[1] * math.log(2 * math.pi)
        return self.log_weights.to(dtype) + log_det - constant

    def _checked_exclude(self, exclude: Tensor, x: Tensor) -> Tensor:
        count = self.centers.shape[0]
        if exclude.dtype != torch.int64 or exclude.shape != x.shape[:-1]:
            raise ValueError(
                f"exclude must be an int64 tensor of shape {tuple(x.shape[:-1])}, one index a point, "
                f"got {exclude.dtype} of shape {tuple(exclude.shape)}"
            )
        if exclude.numel() and (int(exclude.min()) < -1 or int(exclude.max()) >= count):
            raise ValueError(
                f"exclude must hold indices of the {count} centres, or -1 for none, "
                f"got values from {int(exclude.min())} to {int(exclude.max())}"
            )
        if count == 1 and exclude.numel() and int(exclude.max()) == 0:
            raise ValueError("exclude must leave a centre, but the mixture has only one")
        return exclude


class _Cell(NamedTuple):
    """Points that are lifted about the same origin."""

    index: Tensor  # (m,)
    origin: Tensor  # (d,)
    dtype: torch.dtype  # float64 where float32 would lose too much
    lifted: bool  # False where the lifted form would lose too much even in float64


@torch.no_grad()
def _cells(points: Tensor, tril: Tensor) -> list[_Cell]:
    """Group points into cells small enough for the lifted form's rounding error.

    Splitting stops paying where a cell has few points, since each lifts all centres anew: there
    float32 goes over to float64, and where that is not enough, differences are taken instead.
    """
    everything = torch.arange(len(points), device=points.device)
    points = points.detach()
    if len(points) <= 1:
        # The sum is the point itself, or zero if there is none (and it works inside vmap).
        return [_Cell(everything, points.sum(0).double(), torch.float64, True)]
    precision = tril.detach() @ tril.detach().mT
    norm = float(precision.abs().sum(-1).max())
    # largest radius of a cell in the points' dtype, and in float64 for float32's tolerance
    radius, double_radius = (
        math.sqrt(_ROUNDING[points.dtype] / torch.finfo(dtype).eps / norm)
        for dtype in (points.dtype, torch.float64)
    )
    cells, waiting = [], [everything]
    while waiting:
        index = waiting.pop()
        low, high = points[index].aminmax(dim=0)
        extent = high - low
        origin, reach = low + 0.5 * extent, 0.5 * float(extent.norm())
        # "not greater", so that NaN, which no cell is small enough for, is not split
        exact = not reach > radius
        if exact or len(index) <= _SMALLEST_CELL:
            dtype = points.dtype if exact and len(index) > 1 else torch.float64
            cells.append(_Cell(index, origin, dtype, not reach > double_radius))
            continue
        order = points[index, int(extent.argmax())].argsort()
        waiting += index[order].tensor_split(2)
    return cells


class _Lifted(NamedTuple):
    """Centres' side of the lifted form: an attention layer's keys and values (Section 6.2)."""

    origin: Tensor  # (d,)
    weight: Tensor  # (N, d (d + 1) / 2 + d), A in the exponent A T(x) + b
    bias: Tensor  # (N,), b
    value: Tensor | None  # (N, v), what the softmax averages
    score: bool  # whether the values hold Gamma and Gamma Z
    laplacian: bool  # whether they hold the coefficients of |Gamma (x - Z)|^2 - Tr Gamma

    def exponents(self, points: Tensor) -> Tensor:
        """Log of weight times Gaussian for each point and centre, (M, N), eq. (28)."""
        points = points - self.origin
        return torch.addmm(self.bias, _lift_points(points), self.weight.mT)

    def averages(self, points: Tensor, terms: Tensor, total: Tensor) -> list[Tensor]:
        """Score and Laplacian ratio, where asked for; terms / total is the softmax, (M, N)."""
        if self.value is None:
            return []
        points = points - self.origin
        d = points.shape[1]
        mean = terms @ self.value / total
        results = []
        if self.score:
            # sum_i w_i Gamma_i (Z_i - x)
            packed, pulled, mean = mean.tensor_split((d * (d + 1) // 2, d * (d + 3) // 2), 1)
            results.append(pulled - (_unpacked(packed, d) * points[:, None]).sum(-1))
        if self.laplacian:
            # sum_i w_i (|Gamma_i (x - Z_i)|^2 - Tr Gamma_i), eq. (31), multiplied out in x
            lifted = torch.cat([_lift_points(points), torch.ones_like(points[:, :1])], -1)
            results.append((lifted * mean).sum(-1))
        return results


class _Differences(NamedTuple):
    """The same by differences, coordinate by coordinate: slower, and exact for any width."""

    centers: Tensor  # (N, d)
    precision: Tensor  # (N, d, d)
    log_scale: Tensor  # (N,)
    score: bool
    laplacian: bool

    def _pulled(self, points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Coordinates of x - Z_i and of Gamma_i (x - Z_i), each (M, N)."""
        coordinates = range(points.shape[1])
        offset = [points[:, k, None] - self.centers[:, k] for k in coordinates]
        pulled = [
            sum(self.precision[:, k, m] * offset[m] for m in coordinates) for k in coordinates
        ]
        return offset, pulled

    def exponents(self, points: Tensor) -> Tensor:
        pairs = zip(*self._pulled(points), strict=True)
        return self.log_scale - 0.5 * sum(offset * pulled for offset, pulled in pairs)

    def averages(self, points: Tensor, terms: Tensor, total: Tensor) -> list[Tensor]:
        weights = terms / total
        _, pulled = self._pulled(points)
        results = []
        if self.score:
            results.append(-torch.stack([(weights * part).sum(1) for part in pulled], -1))
        if self.laplacian:
            trace = self.precision.diagonal(dim1=-2, dim2=-1).sum(-1)
            square = sum(part.square() for part in pulled)
            results.append((weights * (square - trace)).sum(1))
        return results


def _exponents_block(
    side: _Lifted | _Differences, points: Tensor, exclude: Tensor | None
) -> tuple[Tensor]:
    exponents = side.exponents(points)
    if exclude is not None:
        excluded = torch.zeros_like(exponents, dtype=torch.bool).scatter_(
            1, exclude.clamp(min=0)[:, None], (exclude >= 0)[:, None]
        )
        exponents = exponents.masked_fill(excluded, -math.inf)
    return (exponents,)


def _evaluate_block(
    side: _Lifted | _Differences, points: Tensor, exclude: Tensor | None
) -> tuple[Tensor, ...]:
    """Log-density (without renormalising for `exclude`), score, Laplacian ratio."""
    (exponents,) = _exponents_block(side, points, exclude)
    top = exponents.detach().amax(1, keepdim=True)
    left_out = exponents == -math.inf if exclude is not None else None
    terms = (exponents - top).clamp(min=_EXPONENT_FLOOR[exponents.dtype]).exp()
    if left_out is not None:
        terms = terms.masked_fill(left_out, 0)  # the clamp had lifted them from zero
    total = terms.sum(1, keepdim=True)
    return (top + total.log())[:, 0], *side.averages(points, terms, total)


def _packing(like: Tensor) -> Tensor:
    """Row and column of each entry on or above the diagonal, (2, d (d + 1) / 2)."""
    d = like.shape[-1]
    return torch.triu_indices(d, d, device=like.device)


def _lift_points(points: Tensor) -> Tensor:
    """T(x) of eq. (32), each product x_k x_l once, k <= l: (M, d) -> (M, d (d + 1) / 2 + d)."""
    row, column = _packing(points)
    return torch.cat([points[:, row] * points[:, column], points], -1)


def _packed(matrix: Tensor) -> Tensor:
    """Coefficients of x' S x in the products of `_lift_points` for symmetric S: (N, d, d) -> (N, d (d + 1) / 2)."""
    row, column = _packing(matrix)
    return matrix[:, row, column] * (2 - (row == column).to(matrix.dtype))


def _unpacked(packed: Tensor, d: int) -> Tensor:
    """Symmetric matrices from their entries on or above the diagonal: (M, .) -> (M, d, d)."""
    position = torch.zeros(d, d, dtype=torch.int64, device=packed.device)
    row, column = torch.triu_indices(d, d, device=packed.device)
    position[row, column] = position[column, row] = torch.arange(len(row), device=packed.device)
    return packed[:, position]


def _upper_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R with R R' = matrix, and LAPACK's info (0 where positive definite)."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip((-2, -1)))
    return lower.flip((-2, -1)), info


def _lower_factor(rows: Tensor) -> Tensor:
    """Lower triangular T, positive diagonal, with T T' = B B' for rows B: by QR, so B is not squared."""
    upper = torch.linalg.qr(rows.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT


def _invert_upper(upper: Tensor) -> Tensor:
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)


def _check_shapes(centers: Tensor, matrices: Tensor, name: str) -> None:
    checked_floating("centers", centers)
    checked_floating(name, matrices)
    if centers.ndim != 2 or 0 in centers.shape:
        raise ValueError(
            f"centers must be a matrix (N, d), one centre a row, N and d at least 1, "
            f"got shape {tuple(centers.shape)}"
        )
    expected = (*centers.shape, centers.shape[1])
    if matrices.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected} for {centers.shape[0]} centres in "
            f"{centers.shape[1]} dimensions, got {tuple(matrices.shape)}"
        )
    if matrices.dtype != centers.dtype or matrices.device != centers.device:
        raise TypeError(
            f"{name} must have the centres' dtype and device ({centers.dtype}, {centers.device}), "
            f"got {matrices.dtype}, {matrices.device}"
        )


def _check_log_weights(log_weights: Tensor, centers: Tensor) -> None:
    checked_floating("log_weights", log_weights)
    if log_weights.shape != centers.shape[:1]:
        raise ValueError(
            f"log_weights must have shape ({centers.shape[0]},), one a centre, "
            f"got {tuple(log_weights.shape)}"
        )
    if log_weights.dtype != centers.dtype or log_weights.device != centers.device:
        raise TypeError(
            f"log_weights must have the centres' dtype and device ({centers.dtype}, "
            f"{centers.device}), got {log_weights.dtype}, {log_weights.device}"
        )


def _check_tril(tril: Tensor) -> None:
    checked_finite("precision_tril", tril)
    if tril.triu(1).any():
        bad = int(tril.triu(1).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"precision_tril must be lower triangular, but precision_tril[{bad}] has entries above "
            "its diagonal: pass torch.linalg.cholesky(precision), not its transpose"
        )
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    if not (diagonal > 0).all():
        bad = int((diagonal <= 0).any(1).nonzero()[0])
        raise ValueError(
            f"precision_tril must have a positive diagonal, but precision_tril[{bad}] has "
            f"{float(diagonal[bad].min().detach()):.3g} on it: pass torch.linalg.cholesky(precision)"
        )
