r"""Softmax attention with its log-sum-exp, as eq. (34) needs it: forward and backward, by blocks.

The scores of a query, a point lifted by eq. (32), are linear in it, and the log-sum-exp of the scores is the
log-density. Keys and values have a part that is the same in all cells (the precisions) and a part that
depends on a cell's origin. Neither pass keeps anything of shape (points, centres): the backward pass
recomputes the weights from the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Keys", "Queries", "Values", "attend", "fits_fused", "mask"]

# A row's scores are clamped this far below its maximum: exp of anything smaller comes near the
# denormals, on which matrix products are ten times slower, and weighs nothing (1e-34 in float32).
_SCORE_FLOOR = {
    dtype: 0.9 * math.log(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)
}
# This many scores are computed at a time where they are stored: they should stay in cache.
_BLOCK_ELEMENTS = 2**19
# PyTorch's fused attention is faster for queries up to this long, two matrix products beyond.
_LONGEST_FUSED = 64
# Its operators give the log-sum-exp, which no public function does, and are internal: they may go with a release.
_FUSED: Any
_FUSED_BACKWARD: Any
_FUSED, _FUSED_BACKWARD = (
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}", None)
    for name in ("", "_backward")
)


class Queries(NamedTuple):
    """Lifted points of each of C cells, T(x) of eq. (32) in its two parts."""

    quadratic: Tensor  # (C, M, t)
    linear: Tensor  # (C, M, d)


class Keys(NamedTuple):
    """A and b of eq. (33) about each cell's origin."""

    quadratic: Tensor  # (N, t), the same in all cells
    linear: Tensor  # (C, N, d)
    bias: Tensor  # (C, N)


class Values(NamedTuple):
    """What the softmax averages."""

    shared: Tensor  # (N, p), the same in all cells
    local: Tensor  # (C, N, q)


