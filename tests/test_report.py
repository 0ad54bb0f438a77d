"""The report: its numbers against scikit-learn, its verdicts on a model that copies, and its page."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_iris
from sklearn.neighbors import KernelDensity

from wpo_notes import report
from wpo_notes.__main__ import main
from wpo_notes._tables import write_table
from wpo_notes.mixture import GaussianMixture

NASTY = '<script>alert("x")</script> & $ \\frac'


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def two_laws(n=300):
    """Two narrow normal laws in very different units."""
    x = torch.randn(n, 2, generator=rng(), dtype=torch.float64)
    x[::2, 0] += 12
    return x * torch.tensor([30.0, 0.03], dtype=torch.float64)


@pytest.fixture(scope="module")
def found():
    return report.findings(two_laws(), generator=rng(1), centers=10, steps=3, progress=False)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_competitors_are_judged_in_the_units_of_the_data(found):
    """Of the first round alone, against SciPy and scikit-learn in the data's own units."""
    assert (found.rounds, found.judged) == (5, 300)
    one = report._round(
        found.training, found.held_out, rng(), {"centers": 10, "steps": 0, "progress": False}
    )
    training, held_out = found.training.numpy(), found.held_out.numpy()
    gaussian = multivariate_normal(training.mean(0), np.cov(training.T), allow_singular=False)
    np.testing.assert_allclose(
        one.log_density["one Gaussian"].numpy(), gaussian.logpdf(held_out), rtol=1e-6
    )
    scale = training.std(0, ddof=1)
    bandwidth = float(re.match(r"bandwidth ([\d.]+)", one.chosen["isotropic KDE"])[1])
    kde = KernelDensity(bandwidth=bandwidth).fit(training / scale)
    np.testing.assert_allclose(
        one.log_density["isotropic KDE"].numpy(),
        kde.score_samples(held_out / scale) - np.log(scale).sum(),
        atol=0.15,  # the bandwidth is rounded in the text
    )
    assert one.chosen["EM mixture (BIC)"] == "2 components"


def test_two_laws_are_told_from_one_gaussian(found):
    kernel, gaussian, *_ = found.competitors
    assert kernel.lead is None
    # one Gaussian of std about 6 for two of std 1: log 6 - log 2 = 1.1 nats
    assert 0.8 < gaussian.lead.value < 1.4
    assert gaussian.lead.value == pytest.approx(
        kernel.log_density.value - gaussian.log_density.value
    )
    assert "likelier than one Gaussian" in report._verdict(kernel, found.competitors[1:])


def test_honest_samples_are_no_copies_and_copies_are(found):
    assert abs(found.panel.copying_score) < report._CLEAR
    assert "no sign of copying" in report._copying(found)
    assert found.null.copying_score == pytest.approx(0)
    copies = found.training + 1e-3 * found.training.std(0) * torch.randn(
        found.training.shape, generator=rng(), dtype=torch.float64
    )
    z = [
        (part - found.training.mean(0)) / found.training.std(0)
        for part in (copies, found.training, found.held_out)
    ]
    copied = found._replace(panel=report.memorisation(*z))
    assert "The model copies" in report._copying(copied)
    blurred = found._replace(panel=found.panel._replace(copying_score=8.0))
    assert "wider than the data" in report._copying(blurred)


def test_a_model_no_better_than_a_gaussian_says_so():
    x = torch.randn(100, 2, generator=rng(3), dtype=torch.float64)
    found = report.findings(x, generator=rng(), centers=10, steps=0, progress=False)
    page = report.page(found, title="normal samples")
    assert "not clearly better than one Gaussian" in page
    assert "Only 100 rows judge" in page


def test_too_many_centers_names_all_rows_and_those_of_the_fit():
    x = two_laws()
    message = f"of the {len(x)} rows, {len(x) * 4 // 5} are fitted: .* with 400 centres are too few"
    with pytest.raises(ValueError, match=message):
        report.findings(x, generator=rng(), centers=400, steps=0, progress=False)


def test_page_is_complete_in_itself_and_escapes_what_it_is_given(found):
    page = report.page(
        found, title=NASTY, columns=(NASTY, "b"), notes=[f"Column '{NASTY}' is odd."]
    )
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "link", "iframe", "object")]
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    images = [about for tag, about in parsed.tags if tag == "img"]
    assert len(images) == 3
    for about in images:
        assert about["src"].startswith("data:image/png;base64,")
        assert len(about["alt"]) > 40
    assert parsed.text.count(NASTY) >= 4  # title, heading, names, warning
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in parsed.tags
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(
        r"\$\w", parsed.text.replace(NASTY, "")
    )  # no place of the template is left


@pytest.mark.parametrize("columns", [[0], [0, 1, 2, 3]])
def test_command_writes_a_page_on_iris(tmp_path, columns, capsys):
    names = tuple(load_iris().feature_names[k] for k in columns)
    values = load_iris().data[:, columns]
    if len(columns) == 1:
        values = values + np.random.RandomState(0).uniform(-0.05, 0.05, values.shape)
    write_table(tmp_path / "iris.csv", names, values)
    out = tmp_path / "report.html"
    main(
        ["report", str(tmp_path / "iris.csv"), "--out", str(out), "--centers", "10", "--steps", "2"]
    )
    page = out.read_text(encoding="utf-8")
    assert "Kernel model of iris.csv" in page
    assert all(name in page for name in names)
    printed, warned = capsys.readouterr()
    assert printed.count("nats a held-out row") == 4
    if len(columns) > 1:
        assert "row 143 is row 102 again" in page
        assert "has only 22 values in 149 rows" in warned


def test_more_columns_than_are_drawn_have_exact_marginals():
    x = torch.randn(400, 6, generator=rng(2), dtype=torch.float64)
    found = report.findings(x, generator=rng(), centers=10, steps=0, progress=False)
    assert "The first 4 of 6 columns" in report.page(found, title="six")
    assert isinstance(found.mixture, GaussianMixture)
