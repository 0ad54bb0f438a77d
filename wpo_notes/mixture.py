r"""Gaussian mixtures with local precision matrices: eqs. (25), (26), (29) and (31).

Chapter: *The kernel model solves the HJB equation* (``book/kernel-model.md``).

They are evaluated as softmax attention over lifted points (eq. (34)); ``wpo_notes._evaluation`` says how,
and how exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    constraints,
    kl_divergence,
    register_kl,
)

from wpo_notes._checks import (
    checked_finite,
    checked_floating,
    checked_points,
    checked_positive,
    make_generator,
)
from wpo_notes._evaluation import Parameters, evaluate, exponents
from wpo_notes._shapes import Float, Int

if TYPE_CHECKING:
    from wpo_notes.diffusion import Denoiser

__all__ = ["Evaluation", "ExpandedMixture", "GaussianMixture", "kl_monte_carlo"]

# Least number of draws in an estimate of a Kullback-Leibler divergence.
_KL_DRAWS = 10_000


class Evaluation(NamedTuple):
    """What `GaussianMixture.evaluate` returns at points (..., d)."""

    log_prob: Float[Tensor, "*batch"]  #: log-density, eq. (25), in nats
    score: Float[Tensor, "*batch d"]  #: its gradient, eq. (29), in 1 / units
    laplacian_ratio: Float[Tensor, "*batch"]  #: Laplacian over density, eq. (31), in 1 / units²
    responsibilities: Float[Tensor, "*batch N"]  #: posterior probability of each component


class GaussianMixture(Distribution):
    r"""Gaussian mixture given by its centres and the Cholesky factors of its precisions, eq. (25).

    .. math:: \pi(x) = \sum_{i=1}^N w_i \frac{\sqrt{\det\Gamma_i}}{(2\pi)^{d/2}}
              \exp\bigl(-\tfrac12 (x - Z_i)^\top \Gamma_i (x - Z_i)\bigr), \qquad
              \Gamma_i = L_i L_i^\top .

    The paper prints :math:`\det\Gamma_i`; with it the mass is not one and Proposition 4.1 fails
    (see the errata). Everything is differentiable in x and in the parameters.

    As a ``torch.distributions.Distribution`` it has batch shape () and event shape (d,): it can be expanded,
    transformed, and is a member of ``kl_divergence``, which is a Monte Carlo estimate (see `kl_monte_carlo`).

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

    Examples:
        Noise of variance 1.5 on kernels of variance 0.5, whose centres have variance 4.

        >>> import torch
        >>> from wpo_notes.mixture import GaussianMixture
        >>> mixture = GaussianMixture.from_variance(torch.tensor([[-2.0], [2.0]]), 0.5)
        >>> round(float(mixture.diffuse(1.5).variance), 4)
        6.0
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "centers": constraints.independent(constraints.real, 2),
        "precision_tril": constraints.independent(constraints.lower_cholesky, 1),
        "log_weights": constraints.real_vector,
    }
    support = constraints.real_vector

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
        self._start(validate_args)
        if self._validate_args:
            checked_finite("centers", centers)
            _check_tril(precision_tril)
            checked_finite("log_weights", log_weights)

    def _start(self, validate_args: bool | None) -> None:
        """Initialise the base class without its checks: ours have messages that say what to do."""
        Distribution.__init__(self, torch.Size(), self.centers.shape[-1:], validate_args=False)
        default = Distribution._validate_args
        self._validate_args = default if validate_args is None else validate_args

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
            first = int(info.nonzero()[0])
            smallest = float(torch.linalg.eigvalsh(covariance[first].detach())[0])
            raise ValueError(
                f"covariance must be positive definite, but covariance[{first}] has smallest "
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
        (exponents,) = self._exponents(self._checked(x))
        return exponents.softmax(-1)

    def evaluate(self, x: Float[Tensor, "*batch d"]) -> Evaluation:
        """Log-density, score, Laplacian ratio and responsibilities at x, (..., d), from one pass over the centres.

        The responsibilities are N numbers for each point. Without them the other methods need less memory, and less
        time where most centres are too far away to count.
        """
        x = self._checked(x)
        exponents, score, ratio = self._exponents(x, score=True, laplacian=True)
        return Evaluation(exponents.logsumexp(-1), score, ratio, exponents.softmax(-1))

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
        return self._sample(sample_shape, generator)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether `rsample` is there: unless the weights are to be differentiated."""
        return not self.log_weights.requires_grad

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape d"]:
        r"""Samples that are differentiable in the centres and factors: :math:`Z_i + L_i^{-\top}\xi`, i drawn.

        With i and ξ held fixed, the derivative of the mean of f(x) is unbiased. There is none like it in the
        weights: a sample would have to move so that mass flows from one component to another, and between
        components that lie apart, where the density p is small, its speed is of order 1 / p. The estimate would
        have a variance that grows like the exponential of the squared distance in standard deviations. For
        weights, differentiate ``(f(x) * mixture.log_prob(x)).mean()`` at ``x = mixture.sample(...)`` instead.

        Args:
            sample_shape: as in `sample`, with the same draws for the same generator.
            generator: as in `sample`.

        Raises:
            NotImplementedError: the log-weights require a gradient.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                "rsample has no derivative in log_weights, which require a gradient: detach them, or "
                "differentiate (f(x) * mixture.log_prob(x)).mean() at x = mixture.sample(...)"
            )
        return self._sample(sample_shape, generator)

    def _sample(
        self, sample_shape: Sequence[int], generator: torch.Generator | None
    ) -> Float[Tensor, "*shape d"]:
        shape = torch.Size(sample_shape)
        if shape.numel() == 0:  # which multinomial refuses
            return self.centers.new_empty(*shape, *self.event_shape)
        generator = make_generator(generator, self.centers.device)
        weights = self.log_weights.detach().exp()
        component = torch.multinomial(weights, shape.numel(), replacement=True, generator=generator)
        return self._draw(component, generator).reshape(*shape, *self.event_shape)

    def _draw(
        self, component: Int[Tensor, " n"], generator: torch.Generator
    ) -> Float[Tensor, "n d"]:
        """One point of each of the components, differentiable in their parameters."""
        noise = torch.randn(
            (len(component), *self.event_shape, 1),
            generator=generator,
            dtype=self.centers.dtype,
            device=self.centers.device,
        )
        # Cov = L^-T L^-1, so L^-T times white noise has covariance Gamma^-1.
        offset = torch.linalg.solve_triangular(self.precision_tril[component].mT, noise, upper=True)
        return self.centers[component] + offset[..., 0]

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
        (log_weights,) = self.marginal(dims)._exponents(values)
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

    def entropy(self) -> Tensor:
        """Raise an error: a mixture's entropy has no closed form.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the entropy of a mixture has no closed form: estimate it by "
            "-mixture.log_prob(mixture.sample((n,), generator=generator)).mean()"
        )

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> Distribution:
        """The same law at each place of a batch, independent of the others.

        Args:
            batch_shape: shape S of the batch; () returns the mixture itself.

        Returns:
            `ExpandedMixture` of batch shape S and event shape (d,).
        """
        batch_shape = torch.Size(batch_shape)
        return ExpandedMixture(self, batch_shape) if batch_shape else self

    def as_denoiser(self) -> Denoiser:
        r"""Exact denoiser :math:`D(x; \sigma) = x + \sigma^2\,\nabla\log\eta(x, \sigma^2)` of this law, see `wpo_notes.diffusion`."""
        from wpo_notes.diffusion import Denoiser  # which needs this module

        return Denoiser(self)

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

    def _exponents(
        self, x: Tensor, *, score: bool = False, laplacian: bool = False
    ) -> list[Tensor]:
        """Log of weight times Gaussian of each component at x, (..., d) -> (..., N), eq. (28).

        Followed, where asked for, by score and Laplacian ratio.
        """
        points = x.reshape(-1, x.shape[-1])
        found = exponents(self._parameters, points, score=score, laplacian=laplacian)
        return [part.reshape(x.shape[:-1] + part.shape[1:]) for part in found]

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


class ExpandedMixture(Distribution):
    """One mixture at each place of a batch, independent of the others: what `GaussianMixture.expand` returns.

    Args:
        base: the mixture, of event shape (d,).
        batch_shape: shape S of the batch.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # its parameters are those of the base
    support = constraints.real_vector

    def __init__(self, base: GaussianMixture, batch_shape: Sequence[int]) -> None:
        self.base = base
        super().__init__(torch.Size(batch_shape), base.event_shape, validate_args=False)

    def log_prob(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Log-density at x, whose leading shape is broadcast with S.

        Raises:
            ValueError: a leading shape that does not broadcast with S.
        """
        value = self.base.log_prob(x)
        try:
            shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"x must have shape (..., d) with a leading shape that broadcasts with the batch shape "
                f"{tuple(self.batch_shape)}, got {tuple(x.shape)}"
            ) from None
        return value.expand(shape)

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape d"]:
        """Exact samples, ``(*sample_shape, *S, d)``, all independent."""
        return self.base.sample((*sample_shape, *self.batch_shape), generator=generator)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether `rsample` is there, as for the base."""
        return self.base.has_rsample

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape d"]:
        """Differentiable samples, see `GaussianMixture.rsample`."""
        return self.base.rsample((*sample_shape, *self.batch_shape), generator=generator)

    @property
    def mean(self) -> Float[Tensor, "*batch d"]:
        """Mean, ``(*S, d)``."""
        return self.base.mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Float[Tensor, "*batch d"]:
        """Variance of each coordinate, ``(*S, d)``."""
        return self.base.variance.expand(self.batch_shape + self.event_shape)

    def entropy(self) -> Tensor:
        """Raise an error, as `GaussianMixture.entropy` does."""
        return self.base.entropy()

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> Distribution:
        """The same law on a batch of another shape, to which S can be broadcast.

        Raises:
            ValueError: a shape to which S cannot be broadcast.
        """
        batch_shape = torch.Size(batch_shape)
        # Shapes are all that matters, so the tensor that tells takes no memory.
        try:
            torch.empty((), device="meta").expand(self.batch_shape).expand(batch_shape)
        except RuntimeError:
            raise ValueError(
                f"batch_shape must be one to which {tuple(self.batch_shape)} broadcasts, "
                f"got {tuple(batch_shape)}"
            ) from None
        return ExpandedMixture(self.base, batch_shape)

    def __repr__(self) -> str:
        return f"{self.base!r} on a batch of shape {tuple(self.batch_shape)}"


# ---- Kullback-Leibler divergences -----------------------------------------------------------------


def kl_monte_carlo(p: GaussianMixture, q: Distribution) -> Tensor:
    r"""Kullback-Leibler divergence of mixtures by Monte Carlo: what ``torch.distributions.kl_divergence`` calls.

    .. math:: \mathcal D_{KL}(p \| q) &= \sum_i w_i\,\E_{p_i}[\log p - \log q] \\
              &\approx \sum_i \frac{w_i}{m} \sum_{j=1}^m \bigl(\log p - \log q\bigr)(Z_i + L_i^{-\top}\xi_{ij}), \\
              m &= \lceil 10^4 / N \rceil .

    ``kl_divergence`` takes no generator, so the ξ come from one that is seeded by 0: the same arguments give
    the same number, and the global random state is neither read nor changed. With every component drawn
    equally often the estimate is differentiable in all parameters of p and q, the weights too. Its standard
    error is at most :math:`\sqrt{N \max_i w_i}\, / 100` times the standard deviation of log p - log q
    under p; for uniform weights a hundredth of that deviation. `wpo_notes.metrics.kl_divergence` takes a
    generator and a number of draws and returns its error.

    Args:
        p: a mixture.
        q: any distribution of batch shape () with a density on the whole space. For p a ``MultivariateNormal`` or
            a ``MixtureSameFamily`` of laws that have a ``covariance_matrix``, q has to be a mixture.

    Raises:
        ValueError: a q of another event shape, or with a batch; and q's own, where draws are outside of its support.
    """
    if q.batch_shape or q.event_shape != p.event_shape:
        raise ValueError(
            f"both laws must have batch shape () and one event shape, got {tuple(p.event_shape)} and "
            f"batch shape {tuple(q.batch_shape)}, event shape {tuple(q.event_shape)}"
        )
    device, count = p.centers.device, len(p.centers)
    generator = torch.Generator(device).manual_seed(0)
    draws = -(-_KL_DRAWS // count)
    component = torch.arange(count, device=device).repeat_interleave(draws)
    x = p._draw(component, generator)
    ratio = (p.log_prob(x) - q.log_prob(x)).reshape(count, draws)
    return p.log_weights.exp() @ ratio.mean(1)


register_kl(GaussianMixture, Distribution)(kl_monte_carlo)


@register_kl(MultivariateNormal, GaussianMixture)
@register_kl(MixtureSameFamily, GaussianMixture)
def _kl_of_torch(p: MultivariateNormal | MixtureSameFamily, q: GaussianMixture) -> Tensor:
    return kl_monte_carlo(_from_torch(p), q)


@register_kl(ExpandedMixture, ExpandedMixture)
def _kl_of_batches(p: ExpandedMixture, q: ExpandedMixture) -> Tensor:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    return kl_divergence(p.base, q.base).expand(shape)


def _from_torch(law: MultivariateNormal | MixtureSameFamily) -> GaussianMixture:
    """The same law as a `GaussianMixture`."""
    if law.batch_shape:
        raise ValueError(f"both laws must have batch shape (), got {tuple(law.batch_shape)}")
    if isinstance(law, MultivariateNormal):
        return GaussianMixture.from_covariance(law.loc[None], law.covariance_matrix)
    components = law.component_distribution
    if not hasattr(components, "covariance_matrix"):
        raise NotImplementedError(
            "the divergence of a MixtureSameFamily needs components that are MultivariateNormal or "
            f"LowRankMultivariateNormal, got {type(components).__name__}"
        )
    return GaussianMixture.from_covariance(
        components.mean, components.covariance_matrix, log_weights=law.mixture_distribution.logits
    )


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
