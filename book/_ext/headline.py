"""Draws the figure of the README: ``book/_static/headline.png``, by ``make figure`` (half a minute)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from wpo_notes import plots
from wpo_notes.datasets import get
from wpo_notes.fit import fit_kernel_model

TARGET = Path(__file__).resolve().parents[1] / "_static" / "headline.png"


def main() -> None:
    """Fit the kernel model to thin moons and draw data, learned ellipses, density and samples."""
    generator = torch.Generator().manual_seed(0)
    x = get("moons").sample(10_000, generator=generator)
    model = fit_kernel_model(x, generator=generator)
    with torch.no_grad():
        mixture = model()
    plots.use_style()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.1))
    plots.samples(axes[0], x[:3000])
    count = len(mixture.centers)
    shown = torch.randperm(count, generator=generator)[:60]
    plots.ellipses(axes[1], mixture, shown, linewidth=0.8)
    extent = (-3.3, 3.3, -1.9, 1.9)
    plots.density(axes[2], mixture.log_prob, extent, resolution=400, dtype=x.dtype)
    plots.samples(axes[3], mixture.sample((3000,), generator=generator))
    titles = ("data", f"60 of {count} learned kernels", "density", "new samples")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
