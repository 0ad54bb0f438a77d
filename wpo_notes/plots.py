"""Figures of the book: each function takes an `ax`, draws on it and returns it.

Chapters: all. It and `_figures` are the only modules that import matplotlib.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image
from torch import Tensor

from wpo_notes.mixture import GaussianMixture

__all__ = [
    "COLORS",
    "INK",
    "Animation",
    "animation",
    "density",
    "density_grid",
    "ellipses",
    "image",
    "order_of_convergence",
    "samples",
    "use_style",
]

# Okabe and Ito's palette without its black and yellow, distinct for colour-blind readers. Its orange and its
# sky blue are darkened (from #E69F00 and #56B4E9), so that each colour has contrast 3 on white and on dark pages.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B98300", "#4A90C8")
# Text and axes: a grey with contrast 4.3 on white and 4.4 on the dark theme's #121212. No colour
# has more on both: the product of the two contrasts is 18.7 for any of them.
INK = "#7a7a7a"


def use_style() -> None:
    """Set the book's style: transparent background, grey ink, one palette."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": mpl.rcsetup.cycler(color=COLORS),
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


def samples(ax: Axes, x: Tensor, **style: Any) -> Axes:
    """Scatter planar points (n, 2) with equal axes."""
    points = _array(x)
    dots: dict[str, Any] = {"s": 2, "linewidths": 0, "color": COLORS[0], "alpha": 0.6}
    ax.scatter(points[:, 0], points[:, 1], **dots | {"rasterized": True} | style)
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


def image(
    ax: Axes, values: Tensor, extent: tuple[float, float, float, float], **style: Any
) -> Axes:
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
    **style: Any,
) -> Axes:
    """Image of the density exp(log_prob) on (left, right, bottom, top), see `density_grid`."""
    values = density_grid(log_prob, extent, resolution=resolution, dtype=dtype, device=device)
    return image(ax, values, extent, **{"vmin": 0} | style)


