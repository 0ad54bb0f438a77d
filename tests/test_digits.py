"""The digits: the split, the units, what the validation chooses, and the measurements."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture as SklearnMixture

from wpo_notes import metrics
from wpo_notes.experiments import digits
from wpo_notes.experiments.digits import DigitsRun, MemoryRun, bits, split
from wpo_notes.mixture import GaussianMixture
from wpo_notes.structured import LowRankGaussianMixture

CPU = torch.device("cpu")
QUICK = ("clusters, low rank", "early stopping", "scaled KDE", "EM, diagonal", "factor analysis")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the images ------------------------------------------------------------------------------------


def test_split_has_every_image_once_and_the_same_test_images():
    pixels = load_digits().data
    parts = split(1000, 3)
    assert [len(part) for part in parts] == [1000, 250, 397]
    grey = np.floor(17 * torch.cat(parts).numpy())
    assert len(np.unique(grey, axis=0)) == 1647  # all images of the data set differ
    known = {image.tobytes() for image in pixels}
    assert all(image.tobytes() in known for image in grey)
    other = split(100, 0)
    assert torch.equal(parts.test, other.test)
    assert not torch.equal(parts.train[:100], other.train)
    assert torch.equal(split(100, 0).train, other.train)


def test_noise_is_uniform_in_a_grey_level():
    x = split(1000, 0).train
    assert x.dtype == torch.float64
    noise = (17 * x).frac().flatten()
    assert float(noise.min()) >= 0
    # standard errors of mean and variance for 64 000 draws: 0.0011 and 0.0003
    assert abs(float(noise.mean()) - 0.5) < 0.006
    assert abs(float(noise.var()) - 1 / 12) < 0.002


def test_split_refuses_more_images_than_there_are():
    for n in (3, 1121):
        with pytest.raises(ValueError, match="n must be from 4 to 1120"):
            split(n, 0)


def test_bits_of_known_laws():
    # the uniform law on the cube knows nothing: log2 17 bits a pixel
    assert float(bits(torch.zeros(1))) == pytest.approx(math.log2(17))
    # a law on the pixels themselves, uniform in a grey level: its entropy in bits, by the change of variables
    probabilities = np.random.default_rng(0).dirichlet(np.ones(17))
    entropy = -(probabilities * np.log2(probabilities)).sum()
    log_density = torch.from_numpy(np.log(17 * probabilities))
    expected = float((torch.from_numpy(probabilities) * bits(log_density, dim=1)).sum())
    assert expected == pytest.approx(entropy)


# ---- the models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUICK)
def test_law_has_mass_one_in_the_units_of_the_images(method):
    # E_q[p / q] = 1 for samples of another law q whose support is wide enough: p diffused by a little,
    # sampled by the method itself. Standardising without its Jacobian would miss it by e^100.
    train, validation, _ = split(60, 1)
    law = digits.METHODS[method](train, validation, rng(2))
    x = law.sample(4000, rng(3))
    assert x.shape == (4000, 64)
    log_prob = law.log_prob(x)
    entropy = -log_prob.mean()
    # The entropy of the samples under their own law lies below that of the normal law of their covariance.
    normal = 0.5 * (torch.linalg.slogdet(torch.cov(x.T))[1] + 64 * math.log(2 * math.pi * math.e))
    assert float(normal - entropy) > -0.5
    assert float(normal - entropy) < 60


@pytest.mark.parametrize(
    ("method", "trained"), [("clusters, low rank", False), ("score matching, diagonal", True)]
)
def test_restored_units_agree_with_the_change_of_variables(method, trained):
    train, validation, test = split(100, 0)
    law = digits.METHODS[method](train, validation, rng(2))
    units = digits._Units.of(train)
    torch.testing.assert_close(
        units.standardised(train).std(0), torch.ones(64, dtype=torch.float64)
    )
    own = LowRankGaussianMixture.from_variance(units.standardised(train[:5]), 0.3)
    restored = units.restored(own)
    torch.testing.assert_close(
        restored.log_prob(test),
        own.log_prob(units.standardised(test)) - units.scale.log().sum(),
    )
    assert math.isfinite(float(law.log_prob(test).mean()))
    assert ("steps" in law.chosen) == trained


def test_kde_is_the_empirical_score_with_the_best_variance():
    train, validation, test = split(80, 0)
    law = digits.kde(train, validation, rng())
    exact = GaussianMixture.from_variance(train, law.chosen["variance"])
    torch.testing.assert_close(law.log_prob(test), exact.log_prob(test))

    def likelihood(factor):
        variance = factor * law.chosen["variance"]
        return float(GaussianMixture.from_variance(train, variance).log_prob(validation).mean())

    assert likelihood(1) > max(likelihood(0.8), likelihood(1.25))


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_em_is_scikit_learn_s(covariance):
    train, validation, test = split(60, 0)
    law = digits.em(train, validation, rng(4), covariance=covariance)
    seed = int(torch.randint(2**31, (), generator=rng(4)))
    found = SklearnMixture(
        law.chosen["kernels"],
        covariance_type=covariance,
        reg_covar=law.chosen["ridge"],
        random_state=seed,
    ).fit(train.numpy())
    expected = torch.from_numpy(found.score_samples(test.numpy()))
    torch.testing.assert_close(law.log_prob(test), expected, rtol=1e-7, atol=1e-6)


def test_training_is_offered_to_the_validation_at_each_record(monkeypatch):
    train, validation, _ = split(40, 0)
    seen = []
    monkeypatch.setattr(digits, "KERNELS", (5,))
    original = digits._Best.offer
    monkeypatch.setattr(
        digits._Best,
        "offer",
        lambda self, mixture, **about: (
            seen.append(self.about | about) or original(self, mixture, **about)
        ),
    )
    law = digits.METHODS["score matching, diagonal"](train, validation, rng())
    assert [entry["steps"] for entry in seen] == [0, 20, 40, 60, 80, 100]
    assert {entry["rank"] for entry in seen} == {0}
    assert law.chosen in seen


def test_clusters_are_the_start_of_both_objectives(monkeypatch):
    starts = []
    original = digits.low_rank_clusters
    monkeypatch.setattr(digits, "KERNELS", (5,))
    monkeypatch.setattr(
        digits,
        "low_rank_clusters",
        lambda *a, **k: starts.append(original(*a, **k)) or starts[-1],
    )
    train, validation, _ = split(40, 0)
    for method in ("clusters, diagonal", "score matching, diagonal", "likelihood, diagonal"):
        digits.METHODS[method](train, validation, rng(6))
    assert len(starts) == 3
    assert torch.equal(starts[0].centers, starts[1].centers)
    assert torch.equal(starts[0].centers, starts[2].centers)


def test_network_leaves_each_centre_out_at_itself(monkeypatch):
    asked = {}

    def fake(exclude):
        asked["exclude"] = exclude
        return original(exclude)

    original = digits.kernel_loss
    monkeypatch.setattr(digits, "kernel_loss", fake)
    monkeypatch.setattr(digits, "fit", partial(digits.fit))
    train, validation, _ = split(20, 0)
    law = digits.METHODS["network, low rank"](train, validation, rng())
    assert torch.equal(asked["exclude"], torch.arange(20))
    assert law.chosen["kernels"] == 20
    assert law.chosen["rank"] == 4


def test_denoiser_stops_when_the_validation_likelihood_falls(monkeypatch):
    value = {125: 2.0, 250: 3.0, 500: 1.0}
    trained = []

    def fake_fit(network, x, *, steps, **options):
        trained.append(steps)
        network.steps = steps

    monkeypatch.setattr(digits, "fit", fake_fit)
    monkeypatch.setattr(
        digits,
        "stiff_log_prob",
        lambda network, y, *noise: torch.full((len(y),), value[network.steps]),
    )
    train, validation, test = split(20, 0)
    law = digits.denoising(train, validation, rng())
    assert trained == [125, 250, 500]
    assert law.chosen == {"steps": 250}
    jacobian = float(train.std(0).log().sum())
    assert float(law.log_prob(test)[0]) == pytest.approx(3.0 - jacobian, rel=1e-6)


def test_denoiser_s_likelihood_has_the_jacobian_of_its_units(monkeypatch):
    # Untrained, the network is the score of a normal law: in the images' units, one with their deviations.
    monkeypatch.setattr(digits, "DENOISING_STEPS", (0,))
    train, validation, test = split(40, 0)
    law = digits.denoising(train, validation, rng())
    std = math.hypot(1.0, digits.NOISE[0]) * train.std(0)
    normal = torch.distributions.Normal(train.mean(0), std).log_prob(test[:5]).sum(-1)
    torch.testing.assert_close(
        law.log_prob(test[:5]), normal, rtol=0, atol=0.05
    )  # the solver's tolerance
    assert law.sample(3, rng()).shape == (3, 64)


# ---- the runs --------------------------------------------------------------------------------------


def test_run_measures_on_the_test_images():
    settings = DigitsRun("early stopping", 100, seed=1, samples=50, shown=4)
    result = settings.run(device=CPU)
    train, validation, test = split(100, 1)
    law = digits.kde(train, validation, rng(1))
    values = bits(law.log_prob(test))
    assert result.metrics["bits"] == pytest.approx(float(values.mean()))
    assert result.metrics["bits_error"] == pytest.approx(float(values.std()) / 397**0.5)
    assert result.metrics["training_bits"] == pytest.approx(float(bits(law.log_prob(train)).mean()))
    drawn = law.sample(50, rng(10_001))
    assert result.metrics["memorisation"] == metrics.memorisation(drawn, train, test)._asdict()
    null = metrics.memorisation(test[::2], train, test[1::2])._asdict()
    assert result.metrics["null"] == null
    np.testing.assert_allclose(result.arrays["samples"], drawn[:4].float().numpy())
    json.dumps(result.metrics)
    # copies with too little noise are worse than the uniform law on fresh images, and better on their own
    assert result.metrics["training_bits"] < result.metrics["bits"] < math.log2(17)


def test_memory_is_measured_in_a_process_of_its_own():
    # 2000 matrices of 784 x 784 in float32 are 4900 MB; the process needs about 320 MB before it starts. The whole size,
    # 10 000 centres within 2 GB, is the case "memory".
    result = MemoryRun(centers=2000, steps=1).run(device=CPU)
    assert result.metrics["before"] < result.metrics["peak"] < 1300
    assert all(map(math.isfinite, result.metrics["objectives"]))


def test_cases():
    paper = digits.cases("paper")
    names = [case.name for case in paper]
    assert len(set(names)) == len(names) == 1 + 3 * (14 * 3 + 2)
    assert names[0] == "memory"
    assert (paper[0].settings.centers, paper[0].settings.dim, paper[0].settings.rank) == (
        10_000,
        784,
        8,
    )
    full = [case.settings.n for case in paper if getattr(case.settings, "method", "") == "full"]
    assert full == 3 * [300, 1000]
    assert {case.settings.seed for case in digits.cases("paper", seed=5)[1:]} == {5}
    assert {case.settings.n for case in digits.cases("quick")} == {300}
