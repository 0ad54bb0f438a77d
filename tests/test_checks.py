"""Input checks: what passes comes back unchanged, what does not gets a message that says what to do."""

from __future__ import annotations

import math

import pytest
import torch

from wpo_notes import _checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_good_input_is_returned_itself(dtype):
    x = torch.rand(5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert checks.checked_floating("x", x) is x
    assert checks.checked_finite("x", x) is x
    assert checks.checked_points("x", x) is x
    assert checks.checked_points("x", x, 2) is x
    assert checks.checked_points("x", x[0], 2).shape == (2,)
    assert checks.checked_points("x", x[:0], 2).shape == (0, 2)
    assert checks.checked_sample_set("x", x) is x


def test_floating():
    with pytest.raises(
        TypeError, match=r"x must be a torch tensor .* got list \[1\.0, 2\.0\].*as_tensor"
    ):
        checks.checked_floating("x", [1.0, 2.0])
    for dtype in (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64):
        with pytest.raises(
            TypeError, match=rf"got a {dtype} tensor of shape \(3,\) on cpu.*\.double"
        ):
            checks.checked_floating("x", torch.zeros(3, dtype=dtype))


def test_long_values_are_cut_in_messages():
    with pytest.raises(TypeError) as error:
        checks.checked_floating("x", list(range(10_000)))
    assert len(str(error.value)) < 250


def test_finite():
    x = torch.zeros(3, 2)
    x[1, 1], x[2, 0] = math.nan, -math.inf
    message = (
        r"x must be finite, but 2 of its 6 entries .* first at index \(1, 1\)\): remove or impute"
    )
    with pytest.raises(ValueError, match=message):
        checks.checked_finite("x", x)
    with pytest.raises(ValueError, match=message):
        checks.checked_points("x", x)
    assert checks.checked_points("x", x, finite=False) is x
    with pytest.raises(ValueError, match=r"1 of its 1 entries .*index \(\)"):
        checks.checked_finite("x", torch.tensor(math.nan))


def test_points():
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., d\), got .*shape \(\)"):
        checks.checked_points("x", torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"event size 3 \(its last dimension\), got .*shape \(4, 2\)"
    ):
        checks.checked_points("x", torch.zeros(4, 2), 3)
    with pytest.raises(TypeError, match="x must be a torch tensor"):
        checks.checked_points("x", 1.0)


def test_positive():
    assert checks.checked_positive("beta", 0.5) == 0.5
    assert checks.checked_positive("variance", 0.0, zero=True) == 0
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=rf"beta must be a positive finite number, got {value}"
        ):
            checks.checked_positive("beta", value)
    for value in (-1e-9, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"a non-negative finite number, got {value}"):
            checks.checked_positive("variance", value, zero=True)


def test_sample_set():
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    constant, repeated = x.clone(), x.clone()
    constant[:, 1] = 2
    repeated[4] = repeated[1]
    repeated[5] = repeated[1]
    cases = [
        (x[:, 0], r"matrix \(n, d\).*got a torch.float32 tensor of shape \(6,\).*x\[:, None\]"),
        (x[None], r"matrix \(n, d\).*shape \(1, 6, 3\)"),
        (x[:, :0], r"at least one coordinate, got .*shape \(6, 0\)"),
        (x[:0], "at least 2 points, got 0"),
        (x[:1], "at least 2 points, got 1"),
        (x[:1].expand(6, 3), "must vary, but all of its 6 points are equal"),
        (constant, r"must vary in each coordinate, but column\(s\) \[1\] are constant"),
        (repeated, r"must not repeat a point, but 2 of its 6 rows are duplicates.*torch\.unique"),
        (x * math.nan, "must be finite"),
    ]
    for value, message in cases:
        with pytest.raises(ValueError, match=message):
            checks.checked_sample_set("x", value)
    with pytest.raises(TypeError, match="float32 or float64"):
        checks.checked_sample_set("x", x.long())


def test_make_generator():
    cpu = torch.device("cpu")
    given = torch.Generator().manual_seed(3)
    assert checks.make_generator(given, cpu) is given
    state = torch.get_rng_state()
    with torch.device("meta"):
        first, second = checks.make_generator(None, cpu), checks.make_generator(None, cpu)
    assert first.device == cpu
    assert first.initial_seed() != second.initial_seed()
    assert torch.equal(torch.get_rng_state(), state)
