"""Figures of the book: each function takes an `ax`, draws on it and returns it.

Chapters: all. The only module that imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from torch import Tensor

from wpo_notes.mixture import GaussianMixture

__all__ = [
    "COLORS",
    "INK",
    "density",
    "density_grid",
    "ellipses",
    "image",
    "order_of_convergence",
    "samples",
    "use_style",
]

# Okabe and Ito's palette, without its black and yellow: distinct for colour-blind readers. The first
# four have contrast 3 or more on white and on dark pages; the last two only on dark ones: large marks.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Text and axes: a grey with contrast 4.3 on white and 4.4 on the dark theme's #121212. No colour
# has more on both: the product of the two contrasts is 18.7 for any of them.
INK = "#7a7a7a"


def use_style() -> None:
    """Set the book's style: transparent background, grey ink, one palette."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": mpl.cycler(color=COLORS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": "medium",
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "none",
            "savefig.dpi": 160,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 1.8,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "font.size": 10,
        }
    )


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def samples(ax: Axes, x: Tensor, **style) -> Axes:
    """Scatter planar points (n, 2) with equal axes."""
    x = _array(x)
    style = {"s": 2, "linewidths": 0, "color": COLORS[0], "alpha": 0.6, "rasterized": True} | style
    ax.scatter(x[:, 0], x[:, 1], **style)
    ax.set_aspect("equal")
    return ax


def density_grid(
    log_prob: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    resolution: int = 200,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Density exp(log_prob) at the centres of the pixels of (left, right, bottom, top).

    Row k from below, column j from the left: (resolution, resolution), for `image`. Times the area of a
    pixel, the sum is the mass on the rectangle by the midpoint rule. `log_prob` is called once, with
    points (n, 2) of the given dtype and device.
    """
    left, right, bottom, top = extent
    fraction = (torch.arange(resolution, dtype=dtype, device=device) + 0.5) / resolution
    points = torch.cartesian_prod(
        left + (right - left) * fraction, bottom + (top - bottom) * fraction
    )
    with torch.no_grad():
        return log_prob(points).exp().reshape(resolution, resolution).T


def image(ax: Axes, values: Tensor, extent: tuple[float, float, float, float], **style) -> Axes:
    """Image of values (rows from below, columns from the left) on (left, right, bottom, top)."""
    style = {"cmap": "viridis", "interpolation": "bilinear"} | style
    ax.imshow(_array(values), extent=extent, origin="lower", **style)
    return ax


def density(
    ax: Axes,
    log_prob: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    resolution: int = 200,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **style,
) -> Axes:
    """Image of the density exp(log_prob) on (left, right, bottom, top), see `density_grid`."""
    values = density_grid(log_prob, extent, resolution=resolution, dtype=dtype, device=device)
    return image(ax, values, extent, **{"vmin": 0} | style)


def ellipses(
    ax: Axes, mixture: GaussianMixture, index: Tensor, *, deviations: float = 2.0, **style
) -> Axes:
    """Ellipses of the covariances of the planar centres `index`, at `deviations` standard deviations."""
    style = {"facecolor": "none", "edgecolor": COLORS[1], "linewidth": 1.2} | style
    tril = mixture.precision_tril[index].detach()
    values, vectors = torch.linalg.eigh(torch.cholesky_inverse(tril))
    for center, variance, axes in zip(
        mixture.centers[index].detach(), values, vectors, strict=True
    ):
        minor, major = 2 * deviations * variance.sqrt()
        angle = torch.rad2deg(torch.atan2(axes[1, 1], axes[0, 1]))
        ax.add_patch(
            Ellipse(center.tolist(), float(major), float(minor), angle=float(angle), **style)
        )
    ax.autoscale_view()
    ax.set_aspect("equal")
    return ax


def order_of_convergence(ax: Axes, step: Tensor, error: Tensor, order: float, **style) -> Axes:
    """Log-log plot of errors against step sizes, with a line of the expected order just below."""
    step, error = _array(step), _array(error)
    ax.loglog(step, error, "o-", **style)
    guide = 0.5 * error[-1] * (step / step[-1]) ** order
    ax.loglog(step, guide, ":", color=INK, label=f"order {order:g}")
    ax.legend()
    return ax