def ellipses(
    ax: Axes, mixture: GaussianMixture, index: Tensor, *, deviations: float = 2.0, **style: Any
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


def order_of_convergence(ax: Axes, step: Tensor, error: Tensor, order: float, **style: Any) -> Axes:
    """Log-log plot of errors against step sizes, with a line of the expected order just below."""
    steps, errors = _array(step), _array(error)
    ax.loglog(steps, errors, "o-", **style)
    guide = 0.5 * errors[-1] * (steps / steps[-1]) ** order
    ax.loglog(steps, guide, ":", color=INK, label=f"order {order:g}")
    ax.legend()
    return ax


# The theme of a page may set `display` on images, so what is hidden is hidden here too. On paper there is
# the still alone, whichever frame the reader has left on the screen.
_STYLE = """
.animation img { display: block; width: 100%; height: auto; margin: 0 auto; }
.animation [hidden] { display: none; }
.animation-controls {
  display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center; padding: .3rem;
}
.animation-controls input { flex: 1 1 10rem; min-width: 0; height: 1.5rem; }
.animation-controls button { min-width: 4rem; min-height: 1.8rem; }
@media (prefers-reduced-motion: reduce) { .animation-controls button { display: none; } }
@media print {
  .animation img, .animation .animation-controls { display: none; }
  .animation img[data-still] { display: block !important; }
}
"""

# Nothing moves before the reader moves it. The arrow keys go one frame on or back: the browser's own
# behaviour of a slider.
_SCRIPT = """
(root => {
  const frames = root.querySelectorAll("img");
  const slider = root.querySelector("input");
  const button = root.querySelector("button");
  let timer = 0;
  const show = () => {
    frames.forEach((frame, k) => { frame.hidden = k !== slider.valueAsNumber; });
    slider.setAttribute("aria-valuetext", frames[slider.valueAsNumber].dataset.label);
  };
  const pause = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  const step = () => {
    slider.stepUp();
    show();
    if (slider.value === slider.max) pause();
  };
  button.onclick = () => {
    if (timer) return pause();
    if (slider.value === slider.max) slider.value = 0;
    show();
    button.textContent = "Pause";
    timer = setInterval(step, 250);
  };
  slider.oninput = () => { pause(); show(); };
  root.querySelector(".animation-controls").hidden = false;
})"""


@dataclass(frozen=True)
class Animation:
    """Frames with a slider in Jupyter and on the site, one still image elsewhere; see `animation`."""

    frames: list[bytes]
    png: bytes
    labels: list[str]
    name: str
    alt: str
    slider: str
    still: int
    width: float  #: inches

    def __repr__(self) -> str:
        return f"{self.alt} ({len(self.frames)} frames, {self.labels[0]} to {self.labels[-1]})"

    def _repr_png_(self) -> bytes:
        return self.png

    def _repr_html_(self) -> str:
        labels, alt = [html.escape(label) for label in self.labels], html.escape(self.alt)
        images = "\n".join(
            f'<img src="data:image/webp;base64,{base64.b64encode(frame).decode()}" '
            f'alt="{label}. {alt}" data-label="{label}"{" data-still" if k == self.still else " hidden"}>'
            for k, (frame, label) in enumerate(zip(self.frames, labels, strict=True))
        )
        # Browsers that restore a form's state on reload would part the slider from the frame.
        return f"""<div class="animation" id="{self.name}-frames" style="max-width: {self.width:g}in">
<style>{_STYLE}</style>
{images}
<div class="animation-controls" hidden>
<button type="button">Play</button>
<label for="{self.name}-slider">{html.escape(self.slider)}</label>
<input type="range" id="{self.name}-slider" min="0" max="{len(labels) - 1}" value="{self.still}"
 aria-valuetext="{labels[self.still]}" autocomplete="off">
</div>
<script>{_SCRIPT}(document.getElementById("{self.name}-frames"));</script>
</div>"""


def _webp(figure: Figure) -> bytes:
    """The figure as a small image, sharp at 4/3 of the 96 pixels that a page has an inch."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=128)
    # Fewer shades on the smooth edges of lines and letters: half the bytes, and no difference to the eye.
    shades = Image.open(drawn).quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    shades.convert("RGBA").save(small, format="webp", lossless=True)
    return small.getvalue()


def animation(
    figure: Figure,
    draw: Callable[[int], object],
    labels: Sequence[str],
    *,
    name: str,
    alt: str,
    slider: str,
    still: int = 0,
) -> Animation:
    """Frames of one figure with a slider, in a page that needs no server and no other host.

    (Matplotlib's own `Animation.to_jshtml` loads its buttons' font from another host.) The frames are
    WebP images inside the HTML. Without JavaScript, in print and in LaTeX there is the still. The same
    figures give the same bytes. Closes the figure.

    Args:
        figure: the figure, with its limits set; the layout is that of the first frame throughout.
        draw: draw(k) changes the figure's artists to frame k.
        labels: one a frame, at least two; stands above the frame and is what the slider's value reads.
        name: start of the ids of the HTML: unique on the page, letters, digits and hyphens.
        alt: what the frames show, for readers who do not see them.
        slider: name of the slider, such as the variable that it changes.
        still: index of the frame that is shown first, and alone where nothing can move.

    Raises:
        ValueError: fewer than two labels, no description, a still that is no frame, a name that is no id.
    """
    if len(labels) < 2:
        raise ValueError(
            f"labels must name at least 2 frames, got {len(labels)}: show a single picture as a figure"
        )
    if not 0 <= still < len(labels):
        raise ValueError(f"still must be a frame, 0 to {len(labels) - 1}, got {still}")
    if not alt.strip() or not slider.strip():
        raise ValueError(
            "alt and slider must say in words what the frames show and what moves them"
        )
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(
            f"name must be letters, digits and hyphens after a first letter, got {name!r}: it makes ids"
        )

    title = figure.suptitle("", fontsize="medium", parse_math=False)
    frames, png = [], io.BytesIO()
    for k, label in enumerate(labels):
        draw(k)
        title.set_text(label)
        if k == 0:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        frames.append(_webp(figure))
        if k == still:
            figure.savefig(png, format="png")
    plt.close(figure)
    width = figure.get_figwidth()
    return Animation(frames, png.getvalue(), list(labels), name, alt, slider, still, width)
