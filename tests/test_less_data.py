"""Less data, less time: the estimators find what they should, the clock stands when it should."""

import inspect
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture

from wpo_notes import datasets
from wpo_notes.denoiser import ScoreNetwork
from wpo_notes.experiments import estimators, less_data
from wpo_notes.experiments.denoising import denoiser_log_prob
from wpo_notes.experiments.estimators import Stopwatch
from wpo_notes.experiments.less_data import EstimatorRun
from wpo_notes.fit import FitResult, fit, fit_kernel_model
from wpo_notes.mixture import GaussianMixture

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def two_clusters():
    centers = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    covariance = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]])
    return GaussianMixture.from_covariance(
        centers, covariance, log_weights=torch.tensor([0.3, 0.7]).log()
    )


def test_mixture_finds_the_number_of_components(two_clusters):
    x = two_clusters.sample((2000,), generator=rng())
    found = estimators.bic_mixture(x, 0, Stopwatch())
    assert found.chosen == 2
    same = SklearnMixture(2, max_iter=200, random_state=0).fit(x.double().numpy())
    expected = torch.from_numpy(same.score_samples(x.double().numpy())).float()
    torch.testing.assert_close(found.log_prob(x), expected, rtol=1e-4, atol=1e-4)


def test_mixture_search_stops_after_two_worse_sizes(monkeypatch):
    tried = []

    class Counted(SklearnMixture):
        def fit(self, points):
            tried.append(self.n_components)
            return super().fit(points)

    monkeypatch.setattr(estimators, "SklearnMixture", Counted)
    x = torch.randn(400, 2, generator=rng())
    assert estimators.bic_mixture(x, 0, Stopwatch()).chosen == 1
    assert tried == [1, 2, 3]
    tried.clear()
    estimators.bic_mixture(x[:12], 0, Stopwatch())
    assert tried == [1, 2]  # five points a component at least


def test_kde_uses_all_points_with_the_validated_variance():
    x = torch.randn(300, 2, generator=rng())
    found = estimators.kde(x, 0, Stopwatch())
    expected = GaussianMixture.from_variance(x, found.chosen).log_prob(x)
    torch.testing.assert_close(found.log_prob(x), expected)
    held_out, fitted = x[:60], x[60:]

    def likelihood(variance):
        return float(GaussianMixture.from_variance(fitted, variance).log_prob(held_out).mean())

    for factor in (0.7, 1.4):
        assert likelihood(factor * found.chosen) < likelihood(found.chosen)


def test_denoiser_stops_when_the_held_out_likelihood_falls_and_trains_on_all(monkeypatch):
    # Likelihoods by the number of steps; the network is replaced by a normal law of that mean.
    mean = {250: 2.0, 500: 1.0, 1000: 0.1, 2000: 0.5, 4000: 0.0}
    trained = []

    def train(x, seed, *, steps):
        trained.append((len(x), steps))
        return lambda y: -0.5 * (y - mean[steps]).square().sum(-1)

    monkeypatch.setattr(estimators, "_trained_denoiser", train)
    x = torch.zeros(50, 2)
    watch = Stopwatch(lambda log_prob: {"kl": -float(log_prob(x[:1]))})
    found = estimators.denoiser(x, 0, watch)
    assert found.chosen == 1000
    assert trained == [(40, 250), (40, 500), (40, 1000), (40, 2000), (50, 1000)]
    kls = [entry["kl"] for entry in watch.history]
    assert kls == pytest.approx([4.0, 1.0, 0.01, 0.25])


@pytest.mark.parametrize(("n", "centers"), [(50, 10), (200, 20), (20_000, 1000)])
def test_algorithm_1_has_a_tenth_of_the_points_as_centres(n, centers, monkeypatch):
    asked = {}

    def fake(x, **options):
        asked.update(options)
        mixture = GaussianMixture.from_variance(x[: options["centers"]], 1.0)
        return lambda: mixture

    monkeypatch.setattr(estimators, "fit_algorithm_1", fake)
    found = estimators.algorithm_1(torch.randn(n, 2, generator=rng()), 0, Stopwatch())
    assert found.chosen == asked["centers"] == centers
    assert asked["leave_one_out"]


def test_kernel_model_is_the_default_fit_and_watched_with_fewer_steps(monkeypatch):
    asked = []

    def fake(x, *, generator, progress, **options):
        asked.append((generator.initial_seed(), options))
        return lambda: GaussianMixture.from_variance(x[:4], 1 + len(asked))

    monkeypatch.setattr(estimators, "fit_kernel_model", fake)
    x = torch.randn(50, 2, generator=rng())
    found = estimators.kernel_model(x, 7, Stopwatch())
    assert asked == [(7, {})]
    assert found.chosen == 4
    expected = GaussianMixture.from_variance(x[:4], 2.0)
    torch.testing.assert_close(found.log_prob(x), expected.log_prob(x))

    asked.clear()
    watch = Stopwatch(lambda log_prob: {"kl": float(log_prob(x).mean())})
    estimators.kernel_model(x, 7, watch)
    shorter = [(7, {"centers": 4, "steps": steps}) for steps in estimators.KERNEL_STEPS]
    assert asked == [(7, {}), *shorter]
    assert len(watch.history) == len(shorter)
    default = inspect.signature(fit_kernel_model).parameters["steps"].default
    assert estimators.KERNEL_STEPS[-1] == default


