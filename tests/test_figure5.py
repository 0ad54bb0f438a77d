"""Figure 5: kernels against the curve."""

import math

import pytest
import torch
from scipy.stats import kstest

from wpo_notes import datasets
from wpo_notes.experiments.figure5 import axes_along_curve, normal_offset
from wpo_notes.mixture import GaussianMixture


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_offset_from_a_circle_is_the_radius_less_its_own():
    law = datasets.get("rings")
    angle = 2 * math.pi * torch.rand(200, dtype=torch.float64, generator=rng())
    radius = 0.6 + 2.6 * torch.rand(200, dtype=torch.float64, generator=rng(1))
    offset = normal_offset(torch.stack([radius * angle.cos(), radius * angle.sin()], -1), law)
    rings = torch.tensor([3, 2.25, 1.5, 0.75], dtype=torch.float64)
    expected = (radius[:, None] - rings).abs().amin(1)
    torch.testing.assert_close(offset.abs(), expected, rtol=0, atol=1e-9)
    # The normal is the tangent turned left: inwards on a circle that is run through anticlockwise.
    ring = rings[(radius[:, None] - rings).abs().argmin(1)]
    torch.testing.assert_close(offset, ring - radius, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_offset_of_the_law_is_its_noise(noise):
    law = datasets.moons(noise)
    x = law.sample(10_000, generator=rng(), dtype=torch.float64)
    assert kstest(normal_offset(x, law).numpy() / law.std, "norm").pvalue > 0.01
    # and the test tells a deviation that is wrong by an eighth
    assert kstest(normal_offset(x, law).numpy() / (1.125 * law.std), "norm").pvalue < 0.01


def test_samples_scatter_by_the_centres_and_the_kernels_together():
    # Kernels along the curve, short enough for its curvature: the variances across it add.
    law = datasets.moons(0.02)
    centers = law.sample(3000, generator=rng(), dtype=torch.float64)
    tangent = law.nearest(centers).tangent
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], -1)
    axes = torch.stack([0.1 * tangent, 0.03 * normal], -1)
    mixture = GaussianMixture.from_covariance(centers, axes @ axes.mT)
    x = mixture.sample((20_000,), generator=rng(1))
    spread = float(normal_offset(x, law).square().mean().sqrt())
    # standard error of a root mean square of 20 000 values: 0.5 %; of the centres' own scatter 1.3 %
    assert spread == pytest.approx(math.hypot(law.std, 0.03), rel=0.05)


@pytest.mark.parametrize("width", [1e-7, 1.0])
def test_axes_do_not_depend_on_the_kernels_size(width):
    # Kernels that have collapsed on to their centres still have axes.
    law = datasets.get("moons")
    centers = law.sample(40, generator=rng(), dtype=torch.float64)
    tril = torch.randn(40, 2, 2, dtype=torch.float64, generator=rng(1)).tril()
    tril = torch.diagonal_scatter(tril, tril.diagonal(dim1=1, dim2=2).abs() + 1, dim1=1, dim2=2)
    plain = axes_along_curve(GaussianMixture(centers, tril), law)
    scaled = axes_along_curve(GaussianMixture(centers, tril / width), law)
    torch.testing.assert_close(scaled.angle, plain.angle)
    torch.testing.assert_close(scaled.along, width * plain.along)
    torch.testing.assert_close(scaled.across, width * plain.across)
