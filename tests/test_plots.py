from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.stats import multivariate_normal

from wpo_notes import plots
from wpo_notes.mixture import GaussianMixture


@pytest.fixture
def ax():
    with mpl.rc_context():
        figure, ax = plt.subplots()
        yield ax
        plt.close(figure)


def contrast(first: str, second: str) -> float:
    """Contrast of two colours as the Web Content Accessibility Guidelines (2.1) define it."""

    def luminance(color):
        c = np.array(to_rgb(color))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def mixture() -> GaussianMixture:
    """Three centres; the second covariance has std 3 along 30 degrees and 1 across."""
    angle = math.radians(30)
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    turned = rotation @ torch.diag(torch.tensor([9.0, 1.0], dtype=torch.float64)) @ rotation.mT
    plain = torch.diag(torch.tensor([0.25, 4.0], dtype=torch.float64))
    centers = torch.tensor([[0.0, 0.0], [1.0, -2.0], [5.0, 5.0]], dtype=torch.float64)
    return GaussianMixture.from_covariance(centers, torch.stack([plain, turned, plain]))


def test_ink_is_legible_on_light_and_on_dark_pages():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for page in ("#ffffff", "#121212"):
        assert contrast(plots.INK, page) >= 4.2
        assert all(contrast(color, page) >= 3 for color in plots.COLORS)
    assert len(set(plots.COLORS)) == len(plots.COLORS)


def test_style_is_transparent_with_grey_ink():
    with mpl.rc_context():
        plots.use_style()
        figure, ax = plt.subplots()
        assert figure.get_facecolor()[3] == 0
        assert ax.get_facecolor()[3] == 0
        assert ax.xaxis.label.get_color() == plots.INK
        (line,) = ax.plot([0, 1], [0, 1])
        assert line.get_color() == plots.COLORS[0]
        plt.close(figure)


def test_samples_draws_each_point_with_equal_axes(ax):
    x = torch.tensor([[0.0, 1.0], [2.0, -3.0]], requires_grad=True)
    assert plots.samples(ax, x, s=7, color="C3") is ax
    (cloud,) = ax.collections
    np.testing.assert_array_equal(cloud.get_offsets(), x.detach().numpy())
    assert cloud.get_sizes() == [7]
    assert ax.get_aspect() == 1


def test_density_shows_the_value_at_each_pixels_centre(ax):
    law = mixture()
    extent = (-2.0, 4.0, -5.0, 3.0)
    assert plots.density(ax, law.log_prob, extent, resolution=16) is ax
    (image,) = ax.images
    values = np.asarray(image.get_array())
    assert tuple(image.get_extent()) == extent
    # Row k from below, column j from the left: an image that is transposed or upside down fails.
    assert image.origin == "lower"
    for k, j in [(0, 0), (3, 11), (12, 2), (15, 15)]:
        point = torch.tensor(
            [-2 + 6 * (j + 0.5) / 16, -5 + 8 * (k + 0.5) / 16], dtype=torch.float64
        )
        assert values[k, j] == pytest.approx(float(law.log_prob(point).exp()), rel=1e-12)
    assert image.norm.vmin == 0


def test_density_asks_for_points_of_the_given_dtype_and_device(ax):
    asked = []

    def log_prob(x):
        asked.append(x)
        return -x.square().sum(-1)

    torch.set_default_device("meta")
    try:
        plots.density(ax, log_prob, (0, 1, 0, 1), resolution=3, dtype=torch.float32)
    finally:
        torch.set_default_device(None)
    assert asked[0].dtype == torch.float32
    assert asked[0].device.type == "cpu"
    assert asked[0].shape == (9, 2)


def test_density_grid_is_the_density_at_the_pixels_and_has_its_mass():
    # SciPy's density on points laid out by NumPy; the midpoint rule on a smooth density that the
    # rectangle holds is exact to far below 1e-6.
    law = mixture()
    extent = (-15.0, 19.0, -18.0, 17.0)
    values = plots.density_grid(law.log_prob, extent, resolution=300)
    across = np.linspace(-15, 19, 301)[:-1] + 34 / 600
    upwards = np.linspace(-18, 17, 301)[:-1] + 35 / 600
    points = np.stack(np.meshgrid(across, upwards), -1)
    expected = np.mean(
        [
            multivariate_normal(center.numpy(), covariance.numpy()).pdf(points)
            for center, covariance in zip(
                law.centers, torch.cholesky_inverse(law.precision_tril), strict=True
            )
        ],
        axis=0,
    )
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-30)
    assert float(values.sum()) * 34 * 35 / 300**2 == pytest.approx(1, abs=1e-6)


