"""Ablation: the default variant is `fit_kernel_model`, and each change is the one it is named for."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal

from wpo_notes import datasets
from wpo_notes._clusters import clusters
from wpo_notes.experiments import ablation, runs
from wpo_notes.experiments.ablation import (
    Ablation,
    Comparison,
    Variant,
    negative_log_likelihood,
    pooled,
    train,
)
from wpo_notes.experiments.kernel import widths
from wpo_notes.fit import fit, fit_kernel_model
from wpo_notes.losses import implicit_score_matching
from wpo_notes.mixture import GaussianMixture

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def x():
    return datasets.get("swissroll").sample(600, generator=rng(), dtype=torch.float64)


def small(**changes):
    return Variant(**{"centers": 6, "steps": 20, "batch_size": 64} | changes)


class Given(torch.nn.Module):
    """A model that is what it is."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self):
        return self.mixture


def same(one, other, **tolerance):
    for name in ("centers", "precision_tril", "log_weights"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)


@pytest.fixture
def mixture():
    factor = torch.randn(5, 2, 2, dtype=torch.float64, generator=rng(1))
    covariance = factor @ factor.mT + 0.1 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture.from_covariance(
        torch.randn(5, 2, dtype=torch.float64, generator=rng(2)), covariance
    )


def test_default_variant_starts_as_fit_kernel_model(x):
    model = fit_kernel_model(x, centers=30, steps=0, generator=rng(3), progress=False)
    same(pooled(train(x, small(steps=0), generator=rng(3))), model(), rtol=0, atol=1e-12)


def test_default_variant_is_trained_as_fit_kernel_model(x, monkeypatch):
    """On batches of all points: else the two draw different ones, since the members are trained side by side there."""
    draw = torch.randint

    def all_of_them(high, size, **options):
        return torch.arange(high) if size else draw(high, size, **options)

    monkeypatch.setattr(torch, "randint", all_of_them)
    fitted = fit_kernel_model(x, centers=30, steps=20, generator=rng(3), progress=False)()
    own, start = (pooled(train(x, small(steps=k), generator=rng(3))) for k in (20, 0))
    one, other, before = (mixture.log_prob(x).detach() for mixture in (own, fitted, start))
    # There a kernel's largest width is relative to the spread of all members' centres, here to that of its member's:
    # six random clusters spread by a few hundredths more or less.
    assert float((one - other).abs().mean()) < 0.05 * float((one - before).abs().mean())


def test_default_settings_are_those_of_fit_kernel_model():
    defaults = inspect.signature(fit_kernel_model).parameters
    for name in ("members", "steps", "batch_size", "lr"):
        assert getattr(Variant(), name) == defaults[name].default


def test_likelihood_is_that_of_torch(mixture, x):
    expected = -mixture.to_torch().log_prob(x).mean()
    torch.testing.assert_close(negative_log_likelihood(mixture, x), expected)


def test_narrow_widths_are_the_covariances_least(mixture):
    least = torch.linalg.eigvalsh(torch.cholesky_inverse(mixture.precision_tril))[:, 0]
    torch.testing.assert_close(widths(mixture)[1].square(), least)


def test_pooled_density_is_the_mean(x):
    members = train(x, small(members=3), generator=rng())
    mean = torch.stack([member.log_prob(x) for member in members]).exp().mean(0)
    torch.testing.assert_close(pooled(members).log_prob(x).exp(), mean)


def test_start_only_is_the_clusters_in_the_points_units(x):
    variant = small(steps=0, members=1, standardised=False)
    (member,) = train(x, variant, generator=rng(5))
    generator = rng(5)
    torch.randperm(len(x), generator=generator)  # the folds
    start = clusters(x, 6, generator=generator)
    same(member, start, rtol=1e-9, atol=1e-9)


