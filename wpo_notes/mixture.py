r"""Gaussian mixtures with local precision matrices: eqs. (25), (26), (29) and (31).

Chapter: *The kernel model solves the HJB equation* (``book/kernel-model.md``).

They are evaluated as softmax attention over lifted points (eq. (34)); ``wpo_notes._evaluation`` says how,
and how exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

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

from wpo_notes._checks import (
    checked_finite,
    checked_floating,
    checked_points,
    checked_positive,
    make_generator,
)
from wpo_notes._evaluation import Parameters, evaluate, exponents

__all__ = ["GaussianMixture"]


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
        return torch.softmax(self._exponents(self._checked(x)), -1)

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
        dims, rest, values = self._checked_condition(dims, values)
        # Precision = L L', so its blocks are products of rows of L.
        free, given = self.precision_tril[:, rest], self.precision_tril[:, dims]
        tril = _lower_factor(free)
        offset = free @ (given.mT @ (values - self.centers[:, dims])[..., None])
        centers = self.centers[:, rest] - torch.cholesky_solve(offset, tril)[..., 0]
        log_weights = self.marginal(dims)._exponents(values)
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

    def _narrowest_std(self) -> float:
        """About the least standard deviation of a component along an axis of coordinates, given the later ones."""
        return 1 / float(self.precision_tril.diagonal(dim1=-2, dim2=-1).max())

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
        x = self._checked(x)
        if exclude is not None:
            exclude = self._checked_exclude(exclude, x).reshape(-1)
        points = x.reshape(-1, x.shape[-1])
        results = evaluate(
            self._parameters, points, score=score, laplacian=laplacian, exclude=exclude
        )
        return [part.reshape(x.shape[:-1] + part.shape[1:]) for part in results]

    def _exponents(self, x: Tensor) -> Tensor:
        """Log of weight times Gaussian of each component at x, (..., d) -> (..., N), eq. (28)."""
        found = exponents(self._parameters, x.reshape(-1, x.shape[-1]))
        return found.reshape(*x.shape[:-1], len(self.centers))

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.centers, self.precision_tril, self.log_weights)

    def _checked_condition(
        self, dims: Sequence[int], values: Tensor
    ) -> tuple[list[int], list[int], Tensor]:
        """Coordinates that are given, those that are free, and the given values."""
        dims = self._checked_dims(dims)
        values = self._checked(values, "values", len(dims))
        if values.ndim != 1:
            raise ValueError(
                f"values must be one point of shape ({len(dims)},), got shape {tuple(values.shape)}"
            )
        rest = [k for k in range(self.centers.shape[-1]) if k not in dims]
        if not rest:
            raise ValueError("dims must leave at least one coordinate free")
        return dims, rest, values

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