def test_image_has_the_first_row_at_the_bottom(ax):
    values = torch.tensor([[1.0, 2.0], [3.0, -4.0]], requires_grad=True)
    assert plots.image(ax, values, (0.0, 2.0, -1.0, 1.0), vmin=-4, vmax=4, cmap="PuOr") is ax
    (drawn,) = ax.images
    assert tuple(drawn.get_extent()) == (0.0, 2.0, -1.0, 1.0)
    assert drawn.origin == "lower"
    np.testing.assert_array_equal(drawn.get_array(), values.detach().numpy())
    # A signed difference of zero lies in the middle of the colours.
    assert float(drawn.norm(0.0)) == pytest.approx(0.5)


@pytest.mark.parametrize("deviations", [1.0, 2.0])
def test_ellipses_are_those_of_the_covariances(ax, deviations):
    assert plots.ellipses(ax, mixture(), torch.tensor([1, 0]), deviations=deviations) is ax
    turned, plain = ax.patches
    assert tuple(turned.get_center()) == (1.0, -2.0)
    # width and height are diameters: twice `deviations` standard deviations
    assert turned.width == pytest.approx(2 * deviations * 3)
    assert turned.height == pytest.approx(2 * deviations * 1)
    assert turned.angle % 180 == pytest.approx(30)
    assert tuple(plain.get_center()) == (0.0, 0.0)
    assert plain.width == pytest.approx(2 * deviations * 2)
    assert plain.height == pytest.approx(2 * deviations * 0.5)
    assert plain.angle % 180 == pytest.approx(90)
    assert ax.get_aspect() == 1
    low, high = ax.get_xlim()
    assert low < 1 - deviations * 2.6  # the view holds the ellipses
    assert high > 1 + deviations * 2.6


def test_boundary_of_an_ellipse_is_at_that_many_deviations(ax):
    """Mahalanobis distance of the drawn outline from the centre."""
    law = mixture()
    plots.ellipses(ax, law, torch.tensor([1]), deviations=2)
    (patch,) = ax.patches
    # The first vertices of a circle's Bezier curve lie on it, every third one.
    outline = patch.get_patch_transform().transform(patch.get_path().vertices[0:24:3])
    offset = torch.as_tensor(outline, dtype=torch.float64) - law.centers[1]
    distance = (offset @ law.precision_tril[1]).norm(dim=-1)
    torch.testing.assert_close(distance, torch.full_like(distance, 2), rtol=1e-6, atol=0)


def test_order_of_convergence_draws_data_and_a_parallel_guide(ax):
    step = 2.0 ** -torch.arange(5, dtype=torch.float64)
    error = 3 * step**2
    assert plots.order_of_convergence(ax, step, error, 2, label="error") is ax
    data, guide = ax.lines
    np.testing.assert_allclose(data.get_ydata(), error.numpy())
    slope = np.diff(np.log(guide.get_ydata())) / np.diff(np.log(guide.get_xdata()))
    np.testing.assert_allclose(slope, 2)
    assert (guide.get_ydata() < data.get_ydata()).all()
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["error", "order 2"]


# ---- animations


class Parsed(HTMLParser):
    """Elements in order, as (tag, attributes), with a check that each is closed where it should be."""

    VOID = frozenset({"img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGBA"))


def moving_bar(labels=("s = 0", "s = 1", "s = 2"), **options) -> plots.Animation:
    """Frame k is a bar that fills the k-th third of the axes."""
    with mpl.rc_context():
        plots.use_style()
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.set(xlim=(0, 3), ylim=(0, 1))
        (bar,) = ax.bar([0], [1], width=1, align="edge", color="#ff0000")
        options = {"name": "moving-bar", "alt": "A bar", "slider": "Time s"} | options
        return plots.animation(figure, bar.set_x, labels, **options)


def test_animation_is_well_formed_and_needs_no_other_host():
    text = moving_bar()._repr_html_()
    page = Parsed(text)
    assert page.open == []
    images = [image["src"] for image in page.all("img")]
    assert [image[:23] for image in images] == ["data:image/webp;base64,"] * 3
    for image in images:
        text = text.replace(image, "")
    assert not re.search(r"//\w|@import|url\(|fetch|\bhref=|\bsrc=\"[^\"]", text)
    assert "srcset" not in text
    assert not page.all("link")


def test_animation_shows_what_is_drawn_in_each_frame():
    animation = moving_bar()
    sources = [image["src"] for image in Parsed(animation._repr_html_()).all("img")]
    frames = [pixels(base64.b64decode(source.split(",")[1])) for source in sources]
    red = [
        (f[..., 0] > 200) & (f[..., 1] < 60) & (f[..., 2] < 60) & (f[..., 3] > 200) for f in frames
    ]
    middles = [np.nonzero(r)[1].mean() for r in red]
    first, second = np.diff(middles)
    # One bar's width on, each time: the layout does not move. Half a pixel is the edges' rounding.
    assert first > 60
    assert second == pytest.approx(first, abs=1)
    assert len({frame.shape for frame in frames}) == 1
    # The ground is transparent: the corners are, and most of the rest.
    assert all(frame[0, 0, 3] == 0 and (frame[..., 3] == 0).mean() > 0.5 for frame in frames)


