"""Compiled differences: against the lifted form in float64 and its gradients, and where they serve."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from test_mixture import differences, make, parameters, seeded

from wpo_notes import _compiled, _evaluation, _loops
from wpo_notes._evaluation import Parameters, _by_cells, _compilable, evaluate
from wpo_notes.mixture import GaussianMixture

F64 = torch.float64


@pytest.fixture(params=["as they come", "in order"])
def order(request, monkeypatch):
    """Blocks of centres as they come, or in order and left out where they are out of reach."""
    least = (10**9, 1) if request.param == "as they come" else (1, 1)
    monkeypatch.setattr(_compiled, "_WORTH_ORDERING", least)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(_compiled, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def problem(d: int, n: int = 300, points: int = 40, std: float = 0.3):
    """Parameters of a mixture with weights of its own, its samples, and which centre to leave out."""
    centers, tril, log_weights = parameters(n, d, std=std, ratio=3, dtype=torch.float32)
    x = GaussianMixture(centers, tril).sample((points,), generator=seeded(1))
    exclude = torch.randint(-1, n, (points,), generator=seeded(2))
    return x, Parameters(centers, tril, log_weights), exclude


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("d", [1, 2, 6, 8])
def test_values_and_gradients_are_those_of_float64(d, left_out, order, threads):
    x, given, exclude = problem(d)
    exclude = exclude if left_out else None
    cotangents = [torch.randn(40, *shape, generator=seeded(3)) for shape in ((), (d,), ())]

    def found(function, dtype):
        inputs = [part.to(dtype).requires_grad_() for part in (x, *given)]
        centers, tril, log_weights = inputs[1:]
        lower = Parameters(centers, tril.tril(), log_weights)  # of tril, only that is read
        values = function(lower, inputs[0])
        weights = [part.to(dtype) for part in cotangents]
        return *values, *torch.autograd.grad(values, inputs, weights)

    def ours(given, x):
        assert _compilable(given, x)
        return evaluate(given, x, score=True, laplacian=True, exclude=exclude)

    truth = found(lambda given, x: _by_cells(given, x, True, True, exclude), F64)
    # units of rounding, times sums of hundreds of terms that partly cancel
    for dtype, tolerance in ((torch.float32, 2e-5), (F64, 1e-11)):
        for value, true_value in zip(found(ours, dtype), truth, strict=True):
            assert value.dtype == dtype
            error = (value - true_value).detach().abs().max() / true_value.detach().abs().max()
            assert float(error) < tolerance


@pytest.mark.parametrize("wanted", [(), ("score",), ("laplacian",), ("score", "laplacian")])
def test_what_is_asked_for_comes_in_order(wanted):
    x, given, _ = problem(2)
    options = dict.fromkeys(wanted, True)
    found = evaluate(given, x, **options)
    double = Parameters(*(part.double() for part in given)), x.double()
    expected = _by_cells(*double, "score" in wanted, "laplacian" in wanted, None)
    assert len(found) == 1 + len(wanted)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_blocks_that_are_not_full(count, order):
    mixture = make(count, 2, std=0.3, dtype=torch.float32)
    x = mixture.sample((20,), generator=seeded(1))
    torch.testing.assert_close(
        mixture.log_prob(x).double(), differences(mixture, x)[0], rtol=1e-5, atol=1e-5
    )


def test_a_block_with_nothing_but_the_centre_that_is_left_out(order):
    # the last block has one centre, the nearest to x: without it the others are far away
    centers = torch.cat([torch.full((128, 1), 5.0), torch.zeros(1, 1)])
    mixture = GaussianMixture.from_variance(centers, 1.0)
    x = torch.zeros(2, 1)
    score, ratio = mixture.score_and_laplacian_ratio(x, exclude=torch.tensor([128, -1]))
    assert float(score[0]) == pytest.approx(5.0, rel=1e-6)
    assert float(ratio[0]) == pytest.approx(24.0, rel=1e-6)
    assert abs(float(score[1])) < 1e-2


@pytest.mark.parametrize("changed", ["centers", "exclude"])
def test_a_change_before_the_backward_pass_is_an_error(changed):
    centers, tril, log_weights = parameters(5, 2, std=0.3, dtype=torch.float32)
    tril.requires_grad_()
    x, exclude = torch.zeros(3, 2), torch.tensor([0, -1, 4])
    mixture = GaussianMixture(centers, tril, log_weights=log_weights)
    score, _ = mixture.score_and_laplacian_ratio(x, exclude=exclude)
    {"centers": centers, "exclude": exclude}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.sum().backward()


def test_bounds_hold_and_blocks_are_left_out():
    d, n = 2, 2000
    centers, tril, log_weights = parameters(n, d, std=0.05, ratio=3, dtype=torch.float32)
    given = Parameters(centers, tril, log_weights)
    nobody = torch.zeros(0, dtype=int)
    blocks = _compiled._Blocks(*given[:2], given.log_scale(), nobody, [(n, 10_000)])
    order = np.argsort(blocks.slot)
    assert not np.array_equal(order, np.arange(n))
    x = 2 * torch.randn(200, d, generator=seeded(1))
    (exponents,) = _evaluation.exponents(Parameters(*(part.double() for part in given)), x.double())
    exponents = torch.nn.functional.pad(exponents[:, order], (0, -n % 128), value=-math.inf)
    most = exponents.unflatten(1, (-1, 128)).amax(2)
    dims = (0,) * d
    upper = torch.tensor([[_loops._upper(p, b, dims) for b in blocks.bounds] for p in x.numpy()])
    assert bool((upper >= most - 1e-4 * (1 + most.abs())).all())
    # and the bounds are of use: most blocks do not contribute
    reached = upper >= exponents.amax(1, keepdim=True) - float(blocks.cutoff)
    assert float(reached.double().mean()) < 0.5


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_points_see_the_centres_of_their_part(ordered, compiled, monkeypatch):
    if ordered:
        monkeypatch.setattr(_compiled, "_WORTH_ORDERING", (1, 1))
    if not compiled:
        monkeypatch.setattr(_evaluation, "_compiled", lambda: None)
    parts = [(150, 7), (128, 0), (1, 5), (300, 4)]
    given = parameters(sum(n for n, _ in parts), 2, std=0.3, dtype=torch.float64)
    given = [part.requires_grad_() for part in given]
    x = torch.randn(16, 2, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    inputs = [*given, x]
    together = evaluate(Parameters(*given), x, score=True, laplacian=True, parts=parts)
    split = zip(*(part.split([n for n, _ in parts]) for part in given), strict=True)
    apart = [
        evaluate(Parameters(*part), own, score=True, laplacian=True)
        for part, own in zip(split, x.split([m for _, m in parts]), strict=True)
    ]
    apart = [torch.cat(values) for values in zip(*apart, strict=True)]
    derivatives = []
    for values in (together, apart):
        first = torch.autograd.grad(sum(v.sin().sum() for v in values), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        derivatives.append((*values, *first, *second))
    for ours, expected in zip(*derivatives, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max())
        )


def test_long_kernels_of_a_part_are_evaluated_in_float64():
    centers, tril, log_weights = parameters(40, 2, std=0.01, ratio=1000, dtype=torch.float32)
    x = centers[:10] + 0.01
    parts = [(20, 5), (20, 5)]
    given = Parameters(centers, tril, log_weights)
    (ours,) = evaluate(given, x, parts=parts)
    (exact,) = evaluate(given.to(torch.float64), x.double(), parts=parts)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)


def test_centres_out_of_reach_change_nothing(monkeypatch):
    mixture = make(2000, 2, std=0.02, ratio=4, dtype=torch.float32)
    x = mixture.sample((300,), generator=seeded(1))
    found = []
    for least in ((1, 1), (10**9, 1)):
        monkeypatch.setattr(_compiled, "_WORTH_ORDERING", least)
        found.append(mixture._evaluate(x, score=True, laplacian=True))
    for ours, all_of_them in zip(*found, strict=True):
        error = (ours - all_of_them).abs().max() / all_of_them.abs().max()
        assert float(error) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "most", "tolerance"), [(np.float32, 85.9, 1e-7), (np.float64, 699.0, 4e-16)]
)
def test_exponential(dtype, most, tolerance):
    exponential = numba.njit(lambda x: _loops._exp(x))
    x = -np.linspace(0, most, 10_001).astype(dtype)
    found = np.array([exponential(value) for value in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.longdouble)), rtol=tolerance)
    assert exponential(dtype(-most - 2)) == 0 == exponential(dtype(-math.inf))
    assert math.isnan(exponential(dtype(math.nan)))


def test_derivatives_of_derivatives():
    x, given, exclude = problem(2, n=10, points=5)

    def second(function, dtype):
        inputs = [part.to(dtype).requires_grad_() for part in (x, *given)]
        centers, tril, log_weights = inputs[1:]
        values = function(Parameters(centers, tril.tril(), log_weights), inputs[0])
        total = sum((value**2).sum() for value in values)
        first = torch.autograd.grad(total, inputs, create_graph=True)
        return torch.autograd.grad(sum((part**2).mean() for part in first), inputs)

    def ours(given, x):
        return evaluate(given, x, score=True, laplacian=True, exclude=exclude)

    def truth(given, x):
        return _by_cells(given, x, True, True, exclude)

    for found, expected in zip(second(ours, torch.float32), second(truth, F64), strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert float(error) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("part", range(4))
def test_nan_is_passed_on(part, dtype, order):
    x, given, _ = problem(2)
    inputs = [tensor.to(dtype).clone() for tensor in (x, *given)]
    inputs[part][0] = math.nan
    values = evaluate(Parameters(*inputs[1:]), inputs[0], score=True, laplacian=True)
    for value in values:
        assert bool(value[0].isnan().all())
        assert bool(value[1:].isnan().any()) is (part > 0)


@pytest.mark.parametrize("d", [2, 6])
def test_kernels_too_long_for_float32_go_in_float64(d):
    centers, tril, log_weights = parameters(200, d, std=0.3, ratio=3, dtype=torch.float32)
    tril[0, 0] *= 1e4
    given = Parameters(centers, tril, log_weights)
    x = GaussianMixture(centers, tril).sample((50,), generator=seeded(1))
    x[0] = centers[0] + 1e-5  # where the narrow kernel weighs something
    found = evaluate(given, x, score=True, laplacian=True)
    double = Parameters(*(part.double() for part in given))
    for ours, truth in zip(found, _by_cells(double, x.double(), True, True, None), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


def test_where_it_serves(monkeypatch):
    calls = []
    original = _compiled.evaluate_by_differences
    monkeypatch.setattr(
        _compiled, "evaluate_by_differences", lambda *a: calls.append(a[0].dtype) or original(*a)
    )

    def serves(mixture, x):
        """In which dtype; None if not at all."""
        calls.clear()
        mixture.score(x)
        return calls[0] if calls else None

    centers, tril, _ = parameters(20, 2, dtype=torch.float32)
    plain = GaussianMixture(centers, tril, validate_args=False)  # vmap permits no checks of values
    x = torch.zeros(3, 2)
    assert serves(plain, x) == torch.float32
    assert serves(make(20, 2), x.double()) == F64
    assert not serves(make(20, 9, dtype=torch.float32), torch.zeros(3, 9))
    # too long for their width: float32 would round the exponents by more than 1e-5
    assert serves(make(20, 2, ratio=1000, dtype=torch.float32), x) == F64
    # many points, few cells: matrix products are faster, unless gradients are asked for
    wide, many = make(20, 2, std=2.0, dtype=torch.float32), torch.randn(1024, 2, generator=seeded())
    assert not serves(wide, many)
    assert serves(wide, many[1:])
    assert serves(wide, many.clone().requires_grad_())
    assert serves(make(20, 2, std=0.05, dtype=torch.float32), many)
    assert serves(make(20, 2, std=2.0), many.double()) == F64
    calls.clear()
    torch.func.vmap(torch.func.jacrev(plain.score))(x)
    torch.func.vmap(torch.func.hessian(plain.log_prob))(x)
    with torch.autograd.forward_ad.dual_level():
        plain.log_prob(torch.autograd.forward_ad.make_dual(x, x))
    assert not calls


def test_without_numba_the_result_is_the_same(monkeypatch):
    mixture = make(50, 2, std=0.1, dtype=torch.float32)
    x = mixture.sample((100,), generator=seeded(1))
    found = mixture._evaluate(x, score=True, laplacian=True)

    def missing(name):
        raise ModuleNotFoundError(name="numba")

    _evaluation._compiled.cache_clear()
    monkeypatch.setattr(_evaluation.importlib, "import_module", missing)
    try:
        without = mixture._evaluate(x, score=True, laplacian=True)
    finally:
        _evaluation._compiled.cache_clear()
    for ours, theirs in zip(found, without, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_no_points():
    values = make(5, 2, dtype=torch.float32)._evaluate(torch.zeros(0, 2), score=True)
    assert [value.shape for value in values] == [(0,), (0, 2)]


IN_A_PROCESS = """
import hashlib, torch
from wpo_notes._evaluation import Parameters, evaluate
generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 6, generator=generator)
centers = torch.cat([x[:16], torch.randn(2000, 6, generator=generator)]).requires_grad_()
tril = 2 * torch.eye(6) + 0.6 * torch.randn(2016, 6, 6, generator=generator).tril(-1)
exclude = torch.where(torch.arange(64) < 16, torch.arange(64), -1)
given = Parameters(centers, tril, torch.zeros(2016))
values = evaluate(given, x, score=True, laplacian=True, exclude=exclude)
found = [*values, *torch.autograd.grad(values[2].sum() - values[1].square().sum(), centers)]
assert all(part.isfinite().all() for part in found)
print(hashlib.sha256(b"".join(part.detach().numpy().tobytes() for part in found)).hexdigest())
"""


def test_compiled_here_or_before_gives_the_same_bits(tmp_path):
    # A killed run goes on in a process that finds the code of the first in Numba's cache.
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_A_PROCESS]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbc"))  # the second loaded what the first compiled
    assert len(first) == 65
    assert first == second
