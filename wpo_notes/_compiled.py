r"""Evaluation on a CPU by compiled differences, and nothing stored for the pairs of a point and a centre.

Centres are taken in blocks, in which ``wpo_notes._loops`` has the formulas. Nothing cancels, however narrow the
kernels are and however far from the origin the data. With many points, centres near each other are in one block,
and blocks that cannot contribute at a point are left out there.

`wpo_notes._evaluation` says when it is used. The first call for a dimension compiles, for some seconds; Numba keeps
the result on disk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wpo_notes._evaluation import TRUNCATION
from wpo_notes._loops import WIDTH, backward, forward, inverse_norms

__all__ = ["evaluate_by_differences", "square_norms_of_inverses"]

# Centres of a part are put in an order, and blocks out of reach left out, if it has so many points and blocks at least.
_WORTH_ORDERING = 1024, 8
# Pairs of a point and a centre that are worth a thread.
_WORTH_A_THREAD = 2**21


def square_norms_of_inverses(tril: Tensor) -> Tensor:
    """Squared Frobenius norms of the inverses of the triangular factors (N, d, d): (N,), without gradient."""
    norms = tril.new_empty(len(tril), requires_grad=False)
    inverse_norms(tril.detach().contiguous().numpy(), norms.numpy(), (0,) * tril.shape[1])
    return norms


def evaluate_by_differences(
    points: Tensor,
    centers: Tensor,
    tril: Tensor,
    log_scale: Tensor,
    exclude: Tensor | None,
    averages: bool,
    otherwise: Callable[..., Sequence[Tensor]],
    parts: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density (M,), score (M, d) and Laplacian ratio (M,) at the points (M, d); the last two only if `averages`.

    Of `tril` (N, d, d) the lower triangle is read. Differentiable in all tensors but `exclude`; where somebody
    differentiates the derivative, it is that of ``otherwise(points, centers, tril, log_scale)``, which returns the same.
    With `parts`, numbers of centres and of points that follow each other, points see only the centres of their part;
    `exclude` is for one part.
    """
    if exclude is None:
        exclude = torch.full((len(points),), -1, device=points.device)
    if parts is None:
        parts = [(len(centers), len(points))]
    return _Evaluation.apply(points, centers, tril, log_scale, exclude, averages, otherwise, parts)


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        points, centers, tril, log_scale, exclude, averages, ctx.otherwise, parts = inputs
        ctx.sides = sides = _Blocks(centers, tril, log_scale, exclude, parts)
        d = points.shape[1]
        states = points.new_zeros(len(points), d + 3)
        states[:, 0] = -math.inf

        x, own = _arrays(points, states)

        def work(part: _Part, start: int, end: int) -> None:
            rows = slice(part.rows.start + start, part.rows.start + end)
            of_blocks = sides.blocks[part.blocks], sides.bounds[part.blocks]
            of_points = sides.exclude[rows], sides.cutoff, averages, own[rows]
            forward(x[rows], *of_blocks, *of_points, (0,) * d)

        for part in sides.parts:
            _in_threads(functools.partial(work, part), _length(part.rows), part.pairs)
        total = states[:, 1]
        # the search for the largest exponent does not see NaN
        nan = 0 * points.sum(1) + sides.nan
        log_prob = states[:, 0] + total.log() + nan
        average = states[:, 2:] / total[:, None] + nan[:, None]
        score, ratio = -average[:, :d], average[:, d]
        ctx.save_for_backward(points, centers, tril, log_scale, exclude, log_prob, score, ratio)
        return log_prob, score, ratio

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # `exclude` is saved for PyTorch's check that nobody changed it: the blocks may share its memory
        *inputs, _exclude, log_prob, score, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this pass too
            return *_differentiable(ctx, inputs, gradients), *[None] * 4
        sides = ctx.sides
        to_log_prob, to_score, to_ratio = gradients
        shift = to_log_prob - (to_score * score).sum(1) - to_ratio * ratio
        to_blocks = np.zeros_like(sides.blocks)
        x, *of_points = _arrays(inputs[0], log_prob, shift, to_score, to_ratio)
        to_points = np.zeros_like(x)

        def work(part: _Part, start: int, end: int) -> np.ndarray:
            of_blocks = slice(part.blocks.start + start, part.blocks.start + end)
            blocks, bounds, to = (
                array[of_blocks] for array in (sides.blocks, sides.bounds, to_blocks)
            )
            of_rows = (array[part.rows] for array in of_points)
            share = np.zeros_like(x[part.rows])
            own = sides.exclude[part.rows] - start * WIDTH
            rest = (*of_rows, share, to, (0,) * x.shape[1])
            backward(x[part.rows], blocks, bounds, own, sides.cutoff, *rest)
            return share

        for part in sides.parts:
            shares = _in_threads(functools.partial(work, part), _length(part.blocks), part.pairs)
            to_points[part.rows] = sum(shares)
        return torch.from_numpy(to_points), *sides.unpacked(to_blocks), *[None] * 4


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Arrays that share the tensors' memory if these are contiguous."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _differentiable(
    ctx: Any, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients with respect to the inputs as functions of these and of the outputs' gradients."""
    # views, since log_scale is itself a function of tril, which is none of our concern
    views = [part.view_as(part) for part in inputs]
    needed = ctx.needs_input_grad[: len(views)]
    found = torch.autograd.grad(
        ctx.otherwise(*views),
        [view for view, need in zip(views, needed, strict=True) if need],
        gradients,
        create_graph=True,
        materialize_grads=True,
    )
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


class _Part(NamedTuple):
    """Points, and the blocks that they see."""

    rows: slice
    blocks: slice
    pairs: int  # of a point and a centre


def _length(part: slice) -> int:
    return part.stop - part.start


