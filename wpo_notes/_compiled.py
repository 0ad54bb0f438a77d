r"""Evaluation on a CPU by compiled differences, and nothing stored in between.

Centres are taken in blocks, in which ``wpo_notes._loops`` has the formulas. Nothing cancels, however narrow the
kernels are and however far from the origin the data. With many points, centres near each other are in one block,
and blocks that cannot contribute at a point are left out there.

`wpo_notes._evaluation` says when it is used. The first call for a dimension compiles, for some seconds; Numba keeps
the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from wpo_notes._evaluation import TRUNCATION
from wpo_notes._loops import WIDTH, backward, forward, inverse_norms

__all__ = ["evaluate_by_differences", "square_norms_of_inverses"]

# Centres are put in an order, and blocks out of reach left out, if there are so many points and blocks at least.
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density (M,), score (M, d) and Laplacian ratio (M,) at the points (M, d); the last two only if `averages`.

    Of `tril` (N, d, d) the lower triangle is read. Differentiable in all tensors but `exclude`; where somebody
    differentiates the derivative, it is that of ``otherwise(points, centers, tril, log_scale)``, which returns the same.
    """
    if exclude is None:
        exclude = torch.full((len(points),), -1, device=points.device)
    return _Evaluation.apply(points, centers, tril, log_scale, exclude, averages, otherwise)


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        points, centers, tril, log_scale, exclude, averages, ctx.otherwise = inputs
        least, blocks = _WORTH_ORDERING
        ctx.ordered = len(points) >= least and len(centers) >= blocks * WIDTH
        sides = _Blocks(centers, tril, log_scale, exclude, ctx.ordered)
        d = points.shape[1]
        states = points.new_zeros(len(points), d + 3)
        states[:, 0] = -math.inf

        arrays = _arrays(points, sides.exclude, states)
        centers_ = _arrays(sides.blocks, sides.bounds)

        def work(start: int, end: int) -> None:
            x, left_out, own = (part[start:end] for part in arrays)
            forward(x, *centers_, left_out, sides.cutoff, averages, own, (0,) * d)

        _in_threads(work, len(points), len(points) * len(centers))
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
        *inputs, exclude, log_prob, score, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this pass too
            return *_differentiable(ctx, inputs, gradients), None, None, None
        points, centers, tril, log_scale = (part.detach() for part in inputs)
        sides = _Blocks(centers, tril, log_scale, exclude, ctx.ordered)
        to_log_prob, to_score, to_ratio = gradients
        shift = to_log_prob - (to_score * score).sum(1) - to_ratio * ratio
        to_blocks = torch.zeros_like(sides.blocks)
        x, left_out, *of_points = _arrays(
            points, sides.exclude, log_prob, shift, to_score, to_ratio
        )
        of_blocks = _arrays(sides.blocks, sides.bounds, to_blocks)

        def work(start: int, end: int) -> np.ndarray:
            blocks, bounds, to = (part[start:end] for part in of_blocks)
            share = np.zeros_like(x)
            own = left_out - start * WIDTH
            rest = (*of_points, share, to, (0,) * x.shape[1])
            backward(x, blocks, bounds, own, sides.cutoff, *rest)
            return share

        shares = _in_threads(work, len(sides.blocks), len(points) * len(centers))
        to_points = torch.from_numpy(sum(shares))
        return to_points, *sides.unpacked(to_blocks), None, None, None


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


class _Blocks:
    """Centres in blocks (B, rows * width), with bounds (B, 2 d + 2) of what each can contribute."""

    def __init__(
        self, centers: Tensor, tril: Tensor, log_scale: Tensor, exclude: Tensor, ordered: bool
    ) -> None:
        n, d = centers.shape
        self.shape = n, d
        row, column = torch.tril_indices(d, d, device=tril.device)
        self.entries = d * row + column
        packed = tril.flatten(1).index_select(1, self.entries)
        numbers = torch.cat([centers, packed, log_scale[:, None]], 1)
        self.nan = 0 * float(numbers[:, :-1].sum()) + 0 * float(
            log_scale.nan_to_num(math.nan, 0, 0).sum()
        )
        self.order = None
        self.exclude = exclude
        if ordered:
            self.order = _z_order(centers)
            numbers = numbers[self.order]
            rank = torch.empty_like(self.order)
            rank[self.order] = torch.arange(n, device=rank.device)
            self.exclude = torch.where(exclude >= 0, rank[exclude.clamp(min=0)], -1)
        missing = -n % WIDTH
        numbers = pad(numbers, (0, 0, 0, missing))
        numbers[n:, -1] = -math.inf
        numbers = numbers.unflatten(0, (-1, WIDTH))
        self.blocks = numbers.mT.flatten(1).contiguous()
        self.cutoff = self.blocks.new_tensor(math.log(n / TRUNCATION[tril.dtype])).numpy()[()]
        self.bounds = self._bounds(numbers, tril) if ordered else self._no_bounds()

    def _no_bounds(self) -> Tensor:
        bounds = self.blocks.new_zeros(len(self.blocks), 2 * self.shape[1] + 2)
        bounds[:, -2] = math.inf
        return bounds

    def _bounds(self, numbers: Tensor, tril: Tensor) -> Tensor:
        r"""Box, largest log of weight times normalisation b, and least half eigenvalue of each block.

        A centre's exponent is :math:`b_i - |L_i^T(x - Z_i)|^2 / 2 \le b_i - |x - Z_i|^2 / 2\|L_i^{-1}\|_F^2`, and
        :math:`|x - Z_i|` at least the distance of x to the box of the block's centres. A block whose bound lies
        below l + log(ε / N), for an exponent l that was found at x, contributes less than the share ε of the density,
        even together with all others that are left out for that reason.
        """
        n, d = self.shape
        least = 0.5 / square_norms_of_inverses(tril)[self.order]
        least = pad(least, (0, -n % WIDTH), value=math.inf)
        real = (numbers[..., -1] > -math.inf)[..., None]
        box = [
            numbers[..., :d].where(real, math.inf).amin(1),
            numbers[..., :d].where(real, -math.inf).amax(1),
        ]
        most = numbers[..., -1].amax(1, keepdim=True)
        return torch.cat([*box, most, least.unflatten(0, (-1, WIDTH)).amin(1, keepdim=True)], 1)

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of blocks, as they are packed, by centre: centres, factors, and logs of scales."""
        n, d = self.shape
        numbers = blocks.unflatten(1, (-1, WIDTH)).mT.flatten(0, 1)[:n]
        if self.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(0, self.order, numbers)
        tril = numbers.new_zeros(n, d * d).index_copy_(1, self.entries, numbers[:, d:-1])
        return numbers[:, :d], tril.unflatten(1, (d, d)), numbers[:, -1]


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
