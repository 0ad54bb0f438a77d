r"""Inner loops of the evaluation by differences, compiled by Numba: what a block of centres gives a point, and takes back.

With :math:`y = x - Z_i`, :math:`u = L_i^\top y` and :math:`p = L_i u = \Gamma_i y`, a centre's exponent is
:math:`b_i - |u|^2 / 2`, where :math:`b_i` is the log of weight times normalisation; the score is the mean of :math:`-p`, and
the Laplacian ratio that of the brackets :math:`|p|^2 - \operatorname{Tr}\Gamma_i`, eqs. (28)-(31). A block's numbers lie in
rows, one a coordinate of Z, an entry of L, and b. The innermost loops run along the rows: they become vector
instructions, on numbers in the first-level cache.

The number of dimensions comes as the length of a tuple, `dims`, so that loops over coordinates have constant lengths.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
from numba import njit, types
from numba.extending import overload

__all__ = ["WIDTH", "backward", "forward", "inverse_norms"]

WIDTH = 128  # centres of a block
_QUARTER = WIDTH // 4  # sums in four parts, which the processor adds side by side
_GROUP = 16  # points that visit a block together, while it is in the cache
_ZERO, _HALF, _ONE, _TWO = (np.float32(value) for value in (0.0, 0.5, 1.0, 2.0))
_INFINITY = np.float32(math.inf)
# exp(x) = 2^n exp(r) with n the integer next to x / log 2, which adding the shifter leaves in the last bits of the sum,
# and log 2 split in two so that r is exact (float64: Sun's fdlibm, e_exp.c). Taylor's polynomial of r, |r| < 0.35, has
# the terms that the dtype can see. Below the least exponent, where exp comes near the denormals, a weight is zero.
_LOG2_E32, _HIGH32, _LOW32 = (
    np.float32(value) for value in (1 / math.log(2), 0.693359375, math.log(2) - 0.693359375)
)
_SHIFTER32, _LEAST32 = np.float32(1.5 * 2**23), np.float32(-86.0)
_INVERSES32 = tuple(np.float32(1 / k) for k in range(7, 0, -1))
_LOG2_E64, _HIGH64, _LOW64 = 1 / math.log(2), 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SHIFTER64, _LEAST64 = 1.5 * 2**52, -700.0
_INVERSES64 = tuple(1 / k for k in range(13, 0, -1))
# Sums may be reordered, which vector instructions need; NaN and infinity are respected.
_FAST = {"contract", "reassoc", "nsz"}
# What `forward` and `backward` call is inlined in them: else a process that compiles may take other copies of it, which round
# in another order, than one that loads the two from Numba's cache.


@no_type_check
def _exp(given):
    """exp(x) for x <= 0 to the dtype's precision, in vector instructions; compiled code takes one of the next two."""


@overload(_exp, jit_options={"fastmath": {"contract"}})
@no_type_check
def _exp_of_dtype(given):
    return _exp32 if given == types.float32 else _exp64


@no_type_check
def _exp32(given):
    x = given if given > _LEAST32 else _LEAST32
    shifted = x * _LOG2_E32 + _SHIFTER32
    n = shifted - _SHIFTER32
    r = x - n * _HIGH32 - n * _LOW32
    value = _ONE
    for inverse in range(7):
        value = value * (r * _INVERSES32[inverse]) + _ONE
    # multiplied by 2^n in the bits of the exponent
    bits = np.int32(
        np.float32(value).view(np.int32) + np.int32(np.float32(shifted).view(np.int32) << 23)
    )
    result = np.int32(bits).view(np.float32)
    return result if given > _LEAST32 else (_ZERO if given <= _LEAST32 else given)


@no_type_check
def _exp64(given):
    x = given if given > _LEAST64 else _LEAST64
    shifted = x * _LOG2_E64 + _SHIFTER64
    n = shifted - _SHIFTER64
    r = x - n * _HIGH64 - n * _LOW64
    value = 1.0
    for inverse in range(13):
        value = value * (r * _INVERSES64[inverse]) + 1.0
    bits = np.int64(
        np.float64(value).view(np.int64) + np.int64(np.float64(shifted).view(np.int64) << 52)
    )
    result = np.int64(bits).view(np.float64)
    return result if given > _LEAST64 else (0.0 if given <= _LEAST64 else given)


