"""Does denoising score matching memorise? The runs measure what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from wpo_notes import datasets
from wpo_notes.denoiser import ScoreNetwork
from wpo_notes.experiments import denoiser_memorises
from wpo_notes.experiments.denoiser_memorises import DenoiserRun, law_score
from wpo_notes.mixture import GaussianMixture

CPU = torch.device("cpu")
TINY = DenoiserRun(
    data="swissroll",
    n=20,
    hidden=(32, 32),
    steps=60,
    seed=0,
    batch_size=64,
    levels=(0.1, 0.5),
    record_every=10,
    compared=300,
    measured=50,
    samples=100,
    shown=20,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny():
    return TINY.run(device=CPU)


def test_law_score_is_the_gradient_of_the_diffused_density():
    # The 8 Gaussians of variance 0.125 with noise of variance 0.09: a mixture again.
    law = datasets.get("8gaussians")
    mixture = GaussianMixture.from_variance(law.centers, law.std**2 + 0.09)
    y = 2 * torch.randn(50, 2, dtype=torch.float64, generator=rng())
    torch.testing.assert_close(law_score(law, y, 0.3), mixture.score(y), rtol=1e-8, atol=1e-8)
    # and of a curve, against differences of the log-density
    law, h = datasets.get("moons"), 1e-5
    y = law.sample(20, generator=rng(), dtype=torch.float64)
    diffused = law.diffuse(0.04)
    differences = [
        (diffused.log_prob(y + h * e) - diffused.log_prob(y - h * e)) / (2 * h)
        for e in torch.eye(2, dtype=torch.float64)
    ]
    torch.testing.assert_close(
        law_score(law, y, 0.2), torch.stack(differences, 1), rtol=1e-5, atol=1e-5
    )


def test_records_are_at_the_doubles_and_triples(tiny):
    assert [entry["step"] for entry in tiny.history] == [10, 20, 30, 40, 60]
    longer = replace(TINY, steps=140).run(device=CPU)
    steps = [entry["step"] for entry in longer.history]
    assert steps == [10, 20, 30, 40, 60, 80, 120, 140]  # the last one always


def test_run_repeats(tiny):
    again = TINY.run(device=CPU)
    assert again.metrics == tiny.metrics
    assert again.history == tiny.history
    for name, array in tiny.arrays.items():
        assert np.array_equal(again.arrays[name], array)


def test_distances_are_their_definitions(tiny, monkeypatch):
    # A network that is the empirical score, and one that is the law's, have the known distances.
    law = datasets.get("swissroll")
    x = torch.from_numpy(tiny.arrays["training"])
    watch = denoiser_memorises._Watch(TINY, law, x)

    class Exact(ScoreNetwork):
        def forward(self, y, std):
            return GaussianMixture.from_variance(x.double(), std**2).score(y.double())

    class OfLaw(ScoreNetwork):
        def forward(self, y, std):
            return law_score(law, y.double(), std)

    monkeypatch.setattr(
        denoiser_memorises, "denoiser_samples", lambda network, n, *_, generator: x[:5]
    )
    monkeypatch.setattr(
        denoiser_memorises, "stiff_log_prob", lambda network, y, *_: law.log_prob(y) - 0.25
    )
    exact, true = (watch(watch.attach(kind(2, data_std=1.0))) for kind in (Exact, OfLaw))
    scores = tiny.metrics["scores"]
    for where in ("training", "fresh"):
        assert exact[where]["to_empirical"] == pytest.approx([0, 0], abs=1e-12)
        assert true[where]["to_law"] == pytest.approx([0, 0], abs=1e-12)
        assert exact[where]["to_law"] == pytest.approx(scores[where]["law_to_empirical"])
        assert true[where]["to_empirical"] == pytest.approx(scores[where]["law_to_empirical"])
    assert exact["kl"] == pytest.approx(0.25, abs=1e-5)
    # the noised training points are at the empirical score's own distribution: Tweedie's identity
    # E |s|^2 <= d / sigma^2, with equality where each point is alone
    for level, square in zip(TINY.levels, scores["training"]["empirical"], strict=True):
        assert square < 1.1 * 2 / level**2
    assert scores["training"]["empirical"][0] > 0.8 * 2 / TINY.levels[0] ** 2


def test_noised_points_are_what_they_are_called(tiny):
    law = datasets.get("swissroll")
    x = torch.from_numpy(tiny.arrays["training"])
    watch = denoiser_memorises._Watch(TINY, law, x)
    tree = KDTree(x.numpy())
    for (near, *_), (far, *_) in zip(watch.points["training"], watch.points["fresh"], strict=True):
        assert near.shape == far.shape == (300, 2)
        assert tree.query(near.numpy())[0].mean() < tree.query(far.numpy())[0].mean()
    distance = tree.query(watch.points["training"][0][0].numpy())[0]
    # Rayleigh: the mean of |sigma xi| is sigma sqrt(pi / 2); a little less to the nearest of all points
    assert distance.mean() == pytest.approx(0.1 * (np.pi / 2) ** 0.5, rel=0.1)


def test_references_are_copies_and_fresh_draws(tiny):
    about = tiny.metrics
    assert about["exact"]["std"] == TINY.std_min
    assert about["exact"]["memorisation"]["share_near"] > 0.95
    assert about["exact"]["memorisation"]["authenticity"] < 0.02
    assert about["fresh"]["memorisation"]["share_near"] < 0.35
    assert about["blurred"]["memorisation"]["share_near"] < 0.35
    assert 0 < about["blurred"]["kl"] < about["exact"]["kl"]


def test_kept_samples_and_points(tiny):
    law = datasets.get("swissroll")
    assert set(tiny.arrays) == {"training", "early", "late"}
    expected = law.sample(20, generator=rng(0), dtype=torch.float32)
    assert np.array_equal(tiny.arrays["training"], expected.numpy())
    assert tiny.arrays["early"].shape == tiny.arrays["late"].shape == (100, 2)


def test_training_on_a_few_points_memorises_them():
    result = replace(TINY, n=5, steps=3000, record_every=1500, shown=1500).run(device=CPU)
    scores, last = result.metrics["scores"]["training"], result.history[-1]
    for k in range(len(TINY.levels)):
        assert last["training"]["to_empirical"][k] < 0.5 * scores["law_to_empirical"][k]
    near = last["memorisation"]["share_near"]
    assert near > result.metrics["fresh"]["memorisation"]["share_near"] + 0.2


def test_steps_must_fit_the_records():
    with pytest.raises(
        ValueError, match=r"steps must be a multiple of record_every \(10\), got 65"
    ):
        replace(TINY, steps=65)


def test_cases():
    cases = denoiser_memorises.cases("paper")
    assert len(cases) == 2 * 3 * 3 + 2 * 2
    wide = [case.settings for case in cases if case.settings.hidden == denoiser_memorises.WIDE]
    assert {(s.n, s.steps, s.seed) for s in wide} == {(100, 32_000, 0), (1000, 32_000, 0)}
    (quick,) = denoiser_memorises.cases("quick", data="moons", seed=3)
    assert (quick.settings.data, quick.settings.seed) == ("moons", 3)