def test_units_do_not_matter_unless_asked_for():
    def kl(factor, **changes):
        # Rounding in float32 differs, and twenty steps of Adam enlarge that: the margin is for it.
        settings = Ablation("swissroll", 0, small(**changes), n=500, measured=500, stretch=factor)
        return settings.run(device=CPU).metrics["kl"]

    assert kl(10.0) == pytest.approx(kl(1.0), abs=1e-3)
    assert abs(kl(10.0, standardised=False) - kl(1.0, standardised=False)) > 1e-2


def test_fixed_centres_stay_and_others_move(x):
    kept, moved, start = (
        train(x, small(members=1, **changes), generator=rng())[0].centers
        for changes in ({"moving": False}, {}, {"steps": 0})
    )
    torch.testing.assert_close(kept, start)
    assert (moved - start).norm(dim=1).min() > 1e-4
    network = train(x, small(members=1, precisions="network"), generator=rng())[0]
    torch.testing.assert_close(network.centers, start)


@pytest.mark.parametrize("own", ["scored", "left out", "disjoint"])
def test_points_as_centres(x, own, monkeypatch):
    """Which points are trained on, and which centre is left out where."""
    seen = {}
    loss = ablation.implicit_score_matching

    def noted(mixture, batch, *, exclude=None):
        seen.setdefault("batch", []).append(batch)
        seen.setdefault("exclude", []).append(exclude)
        return loss(mixture, batch, exclude=exclude)

    monkeypatch.setattr(ablation, "implicit_score_matching", noted)
    variant = small(start="points", own=own, members=1, moving=False, standardised=False)
    (member,) = train(x, variant, generator=rng())
    assert len(member.centers) == 6
    equal = (torch.cat(seen["batch"])[:, None] == member.centers).all(-1)
    is_center = equal.any(1)
    if own == "disjoint":
        assert not is_center.any()
    else:
        assert is_center.any()
    if own == "left out":
        exclude = torch.cat(seen["exclude"])
        assert torch.equal(exclude >= 0, is_center)
        assert torch.equal(exclude[is_center], equal[is_center].int().argmax(1))
    else:
        assert all(exclude is None for exclude in seen["exclude"])


def test_noise_matches_the_law_and_the_model_alike(x):
    """Of normal laws, by its formula: least where the model is the law."""
    start = GaussianMixture(x[:2], torch.eye(2, dtype=x.dtype).expand(2, 2, 2))
    variant = Variant(noise=(2.0, 3.0))
    loss = ablation._loss(variant, start, lambda mixture: mixture, None)
    points = torch.randn(200_000, 2, dtype=x.dtype, generator=rng())

    def value(variance):
        mixture = GaussianMixture.from_variance(torch.zeros(1, 2, dtype=x.dtype), variance)
        return float(loss(Given(mixture), points, None, rng(1)))

    def expected(variance):
        # the start's kernels are one wide; N(0, variance + v) scored on N(0, 1 + v), weighted by v
        terms = [v * 2 * ((1 + v) / (variance + v) ** 2 - 2 / (variance + v)) for v in (4.0, 9.0)]
        return sum(terms) / 13

    for variance in (0.5, 1.0, 2.0):
        # the standard error is about 2e-3 / sqrt(v)
        assert value(variance) == pytest.approx(expected(variance), abs=5e-3)
    assert expected(1.0) < min(expected(0.9), expected(1.1))


def test_bounds_hold(mixture):
    start = GaussianMixture.from_variance(torch.randn(4, 2, dtype=torch.float64), 0.04)
    bounded = ablation._bounds(start, Variant(floor=0.5, ceiling=0.7))(mixture)
    variances = torch.linalg.eigvalsh(torch.cholesky_inverse(bounded.precision_tril))
    assert variances.min() >= 0.1**2
    assert variances.max() <= 0.7**2 + 0.1**2
    free = torch.linalg.eigvalsh(torch.cholesky_inverse(mixture.precision_tril))
    torch.testing.assert_close(variances, 1 / (1 / free + 1 / 0.7**2) + 0.1**2)


