r"""Gaussian mixtures with covariances diagonal plus low rank: eqs. (25), (26), (29), (31) in many dimensions.

.. math:: \begin{aligned}
          C_i &= \operatorname{diag}(v_i) + W_i W_i^\top , & \Gamma_i &= C_i^{-1} = D_i^{-1} - V_i V_i^\top , \\
          V_i &= D_i^{-1} W_i R_i^{-\top} , & R_i R_i^\top &= I + W_i^\top D_i^{-1} W_i ,
          \end{aligned}

by Woodbury's identity, with :math:`D_i = \operatorname{diag}(v_i)` and the r × r factor R. A kernel costs d (r + 1)
numbers and an evaluation d (r + 2) products, instead of d²; no d × d matrix of a kernel exists.

Chapter: *Many dimensions: real images* (``book/digits.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    constraints,
)
from torch.utils.checkpoint import checkpoint

from wpo_notes._checks import checked_finite, checked_floating, checked_positive, make_generator
from wpo_notes._evaluation import merged
from wpo_notes._optional import needed
from wpo_notes._shapes import Float, Int
from wpo_notes.mixture import GaussianMixture

__all__ = ["LowRankGaussianMixture", "low_rank_clusters"]

# Numbers of the kernels' side, and of the points' side, that are made at a time. A block of 36 MB is above
# glibc's largest threshold for memory of its own, which is given back; smaller blocks leave holes in the heap.
_BLOCK_ELEMENTS = 9 * 2**19


class LowRankGaussianMixture(GaussianMixture):
    r"""Gaussian mixture whose covariances are diagonal plus low rank, :math:`\operatorname{diag}(v_i) + W_i W_i^\top`.

    With rank r = 0 they are diagonal. It has the methods of `GaussianMixture`, but no `precision_tril`. Marginals,
    conditionals and the heat flow (26) are of the same kind and exact.

    Evaluation multiplies the quadratic forms out about the mean of the centres, in float64 for float32 too: an exponent's
    error is about :math:`10^{-16}\, r_x^2 / \min v` for points within :math:`r_x` of that mean. Points and kernels are
    taken by blocks; where there are several, the backward pass computes them anew.

    Args:
        centers: (N, d), the means Z_i, in the data's units.
        variance: (N, d), positive, v_i in units squared.
        factor: (N, d, r), W_i in the data's units, r >= 0.
        log_weights: (N,), logarithms of positive weights, normalised here; uniform if None.
        validate_args: check parameters and arguments; None means torch's default (True).

    Raises:
        TypeError: a tensor that is not float32 or float64, or parameters of different dtypes.
        ValueError: wrong shapes, no centre, NaN or infinite entries, a variance that is not positive.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "centers": constraints.independent(constraints.real, 2),
        "diagonal": constraints.independent(constraints.positive, 2),
        "factor": constraints.independent(constraints.real, 3),
        "log_weights": constraints.real_vector,
    }

    diagonal: Float[Tensor, "N d"]
    factor: Float[Tensor, "N d r"]

    def __init__(
        self,
        centers: Tensor,
        variance: Tensor,
        factor: Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if log_weights is None and isinstance(centers, Tensor) and centers.ndim:
            log_weights = centers.new_zeros(centers.shape[0])
        _check_shapes(centers, variance, factor, log_weights)
        assert log_weights is not None  # it would have been refused
        self.centers, self.diagonal, self.factor = centers, variance, factor
        self.log_weights = log_weights - torch.logsumexp(log_weights, 0)
        self._start(validate_args)
        if self._validate_args:
            for name, value in (
                ("centers", centers),
                ("variance", variance),
                ("factor", factor),
                ("log_weights", log_weights),
            ):
                checked_finite(name, value)
            if not bool((variance > 0).all()):
                bad = int((variance <= 0).any(1).nonzero()[0])
                raise ValueError(
                    f"variance must be positive, but variance[{bad}] has "
                    f"{float(variance[bad].min().detach()):.3g}: a kernel without width has no density"
                )

    @classmethod
    def from_variance(
        cls,
        centers: Tensor,
        variance: float | Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> LowRankGaussianMixture:
        """Mixture of rank 0 with one variance, one a coordinate (d,), or one a centre and coordinate (N, d).

        Raises:
            ValueError: a variance of another shape or not positive.
        """
        checked_floating("centers", centers)
        variance = torch.as_tensor(variance, dtype=centers.dtype, device=centers.device)
        if variance.shape not in ((), centers.shape[-1:], centers.shape):
            raise ValueError(
                f"variance must be a number or have shape {tuple(centers.shape[-1:])}, one a coordinate, or "
                f"{tuple(centers.shape)}, got shape {tuple(variance.shape)}"
            )
        return cls(
            centers,
            variance.expand(centers.shape),
            centers.new_zeros(*centers.shape, 0),
            log_weights=log_weights,
            validate_args=validate_args,
        )

    @classmethod
    def from_covariance(
        cls,
        centers: Tensor,
        covariance: Tensor,
        *,
        log_weights: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> GaussianMixture:
        """Raise an error: a covariance is not low-rank plus diagonal in general.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a LowRankGaussianMixture has no from_covariance: use GaussianMixture.from_covariance, or "
            "give variance and factor"
        )

    # ---- the mixture as a law ---------------------------------------------------------------

    def _draw(
        self, component: Int[Tensor, " n"], generator: torch.Generator
    ) -> Float[Tensor, "n d"]:
        r"""One point :math:`Z_i + \sqrt{v_i}\,\xi + W_i\zeta` of each of the components."""
        n, (_, d, r) = len(component), self.factor.shape
        about: Any = {
            "dtype": self.centers.dtype,
            "device": self.centers.device,
            "generator": generator,
        }
        x = self.centers[component] + self.diagonal[component].sqrt() * torch.randn(n, d, **about)
        inner = torch.randn(n, r, 1, **about)
        rows = max(1, _BLOCK_ELEMENTS // max(d * r, 1))
        parts = zip(component.split(rows), inner.split(rows), strict=True)
        return x + torch.cat([(self.factor[index] @ part)[..., 0] for index, part in parts])

    def diffuse(self, variance: float | Tensor) -> LowRankGaussianMixture:
        r"""Convolution with N(0, variance I), Proposition 4.1: :math:`v_i` becomes :math:`v_i + \beta^2 s`.

        Args:
            variance: :math:`\beta^2 s \ge 0`, a number or a 0-d tensor (differentiable), in the data's units squared.
        """
        if self._validate_args:
            number = variance.detach() if isinstance(variance, Tensor) else variance
            checked_positive("variance", float(number), zero=True)
        return self._like(self.centers, self.diagonal + variance, self.factor, self.log_weights)

    def marginal(self, dims: Sequence[int]) -> LowRankGaussianMixture:
        """Exact marginal law of the coordinates `dims`: their rows of centres, variances and factors."""
        dims = self._checked_dims(dims)
        return self._like(
            self.centers[:, dims], self.diagonal[:, dims], self.factor[:, dims], self.log_weights
        )

    def conditional(
        self, dims: Sequence[int], values: Float[Tensor, " k"]
    ) -> LowRankGaussianMixture:
        r"""Exact law of the other coordinates, in their order, given that x[dims] = values.

        With b the given coordinates, a the others and :math:`R R^\top = I + W_b^\top D_b^{-1} W_b`,

        .. math:: Z_{a \mid b} &= Z_a + W_a (R R^\top)^{-1} W_b^\top D_b^{-1} (x_b - Z_b), \\
                  C_{a \mid b} &= D_a + W_a (R R^\top)^{-1} W_a^\top .
        """
        dims, rest, values = self._checked_condition(dims, values)
        free, given = self.factor[:, rest].double(), self.factor[:, dims].double()
        scaled = given.mT / self.diagonal[:, None, dims].double()  # W_b' D_b^-1, (N, r, k)
        inner = _cholesky_plus_identity(scaled @ given)
        reduced = torch.linalg.solve_triangular(inner, free.mT, upper=False)  # R^-1 W_a', (N, r, a)
        offset = values.double() - self.centers[:, dims].double()
        pulled = torch.linalg.solve_triangular(inner, scaled @ offset[..., None], upper=False)
        centers = self.centers[:, rest].double() + (reduced.mT @ pulled)[..., 0]
        return self._like(
            centers.to(values.dtype),
            self.diagonal[:, rest],
            reduced.mT.to(values.dtype),
            self.marginal(dims)._exponents(values)[0],
        )

    @property
    def covariance_matrix(self) -> Float[Tensor, "d d"]:
        """Covariance of the mixture, (d, d): mean of the covariances plus covariance of the means."""
        root = (0.5 * self.log_weights).exp()
        columns = torch.cat([self.factor, (self.centers - self.mean)[..., None]], -1)
        columns = (root[:, None, None] * columns).transpose(0, 1).flatten(1)  # (d, N (r + 1))
        return columns @ columns.mT + (self.log_weights.exp() @ self.diagonal).diag()

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Variance of each coordinate, (d,)."""
        offset = self.centers - self.mean
        own = self.diagonal + self.factor.square().sum(-1) + offset.square()
        return self.log_weights.exp() @ own

    def to_torch(self) -> MixtureSameFamily:
        """Return the same law as ``torch.distributions.MixtureSameFamily``."""
        factor = self.factor
        if factor.shape[-1] == 0:  # which torch refuses
            factor = factor.new_zeros(*factor.shape[:-1], 1)
        components = LowRankMultivariateNormal(
            self.centers, factor, self.diagonal, validate_args=self._validate_args
        )
        return MixtureSameFamily(
            Categorical(logits=self.log_weights), components, validate_args=self._validate_args
        )

    def __repr__(self) -> str:
        n, d, r = self.factor.shape
        return (
            f"LowRankGaussianMixture({n} centres in {d} dimensions, rank {r}, {self.centers.dtype})"
        )

    # ---- evaluation ---------------------------------------------------------------------------

    def _narrowest_std(self) -> float:
        """Least standard deviation of the diagonal parts."""
        return float(self.diagonal.min()) ** 0.5

    def _like(  # type: ignore[override]
        self, centers: Tensor, variance: Tensor, factor: Tensor, log_weights: Tensor
    ) -> LowRankGaussianMixture:
        """Mixture whose parameters are valid by construction, with this one's validation."""
        mixture = LowRankGaussianMixture(
            centers, variance, factor, log_weights=log_weights, validate_args=False
        )
        mixture._validate_args = self._validate_args
        return mixture

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
        points = x.reshape(-1, x.shape[-1])
        if exclude is None:
            left_out = [None] * len(points.split(self._rows))
        else:
            left_out = self._checked_exclude(exclude, x).reshape(-1).split(self._rows)
        origin = self.centers.detach().double().mean(0)

        def at(points: Tensor, exclude: Tensor | None) -> tuple[Tensor, ...]:
            """Merge the blocks of kernels, each a mixture of its own."""
            arguments = points.double() - origin, exclude, score, laplacian
            results = [
                self._recomputed(_evaluate_block, *arguments, *kernels, several=blocks > 1)
                for kernels in self._blocks(origin)
            ]
            return tuple(value.to(x.dtype) for value in merged(results))

        blocks = len(self._sizes)
        parts = [
            self._recomputed(at, *part, several=len(left_out) > 1)
            for part in zip(points.split(self._rows), left_out, strict=True)
        ]
        results = [torch.cat(values) for values in zip(*parts, strict=True)]
        return [part.reshape(x.shape[:-1] + part.shape[1:]) for part in results]

    def _exponents(
        self, x: Tensor, *, score: bool = False, laplacian: bool = False
    ) -> list[Tensor]:
        """Log of weight times Gaussian of each component at x, (..., d) -> (..., N), eq. (28).

        Followed, where asked for, by score and Laplacian ratio.
        """
        origin = self.centers.detach().double().mean(0)

        def at(points: Tensor) -> list[Tensor]:
            """Merge the blocks of kernels, each a mixture of its own."""
            points, several, results = points.double() - origin, [], []
            for block in self._blocks(origin):
                kernels = _Kernels(*block)
                exponents, along = kernels.exponents(points)
                several.append(exponents)
                results.append(kernels.mixed(points, exponents, along, score, laplacian))
            return [torch.cat(several, 1), *merged(results)[1:]]

        parts = [at(points) for points in x.reshape(-1, x.shape[-1]).split(self._rows)]
        found = (torch.cat(values).to(x.dtype) for values in zip(*parts, strict=True))
        return [part.reshape(x.shape[:-1] + part.shape[1:]) for part in found]

    @property
    def _sizes(self) -> list[int]:
        """Numbers of kernels that are taken at a time."""
        n, d, r = self.factor.shape
        most = max(1, _BLOCK_ELEMENTS // (d * max(r, 1)))
        return [most] * (n // most) + [n % most] * (n % most > 0)

    @property
    def _rows(self) -> int:
        """Number of points that are taken at a time."""
        _, d, r = self.factor.shape
        return max(1, _BLOCK_ELEMENTS // max(self._sizes[0] * max(r, 1), 8 * d))

    def _blocks(self, origin: Tensor) -> Iterator[tuple[Any, ...]]:
        """Kernels by blocks, about an origin and in float64, each with the number of its first."""
        first = 0
        parameters = (self.centers, self.diagonal, self.factor, self.log_weights)
        for centers, *rest in zip(*(part.split(self._sizes) for part in parameters), strict=True):
            yield centers, *rest, origin, first
            first += len(centers)

    @staticmethod
    def _recomputed(
        function: Callable[..., Any], *arguments: Any, several: bool
    ) -> tuple[Tensor, ...]:
        """Result of the function; where there are several, computed anew in the backward pass."""
        if several and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


class _Kernels:
    """A block of kernels about an origin: their precisions by Woodbury's identity, in float64."""

    def __init__(
        self,
        centers: Tensor,
        variance: Tensor,
        factor: Tensor,
        log_weights: Tensor,
        origin: Tensor,
        first: int,
    ) -> None:
        centers, factor = centers.double() - origin, factor.double()
        d = centers.shape[1]
        self.first = first
        self.precision = 1 / variance.double()  # (n, d)
        scaled = factor.mT * self.precision[:, None]  # W' D^-1, (n, r, d)
        inner = _cholesky_plus_identity(scaled @ factor)
        self.rows = torch.linalg.solve_triangular(inner, scaled, upper=False)  # V', (n, r, d)
        log_det = 0.5 * self.precision.log().sum(1)
        log_det = log_det - inner.diagonal(dim1=-2, dim2=-1).log().sum(1)
        self.log_scale = log_weights.double() + log_det - 0.5 * d * math.log(2 * math.pi)
        self.centers = centers
        self.pulled = self.precision * centers

    def along(self, rows: Tensor, points: Tensor) -> Tensor:
        """Products of rows (n, r, d) with x - Z, (m, n, r)."""
        n, r, d = rows.shape
        at_centers = (rows @ self.centers[..., None])[..., 0]
        return (points @ rows.reshape(n * r, d).mT).unflatten(1, (n, r)) - at_centers

    def exponents(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log of weight times Gaussian, (m, n), eq. (28), and V'(x - Z), (m, n, r)."""
        along = self.along(self.rows, points)
        bias = self.log_scale - 0.5 * (self.pulled * self.centers).sum(1)
        quadratic = points.square() @ self.precision.mT
        exponents = bias - 0.5 * quadratic + points @ self.pulled.mT
        return exponents + 0.5 * along.square().sum(-1), along

    def mixed(
        self, points: Tensor, exponents: Tensor, along: Tensor, score: bool, laplacian: bool
    ) -> list[Tensor]:
        """Log-density (m,) and, where asked for, score and Laplacian ratio, from what `exponents` returns."""
        log_prob = torch.logsumexp(exponents, 1)
        weights = (exponents - log_prob[:, None]).exp()
        results = [log_prob]
        if score:
            results.append(self.score(points, weights, along))
        if laplacian:
            results.append((weights * self.laplacians(points, along)).sum(1))
        return results

    def score(self, points: Tensor, weights: Tensor, along: Tensor) -> Tensor:
        """Sum of weights (m, n) times -Gamma (x - Z), (m, d)."""
        n, r, d = self.rows.shape
        inner = (weights[..., None] * along).flatten(1) @ self.rows.reshape(n * r, d)
        return inner + weights @ self.pulled - points * (weights @ self.precision)

    def laplacians(self, points: Tensor, along: Tensor) -> Tensor:
        r"""Laplacian ratios of the kernels, (m, n): :math:`|\Gamma(x - Z)|^2 - \operatorname{Tr}\Gamma`, eq. (31).

        .. math:: |\Gamma y|^2 = |D^{-1} y|^2 - 2\, (V^\top y) \cdot (U^\top y), \qquad
                  U = D^{-1} V - \tfrac12 V V^\top V .
        """
        across = self.rows * self.precision[:, None] - 0.5 * (self.rows @ self.rows.mT) @ self.rows
        trace = self.precision.sum(1) - self.rows.square().sum((1, 2))
        square = points.square() @ self.precision.square().mT
        linear = points @ (self.precision * self.pulled).mT
        both = (along * self.along(across, points)).sum(-1)
        return square - 2 * linear + self.pulled.square().sum(1) - 2 * both - trace


def _evaluate_block(
    points: Tensor,
    exclude: Tensor | None,
    score: bool,
    laplacian: bool,
    *block: Any,
) -> tuple[Tensor, ...]:
    """Log-density of a block's part of the mixture at points (m, d), its score and Laplacian ratio."""
    kernels = _Kernels(*block)
    exponents, along = kernels.exponents(points)
    if exclude is not None:
        last = kernels.first + len(kernels.centers)
        own = torch.arange(kernels.first, last, device=points.device)
        # Not -inf: nothing else may be in this block.
        exponents = exponents.masked_fill(exclude[:, None] == own, -1e300)
    return tuple(kernels.mixed(points, exponents, along, score, laplacian))


def low_rank_clusters(
    points: Float[Tensor, "n d"], count: int, rank: int, *, generator: torch.Generator | None = None
) -> LowRankGaussianMixture:
    r"""Mixture of at most `count` normal laws of the rank, one a cluster of k-means (scikit-learn).

    With the cluster's mean, the mean squares :math:`s_k` of its :math:`n_i` points about it and
    their principal axes :math:`a_j` with variances :math:`\lambda_j`,

    .. math:: W_i = (\sqrt{\lambda_j - \bar\lambda}\; a_j)_{j \le r} , \qquad
              v_{ik} = s_k - (W_i W_i^\top)_{kk} ,

    where :math:`\bar\lambda` is the mean of the other variances (Tipping and Bishop 1999). Before, the squares are
    averaged with those of two points of the variance of all clusters, and the variances of the axes shrunk by
    :math:`n_i / (n_i + 2)`; no :math:`v_{ik}` is below a hundredth of that variance. Clusters of at most r + 1 points are
    given up and their points join the nearest others.

    Args:
        points: (n, d).
        count: number of clusters, from 1 to n.
        rank: r, from 0 to d - 1.
        generator: source of the first centres; a fresh one if None.

    Raises:
        ValueError: a count or rank outside its range, or clusters that are all too small.
    """
    n, d = points.shape
    if not 1 <= count <= n:
        raise ValueError(f"count must be from 1 to the {n} points, got {count}")
    if not 0 <= rank < d:
        raise ValueError(f"rank must be from 0 to {d - 1}, below the dimension, got {rank}")
    generator = make_generator(generator, points.device)
    seed = int(torch.randint(2**31, (), generator=generator, device=points.device))
    k_means = needed("sklearn.cluster").KMeans(count, n_init=1, max_iter=30, random_state=seed)
    found = k_means.fit(points.cpu().numpy())
    label = torch.from_numpy(found.labels_).to(points.device, torch.int64)
    centers = torch.from_numpy(found.cluster_centers_).to(points)
    large = torch.bincount(label, minlength=count) > rank + 1
    if not bool(large.any()):
        raise ValueError(
            f"a cluster must have more than rank + 1 = {rank + 1} points, but none of {count} has: ask for fewer"
        )
    if not bool(large.all()):
        centers = centers[large]
        label = torch.cdist(points, centers).argmin(1)
    clusters = [points[label == k] for k in range(len(centers))]
    centers = torch.stack([cluster.mean(0) for cluster in clusters])
    number = label.bincount(minlength=len(centers)).to(points)
    offset = points - centers[label]
    common = offset.square().mean(0)
    variances, factors = [], []
    for cluster, center in zip(clusters, centers, strict=True):
        local, share = cluster - center, len(cluster) / (len(cluster) + 2)
        square = share * local.square().mean(0) + (1 - share) * common
        _, singular, axes = torch.linalg.svd(local, full_matrices=False)
        spectrum = share * singular.square() / len(cluster)
        rest = spectrum[rank:].sum() / (d - rank)
        factor = (spectrum[:rank] - rest).clamp(min=0).sqrt() * axes[:rank].mT
        variances.append(torch.maximum(square - factor.square().sum(1), 0.01 * common))
        factors.append(factor)
    return LowRankGaussianMixture(
        centers, torch.stack(variances), torch.stack(factors), log_weights=number.log()
    )


def _cholesky_plus_identity(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of I + matrix, (N, r, r)."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Not checked, as in a training loop NaN shall reach the objective; I + A'A has a factor.
    return torch.linalg.cholesky_ex(identity + matrix)[0]


def _check_shapes(
    centers: Tensor, variance: Tensor, factor: Tensor, log_weights: Tensor | None
) -> None:
    checked_floating("centers", centers)
    if centers.ndim != 2 or 0 in centers.shape:
        raise ValueError(
            f"centers must be a matrix (N, d), one centre a row, N and d at least 1, "
            f"got shape {tuple(centers.shape)}"
        )
    n, d = centers.shape
    expected: dict[str, tuple[Any, str, tuple[int, ...]]] = {
        "variance": (variance, f"({n}, {d})", (n, d)),
        "factor": (factor, f"({n}, {d}, r)", (n, d, *factor.shape[2:3])),
        "log_weights": (log_weights, f"({n},)", (n,)),
    }
    for name, (value, text, shape) in expected.items():
        checked_floating(name, value)
        if value.shape != shape or (name == "factor" and value.ndim != 3):
            raise ValueError(
                f"{name} must have shape {text} for {n} centres in {d} dimensions, got {tuple(value.shape)}"
            )
        if value.dtype != centers.dtype or value.device != centers.device:
            raise TypeError(
                f"{name} must have the centres' dtype and device ({centers.dtype}, {centers.device}), "
                f"got {value.dtype}, {value.device}"
            )