def test_animation_has_a_slider_with_names_and_values():
    page = Parsed(moving_bar(still=1)._repr_html_())
    (slider,), (label,), (button,) = (page.all(tag) for tag in ("input", "label", "button"))
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "2")
    assert slider["value"] == "1"
    assert slider["aria-valuetext"] == "s = 1"
    assert label["for"] == slider["id"]
    assert page.text["label"] == "Time s"
    assert button["type"] == "button"
    assert page.text["button"].strip() == "Play"
    images = page.all("img")
    assert [image["alt"] for image in images] == ["s = 0. A bar", "s = 1. A bar", "s = 2. A bar"]
    # Without JavaScript there is the still alone, and no slider that does nothing.
    assert ["hidden" in image for image in images] == [True, False, True]
    assert ["data-still" in image for image in images] == [False, True, False]
    (controls,) = (a for a in page.all("div") if a["class"] == "animation-controls")
    assert "hidden" in controls
    assert "prefers-reduced-motion" in page.text["style"]
    assert "@media print" in page.text["style"]


def test_animations_of_one_page_have_ids_of_their_own():
    texts = [moving_bar(name=name)._repr_html_() for name in ("one", "two")]
    ids = [a["id"] for text in texts for _, a in Parsed(text).elements if "id" in a]
    assert sorted(ids) == ["one-frames", "one-slider", "two-frames", "two-slider"]
    assert 'getElementById("one-frames")' in texts[0]


def test_animation_is_the_same_each_time_it_is_made():
    first, second = moving_bar(), moving_bar()
    assert first._repr_html_() == second._repr_html_()
    assert first._repr_png_() == second._repr_png_()


def test_animation_escapes_what_it_is_given():
    labels = ('a < b & "c" $x$', "</script><b>", "$")  # no mathematics, and nothing to break out of
    animation = moving_bar(labels, alt="'<i>\" & more", slider="<u>t</u>")
    page = Parsed(animation._repr_html_())
    assert page.open == []
    assert {tag for tag, _ in page.elements} == {
        *("div", "style", "img", "button", "label", "input", "script")
    }
    assert [image["data-label"] for image in page.all("img")] == list(labels)
    assert page.all("img")[1]["alt"] == "</script><b>. '<i>\" & more"
    assert page.text["label"] == "<u>t</u>"


def test_animation_is_small():
    """Thirty frames of two panels of noisy lines, busier than the book's own, stay below half a megabyte."""
    with mpl.rc_context():
        plots.use_style()
        figure, axes = plt.subplots(1, 2, figsize=(5.8, 3))
        lines = [ax.plot(np.arange(40), np.zeros(40))[0] for ax in axes]
        for ax in axes:
            ax.set_ylim(-3, 3)
        noise = np.random.default_rng(0).standard_normal((30, 2, 40))

        def draw(k):
            for line, values in zip(lines, noise[k], strict=True):
                line.set_ydata(values)

        options = {"name": "noise", "alt": "Noise", "slider": "k"}
        animation = plots.animation(figure, draw, [str(k) for k in range(30)], **options)
    assert len(animation._repr_html_()) < 500_000


def test_still_of_an_animation_is_a_png_for_print():
    animation = moving_bar(still=2)
    png = animation._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.size == (480, 320)  # 3 by 2 inches at the style's 160 dots an inch
    red = (np.asarray(image.convert("RGBA")) == (255, 0, 0, 255)).all(-1)
    assert np.nonzero(red)[1].mean() > 360  # the last third
    assert "3 frames" in repr(animation)
    assert "s = 0 to s = 2" in repr(animation)


def test_animation_closes_its_figure():
    before = plt.get_fignums()
    moving_bar()
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ()}, "at least 2 frames, got 0: show a single picture as a figure"),
        ({"labels": ("s = 0",)}, "at least 2 frames, got 1"),
        ({"still": 3}, "still must be a frame, 0 to 2, got 3"),
        ({"still": -1}, "still must be a frame, 0 to 2, got -1"),
        ({"alt": " "}, "must say in words what the frames show"),
        ({"slider": ""}, "must say in words what the frames show and what moves them"),
        ({"name": "a b"}, "letters, digits and hyphens after a first letter, got 'a b'"),
        ({"name": ""}, "letters, digits and hyphens"),
    ],
)
def test_animation_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moving_bar(**options)
    plt.close("all")
