r"""Evaluation of a Gaussian mixture: lifted about the origins of cells, or by differences.

The exponent of a Gaussian is linear in the lifted point of eq. (32),

.. math:: y_i(x) = A_i \cdot T(x) + b_i, \qquad T(x) = \bigl((x_k x_l)_{k \le l}, (x_k)_k\bigr),

so log-density, score and Laplacian are softmax attention (eq. (34)), and no tensor of shape
(points, centres, d) exists. Multiplied out like this, the quadratic form cancels in floating point:
its absolute error is about :math:`\varepsilon\, r^2\, \lambda_{\max}(\Gamma) / \sqrt d` for points within r of
the origin (the roundings of the d squares have random signs). The points are therefore grouped into cells,
each lifted about an origin of its own, until that bound is small; points that would make too many cells
are lifted in float64, and kernels too narrow for that are evaluated by differences, in float64, as are no more kernels
than dimensions. What cells do not cure is :math:`\varepsilon\,\kappa(\Gamma)`, for kernels much longer than wide: in
float32, prefer float64 where the ratio of axes exceeds a few hundred.

Kernels that narrow reach few cells: centres that cannot contribute to any point of a cell are left out there
(`_contributing` proves the bound).

On a CPU and in few dimensions ``wpo_notes._compiled`` takes differences instead, if Numba is installed: in float64
where kernels are too long for float32.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wpo_notes._attention import attend, mask

__all__ = ["TRUNCATION", "Parameters", "evaluate", "exponents", "merged"]

# Bound on the rounding error of an exponent, in nats, up to which it is multiplied out.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
# Cells are halved down to this many points, and further only if that makes few more cells: each lifts centres anew.
_SMALLEST_CELL = 128
# Share of the density at a point up to which centres may be left out, all together.
TRUNCATION = {torch.float32: 1e-12, torch.float64: 1e-24}
# Cells reach about so many times as far as the median kernel, where there are others too far away to contribute.
_REACH = 3
# Cells are evaluated one by one where no more than this share of the centres remains,
_WORTH_TRUNCATING = 0.5
# told from about so many of the cells.
_SAMPLED_CELLS = 16
# This many numbers of the centres' side, keys and values, are made at a time if there are many cells.
_KEY_ELEMENTS = 2**21
# Centres are taken in shards whose sides have about this many numbers, so that memory does not grow with them.
_SIDE_ELEMENTS = 2**24
# So many points are evaluated at a time, so that memory does not grow with them beyond the results.
_MOST_POINTS = 2**18
# Compiled differences, where they serve, are the fastest in up to so many dimensions,
_LARGEST_COMPILED = 8
# except for so many points in boxes that reach no more than so many times as far as one cell, in float32.
_MANY_POINTS, _FEW_CELLS = 1024, 4
# This many numbers of differences (points times centres times dimensions) are computed at a time.
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
        """Log of weight times normalisation of each component, (N,), in float64: in many dimensions it is large."""
        log_det = self.precision_tril.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return self.log_weights + log_det - 0.5 * self.centers.shape[1] * math.log(2 * math.pi)


def evaluate(
    parameters: Parameters,
    points: Tensor,
    *,
    score: bool = False,
    laplacian: bool = False,
    exclude: Tensor | None = None,
    parts: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """Log-density at the points (M, d) and, where asked for, score and Laplacian ratio, in that order.

    `exclude` (M,) leaves a centre out of the sum at each point, or none where it is -1; the log-density
    is then not renormalised. Instead of it, `parts` may give numbers of centres and of points that follow each other:
    points see only the centres of their part, whose weights are not renormalised either.
    """
    if parts is not None:
        return _evaluate_parts(parameters, points, score, laplacian, parts)
    if len(points) > _MOST_POINTS:
        left_out = repeat(None) if exclude is None else exclude.split(_MOST_POINTS)
        blocks = [
            evaluate(parameters, block, score=score, laplacian=laplacian, exclude=own)
            for block, own in zip(points.split(_MOST_POINTS), left_out, strict=False)
        ]
        return [torch.cat(values) for values in zip(*blocks, strict=True)]
    count, d = parameters.centers.shape
    # at least two centres a shard, so that one can be left out
    shards = min(-(-count * (d * d + 124) // _SIDE_ELEMENTS), max(1, count // 2))
    if shards == 1:
        results = _evaluate_shard(parameters, points, score, laplacian, exclude)
        return _all_to(results, points.dtype)
    several, start = [], 0
    for shard in zip(*(part.tensor_split(shards) for part in parameters), strict=True):
        own, end = None, start + len(shard[0])
        if exclude is not None:
            own = (exclude - start).where((start <= exclude) & (exclude < end), -1)
        several.append(_evaluate_shard(Parameters(*shard), points, score, laplacian, own))
        start = end
    return _all_to(merged(several), points.dtype)


def _all_to(results: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [value.to(dtype) for value in results]


def merged(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Join evaluations of parts of a mixture: log-density of the sum, means of scores and Laplacian ratios.

    The log-densities may be in float64, so that they are not rounded twice, and the rest in float32.
    """
    log_probs, *averages = (torch.stack(part) for part in zip(*results, strict=True))
    weights = log_probs.softmax(0)
    means = [
        torch.einsum("sm,sm...->m...", weights.to(average.dtype), average) for average in averages
    ]
    return [log_probs.logsumexp(0), *means]


