r"""Softmax attention with its log-sum-exp, as eq. (34) needs it: forward and backward, by blocks.

The scores of a query, a point lifted by eq. (32), are linear in it, and the log-sum-exp of the scores is the
log-density. Neither pass keeps anything of shape (points, centres): the backward pass recomputes the weights
from the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["attend", "mask"]

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


def attend(
    queries: Tensor, keys: Tensor, bias: Tensor, values: Tensor, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the scores (C, M) and softmax averages of the values (C, M, v), in each of C cells.

    The scores of the queries (C, M, k) are their products with the keys (C, N, k) plus the bias (C, N); the
    values are (C, N, v). Where `exclude` (C, M) is not -1, that key is left out for that query. Differentiable
    twice, in forward and reverse mode, in all but `exclude`.
    """
    return _Attention.apply(queries, keys, bias, values, exclude)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        problem = _Problem(*inputs)
        return _fused(problem) if problem.fused else _by_products(problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation allows no second look
        problem, output = _Problem(*saved[:5]), saved[5:]
        # With gradients enabled, somebody differentiates this pass too.
        if problem.fused and not torch.is_grad_enabled():
            return *_fused_backward(problem, output, gradients), None
        return *_backward_by_products(problem, output, gradients), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors  # once: recomputation allows no second look
        problem, output = _Problem(*saved[:5]), saved[5:]
        return _jvp(problem, output, _Problem._make((*tangents[:4], None)))


class _Problem(NamedTuple):
    queries: Tensor
    keys: Tensor
    bias: Tensor
    values: Tensor
    exclude: Tensor | None

    @property
    def fused(self) -> bool:
        cells, points, length = self.queries.shape
        # A single point is what vmap sees, for which the fused operation has no rule.
        return (
            _FUSED is not None
            and self.queries.device.type == "cpu"
            and length < _LONGEST_FUSED
            and cells * points > 1
        )

    def rows(self, cell: int, rows: slice) -> _Problem:
        """Restrict to some points of one cell."""
        exclude = None if self.exclude is None else self.exclude[cell, rows]
        keys, bias, values = self.keys[cell], self.bias[cell], self.values[cell]
        return _Problem(self.queries[cell, rows], keys, bias, values, exclude)

    def blocks(self) -> list[tuple[int, slice]]:
        """Blocks of rows whose scores stay in cache, one cell at a time."""
        return [(cell, rows) for cell in range(len(self.bias)) for rows in self.slices()]

    def slices(self, cells: int = 1) -> list[slice]:
        """Rows of the points, so many that their scores in some cells make a block."""
        points, size = self.queries.shape[1], _BLOCK_ELEMENTS // self.bias.shape[1] // cells
        size = max(1, size)
        return [slice(start, start + size) for start in range(0, max(points, 1), size)]

    def scores(self) -> Tensor:
        """Scores of a block, (m, N); -inf where a key is excluded."""
        scores = torch.addmm(self.bias, self.queries, self.keys.mT)
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


def _by_products(problem: _Problem) -> tuple[Tensor, Tensor]:
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
        blocks.append((log_total, terms @ block.values / total))
    log_total, mean = _stacked(blocks, len(problem.bias))
    return log_total, mean


def _backward_by_products(
    problem: _Problem, output: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> list[Tensor]:
    log_total, mean = output
    to_log_total, to_mean = gradients
    # d log_total = w . d scores, and d mean = w . ((value - mean) d scores + d value), for the weights w
    shift = to_log_total - (to_mean * mean).sum(-1)
    of_points, of_cells = [], []
    for cell in range(len(problem.bias)):
        keys, bias, values = (
            torch.zeros_like(part[cell]) for part in (problem.keys, problem.bias, problem.values)
        )
        for rows in problem.slices():
            block = problem.rows(cell, rows)
            weights = block.weights(log_total[cell, rows])
            to_block = to_mean[cell, rows]
            to_scores = weights * torch.addmm(shift[cell, rows, None], to_block, block.values.mT)
            of_points.append((to_scores @ block.keys,))
            # products in this order, (k, m) (m, N), are twice as fast as the transposed ones
            keys = keys + (block.queries.mT @ to_scores).mT
            bias = bias + to_scores.sum(0)
            values = values + (to_block.mT @ weights).mT
        of_cells.append((keys, bias, values))
    of_keys = (torch.stack(part) for part in zip(*of_cells, strict=True))
    return [*_stacked(of_points, len(problem.bias)), *of_keys]


def _jvp(problem: _Problem, output: tuple[Tensor, ...], tangent: _Problem) -> tuple[Tensor, ...]:
    blocks = []
    for cell, rows in problem.blocks():
        block, moved = problem.rows(cell, rows), tangent.rows(cell, rows)
        weights = block.weights(output[0][cell, rows])
        scores = moved.queries @ block.keys.mT + block.queries @ moved.keys.mT + moved.bias
        log_total = (weights * scores).sum(1, keepdim=True)
        weights_moved = weights * (scores - log_total)
        mean = weights_moved @ block.values + weights @ moved.values
        blocks.append((log_total[:, 0], mean))
    return _stacked(blocks, len(problem.bias))


def _stacked(blocks: Sequence[tuple[Tensor, ...]], cells: int) -> tuple[Tensor, ...]:
    """Join blocks of rows and give back the cells' axis: (C, M, ...)."""
    return tuple(torch.cat(part).unflatten(0, (cells, -1)) for part in zip(*blocks, strict=True))


# ---- PyTorch's fused attention for CPUs ---------------------------------------------------------------


def _fused(problem: _Problem) -> tuple[Tensor, Tensor]:
    query, key, value = _joined(problem)
    blocks = []
    for rows in _fused_slices(problem):
        mean, log_total = _FUSED(
            query[:, :, rows], key, value, attn_mask=_fused_mask(problem, rows), scale=1.0
        )
        blocks.append((log_total[:, 0], mean[:, 0]))
    log_total, mean = _columns(blocks)
    # The operation turns NaN into zero: put it back.
    nan = 0 * (problem.bias.amax(1, keepdim=True) + problem.queries.sum(-1))
    mean = mean[..., : problem.values.shape[2]] + nan[..., None]
    return log_total + nan, mean


def _fused_backward(
    problem: _Problem, output: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> list[Tensor]:
    log_total, mean = output
    query, key, value = _joined(problem)
    # The operation knows no gradient of the log-sum-exp. In the column in which all values are one that gradient
    # has the same effect, if the column's average, which would be one, is given as zero.
    none = torch.zeros_like(log_total)
    mean = _padded([mean, none[..., None]], query.shape[-1])
    to_mean = _padded([gradients[1], gradients[0][..., None]], query.shape[-1])
    blocks = []
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
        blocks.append((of_query[:, 0],))
        of_key += part_key
        of_value += part_value
    (of_query,) = _columns(blocks)
    k, v = problem.keys.shape[2], problem.values.shape[2]
    return [of_query[..., :k], of_key[:, 0, :, :k], of_key[:, 0, :, k], of_value[:, 0, :, :v]]


def _fused_slices(problem: _Problem) -> list[slice]:
    """All rows at once; only a mask has to be stored."""
    return [slice(None)] if problem.exclude is None else problem.slices(len(problem.bias))


def _fused_mask(problem: _Problem, rows: slice) -> Tensor | None:
    return None if problem.exclude is None else mask(problem.exclude[:, None, rows], problem.bias)


def _joined(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one length, (C, 1, M or N, k); a query's 1 meets the bias."""
    length = max(problem.keys.shape[2], problem.values.shape[2]) + 1
    one = problem.bias.new_ones(1, 1, 1)
    return (
        _padded([problem.queries, one.expand(*problem.queries.shape[:2], 1)], length),
        _padded([problem.keys, problem.bias[..., None]], length),
        _padded([problem.values, one.expand(*problem.bias.shape, 1)], length),
    )


def _columns(blocks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join blocks of rows of all cells."""
    return tuple(torch.cat(part, 1) for part in zip(*blocks, strict=True))


def _padded(parts: list[Tensor], length: int) -> Tensor:
    """Join along the last axis, fill up with zeros: (C, ., k) -> (C, 1, ., length)."""
    missing = length - sum(part.shape[-1] for part in parts)
    zeros = parts[0].new_zeros(1, 1, 1).expand(*parts[0].shape[:-1], missing)
    return torch.cat([*parts, zeros], -1)[:, None]