@njit(fastmath=_FAST, forceinline=True)
@no_type_check
def _exponents(x, block, scratch, dims):
    """u into the scratch's first d rows, and the exponents into the next."""
    d = len(dims)
    scale = (d + d * (d + 1) // 2) * WIDTH
    for j in range(WIDTH):
        square = _ZERO
        for k in range(d):
            u = _ZERO
            for m in range(k, d):
                entry = (d + m * (m + 1) // 2 + k) * WIDTH
                u += block[entry + j] * (x[m] - block[m * WIDTH + j])
            scratch[k * WIDTH + j] = u
            square += u * u
        scratch[d * WIDTH + j] = block[scale + j] - _HALF * square


@njit(fastmath=_FAST | {"nnan"}, forceinline=True)
@no_type_check
def _largest(scratch, dims):
    """Largest exponent; NaN is looked for elsewhere."""
    start = len(dims) * WIDTH
    a = b = c = e = -_INFINITY
    for j in range(start, start + _QUARTER):
        a = max(a, scratch[j])
        b = max(b, scratch[j + _QUARTER])
        c = max(c, scratch[j + 2 * _QUARTER])
        e = max(e, scratch[j + 3 * _QUARTER])
    return max(max(a, b), max(c, e))


@njit(fastmath=_FAST, forceinline=True)
@no_type_check
def _weights(scratch, top, dims):
    """exp(exponent - top) in place of the exponents, and their sum."""
    first = len(dims) * WIDTH
    total = _ZERO
    for j in range(WIDTH):
        weight = _exp(scratch[first + j] - top)
        scratch[first + j] = weight
        total += weight
    return total


@njit(fastmath=_FAST, forceinline=True)
@no_type_check
def _pulled(block, scratch, out, dims):
    """p = L u into the first d rows of `out`, and |p|^2 - Tr Gamma into the next."""
    d = len(dims)
    for j in range(WIDTH):
        bracket = _ZERO
        for k in range(d):
            p = _ZERO
            for m in range(k + 1):
                entry = block[(d + k * (k + 1) // 2 + m) * WIDTH + j]
                p += entry * scratch[m * WIDTH + j]
                bracket -= entry * entry
            out[k * WIDTH + j] = p
            bracket += p * p
        out[d * WIDTH + j] = bracket


@njit(fastmath=_FAST, forceinline=True)
@no_type_check
def _product(weights, row):
    """Sum over the block of the weights times a row."""
    a = b = c = e = _ZERO
    for j in range(_QUARTER):
        a += weights[j] * row[j]
        b += weights[j + _QUARTER] * row[j + _QUARTER]
        c += weights[j + 2 * _QUARTER] * row[j + 2 * _QUARTER]
        e += weights[j + 3 * _QUARTER] * row[j + 3 * _QUARTER]
    return (a + b) + (c + e)


@njit(fastmath={"contract"}, forceinline=True)
@no_type_check
def _upper(x, bound, dims):
    """Upper bound of a block's exponents at x, from its box: see `_bounds`."""
    d = len(dims)
    square = _ZERO
    for k in range(d):
        outside = max(bound[k] - x[k], x[k] - bound[d + k], _ZERO)
        square += outside * outside
    return bound[2 * d] - bound[2 * d + 1] * square


@njit(fastmath={"contract"}, forceinline=True)
@no_type_check
def _visit(x, block, own, cutoff, averages, state, scratch, out, dims):
    """Add a block to a point's state: largest exponent, sum of weights, of weighted p, of weighted brackets."""
    d = len(dims)
    _exponents(x, block, scratch, dims)
    if 0 <= own < WIDTH:
        scratch[d * WIDTH + own] = -_INFINITY
    largest = _largest(scratch, dims)
    if largest > state[0]:
        factor = _exp(state[0] - largest)
        for k in range(1, d + 3):
            state[k] *= factor
        state[0] = largest
    elif not largest > state[0] - cutoff:
        return
    state[1] += _weights(scratch, state[0], dims)
    if not averages:
        return
    _pulled(block, scratch, out, dims)
    weights = scratch[d * WIDTH :]
    for k in range(d + 1):
        state[2 + k] += _product(weights, out[k * WIDTH :])


@njit(nogil=True, cache=True)
@no_type_check
def forward(points, blocks, bounds, exclude, cutoff, averages, states, dims):
    d = len(dims)
    scratch = np.empty((d + 1) * WIDTH, dtype=points.dtype)
    out = np.empty((d + 1) * WIDTH, dtype=points.dtype)
    first = np.empty(_GROUP, dtype=np.int64)
    for start in range(0, len(points), _GROUP):
        count = min(_GROUP, len(points) - start)
        for i in range(count):
            # The block that promises most comes first, so that the others can be compared with it.
            best, most = 0, -_INFINITY
            for b in range(len(blocks)):
                upper = _upper(points[start + i], bounds[b], dims)
                if upper > most:
                    best, most = b, upper
            first[i] = best
            own = exclude[start + i] - best * WIDTH
            _visit(
                points[start + i],
                blocks[best],
                own,
                cutoff,
                averages,
                states[start + i],
                scratch,
                out,
                dims,
            )
        for b in range(len(blocks)):
            for i in range(count):
                x, state = points[start + i], states[start + i]
                if b == first[i] or _upper(x, bounds[b], dims) < state[0] - cutoff:
                    continue
                own = exclude[start + i] - b * WIDTH
                _visit(x, blocks[b], own, cutoff, averages, state, scratch, out, dims)


@njit(fastmath=_FAST, forceinline=True)
@no_type_check
def _push(x, block, scratch, out, moved, to_block, shift, to_score, to_ratio, dims):
    """Add a point's gradients with respect to a block; those of y into the first rows of `moved`.

    The scratch has u and the weights w, `out` p and the brackets. With gradients a of the log-density, b of the score
    s and c of the ratio r, and shift = a - b.s - c r, an exponent's gradient is g = w (shift - b.p + c bracket), and
    that of p is w (2 c p - b).
    """
    d = len(dims)
    scale = (d + d * (d + 1) // 2) * WIDTH
    for j in range(WIDTH):
        weight = scratch[d * WIDTH + j]
        slope = shift + to_ratio * out[d * WIDTH + j]
        for k in range(d):
            p = out[k * WIDTH + j]
            slope -= to_score[k] * p
            out[k * WIDTH + j] = weight * (_TWO * to_ratio * p - to_score[k])
        out[d * WIDTH + j] = weight * slope
        to_block[scale + j] += weight * slope
    for j in range(WIDTH):  # u = L'y has the exponent's gradient, and p = L u
        for m in range(d):
            of_u = -out[d * WIDTH + j] * scratch[m * WIDTH + j]
            for k in range(m, d):
                of_u += block[(d + k * (k + 1) // 2 + m) * WIDTH + j] * out[k * WIDTH + j]
            moved[m * WIDTH + j] = of_u
    for k in range(d):
        for m in range(k + 1):
            entry = (d + k * (k + 1) // 2 + m) * WIDTH
            for j in range(WIDTH):
                to_block[entry + j] += (
                    out[k * WIDTH + j] * scratch[m * WIDTH + j]
                    + (x[k] - block[k * WIDTH + j]) * moved[m * WIDTH + j]
                    - _TWO * to_ratio * scratch[d * WIDTH + j] * block[entry + j]
                )
    for j in range(WIDTH):
        for back in range(d):  # from the last: those before are still needed
            k = d - 1 - back
            of_y = _ZERO
            for m in range(k + 1):
                of_y += block[(d + k * (k + 1) // 2 + m) * WIDTH + j] * moved[m * WIDTH + j]
            moved[k * WIDTH + j] = of_y
            to_block[k * WIDTH + j] -= of_y


@njit(nogil=True, cache=True)
@no_type_check
def backward(
    points,
    blocks,
    bounds,
    exclude,
    cutoff,
    log_prob,
    shift,
    to_score,
    to_ratio,
    to_points,
    to_blocks,
    dims,
):
    d = len(dims)
    scratch = np.empty((d + 1) * WIDTH, dtype=points.dtype)
    out = np.empty((d + 1) * WIDTH, dtype=points.dtype)
    moved = np.empty(d * WIDTH, dtype=points.dtype)
    ones = np.ones(WIDTH, dtype=points.dtype)
    for b in range(len(blocks)):
        block = blocks[b]
        for i in range(len(points)):
            x = points[i]
            if _upper(x, bounds[b], dims) < log_prob[i] - cutoff:
                continue
            _exponents(x, block, scratch, dims)
            own = exclude[i] - b * WIDTH
            if 0 <= own < WIDTH:
                scratch[d * WIDTH + own] = -_INFINITY
            if _largest(scratch, dims) < log_prob[i] - cutoff:
                continue
            _weights(scratch, log_prob[i], dims)
            _pulled(block, scratch, out, dims)
            _push(
                x,
                block,
                scratch,
                out,
                moved,
                to_blocks[b],
                shift[i],
                to_score[i],
                to_ratio[i],
                dims,
            )
            for k in range(d):
                to_points[i, k] += _product(ones, moved[k * WIDTH :])


@njit(fastmath={"contract"}, cache=True)
@no_type_check
def inverse_norms(tril, out, dims):
    """Squared Frobenius norms of the inverses of lower triangular matrices (N, d, d), by forward substitution."""
    d = len(dims)
    column = np.empty(d, dtype=tril.dtype)
    for i in range(len(tril)):
        total = _ZERO
        for c in range(d):
            for row in range(c, d):
                value = _ONE if row == c else _ZERO
                for k in range(c, row):
                    value -= tril[i, row, k] * column[k]
                column[row] = value / tril[i, row, row]
                total += column[row] * column[row]
        out[i] = total
