"""Whole figures of a fitted mixture, for the commands that draw: import it only there, since it imports matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from wpo_notes import plots
from wpo_notes.mixture import GaussianMixture

__all__ = ["MOST_COLUMNS", "compared", "distances", "pairs"]

MOST_COLUMNS = 4  # of which marginals are drawn
# Of more kernels only the heaviest are drawn, of more points only the first.
_MOST_ELLIPSES, _MOST_POINTS = 40, 2000
_TAIL, _MARGIN, _RESOLUTION = 0.002, 0.08, 150


@contextmanager
def _style() -> Iterator[None]:
    """The book's style, and afterwards what was set before."""
    with mpl.rc_context():
        plots.use_style()
        yield


def pairs(
    mixture: GaussianMixture,
    columns: Sequence[str],
    *,
    samples: Tensor,
    data: Tensor | None = None,
) -> Figure:
    """Marginals of the first columns, exact: one on the diagonal, two below it, points above it.

    Args:
        mixture: of d dimensions.
        columns: d names.
        samples: (n, d), of the mixture; they set the limits of the axes if there are no data.
        data: (m, d), drawn over them.
    """
    count = min(len(columns), MOST_COLUMNS)
    limits = [_limits(samples if data is None else data, k) for k in range(count)]
    with _style():
        size = 2.0 * count + 0.4 if count > 1 else 3.6
        figure = Figure(figsize=(size, size))
        axes = figure.subplots(count, count, squeeze=False)
        for row in range(count):
            for column in range(count):
                ax = axes[row, column]
                if row == column:
                    _marginal(ax, mixture, row, limits[row], data)
                elif row > column:
                    _pair(ax, mixture, column, row, limits)
                else:
                    _points(ax, samples[:, [column, row]], data, column, row)
                ax.set(xlim=limits[column], aspect="auto")
                if row != column:
                    ax.set_ylim(limits[row])
                ax.tick_params(labelsize="x-small")
                if row < count - 1:
                    ax.tick_params(labelbottom=False)
                else:
                    ax.set_xlabel(_short(columns[column]), parse_math=False, fontsize="small")
                if column > 0 or row == 0:
                    ax.tick_params(labelleft=False)
                else:
                    ax.set_ylabel(_short(columns[row]), parse_math=False, fontsize="small")
    return figure


def compared(names: Sequence[str], values: Sequence[float], errors: Sequence[float]) -> Figure:
    """Values with twice their standard errors, the first one marked."""
    with _style():
        figure = Figure(figsize=(5.2, 0.5 * len(names) + 0.8))
        ax = figure.subplots()
        for place, (value, error) in enumerate(zip(values, errors, strict=True)):
            color = plots.COLORS[0] if place == 0 else plots.INK
            ax.errorbar(value, place, xerr=2 * error, fmt="o", color=color, capsize=3)
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="held-out log-density, nats a row")
    return figure


def distances(samples: Tensor, held_out: Tensor) -> Figure:
    """Distribution functions of the distances to the nearest training row."""
    with _style():
        figure = Figure(figsize=(5.2, 2.8))
        ax = figure.subplots()
        ax.ecdf(samples.numpy(), label="samples of the model", color=plots.COLORS[0])
        ax.ecdf(held_out.numpy(), label="held-out rows", color=plots.COLORS[1], ls="--")
        ax.set(
            xlabel="distance to the nearest training row, standardised",
            ylabel="share",
            xlim=(0, None),
        )
        ax.legend(loc="lower right")
    return figure


def _marginal(
    ax: Axes,
    mixture: GaussianMixture,
    column: int,
    limits: tuple[float, float],
    data: Tensor | None,
) -> None:
    like = mixture.centers
    grid = torch.linspace(*limits, 300, dtype=like.dtype, device=like.device)
    density = mixture.marginal([column]).log_prob(grid[:, None]).exp()
    if data is not None:
        ax.hist(
            data[:, column].cpu(), bins=30, range=limits, density=True, color=plots.INK, alpha=0.4
        )
    ax.plot(grid.cpu(), density.cpu(), color=plots.COLORS[0])
    ax.set(yticks=[], ylim=(0, None))


def _pair(
    ax: Axes,
    mixture: GaussianMixture,
    x: int,
    y: int,
    limits: Sequence[tuple[float, float]],
) -> None:
    marginal = mixture.marginal([x, y])
    like = marginal.centers
    extent = (*limits[x], *limits[y])
    plots.density(
        ax, marginal.log_prob, extent, resolution=_RESOLUTION, dtype=like.dtype, device=like.device
    )
    heaviest = marginal.log_weights.argsort(descending=True, stable=True)[:_MOST_ELLIPSES]
    covariance = marginal.to_torch().component_distribution.covariance_matrix  # type: ignore[attr-defined]
    full = GaussianMixture.from_covariance(like, covariance, log_weights=marginal.log_weights)
    plots.ellipses(ax, full, heaviest, deviations=1.0, edgecolor="white", linewidth=0.6, alpha=0.7)


def _points(ax: Axes, samples: Tensor, data: Tensor | None, x: int, y: int) -> None:
    count = _MOST_POINTS if data is None else min(len(data), _MOST_POINTS)  # as many of both
    plots.samples(ax, samples[:count], s=5)
    if data is not None:
        plots.samples(ax, data[:count, [x, y]], s=5, color=plots.COLORS[1])


def _limits(points: Tensor, column: int) -> tuple[float, float]:
    values = points[:, column]
    low, high = (float(values.quantile(q)) for q in (_TAIL, 1 - _TAIL))
    margin = _MARGIN * (high - low)
    return low - margin, high + margin


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