def test_weights_by_expectation_maximisation_raise_the_likelihood(x):
    (kept,), (reweighed,) = (
        train(x, small(members=1, reweighed=value, standardised=False), generator=rng())
        for value in (False, True)
    )
    torch.testing.assert_close(kept.centers, reweighed.centers)
    assert reweighed.log_prob(x).mean() > kept.log_prob(x).mean()
    # At the optimum of the weights the mean responsibilities are the weights.
    torch.testing.assert_close(
        reweighed.responsibilities(x).mean(0), reweighed.log_weights.exp(), rtol=0, atol=1e-2
    )


def test_divergence_is_that_of_normal_laws():
    law, model = (
        MultivariateNormal(torch.full((2,), mean).double(), torch.eye(2).double())
        for mean in (0.0, 0.5)
    )
    torch.manual_seed(0)
    points = law.sample((100_000,))
    found = ablation._divergence(law.log_prob(points), model.log_prob(points))
    assert found["kl"] == pytest.approx(0.25, abs=4 * found["kl_error"])
    assert found["kl_error"] == pytest.approx(math.sqrt(0.5 / 100_000), rel=0.02)


@pytest.fixture
def short(monkeypatch):
    """Few steps of small batches, as in the defaults otherwise."""

    def few(*arguments, **options):
        return fit(*arguments, **options | {"steps": 5, "batch_size": 32})

    monkeypatch.setattr(ablation, "fit", few)
    monkeypatch.setattr(
        ablation, "fit_kernel_model", partial(fit_kernel_model, steps=5, batch_size=32)
    )


@pytest.mark.parametrize("method", ablation.METHODS)
def test_comparison_measures_each_method(short, method):
    metrics = Comparison(method, "8gaussians", 0, n=300, measured=300).run(device=CPU).metrics
    assert 0 < metrics["kl"] < 1
    assert metrics["chosen"] > 0


def test_likelihood_is_the_default_with_the_other_objective(x, short, monkeypatch):
    monkeypatch.setattr(ablation, "negative_log_likelihood", implicit_score_matching)
    log_prob, chosen = ablation._likelihood(x, x, 0, rng(7))
    model = ablation.fit_kernel_model(x, generator=rng(7), progress=False)
    assert chosen == len(model().centers)
    torch.testing.assert_close(log_prob(x), model().log_prob(x))


def test_oracle_is_the_best_of_the_isotropic_ones():
    x, fresh = (
        datasets.get("moons").sample(300, generator=rng(k), dtype=torch.float64) for k in (0, 1)
    )
    (oracle, variance), (other, _) = (
        ablation.METHODS[name](x, fresh, 0, rng()) for name in ("oracle KDE", "KDE")
    )
    best = oracle(fresh).mean()
    assert best >= other(fresh).mean() - 1e-6
    for factor in (0.5, 2.0):
        blurred = GaussianMixture.from_variance(x, factor * variance)
        assert best > blurred.log_prob(fresh).mean()


def test_a_run_that_stops_is_recorded():
    variant = small(start="points", lr=1e30)
    metrics = Ablation("moons", 0, variant, n=300, measured=100).run(device=CPU).metrics
    assert "training stopped" in metrics["stopped"]


def test_cases_are_distinct_and_repeatable(tmp_path):
    names = [case.name for case in ablation.cases("paper")]
    assert len(set(names)) == len(names)
    assert len(ablation.cases("paper", data="rings", seed=1)) == len(ablation.METHODS)
    case = runs.Case("ablation", "tiny", Ablation("moons", 0, small(), n=300, measured=100))
    metrics = runs.run(case, tmp_path).metrics
    again = case.record().metrics
    assert metrics.pop("processor_seconds") > 0
    assert again.pop("processor_seconds") > 0
    assert metrics == again
    # Jensen's inequality
    assert metrics["kl"] <= sum(metrics["members_kl"]) / 5