class _Blocks:
    """Centres in blocks (B, rows * width), with bounds (B, 2 d + 2) of what each can contribute.

    They are kept for the backward pass, and take the memory of the parameters. In NumPy, which takes a fraction of
    PyTorch's time for a call: with few centres, calls are most of a step.
    """

    def __init__(
        self,
        centers: Tensor,
        tril: Tensor,
        log_scale: Tensor,
        exclude: Tensor,
        parts: Sequence[tuple[int, int]],
    ) -> None:
        n, d = self.shape = tuple(centers.shape)
        self.entries = _lower_entries(d)
        centers_, tril_, log_scale_, self.exclude = _arrays(centers, tril, log_scale, exclude)
        numbers = np.empty((n, d + len(self.entries) + 1), centers_.dtype)
        numbers[:, :d] = centers_
        numbers[:, d:-1] = tril_.reshape(n, d * d)[:, self.entries]
        numbers[:, -1] = log_scale_
        finite = np.isfinite(numbers[:, :-1]).all() and not np.isnan(log_scale_).any()
        self.nan = 0.0 if finite else math.nan
        ordered = self._place(parts, centers)
        # the last block of a part is filled up with centres of no weight
        slots = np.zeros((self.parts[-1].blocks.stop * WIDTH, numbers.shape[1]), numbers.dtype)
        slots[:, -1] = -math.inf
        slots[self.slot] = numbers
        blocks = slots.reshape(-1, WIDTH, numbers.shape[1])
        self.blocks = np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(len(blocks), -1)
        self.cutoff = numbers.dtype.type(math.log(n / TRUNCATION[tril.dtype]))
        self.bounds = np.zeros((len(blocks), 2 * d + 2), numbers.dtype)
        self.bounds[:, -2] = math.inf
        if ordered:
            self._bound(blocks, tril)

    def _place(self, parts: Sequence[tuple[int, int]], centers: Tensor) -> bool:
        """Give each centre a slot, so that centres of one part only share a block; whether neighbours do in some part."""
        self.parts = []
        self.slot = np.arange(self.shape[0])
        ordered = False
        least_points, least_blocks = _WORTH_ORDERING
        center = row = block = 0
        for count, points in parts:
            rows, blocks = slice(row, row + points), slice(block, block - (-count // WIDTH))
            own = slice(center, center + count)
            slots = self.slot[own]
            slots += block * WIDTH - center
            if points >= least_points and count >= least_blocks * WIDTH:
                slots[_z_order(centers[own]).numpy()] = slots.copy()
                ordered = True
            self.parts.append(_Part(rows, blocks, count * points))
            center, row, block = own.stop, rows.stop, blocks.stop
        if ordered:
            self.exclude = np.where(self.exclude >= 0, self.slot[self.exclude], -1)
        return ordered

    def _bound(self, blocks: np.ndarray, tril: Tensor) -> None:
        r"""Box, largest log of weight times normalisation b, and least half eigenvalue of each block.

        A centre's exponent is :math:`b_i - |L_i^T(x - Z_i)|^2 / 2 \le b_i - |x - Z_i|^2 / 2\|L_i^{-1}\|_F^2`, and
        :math:`|x - Z_i|` at least the distance of x to the box of the block's centres. A block whose bound lies
        below l + log(ε / N), for an exponent l that was found at x, contributes less than the share ε of the density,
        even together with all others that are left out for that reason.
        """
        d = self.shape[1]
        least = np.full(blocks.shape[0] * WIDTH, math.inf, blocks.dtype)
        least[self.slot] = 0.5 / square_norms_of_inverses(tril).numpy()
        real = blocks[..., -1:] > -math.inf
        self.bounds[:, :d] = np.where(real, blocks[..., :d], math.inf).min(1)
        self.bounds[:, d : 2 * d] = np.where(real, blocks[..., :d], -math.inf).max(1)
        self.bounds[:, -2] = blocks[..., -1].max(1)
        self.bounds[:, -1] = least.reshape(-1, WIDTH).min(1)

    def unpacked(self, blocks: np.ndarray) -> list[Tensor]:
        """Numbers of blocks, as they are packed, by centre: centres, factors, and logs of scales."""
        n, d = self.shape
        numbers = blocks.reshape(len(blocks), -1, WIDTH).swapaxes(1, 2)
        numbers = numbers.reshape(-1, numbers.shape[2])[self.slot]
        tril = np.zeros((n, d * d), numbers.dtype)
        tril[:, self.entries] = numbers[:, d:-1]
        parts = numbers[:, :d], tril.reshape(n, d, d), numbers[:, -1]
        return [torch.from_numpy(part) for part in parts]


@functools.cache
def _lower_entries(d: int) -> np.ndarray:
    """Places of the lower triangle's entries, row by row, in a matrix (d, d) that is laid flat."""
    row, column = np.tril_indices(d)
    return d * row + column


def _z_order(x: Tensor) -> Tensor:
    """Order of points (N, d) along a Z-order curve: neighbours in it are mostly near each other."""
    d = x.shape[1]
    bits = min(10, 60 // d)
    low, high = x.aminmax(dim=0)
    cell = ((x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny) * (2**bits - 1)).long()
    code = torch.zeros_like(cell[:, 0])
    for bit in range(bits - 1, -1, -1):
        for k in range(d):
            code = 2 * code + (cell[:, k] >> bit) % 2
    return code.argsort()


def _in_threads(work: Callable[[int, int], Any], count: int, pairs: int) -> list[Any]:
    """Results of work(start, end) for parts of the range, in as many threads as PyTorch uses and it is worth."""
    threads = max(1, min(torch.get_num_threads(), pairs // _WORTH_A_THREAD, count))
    if threads == 1:
        return [work(0, count)]
    edges = [count * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))
