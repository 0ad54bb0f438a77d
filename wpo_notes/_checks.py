"""Input checks at the package's boundary: what was expected, what came, what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "checked_points",
    "checked_positive",
    "checked_sample_set",
    "make_generator",
]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"


def checked_floating(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor of floating dtype; otherwise raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor of float32 or float64, got {_describe(value)}: "
            "convert it with torch.as_tensor(...)"
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must have dtype float32 or float64, got {_describe(value)}: "
            "convert it with .float() or .double()"
        )
    return value


def checked_finite(name: str, value: Tensor) -> Tensor:
    """Return `value` if all of it is finite; otherwise raise ValueError that says where it is not."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, but {int(bad.sum())} of its {value.numel()} entries are NaN or "
            f"infinite (the first at index {first}): remove or impute them"
        )
    return value


def checked_points(
    name: str, value: object, dim: int | None = None, *, finite: bool = True
) -> Tensor:
    """Check a batch of points of shape (..., dim): floating, right event size, finite."""
    value = checked_floating(name, value)
    if value.ndim == 0:
        raise ValueError(f"{name} must have shape (..., d), got {_describe(value)}")
    if dim is not None and value.shape[-1] != dim:
        raise ValueError(
            f"{name} must have event size {dim} (its last dimension), got {_describe(value)}"
        )
    return checked_finite(name, value) if finite else value


def checked_positive(name: str, value: float, *, zero: bool = False) -> float:
    """Check a positive (or, with `zero`, non-negative) finite number."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        kind = "non-negative" if zero else "positive"
        raise ValueError(f"{name} must be a {kind} finite number, got {value}")
    return value


def checked_sample_set(name: str, value: object) -> Tensor:
    """Check a sample set (n, d) to learn from: enough distinct points that vary in each coordinate."""
    value = checked_points(name, value)
    if value.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix (n, d), one point a row, got {_describe(value)}: "
            "reshape it; for one coordinate use x[:, None]"
        )
    n, d = value.shape
    if d == 0:
        raise ValueError(f"{name} must have at least one coordinate, got {_describe(value)}")
    if n < 2:
        raise ValueError(f"{name} must have at least 2 points, got {n}: bring more")
    spread = value.amax(0) - value.amin(0)
    constant = (spread == 0).nonzero()[:, 0].tolist()
    if len(constant) == d:
        raise ValueError(f"{name} must vary, but all of its {n} points are equal")
    if constant:
        raise ValueError(
            f"{name} must vary in each coordinate, but column(s) {constant} are constant: "
            "there the data have no density; drop the column(s)"
        )
    distinct = torch.unique(value, dim=0).shape[0]
    if distinct < n:
        raise ValueError(
            f"{name} must not repeat a point, but {n - distinct} of its {n} rows are duplicates: "
            "a point that is also a centre would be scored at itself, and the objective would be "
            "unbounded below; remove them with torch.unique(x, dim=0)"
        )
    return value


def make_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return `generator`, or a fresh one seeded by the operating system: global state stays as it is."""
    if generator is None:
        generator = torch.Generator(device)
        generator.seed()
    return generator
