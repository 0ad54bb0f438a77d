r"""Evaluation of a Gaussian mixture: lifted about the origins of cells, or by differences.

The exponent of a Gaussian is linear in the lifted point of eq. (32),

.. math:: y_i(x) = A_i \cdot T(x) + b_i, \qquad T(x) = \bigl((x_k x_l)_{k \le l}, (x_k)_k\bigr),

so log-density, score and Laplacian are softmax attention (eq. (34)), and no tensor of shape
(points, centres, d) exists. Multiplied out like this, the quadratic form cancels in floating point:
its absolute error is about :math:`\varepsilon\, r^2\, \lambda_{\max}(\Gamma) / \sqrt d` for points within r of
the origin (the roundings of the d squares have random signs). The points are therefore grouped into cells,
each lifted about an origin of its own, until that bound is small; those for which cells would become too
small are lifted in float64, and kernels too narrow for that are evaluated by differences. What neither cures is :math:`\varepsilon\,\kappa(\Gamma)`, for
kernels much longer than wide: in float32, prefer float64 where the ratio of axes exceeds a few hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wpo_notes._attention import Keys, Queries, Values, attend, fits_fused, mask

__all__ = ["Parameters", "evaluate", "exponents", "merged"]

# Bound on the rounding error of an exponent, in nats, up to which it is multiplied out.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
# Cells are halved down to this many points: each lifts all centres anew.
_SMALLEST_CELL = 128
# This many numbers of the centres' side, keys and values, are made at a time if there are many cells.
_KEY_ELEMENTS = 2**21
# Centres are taken in shards whose sides have about this many numbers, so that memory does not grow with them.
_SIDE_ELEMENTS = 2**24
# This many differences (points times centres) are computed at a time.
_BLOCK_ELEMENTS = 2**20


class Parameters(NamedTuple):
    """Parameters of a mixture."""

    centers: Tensor  # (N, d)
    precision_tril: Tensor  # (N, d, d)
    log_weights: Tensor  # (N,), normalised

    def to(self, dtype: torch.dtype) -> Parameters:
        """Convert all to another dtype."""
        return Parameters(*(part.to(dtype) for part in self))

    def precision(self) -> Tensor:
        """Precision matrices, (N, d, d)."""
        return self.precision_tril @ self.precision_tril.mT

    def log_scale(self) -> Tensor:
        """Log of weight times normalisation of each component, (N,)."""
        log_det = self.precision_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_weights + log_det - 0.5 * self.centers.shape[1] * math.log(2 * math.pi)


def evaluate(
    parameters: Parameters,
    points: Tensor,
    *,
    score: bool = False,
    laplacian: bool = False,
    exclude: Tensor | None = None,
) -> list[Tensor]:
    """Log-density at the points (M, d) and, where asked for, score and Laplacian ratio, in that order.

    `exclude` (M,) leaves a centre out of the sum at each point, or none where it is -1; the log-density
    is then not renormalised.
    """
    count, d = parameters.centers.shape
    # at least two centres a shard, so that one can be left out
    shards = min(-(-count * (d * d + 124) // _SIDE_ELEMENTS), max(1, count // 2))
    if shards == 1:
        return _evaluate_shard(parameters, points, score, laplacian, exclude)
    results, start = [], 0
    for shard in zip(*(part.tensor_split(shards) for part in parameters), strict=True):
        own, end = None, start + len(shard[0])
        if exclude is not None:
            own = (exclude - start).where((start <= exclude) & (exclude < end), -1)
        results.append(_evaluate_shard(Parameters(*shard), points, score, laplacian, own))
        start = end
    return merged(results)


def merged(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Join evaluations of parts of a mixture: log-density of the sum, means of scores and Laplacian ratios."""
    log_probs, *averages = (torch.stack(part) for part in zip(*results, strict=True))
    weights = log_probs.softmax(0)
    means = [torch.einsum("sm,sm...->m...", weights, average) for average in averages]
    return [log_probs.logsumexp(0), *means]


