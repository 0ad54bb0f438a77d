"""Softmax attention with log-sum-exp: both ways of computing it against plain autograd, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from wpo_notes import _attention
from wpo_notes._attention import attend, mask

F64 = torch.float64


def problem(cells=2, points=5, keys=7, k=5, v=7, dtype=F64, scale=1.0):
    """Inputs of `attend` that need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(cells, points, k), (cells, keys, k), (cells, keys), (cells, keys, v)]
    return [
        (scale * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_()
        for shape in shapes
    ]


def excluded(cells=2, points=5, keys=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, keys, (cells, points), generator=generator)


def attention(exclude=None):
    def function(*inputs):
        return attend(*inputs, exclude)

    return function


def plain(exclude=None):
    """The same by PyTorch's softmax and autograd."""

    def function(queries, keys, bias, values):
        scores = queries @ keys.mT + bias[:, None]
        if exclude is not None:
            scores = scores + mask(exclude, bias)
        weights = scores.softmax(-1)
        return scores.logsumexp(-1), weights @ values

    return function


@pytest.fixture(params=["fused", "products"])
def way(request, monkeypatch):
    """Fused attention, or two matrix products by blocks of two points."""
    if request.param == "products":
        monkeypatch.setattr(_attention, "_LONGEST_FUSED", 0)
        monkeypatch.setattr(_attention, "_BLOCK_ELEMENTS", 14)
    return request.param


@pytest.mark.parametrize("exclude", [None, excluded()])
@pytest.mark.parametrize("sizes", [{}, {"v": 0}, {"v": 2}, {"k": 11, "v": 4}])
def test_values_and_gradients(way, exclude, sizes):
    inputs = problem(**sizes)
    values, expected = attention(exclude)(*inputs), plain(exclude)(*inputs)
    weights = [torch.randn(part.shape, dtype=F64) for part in expected]
    torch.testing.assert_close(values, expected)
    for ours, theirs in zip(
        torch.autograd.grad(values, inputs, weights, materialize_grads=True),
        torch.autograd.grad(expected, inputs, weights, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exclude", [None, excluded()])
def test_derivatives(way, exclude):
    inputs = problem(scale=0.7)
    assert gradcheck(attention(exclude), inputs, check_forward_ad=True)
    assert gradgradcheck(attention(exclude), inputs)


def test_function_transforms(way):
    inputs = [part.detach() for part in problem()]
    tangents = [torch.randn_like(part) for part in inputs]
    ours = torch.func.jvp(attention(), tuple(inputs), tuple(tangents))
    theirs = torch.func.jvp(plain(), tuple(inputs), tuple(tangents))
    torch.testing.assert_close(ours, theirs)

    def total(function):
        return lambda queries: function(queries, *inputs[1:])[0].sum()

    torch.testing.assert_close(
        torch.func.hessian(total(attention()))(inputs[0]),
        torch.func.hessian(total(plain()))(inputs[0]),
    )


def test_both_ways_are_used():
    big, small = problem(k=300), problem()
    for inputs, fused in ((big, False), (small, True), (problem(cells=1, points=1), False)):
        assert _attention._Problem(*inputs, None).fused is fused


def test_a_release_without_the_fused_operators_does_without(monkeypatch):
    inputs = problem()
    expected = attention()(*inputs)
    monkeypatch.setattr(_attention, "_FUSED", None)
    assert not _attention._Problem(*inputs, None).fused
    torch.testing.assert_close(attention()(*inputs), expected)


def test_far_scores_leave_no_trace(way):
    # exp(-1000) is zero in float64, and must not come back as a clamped weight times a large value
    inputs = [part.detach() for part in problem(cells=1)]
    inputs[2] = torch.full_like(inputs[2], -1000.0)
    inputs[2][0, 0] = 0.0
    inputs[3][0, 1:] = 1e30
    _, mean = attention()(*inputs)
    torch.testing.assert_close(mean, inputs[3][:, :1].expand_as(mean))


@pytest.mark.parametrize("position", range(3))
def test_nan_is_passed_on(way, position):
    inputs = [part.detach() for part in problem()]
    inputs[position].flatten()[0] = math.nan
    if position == 1:  # as in a mixture, where the bias has the same parameters
        inputs[2].flatten()[0] = math.nan
    log_total, mean = attention()(*inputs)
    for part in (log_total[0, 0], mean[0, 0]):
        assert bool(part.isnan().all())


def test_float32_is_within_its_rounding(way):
    inputs = problem(points=64, keys=500, dtype=torch.float32)
    for ours, theirs in zip(
        attention()(*inputs), plain()(*(part.double() for part in inputs)), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