def _evaluate_parts(
    parameters: Parameters,
    points: Tensor,
    score: bool,
    laplacian: bool,
    parts: Sequence[tuple[int, int]],
) -> list[Tensor]:
    compiled = _compiled() if _compilable(parameters, points) else None
    if compiled is not None and not _too_long(parameters, compiled):
        return _by_differences(parameters, points, score, laplacian, None, compiled, parts)

    def each(part: Parameters, own: Tensor) -> list[Tensor]:
        return evaluate(part, own, score=score, laplacian=laplacian)

    return _part_by_part(each, parameters, points, parts)


def _part_by_part(
    each: Callable[[Parameters, Tensor], list[Tensor]],
    parameters: Parameters,
    points: Tensor,
    parts: Sequence[tuple[int, int]],
) -> list[Tensor]:
    of_centers, of_points = (list(counts) for counts in zip(*parts, strict=True))
    split = zip(*(tensor.split(of_centers) for tensor in parameters), strict=True)
    results = [
        each(Parameters(*part), own)
        for part, own in zip(split, points.split(of_points), strict=True)
    ]
    return [torch.cat(values) for values in zip(*results, strict=True)]


def _evaluate_shard(
    parameters: Parameters,
    points: Tensor,
    score: bool,
    laplacian: bool,
    exclude: Tensor | None,
) -> list[Tensor]:
    """As `evaluate`, the log-density in float64: that of a sum is rounded only once, when it is complete."""
    compiled = _compiled() if _compilable(parameters, points) else None
    if compiled is not None and _too_long(parameters, compiled):
        double = parameters.to(torch.float64), points.double()
        log_prob, *means = _evaluate_shard(*double, score, laplacian, exclude)
        return [log_prob, *_all_to(means, points.dtype)]
    if compiled is None or _few_cells(parameters, points):
        return _by_cells(parameters, points, score, laplacian, exclude)
    log_prob, *means = _by_differences(parameters, points, score, laplacian, exclude, compiled)
    return [log_prob.double(), *means]