def _evaluate_shard(
    parameters: Parameters,
    points: Tensor,
    score: bool,
    laplacian: bool,
    exclude: Tensor | None,
) -> list[Tensor]:
    sides = _Sides(parameters, score, laplacian)
    indices, results = [], []
    for cells in _cells(points, sides):
        side = sides[cells.dtype, cells.lifted]
        parts = cells.chunks(side.chunk)
        # Autograd would keep the centres' side of all cells: recompute it when there are many.
        recompute = torch.is_grad_enabled() and len(parts) > 1
        for part in parts:
            excluded = None if exclude is None else exclude[part.index]
            arguments = (points[part.index].to(part.dtype), part.origin, excluded)
            indices.append(part.index)
            results.append(
                checkpoint(side, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else side(*arguments)
            )
    return [
        _restored(indices, [value.flatten(0, 1).to(points.dtype) for value in values], len(points))
        for values in zip(*results, strict=True)
    ]


def exponents(parameters: Parameters, points: Tensor) -> Tensor:
    """Log of weight times Gaussian for each point and centre, (M, N), eq. (28)."""
    sides = _Sides(parameters, score=False, laplacian=False)
    indices, results = [], []
    for cells in _cells(points, sides):
        side = sides[cells.dtype, cells.lifted]
        for part in cells.chunks(1):
            local = points[part.index[0]].to(part.dtype)
            indices.append(part.index)
            results.append(side.exponents(local, part.origin[0]).to(points.dtype))
    return _restored(indices, results, len(points))


def _restored(indices: list[Tensor], values: list[Tensor], points: int) -> Tensor:
    """Values in the order of the points, from those of cells (C, m), in which a point may occur twice."""
    if len(indices) == len(indices[0]) == 1:
        return values[0]  # a lone cell has the points in order
    order = torch.cat([index.flatten() for index in indices])
    position = order.new_empty(points)
    position[order] = torch.arange(len(order), device=order.device)
    return torch.cat(values)[position]


# ---- cells --------------------------------------------------------------------------------------


class _Cells(NamedTuple):
    """Groups of equally many points, each lifted about its own origin."""

    index: Tensor  # type: ignore[assignment]  # (C, m); hides the method of tuples
    origin: Tensor  # (C, d)
    dtype: torch.dtype  # float64 where float32 would lose too much
    lifted: bool  # False where the lifted form would lose too much even in float64

    def chunks(self, size: int) -> list[_Cells]:
        """Split into so many cells at a time."""
        return [
            _Cells(index, origin, self.dtype, self.lifted)
            for index, origin in zip(self.index.split(size), self.origin.split(size), strict=True)
        ]


def _cells(points: Tensor, sides: _Sides) -> list[_Cells]:
    """Group points into cells small enough for the lifted form's rounding error.

    Each precision in turn takes the cells that are small enough for it, and the next one the rest; what
    remains is for differences.
    """
    rest = torch.arange(len(points), device=points.device)
    points = points.detach()
    if len(points) <= 1:
        # The sum is the point itself, or zero if there is none (and it works inside vmap).
        return [_Cells(rest[None], points.sum(0, keepdim=True).double(), torch.float64, True)]
    found, norm = [], None
    for dtype in _products(points.dtype):
        if _too_coarse(points, dtype, sides):
            continue
        if norm is None:
            norm = sides[dtype, True].norm()
        groups, rest = _small_cells(points, rest, _radius(points, dtype, norm))
        found += [_Cells(index, origin, dtype, True) for index, origin in groups]
        if not len(rest):
            return found
    return [*found, _Cells(rest[None], points[rest[:1]], torch.float64, False)]


def _too_coarse(points: Tensor, dtype: torch.dtype, sides: _Sides) -> bool:
    """Whether float32 is surely not enough for points that make only one cell, told without a matrix product."""
    if dtype == torch.float64 or len(points) > _SMALLEST_CELL:
        return False
    radius = _radius(points, dtype, sides.mean_eigenvalue())
    found, _ = _small_cells(points, torch.arange(len(points), device=points.device), radius)
    return not found


def _radius(points: Tensor, dtype: torch.dtype, eigenvalue: float) -> float:
    """Reach of a cell in which products in this dtype round exponents by as much as is allowed."""
    rounding = torch.finfo(dtype).eps * eigenvalue / math.sqrt(points.shape[1])
    return math.sqrt(_ROUNDING[points.dtype] / rounding)


def _products(dtype: torch.dtype) -> list[torch.dtype]:
    """Precisions to try. With reduced matrix products (TF32, bfloat16) float32 is wrong by nats."""
    full = torch.get_float32_matmul_precision() == "highest"
    return [torch.float32, torch.float64] if dtype == torch.float32 and full else [torch.float64]


@torch.no_grad()
def _small_cells(
    points: Tensor, rest: Tensor, radius: float
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Halve cells, each across its longest side, until they reach no further than a radius.

    Returns groups of cells of equal size, the points' indices (C, m) and the origins (C, d), and the indices of
    the points whose cells would be too small.
    """
    found, index = [], rest[None]
    while True:
        local = points[index]
        low, high = local.aminmax(dim=1)
        extent = high - low
        origin = low + 0.5 * extent
        reach = torch.linalg.vector_norm(local - origin[:, None], dim=2).amax(1)
        small = ~(reach > radius)  # and so NaN, which no cell is small enough for, is not split
        if bool(small.any()):
            found.append((index[small], origin[small]))
        if bool(small.all()):
            return found, rest[:0]
        index, local, extent = index[~small], local[~small], extent[~small]
        count = index.shape[1]
        if count <= _SMALLEST_CELL:
            return found, index.unique()
        along = local.gather(2, extent.argmax(1)[:, None, None].expand(-1, count, 1))[..., 0]
        index = index.gather(1, along.argsort(1))
        if count % 2:  # equal halves: the last point is in its cell twice
            index = torch.cat([index, index[:, -1:]], 1)
        index = index.reshape(2 * len(index), -1)


# ---- the lifted form -------------------------------------------------------------------------------


class _Sides(dict[tuple[torch.dtype, bool], Any]):
    """Centres' sides of an evaluation, by dtype and whether lifted, each made when it is first asked for."""

    def __init__(self, parameters: Parameters, score: bool, laplacian: bool) -> None:
        super().__init__()
        self.parameters, self.score, self.laplacian = parameters, score, laplacian

    @torch.no_grad()
    def mean_eigenvalue(self) -> float:
        """Largest mean eigenvalue of a precision, which is at most the largest eigenvalue."""
        trace = self.parameters.precision_tril.square().sum((1, 2)).max()
        return float(trace) / self.parameters.centers.shape[1]

    def __missing__(self, kind: tuple[torch.dtype, bool]) -> _Lifted | _Differences:
        dtype, lifted = kind
        form = _Lifted if lifted else _Differences
        self[kind] = form(self.parameters.to(dtype), self.score, self.laplacian)
        return self[kind]


class _Lifted:
    """Centres' side of the lifted form: an attention layer's keys and values (Section 6.2)."""

    def __init__(self, parameters: Parameters, score: bool, laplacian: bool) -> None:
        self.score, self.laplacian = score, laplacian
        self.centers = parameters.centers
        self.precision = parameters.precision()
        self.log_scale = parameters.log_scale()
        self.key = -0.5 * _packed(self.precision)
        self.value = self.key if score else self.key[:, :0]
        if laplacian:
            self.square = self.precision @ self.precision
            self.trace = self.precision.diagonal(dim1=-2, dim2=-1).sum(-1)
            self.value = torch.cat([self.value, _packed(self.square)], 1)
        (n, d), pairs = self.centers.shape, self.key.shape[1]
        shared = pairs + self.value.shape[1] if fits_fused(pairs + d) else 0  # copied for each cell
        self.chunk = max(1, _KEY_ELEMENTS // (n * (4 * d + shared)))

    @torch.no_grad()
    def norm(self) -> float:
        """Bound on the largest eigenvalue of all precisions: the root of the largest norm of their squares."""
        square = self.square if self.laplacian else self.precision @ self.precision
        return math.sqrt(float(square.abs().sum(-1).max()))

    def keys(self, origin: Tensor) -> tuple[Keys, Tensor, Tensor]:
        """A and b about the origins (C, d), eq. (33); centres (C, N, d) and Gamma Z there."""
        centers = self.centers - origin[:, None]
        # one matrix product a centre for all cells
        pulled = (self.precision @ centers.permute(1, 2, 0)).permute(2, 0, 1)
        bias = self.log_scale - 0.5 * (pulled * centers).sum(-1)
        return Keys(self.key, pulled, bias), pulled, centers

    def exponents(self, points: Tensor, origin: Tensor) -> Tensor:
        """Log of weight times Gaussian for the points of one cell, (m, N)."""
        points = points - origin
        (quadratic, linear, bias), _, _ = self.keys(origin[None])
        exponents = torch.addmm(bias[0], points, linear[0].mT)
        return torch.addmm(exponents, _products_of_pairs(points), quadratic.mT)

    def __call__(
        self, points: Tensor, origin: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Log-density (C, m), score and Laplacian ratio, where asked for, at points (C, m, d)."""
        points = points - origin[:, None]
        pairs = _products_of_pairs(points)
        keys, pulled, _ = self.keys(origin)
        local = [pulled] if self.score else [pulled[..., :0]]
        if self.laplacian:
            linear = -2 * (self.precision @ pulled.permute(1, 2, 0)).permute(2, 0, 1)
            local += [linear, (pulled.square().sum(-1) - self.trace)[..., None]]
        values = Values(self.value, torch.cat(local, -1))
        log_prob, shared, own = attend(Queries(pairs, points), keys, values, exclude)
        results = [log_prob]
        d = points.shape[-1]
        if self.score:
            # sum_i w_i Gamma_i (Z_i - x); the quadratic keys are -Gamma / 2, doubled off the diagonal
            matrix = _unpacked(shared[..., : pairs.shape[-1]], d)
            results.append(own[..., :d] + (matrix * points[..., None, :]).sum(-1))
        if self.laplacian:
            # sum_i w_i (|Gamma_i (x - Z_i)|^2 - Tr Gamma_i), eq. (31), multiplied out in x
            square, linear, constant = (
                shared[..., -pairs.shape[-1] :],
                own[..., -d - 1 : -1],
                own[..., -1],
            )
            results.append((pairs * square).sum(-1) + (points * linear).sum(-1) + constant)
        return tuple(results)


def _packing(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each entry on or above the diagonal, d (d + 1) / 2 of them."""
    row, column = torch.triu_indices(d, d, device=device)
    return row, column


def _products_of_pairs(points: Tensor) -> Tensor:
    """Products x_k x_l, k <= l, each once: (..., d) -> (..., d (d + 1) / 2)."""
    row, column = _packing(points.shape[-1], points.device)
    return points.index_select(-1, row) * points.index_select(-1, column)


def _packed(matrix: Tensor) -> Tensor:
    """Coefficients of x' S x in the products of pairs for symmetric S: (N, d, d) -> (N, d (d + 1) / 2)."""
    d = matrix.shape[-1]
    row, column = _packing(d, matrix.device)
    # index_select on a flat axis is several times as fast as indexing with two lists
    return matrix.flatten(1).index_select(1, d * row + column) * (
        2 - (row == column).to(matrix.dtype)
    )


def _unpacked(packed: Tensor, d: int) -> Tensor:
    """Gradient's matrix, S + S' for coefficients of x' S x: (..., d (d + 1) / 2) -> (..., d, d)."""
    row, column = _packing(d, packed.device)
    position = row.new_zeros(d, d)
    position[row, column] = position[column, row] = torch.arange(len(row), device=row.device)
    factor = 1 + torch.eye(d, dtype=packed.dtype, device=packed.device)
    return packed.index_select(-1, position.flatten()).unflatten(-1, (d, d)) * factor


# ---- differences ------------------------------------------------------------------------------------


class _Differences:
    """The same by differences, coordinate by coordinate: slower, and exact for any width."""

    chunk = 1

    def __init__(self, parameters: Parameters, score: bool, laplacian: bool) -> None:
        self.score, self.laplacian = score, laplacian
        self.centers = parameters.centers
        self.precision = parameters.precision()
        self.log_scale = parameters.log_scale()

    def _pulled(self, points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Coordinates of x - Z_i and of Gamma_i (x - Z_i), each (m, N)."""
        coordinates = range(points.shape[1])
        offset = [points[:, k, None] - self.centers[:, k] for k in coordinates]
        pulled: list[Any] = [
            sum(self.precision[:, k, m] * offset[m] for m in coordinates) for k in coordinates
        ]
        return offset, pulled

    def exponents(self, points: Tensor, origin: Tensor) -> Tensor:
        """Log of weight times Gaussian, (m, N); differences need no origin."""
        pairs = zip(*self._pulled(points), strict=True)
        return self.log_scale - 0.5 * sum(offset * pulled for offset, pulled in pairs)

    def __call__(
        self, points: Tensor, origin: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Log-density (1, m), score and Laplacian ratio, where asked for, at points (1, m, d)."""
        rows = max(1, _BLOCK_ELEMENTS // len(self.centers))
        left_out = (
            [None] * len(points[0].split(rows)) if exclude is None else exclude[0].split(rows)
        )
        blocks = []
        for block in zip(points[0].split(rows), left_out, strict=True):
            blocks.append(
                checkpoint(self._block, *block, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled()
                else self._block(*block)
            )
        return tuple(torch.cat(part)[None] for part in zip(*blocks, strict=True))

    def _block(self, points: Tensor, exclude: Tensor | None) -> tuple[Tensor, ...]:
        offset, pulled = self._pulled(points)
        pairs = zip(offset, pulled, strict=True)
        exponents = self.log_scale - 0.5 * sum(one * other for one, other in pairs)
        if exclude is not None:
            exponents = exponents + mask(exclude, exponents)
        log_prob = torch.logsumexp(exponents, 1)
        weights = (exponents - log_prob[:, None]).exp()
        results = [log_prob]
        if self.score:
            results.append(-torch.stack([(weights * part).sum(1) for part in pulled], -1))
        if self.laplacian:
            trace = self.precision.diagonal(dim1=-2, dim2=-1).sum(-1)
            square: Any = sum(part.square() for part in pulled)
            results.append((weights * (square - trace)).sum(1))
        return tuple(results)
