"""The ways that `make bench` times agree with each other, and its record is the one that the chapter reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import alone
from benchmarks.measurements import growth, peak_megabytes, quality
from benchmarks.ways import exact, problem, training_step, ways
from wpo_notes.experiments.records import Record

RESULTS = Path(__file__).parents[1] / "book" / "results"


@pytest.mark.parametrize("d", [2, 6])
def test_all_ways_give_the_same_numbers(d):
    mixture, x = problem(200, 50, d, offset=10.0)
    truth = exact(mixture, x)
    for name, (way, _) in ways(mixture).items():
        log_prob, score = way(x)
        torch.testing.assert_close(log_prob.double(), truth.log_prob, rtol=0, atol=1e-4, msg=name)
        if score is not None:
            error = (score.double() - truth.score).norm() / truth.score.norm()
            assert error < 1e-4, name


def test_kernels_have_the_widths_that_are_said():
    mixture, _ = problem(100, 1, 6)
    deviations = torch.linalg.eigvalsh(torch.cholesky_inverse(mixture.precision_tril)).sqrt()
    torch.testing.assert_close(deviations[:, :5], torch.full((100, 5), 0.02), rtol=1e-2, atol=0)
    torch.testing.assert_close(deviations[:, 5], torch.full((100,), 0.1), rtol=1e-2, atol=0)
    assert 2 < float(mixture.centers.norm(dim=1).mean()) < 4


@pytest.mark.parametrize("form", ["wpo_notes", "einsum over differences", "network alone"])
def test_training_steps_run(form):
    training_step(50, 2, 8, closed_form=form)()


def test_quality_is_measured():
    threads = torch.get_num_threads()
    row = quality("moons", 0, n=200)
    torch.set_num_threads(threads)
    assert 0 < row["kl"] < 1  # 200 points suffice for the shape
    assert min(row["seconds"], row["paper_seconds"], row["kl_error"]) > 0


def test_peak_memory_is_seen():
    found = peak_megabytes(lambda: torch.ones(50 * 2**18).sum())  # 50 MB
    assert found is None or 45 < found < 70


@pytest.mark.parametrize("d", [2, 16])
def test_evaluation_takes_no_more_than_64_megabytes(d):
    megabytes = alone(growth, 5000, 10_000, d)["megabytes"]
    assert megabytes is None or megabytes < 64


def test_record_is_whole():
    settings = {"centers": 5000, "points": 10_000}
    record = Record.load(RESULTS, "benchmarks", "cpu", settings)
    assert {
        "evaluation",
        "floor",
        "accuracy",
        "training",
        "growth",
        "quality",
    } == record.metrics.keys()
    assert record.environment["commit"]