def test_likelihood_of_a_stiff_flow_is_that_of_the_flow():
    x = datasets.get("swissroll").sample(300, generator=rng(), dtype=torch.float32)
    network = ScoreNetwork(2, hidden=(32, 32), data_std=1.4, dtype=x.dtype, generator=rng())
    loss = estimators.denoising_loss(0.01, 10.0)
    fit(network, x, steps=200, loss=loss, generator=rng(), progress=False)
    exact = denoiser_log_prob(network.double(), x[:50].double(), 0.01, 10.0)  # tolerance 1e-9
    found = estimators.stiff_log_prob(network.float(), x[:50], 0.01, 10.0)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-3)


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_clock_stands_while_divergences_are_measured():
    def divergence(log_prob):
        busy(0.2)
        return {"kl": log_prob(0.0)}

    watch = Stopwatch(divergence)
    busy(0.05)
    watch.note(lambda y: y + 1, 3.0)

    def estimate():
        busy(0.1)
        return lambda y: y + 2

    watch.aside(estimate)
    assert watch.seconds == pytest.approx(0.05, abs=0.03)
    assert 0.03 < watch.wall < 1.0
    first, second = watch.history
    assert first == {"processor_seconds": 3.0, "kl": 1.0}
    assert second["processor_seconds"] == pytest.approx(0.1, abs=0.03)
    assert second["kl"] == 2.0


def test_clock_without_a_divergence_makes_no_other_estimates():
    watch = Stopwatch()
    watch.aside(lambda: pytest.fail("made"))
    watch.note(lambda y: pytest.fail("measured"), 1.0)
    assert watch.history == []


def test_run_measures_the_estimate_on_fresh_points():
    settings = EstimatorRun("kde", "swissroll", 400, seed=3, measured=1000)
    result = settings.run(device=CPU)
    law = datasets.get("swissroll")
    x = law.sample(400, generator=rng(3), dtype=torch.float32)
    fresh = law.sample(1000, generator=rng(10_003), dtype=torch.float32)
    difference = law.log_prob(fresh) - estimators.kde(x, 3, Stopwatch()).log_prob(fresh)
    assert result.metrics["kl"] == pytest.approx(float(difference.mean()), rel=1e-5)
    error = float(difference.std()) / math.sqrt(1000)
    assert result.metrics["kl_error"] == pytest.approx(error, rel=1e-5)
    assert result.history == []
    assert result.metrics["processor_seconds"] > 0
    assert result.seconds > 0


def test_more_points_give_a_lower_divergence():
    few, many = (
        EstimatorRun("mixture", "swissroll", n, seed=0).run(device=CPU).metrics["kl"]
        for n in (100, 3000)
    )
    assert 0 < many < few / 5


def test_watched_run_has_the_history_of_the_training(monkeypatch):
    quick = partial(fit_kernel_model, members=2)
    monkeypatch.setattr(
        estimators,
        "fit_kernel_model",
        lambda x, **options: quick(x, **({"centers": 20, "steps": 30} | options)),
    )
    monkeypatch.setattr(estimators, "KERNEL_STEPS", (0, 30))
    settings = EstimatorRun("kernel model", "swissroll", 300, seed=0, watched=True, measured=1000)
    result = settings.run(device=CPU)
    start, end = result.history
    assert 0 < start["processor_seconds"] < end["processor_seconds"]
    # the last is the same fit, measured on two fifths of the points
    assert end["kl"] == pytest.approx(result.metrics["kl"], abs=4 * end["kl_error"])
    assert result.metrics["processor_seconds"] < 2 * end["processor_seconds"] + 0.5
    plain = replace(settings, watched=False).run(device=CPU)
    assert plain.metrics["kl"] == result.metrics["kl"]


def test_denoiser_of_the_paper_is_trained_as_it_says(monkeypatch):
    asked = {}

    def fake(network, x, **options):
        asked.update(options, hidden=[layer.out_features for layer in network.network[::2]])
        return FitResult(network, [], 0.0)

    monkeypatch.setattr(estimators, "fit", fake)
    x = torch.randn(50, 2, generator=rng())
    log_prob = estimators._trained_denoiser(x, 0, steps=9)
    assert asked["steps"] == 9
    assert asked["hidden"] == [64] * 5 + [2]
    # untrained, the density is the normal one with the data's deviation and the least noise
    std = math.hypot(float(x.std(0).mean()), estimators.NOISE[0])
    normal = torch.distributions.Normal(0.0, std).log_prob(x).sum(-1)
    torch.testing.assert_close(log_prob(x), normal, rtol=0, atol=5e-3)  # the solver's tolerance


def test_cases_watch_the_trained_at_one_size():
    cases = less_data.cases("paper")
    assert len(cases) == 3 * 5 * 4 * 3 + 5 * 3  # and denoising on the other five laws
    watched = {(c.settings.method, c.settings.n) for c in cases if c.settings.watched}
    assert watched == {(method, 10_000) for method in ("kernel model", "denoising")}
    assert {c.settings.n for c in less_data.cases("quick")} == {100, 1000}
    few = less_data.cases("paper", data="moons", seed=5)
    assert {(c.settings.data, c.settings.seed) for c in few} == {("moons", 5)}