def _by_differences(
    parameters: Parameters,
    points: Tensor,
    score: bool,
    laplacian: bool,
    exclude: Tensor | None,
    compiled: Any,
    parts: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    def otherwise(points: Tensor, centers: Tensor, tril: Tensor, log_scale: Tensor) -> list[Tensor]:
        unweighted = Parameters(centers, tril, torch.zeros_like(log_scale))
        again = unweighted._replace(log_weights=log_scale - unweighted.log_scale())
        if parts is None:
            return _all_to(_by_cells(again, points, True, True, exclude), points.dtype)

        def each(part: Parameters, own: Tensor) -> list[Tensor]:
            return _all_to(_by_cells(part, own, True, True, None), points.dtype)

        return _part_by_part(each, again, points, parts)

    averages = score or laplacian
    log_scale = parameters.log_scale().to(points.dtype)
    arguments = (points, *parameters[:2], log_scale, exclude, averages, otherwise)
    log_prob, *means = compiled.evaluate_by_differences(*arguments, parts)
    return [
        log_prob,
        *(mean for mean, wanted in zip(means, (score, laplacian), strict=True) if wanted),
    ]


def _compilable(parameters: Parameters, points: Tensor) -> bool:
    """Whether these are plain tensors in memory, of one dtype and few dimensions, outside of function transforms."""
    parts = (points, *parameters)
    return (
        points.shape[1] <= _LARGEST_COMPILED
        and all(type(part) in (Tensor, torch.nn.Parameter) for part in parts)
        and points.dtype in _ROUNDING
        and all(part.dtype == points.dtype and part.device.type == "cpu" for part in parts)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


@torch.no_grad()
def _too_long(parameters: Parameters, compiled: Any) -> bool:
    """Whether differences in float32 would round exponents by more than is allowed.

    The entries of L' y are rounded by up to the unit roundoff times |L| |y|, where |y| is some multiple of |L^-1|
    wherever the kernel weighs anything: kernels much longer than wide need float64.
    """
    tril = parameters.precision_tril
    if tril.dtype == torch.float64:
        return False
    product = tril.square().sum((1, 2)) * compiled.square_norms_of_inverses(tril)
    return torch.finfo(tril.dtype).eps * math.sqrt(float(product.max())) > _ROUNDING[tril.dtype]


@torch.no_grad()
def _few_cells(parameters: Parameters, points: Tensor) -> bool:
    """Whether many points make so few cells, in float32, that matrix products are faster than differences.

    Kernels so wide reach everywhere, so that nothing is left out. With gradients, differences stay ahead.
    """
    differentiable = any(part.requires_grad for part in (points, *parameters))
    if len(points) < _MANY_POINTS or differentiable or torch.float32 not in _products(points.dtype):
        return False
    low, high = points.aminmax(dim=0)
    reach = 0.5 * float(torch.linalg.vector_norm(high - low))
    trace = float(parameters.precision_tril.square().sum((1, 2)).max())
    return reach <= _FEW_CELLS * _radius(points, points.dtype, trace)


@functools.cache
def _compiled() -> Any:
    """The compiled evaluation; None without Numba, or where it can keep nothing on disk."""
    try:
        return importlib.import_module("wpo_notes._compiled")
    except (ModuleNotFoundError, RuntimeError):
        return None


def _by_cells(
    parameters: Parameters,
    points: Tensor,
    score: bool,
    laplacian: bool,
    exclude: Tensor | None,
) -> list[Tensor]:
    """As `evaluate`, the log-density in float64."""
    sides = _Sides(parameters, score, laplacian)
    indices, results = [], []
    # Where the caller leaves a centre out, the bound of those that contribute does not hold.
    truncate = exclude is None
    for cells in _cells(points, sides, truncate=truncate):
        side = sides[cells.dtype, cells.lifted]
        parts = side.parts(cells, points if truncate else None)
        # Autograd would keep the centres' side of all cells: recompute it when there are many.
        recompute = torch.is_grad_enabled() and len(cells.index) > side.chunk
        for part, kept in parts:
            excluded = None if exclude is None else exclude[part.index]
            arguments = (points[part.index].to(part.dtype), part.origin, excluded, kept)
            indices.append(part.index)
            log_prob, *means = (
                checkpoint(side, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else side(*arguments)
            )
            results.append([sides.with_level(log_prob), *_all_to(means, points.dtype)])
    return [
        _restored(indices, [value.flatten(0, 1) for value in values], len(points))
        for values in zip(*results, strict=True)
    ]


def exponents(
    parameters: Parameters, points: Tensor, *, score: bool = False, laplacian: bool = False
) -> list[Tensor]:
    """Log of weight times Gaussian for each point and centre, (M, N), eq. (28).

    Followed, where asked for, by the score and the Laplacian ratio, of the same exponents.
    """
    sides = _Sides(parameters, score, laplacian)
    indices, results = [], []
    for cells in _cells(points, sides, truncate=False):
        side = sides[cells.dtype, cells.lifted]
        for part in cells.chunks(1):
            local = points[part.index[0]].to(part.dtype)
            indices.append(part.index)
            exponents, *means = side.exponents(local, part.origin[0])
            results.append(_all_to([sides.with_level(exponents), *means], points.dtype))
    return [_restored(indices, list(values), len(points)) for values in zip(*results, strict=True)]


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


def _cells(points: Tensor, sides: _Sides, *, truncate: bool) -> list[_Cells]:
    """Group points into cells small enough for the lifted form's rounding error, and for few centres to contribute.

    Each precision in turn takes the cells that are small enough for it, and the next one the rest; what
    remains is for differences.
    """
    rest = torch.arange(len(points), device=points.device)
    points = points.detach()
    if sides.few:
        return [_Cells(rest[None], sides.parameters.centers[:1].detach(), torch.float64, False)]
    if len(points) <= 1:
        # The sum is the point itself, or zero if there is none (and it works inside vmap).
        return [_Cells(rest[None], points.sum(0, keepdim=True).double(), torch.float64, True)]
    found, norm, reach = [], None, math.inf
    for dtype in _products(points.dtype):
        if _too_coarse(points, dtype, sides):
            continue
        side = sides[dtype, True]
        if norm is None:
            norm = side.norm()
            reach = _worthwhile_reach(points, side) if truncate else math.inf
        radius = _radius(points, dtype, norm)
        groups, left = _small_cells(points, rest[None], radius, reach)
        if reach < math.inf and not _few_contribute(points, groups, side):
            reach = math.inf  # cells as small as that would only lift all centres again and again
            groups, left = _small_cells(points, rest[None], radius, reach)
        found += [_Cells(index, origin, dtype, True) for index, origin in groups]
        if not len(left):
            return found
        rest = left.unique()  # the next precision may do with fewer and larger cells
    return [*found, _Cells(rest[None], points[rest[:1]], torch.float64, False)]


def _few_contribute(points: Tensor, groups: list[tuple[Tensor, Tensor]], side: _Lifted) -> bool:
    """Whether so few centres contribute to cells that these are worth evaluating one by one, told from some of them."""
    shares = []
    for index, origin in groups:
        some = slice(None, None, -(-len(index) // _SAMPLED_CELLS))
        local, about = (
            points[index[some]].to(side.centers.dtype),
            origin[some].to(side.centers.dtype),
        )
        shares.append(side._contributing(local, about).double().mean() * index.numel())
    total = sum(index.numel() for index, _ in groups)
    return not groups or float(sum(shares)) <= _WORTH_TRUNCATING * total


def _worthwhile_reach(points: Tensor, side: _Lifted) -> float:
    """Reach of cells that few centres contribute to; infinite where all points are about as close to each other."""
    if len(points) <= _SMALLEST_CELL:
        return math.inf
    width = float(side.least_eigenvalue.median()) ** -0.5
    reach = _REACH * width
    # where a Gaussian's density is below the share that counts of that at its typical point, |x|^2 / width^2 = d
    cutoff = math.sqrt(points.shape[1] - 2 * math.log(TRUNCATION[points.dtype]))
    middle = 0.5 * (points.amax(0) + points.amin(0))
    extent = float(torch.linalg.vector_norm(points - middle, dim=1).max())
    return reach if extent > reach + width * cutoff else math.inf


def _too_coarse(points: Tensor, dtype: torch.dtype, sides: _Sides) -> bool:
    """Whether float32 is surely not enough for points that make only one cell, told without a matrix product."""
    if dtype == torch.float64 or len(points) > _SMALLEST_CELL:
        return False
    radius = _radius(points, dtype, sides.mean_eigenvalue())
    everything = torch.arange(len(points), device=points.device)[None]
    found, _ = _small_cells(points, everything, radius, math.inf)
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
    points: Tensor, index: Tensor, radius: float, reach: float
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Halve cells (C, m), each across its longest side, until they reach no further than a radius.

    They are halved on until they reach no further than `reach` as long as they have points enough. Returns
    groups of cells of equal size, the points' indices (C, m) and the origins (C, d), and the cells that still
    reach further than the radius when there would be too many of them.
    """
    found: list[tuple[Tensor, Tensor]] = []
    most = 4 * len(points) // _SMALLEST_CELL
    while True:
        local = points[index]
        low, high = local.aminmax(dim=1)
        extent = high - low
        origin = low + 0.5 * extent
        distance = torch.linalg.vector_norm(local - origin[:, None], dim=2).amax(1)
        count = index.shape[1]
        # so that NaN, which no cell is small enough for, is not split
        small = ~(distance > (min(radius, reach) if count > _SMALLEST_CELL else radius))
        if bool(small.any()):
            found.append((index[small], origin[small]))
        index, local, extent = index[~small], local[~small], extent[~small]
        # cells that there would be, and those that all the rest would make one by one
        cells = 2 * len(index) + sum(len(origin) for _, origin in found)
        if not len(index) or (count <= _SMALLEST_CELL and min(cells, index.numel()) > most):
            return found, index
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
        n, d = parameters.centers.shape
        # Lifting makes d (d + 3) / 2 numbers of a point; its differences are n d, and need no cells.
        self.few = n <= d
        log_scale = parameters.log_scale()
        # Left out of the exponents and added to their log-sum-exp in float64, so that float32 rounds small numbers.
        self.level = log_scale.detach().amax()
        self.log_scale = log_scale - self.level

    @torch.no_grad()
    def mean_eigenvalue(self) -> float:
        """Largest mean eigenvalue of a precision, which is at most the largest eigenvalue."""
        trace = self.parameters.precision_tril.square().sum((1, 2)).max()
        return float(trace) / self.parameters.centers.shape[1]

    def __missing__(self, kind: tuple[torch.dtype, bool]) -> _Lifted | _Differences:
        dtype, lifted = kind
        form = _Lifted if lifted else _Differences
        parameters, log_scale = self.parameters.to(dtype), self.log_scale.to(dtype)
        self[kind] = form(parameters, log_scale, self.score, self.laplacian)
        return self[kind]

    def with_level(self, exponents: Tensor) -> Tensor:
        """Exponents, or their log-sum-exp, with what was left out of them."""
        return exponents.double() + self.level


class _Lifted:
    """Centres' side of the lifted form: what makes an attention layer's keys and values (Section 6.2)."""

    def __init__(
        self, parameters: Parameters, log_scale: Tensor, score: bool, laplacian: bool
    ) -> None:
        self.score, self.laplacian = score, laplacian
        self.centers, self.tril = parameters.centers, parameters.precision_tril
        self.precision = parameters.precision()
        self.log_scale = log_scale
        self.quadratic = -0.5 * _packed(self.precision)
        length = self.quadratic.shape[1] * (1 + score + laplacian)
        if laplacian:
            self.square = _packed(self.squared)
            self.trace = self.precision.diagonal(dim1=-2, dim2=-1).sum(-1)
        n, d = self.centers.shape
        self.length = length + 4 * d  # of a centre's keys and values together
        self.chunk = max(1, _KEY_ELEMENTS // (n * self.length))

    @torch.no_grad()
    def norm(self) -> float:
        """Bound on the largest eigenvalue of all precisions: the root of the largest norm of their squares."""
        return math.sqrt(float(self.squared.abs().sum(-1).max()))

    @functools.cached_property
    def squared(self) -> Tensor:
        """Squares of the precisions, (N, d, d)."""
        return self.precision @ self.precision

    @functools.cached_property
    def least_eigenvalue(self) -> Tensor:
        """Lower bound on each precision's least eigenvalue, (N,)."""
        identity = torch.eye(self.tril.shape[1], dtype=self.tril.dtype, device=self.tril.device)
        inverse = torch.linalg.solve_triangular(self.tril.detach(), identity, upper=False)
        # its Frobenius norm bounds the covariance's largest eigenvalue, far better than the trace in many dimensions
        return 1 / torch.linalg.matrix_norm(inverse.mT @ inverse)

    def parts(self, cells: _Cells, points: Tensor | None) -> Iterator[tuple[_Cells, Tensor | None]]:
        """Cells to evaluate together, and which centres contribute there, (C, K): all if None, and if points is.

        The lists of centres are filled up with -1.
        """
        if points is None or len(cells.index) == 1:
            yield from ((part, None) for part in cells.chunks(self.chunk))
            return
        for group in cells.chunks(max(1, _KEY_ELEMENTS // len(self.centers))):
            local = points[group.index].to(group.dtype)
            contributing = self._contributing(local, group.origin.to(group.dtype))
            count = contributing.sum(1)
            if int(count.sum()) > _WORTH_TRUNCATING * contributing.numel():
                yield from ((part, None) for part in group.chunks(self.chunk))
                continue
            order = count.argsort()  # cells with lists of about equal lengths together
            size = max(1, _KEY_ELEMENTS // (int(count.max()) * self.length))
            for some in order.split(size):
                part = _Cells(group.index[some], group.origin[some], group.dtype, True)
                yield part, _listed(contributing[some])

    @torch.no_grad()
    def _contributing(self, points: Tensor, origin: Tensor) -> Tensor:
        r"""Which centres to keep in each cell, (C, N), for its points (C, m, d) within r of its origin o.

        In a cell, let l be the least exponent of the centre next to o, over the points. At each point the
        density is then at least :math:`e^l`. A centre's exponent is :math:`b_i - |L_i^T(x - Z_i)|^2 / 2`, with
        :math:`b_i` the log of weight times normalisation, and :math:`|L_i^T v|^2 \ge |v|^2 / \|\Sigma_i\|_F` for the
        covariance :math:`\Sigma_i`; so by the triangle inequality it is at most
        :math:`u_i = b_i - (|o - Z_i| - r)_+^2 / 2\|\Sigma_i\|_F`. Those with
        :math:`u_i < l + \log(\epsilon / N)` are, all together, less than the share :math:`\epsilon` of the density.
        """
        reach = torch.linalg.vector_norm(points - origin[:, None], dim=2).amax(1, keepdim=True)
        distance = torch.cdist(origin, self.centers, compute_mode="donot_use_mm_for_euclid_dist")
        most = (
            self.log_scale - 0.5 * (distance - reach).clamp(min=0).square() * self.least_eigenvalue
        )
        near = distance.argmin(1)
        pulled = (points - self.centers[near][:, None]) @ self.tril[near]
        least = (self.log_scale[near] - 0.5 * pulled.square().sum(2).amax(1))[:, None]
        share = TRUNCATION[self.centers.dtype] / len(self.centers)
        return ~(most < least + math.log(share))  # NaN contributes

    def _only(self, kept: Tensor) -> _Lifted:
        """The side of some centres in each cell, (C, K, ...), where the index is not -1."""
        side = copy.copy(self)
        index = kept.clamp(min=0)
        used = ["centers", "precision", "log_scale", "quadratic"]
        for name in used + ["square", "trace"] * self.laplacian:
            part = getattr(self, name).index_select(0, index.flatten())
            setattr(side, name, part.unflatten(0, index.shape))
        # far below all others, and finite: times zero it would be NaN
        side.log_scale = side.log_scale.where(kept >= 0, -1e30)
        return side

    def _keys(self, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A and b about the origins (C, d), eq. (33), and Gamma Z there: (C, N, k), (C, N), (C, N, d)."""
        centers = self.centers - origin[:, None]
        pulled = _applied(self.precision, centers)
        bias = self.log_scale - 0.5 * (pulled * centers).sum(-1)
        return _joined(self.quadratic, pulled), bias, pulled

    def exponents(self, points: Tensor, origin: Tensor) -> list[Tensor]:
        """Log of weight times Gaussian for the points of one cell, (m, N), and averages as in `__call__`."""
        points = points - origin
        keys, bias, pulled = self._keys(origin[None])
        lifted = _lifted(points)
        exponents = torch.addmm(bias[0], lifted, keys[0].mT)
        if not (self.score or self.laplacian):
            return [exponents]
        mean = exponents.softmax(1) @ self._values(keys, pulled)[0]
        return [exponents, *self._averages(points, lifted, mean)]

    def __call__(
        self, points: Tensor, origin: Tensor, exclude: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Log-density (C, m), score and Laplacian ratio, where asked for, at points (C, m, d)."""
        if kept is not None:
            return self._only(kept)(points, origin, exclude)
        points = points - origin[:, None]
        keys, bias, pulled = self._keys(origin)
        lifted = _lifted(points)
        log_prob, mean = attend(lifted, keys, bias, self._values(keys, pulled), exclude)
        return log_prob, *self._averages(points, lifted, mean)

    def _values(self, keys: Tensor, pulled: Tensor) -> Tensor:
        """What to average for the score and the Laplacian ratio, (C, N, v), from what `_keys` returns."""
        values = [keys] if self.score else []
        if self.laplacian:
            linear = -2 * _applied(self.precision, pulled)
            constant = pulled.square().sum(-1) - self.trace
            values += [_joined(self.square, linear), constant[..., None]]
        return values[0] if len(values) == 1 else torch.cat([keys[..., :0], *values], -1)

    def _averages(self, points: Tensor, lifted: Tensor, mean: Tensor) -> list[Tensor]:
        """Score (..., m, d) and Laplacian ratio (..., m), where asked for, from the mean values."""
        results = []
        d, length = points.shape[-1], lifted.shape[-1]
        if self.score:
            # sum_i w_i Gamma_i (Z_i - x); the quadratic keys are -Gamma / 2, doubled off the diagonal
            matrix = _unpacked(mean[..., : length - d], d)
            results.append(mean[..., length - d : length] + (matrix * points[..., None, :]).sum(-1))
        if self.laplacian:
            # sum_i w_i (|Gamma_i (x - Z_i)|^2 - Tr Gamma_i), eq. (31), multiplied out in x
            results.append((lifted * mean[..., -length - 1 : -1]).sum(-1) + mean[..., -1])
        return results


def _listed(chosen: Tensor) -> Tensor:
    """Indices of the true entries of each row, filled up with -1: (C, N) -> (C, K)."""
    count = chosen.sum(1)
    row, column = chosen.nonzero(as_tuple=True)
    position = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    listed = column.new_full((len(chosen), int(count.max())), -1)
    listed[row, position] = column
    return listed


def _applied(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Products with the centres' matrices, which are (N, d, d) for all cells or (C, N, d, d): (C, N, d)."""
    if matrix.ndim == 3:  # one matrix product a centre for all cells
        return (matrix @ vectors.permute(1, 2, 0)).permute(2, 0, 1)
    return (matrix @ vectors[..., None])[..., 0]


def _joined(shared: Tensor, local: Tensor) -> Tensor:
    """Parts of keys or values, the first (N, t) for all cells or (C, N, t): (C, N, t + d)."""
    return torch.cat([shared.expand(*local.shape[:-1], -1), local], -1)


def _lifted(points: Tensor) -> Tensor:
    """T(x) of eq. (32), with each product of coordinates once: (..., d) -> (..., d (d + 1) / 2 + d)."""
    row, column = _packing(points.shape[-1], points.device)
    pairs = points.index_select(-1, row) * points.index_select(-1, column)
    return torch.cat([pairs, points], -1)


def _packing(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each entry on or above the diagonal, d (d + 1) / 2 of them."""
    row, column = torch.triu_indices(d, d, device=device)
    return row, column


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
    """The same by differences: slower where centres are many, and exact for any width."""

    chunk = 1

    def parts(self, cells: _Cells, points: Tensor | None) -> Iterator[tuple[_Cells, None]]:
        """Cells to evaluate one at a time, all with all centres."""
        return ((part, None) for part in cells.chunks(1))

    def __init__(
        self, parameters: Parameters, log_scale: Tensor, score: bool, laplacian: bool
    ) -> None:
        self.score, self.laplacian = score, laplacian
        self.centers, self.tril = parameters.centers, parameters.precision_tril
        self.log_scale = log_scale

    def exponents(self, points: Tensor, origin: Tensor) -> list[Tensor]:
        """Log of weight times Gaussian, (m, N), and averages as in `__call__`; differences need no origin."""

        def each(points: Tensor, exclude: Tensor | None) -> tuple[Tensor, ...]:
            whitened, exponents = self._exponents(points)
            return exponents, *self._averages(whitened, exponents.softmax(1))

        return self._in_blocks(each, points, None)

    def __call__(
        self, points: Tensor, origin: Tensor, exclude: Tensor | None, kept: None = None
    ) -> tuple[Tensor, ...]:
        """Log-density (1, m), score and Laplacian ratio, where asked for, at points (1, m, d)."""

        def each(points: Tensor, exclude: Tensor | None) -> tuple[Tensor, ...]:
            whitened, exponents = self._exponents(points)
            if exclude is not None:
                exponents = exponents + mask(exclude, exponents)
            log_prob = torch.logsumexp(exponents, 1)
            weights = (exponents - log_prob[:, None]).exp()
            return log_prob, *self._averages(whitened, weights)

        left_out = None if exclude is None else exclude[0]
        return tuple(part[None] for part in self._in_blocks(each, points[0], left_out))

    def _in_blocks(
        self,
        each: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
        points: Tensor,
        exclude: Tensor | None,
    ) -> list[Tensor]:
        """What `each` returns, for few enough points at a time; if they are several, recomputed for the gradient."""
        rows = max(1, _BLOCK_ELEMENTS // self.centers.numel())
        if len(points) <= rows:
            return list(each(points, exclude))
        left_out = repeat(None) if exclude is None else exclude.split(rows)
        blocks = [
            checkpoint(each, *block, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else each(*block)
            for block in zip(points.split(rows), left_out, strict=False)
        ]
        return [torch.cat(part) for part in zip(*blocks, strict=True)]

    def _exponents(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """L_i' (x - Z_i), (N, m, d), and the log of weight times Gaussian, (m, N)."""
        whitened = (points - self.centers[:, None]) @ self.tril
        return whitened, self.log_scale - 0.5 * whitened.square().sum(2).mT

    def _averages(self, whitened: Tensor, weights: Tensor) -> list[Tensor]:
        """Score (m, d) and Laplacian ratio (m,), where asked for, with weights (m, N)."""
        results: list[Tensor] = []
        if not (self.score or self.laplacian):
            return results
        pulled = whitened @ self.tril.mT  # Gamma_i (x - Z_i)
        if self.score:
            results.append(-(weights.mT[..., None] * pulled).sum(0))
        if self.laplacian:
            trace = self.tril.square().sum((1, 2))
            results.append((weights * (pulled.square().sum(2).mT - trace)).sum(1))
        return results