def attend(
    queries: Queries, keys: Keys, values: Values, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the scores (C, M) and softmax averages of the values, (C, M, p) and (C, M, q).

    Where `exclude` (C, M) is not -1, that key is left out for that query. Differentiable twice, in forward
    and reverse mode, in all but `exclude`.
    """
    return _Attention.apply(*queries, *keys, *values, exclude)


def fits_fused(length: int) -> bool:
    """Whether fused attention is the faster for lifted points of this length; it copies the keys for each cell."""
    return length < _LONGEST_FUSED


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        problem = _Problem(*inputs)
        return _fused(problem) if problem.fused else _by_products(problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation allows no second look
        problem, output = _Problem(*saved[:8]), saved[8:]
        # With gradients enabled, somebody differentiates this pass too.
        if problem.fused and not torch.is_grad_enabled():
            return *_fused_backward(problem, output, gradients), None
        return *_backward_by_products(problem, output, gradients), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors  # once: recomputation allows no second look
        problem, output = _Problem(*saved[:8]), saved[8:]
        return _jvp(problem, output, _Problem._make((*tangents[:7], None)))


class _Problem(NamedTuple):
    quadratic: Tensor
    linear: Tensor
    key_quadratic: Tensor
    key_linear: Tensor
    bias: Tensor
    value_shared: Tensor
    value_local: Tensor
    exclude: Tensor | None

    @property
    def fused(self) -> bool:
        cells, points, length = self.quadratic.shape
        # A single point is what vmap sees, for which the fused operation has no rule.
        return (
            _FUSED is not None
            and self.quadratic.device.type == "cpu"
            and fits_fused(length + self.linear.shape[2])
            and cells * points > 1
        )

    def rows(self, cell: int, rows: slice) -> _Problem:
        """Restrict to some points of one cell."""
        exclude = None if self.exclude is None else self.exclude[cell, rows]
        return _Problem(
            self.quadratic[cell, rows],
            self.linear[cell, rows],
            self.key_quadratic,
            self.key_linear[cell],
            self.bias[cell],
            self.value_shared,
            self.value_local[cell],
            exclude,
        )

    def blocks(self) -> list[tuple[int, slice]]:
        """Blocks of rows whose scores stay in cache, one cell at a time."""
        return [(cell, rows) for cell in range(len(self.bias)) for rows in self.slices()]

    def slices(self, cells: int = 1) -> list[slice]:
        """Rows of the points, so many that their scores in some cells make a block."""
        points, size = (
            self.quadratic.shape[1],
            max(1, _BLOCK_ELEMENTS // self.bias.shape[1] // cells),
        )
        return [slice(start, start + size) for start in range(0, max(points, 1), size)]

    def scores(self) -> Tensor:
        """Scores of a block, (m, N); -inf where a key is excluded."""
        scores = torch.addmm(self.bias, self.linear, self.key_linear.mT)
        scores = torch.addmm(scores, self.quadratic, self.key_quadratic.mT)
        return scores if self.exclude is None else scores + mask(self.exclude, scores)

    def weights(self, log_total: Tensor) -> Tensor:
        """Softmax of the scores of a block, from their log-sum-exp, (m, N)."""
        scores = self.scores() - log_total[:, None]
        weights = scores.clamp(min=_SCORE_FLOOR[scores.dtype]).exp()
        return weights if self.exclude is None else weights * (scores > -math.inf)


def mask(exclude: Tensor, like: Tensor) -> Tensor:
    """-inf at the excluded keys and 0 elsewhere: (..., N) for exclude (...) and N = like.shape[-1]."""
    mask = like.new_zeros(*exclude.shape, like.shape[-1])
    at = exclude[..., None]
    return mask.scatter_(-1, at.clamp(min=0), torch.where(at >= 0, -math.inf, 0.0).to(mask.dtype))


# ---- two matrix products, the scores of one block of points in between --------------------------------


def _by_products(problem: _Problem) -> tuple[Tensor, ...]:
    blocks = []
    for cell, rows in problem.blocks():
        block = problem.rows(cell, rows)
        scores = block.scores()
        top = scores.amax(1, keepdim=True)
        terms = (scores - top).clamp(min=_SCORE_FLOOR[scores.dtype]).exp_()
        if block.exclude is not None:
            terms = terms * (scores > -math.inf)  # the clamp had lifted them from zero
        total = terms.sum(1, keepdim=True)
        log_total = (top + total.log())[:, 0]
        blocks.append(
            (log_total, terms @ block.value_shared / total, terms @ block.value_local / total)
        )
    return _stacked(blocks, len(problem.bias))


def _backward_by_products(
    problem: _Problem, output: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> list[Tensor]:
    log_total, shared, local = output
    to_log_total, to_shared, to_local = gradients
    # d log_total = w . d scores, and d mean = w . ((value - mean) d scores + d value), for the weights w
    shift = to_log_total - (to_shared * shared).sum(-1) - (to_local * local).sum(-1)
    of_points, of_cells = [], []
    key_quadratic, value_shared = (
        torch.zeros_like(part) for part in (problem.key_quadratic, problem.value_shared)
    )
    for cell in range(len(problem.bias)):
        key_linear, bias, value_local = (
            torch.zeros_like(part[cell])
            for part in (problem.key_linear, problem.bias, problem.value_local)
        )
        for rows in problem.slices():
            block = problem.rows(cell, rows)
            weights = block.weights(log_total[cell, rows])
            by_shared, by_local = to_shared[cell, rows], to_local[cell, rows]
            pulled = torch.addmm(shift[cell, rows, None], by_shared, block.value_shared.mT)
            to_scores = weights * torch.addmm(pulled, by_local, block.value_local.mT)
            of_points.append((to_scores @ block.key_quadratic, to_scores @ block.key_linear))
            # products in this order, (k, m) (m, N), are twice as fast as the transposed ones
            key_quadratic = key_quadratic + (block.quadratic.mT @ to_scores).mT
            key_linear = key_linear + (block.linear.mT @ to_scores).mT
            bias = bias + to_scores.sum(0)
            value_shared = value_shared + (by_shared.mT @ weights).mT
            value_local = value_local + (by_local.mT @ weights).mT
        of_cells.append((key_linear, bias, value_local))
    quadratic, linear = _stacked(of_points, len(problem.bias))
    key_linear, bias, value_local = (torch.stack(part) for part in zip(*of_cells, strict=True))
    return [quadratic, linear, key_quadratic, key_linear, bias, value_shared, value_local]


def _jvp(problem: _Problem, output: tuple[Tensor, ...], tangent: _Problem) -> tuple[Tensor, ...]:
    blocks = []
    for cell, rows in problem.blocks():
        block, moved = problem.rows(cell, rows), tangent.rows(cell, rows)
        weights = block.weights(output[0][cell, rows])
        scores = (
            moved.linear @ block.key_linear.mT
            + block.linear @ moved.key_linear.mT
            + moved.quadratic @ block.key_quadratic.mT
            + block.quadratic @ moved.key_quadratic.mT
            + moved.bias
        )
        log_total = (weights * scores).sum(1, keepdim=True)
        weights_moved = weights * (scores - log_total)
        blocks.append(
            (
                log_total[:, 0],
                weights_moved @ block.value_shared + weights @ moved.value_shared,
                weights_moved @ block.value_local + weights @ moved.value_local,
            )
        )
    return _stacked(blocks, len(problem.bias))


def _stacked(blocks: Sequence[tuple[Tensor, ...]], cells: int) -> tuple[Tensor, ...]:
    """Join blocks of rows and give back the cells' axis: (C, M, ...)."""
    return tuple(torch.cat(part).unflatten(0, (cells, -1)) for part in zip(*blocks, strict=True))


# ---- PyTorch's fused attention for CPUs ---------------------------------------------------------------


def _fused(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _joined(problem)
    blocks = []
    for rows in _fused_slices(problem):
        mean, log_total = _FUSED(
            query[:, :, rows], key, value, attn_mask=_fused_mask(problem, rows), scale=1.0
        )
        blocks.append((log_total[:, 0], mean[:, 0]))
    log_total, mean = (torch.cat(part, 1) for part in zip(*blocks, strict=True))
    # The operation turns NaN into zero: put it back.
    nan = 0 * (problem.bias.amax(1, keepdim=True) + query[:, 0].sum(-1))
    mean = mean + nan[..., None]
    p, q = problem.value_shared.shape[1], problem.value_local.shape[2]
    return log_total + nan, mean[..., :p].clone(), mean[..., p : p + q].clone()


def _fused_backward(
    problem: _Problem, output: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> list[Tensor]:
    log_total, shared, local = output
    query, key, value = _joined(problem)
    # The operation knows no gradient of the log-sum-exp. In the column in which all values are one that gradient
    # has the same effect, if the column's average, which would be one, is given as zero.
    none = torch.zeros_like(log_total)
    mean = _padded([shared, local, none[..., None]], query.shape[-1])
    to_mean = _padded([*gradients[1:], gradients[0][..., None]], query.shape[-1])
    of_queries = []
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    for rows in _fused_slices(problem):
        of_query, part_key, part_value = _FUSED_BACKWARD(
            to_mean[:, :, rows],
            query[:, :, rows],
            key,
            value,
            mean[:, :, rows],
            log_total[:, None, rows],
            0.0,
            False,
            attn_mask=_fused_mask(problem, rows),
            scale=1.0,
        )
        of_queries.append(of_query)
        of_key += part_key
        of_value += part_value
    t, d = problem.quadratic.shape[2], problem.linear.shape[2]
    p, q = problem.value_shared.shape[1], problem.value_local.shape[2]
    of_query = torch.cat(of_queries, 2)[:, 0]
    of_key, of_value = of_key[:, 0], of_value[:, 0]
    return [
        of_query[..., :t],
        of_query[..., t : t + d],
        of_key[..., :t].sum(0),
        of_key[..., t : t + d],
        of_key[..., t + d],
        of_value[..., :p].sum(0),
        of_value[..., p : p + q],
    ]


def _fused_slices(problem: _Problem) -> list[slice]:
    """All rows at once; only a mask has to be stored."""
    return [slice(None)] if problem.exclude is None else problem.slices(len(problem.bias))


def _fused_mask(problem: _Problem, rows: slice) -> Tensor | None:
    return None if problem.exclude is None else mask(problem.exclude[:, None, rows], problem.bias)


def _joined(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one length, (C, 1, M or N, k); a query's 1 meets the bias."""
    cells, _, t = problem.quadratic.shape
    d, p, q = problem.linear.shape[2], problem.value_shared.shape[1], problem.value_local.shape[2]
    length = max(t + d, p + q) + 1
    one = problem.bias.new_ones(1, 1, 1)
    query = [problem.quadratic, problem.linear, one.expand(cells, problem.quadratic.shape[1], 1)]
    key = [problem.key_quadratic.expand(cells, -1, -1), problem.key_linear, problem.bias[..., None]]
    value = [
        problem.value_shared.expand(cells, -1, -1),
        problem.value_local,
        one.expand(*problem.bias.shape, 1),
    ]
    return _padded(query, length), _padded(key, length), _padded(value, length)


def _padded(parts: list[Tensor], length: int) -> Tensor:
    """Join along the last axis, fill up with zeros: (C, ., k) -> (C, 1, ., length)."""
    missing = length - sum(part.shape[-1] for part in parts)
    zeros = parts[0].new_zeros(1, 1, 1).expand(*parts[0].shape[:-1], missing)
    return torch.cat([*parts, zeros], -1)[:, None]
