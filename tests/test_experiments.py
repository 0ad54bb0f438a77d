"""Experiments: records are whole and loaded only as they were made; killed runs go on; CLI."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from wpo_notes import __main__ as cli
from wpo_notes import datasets
from wpo_notes import fit as fit_module
from wpo_notes.denoiser import ScoreNetwork
from wpo_notes.experiments import EXPERIMENTS, SHORT, denoising, figure5, figure6, kernel, runs
from wpo_notes.experiments.denoiser_memorises import DenoiserRun
from wpo_notes.experiments.denoising import DenoisingRun, SideBySide
from wpo_notes.experiments.figure4 import conditional_blocks
from wpo_notes.experiments.kernel import KernelRun
from wpo_notes.experiments.records import Record, environment
from wpo_notes.experiments.runs import Case
from wpo_notes.losses import denoising_score_matching
from wpo_notes.mixture import GaussianMixture

TINY = KernelRun(
    data="swissroll",
    mode="leave one out",
    n=200,
    centers=20,
    steps=30,
    seed=0,
    hidden=(8, 8),
    record_every=10,
    measured=100,
    samples=50,
    dtype="float64",
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- records


@pytest.fixture
def record():
    return Record(
        "figure2",
        "tiny",
        {"n": 3, "hidden": [64, 64], "lr": 2e-3},
        {"kl": 0.25, "stopped": None},
        [{"step": 1, "objective": -1.5}],
        {"samples": np.arange(6.0).reshape(3, 2)},
        1.5,
        {"commit": "abc"},
    )


def test_record_comes_back_as_it_was(record, tmp_path):
    record.save(tmp_path)
    # a tuple is a list in JSON, and the same settings
    back = Record.load(tmp_path, "figure2", "tiny", {"n": 3, "hidden": (64, 64), "lr": 2e-3})
    assert np.array_equal(back.arrays.pop("samples"), record.arrays["samples"])
    assert replace(back, arrays={}) == replace(record, arrays={})


def test_record_of_other_settings_is_refused(record, tmp_path):
    record.save(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(lr is 0.002, not 0.001; seed is None"):
        Record.load(tmp_path, "figure2", "tiny", record.settings | {"lr": 1e-3, "seed": 1})


def test_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m wpo_notes figure2 --scale paper --case"):
        Record.load(tmp_path, "figure2", "tiny", {})


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_damaged_record_is_refused(record, tmp_path, suffix, damage):
    record.save(tmp_path)
    path = tmp_path / "figure2" / f"tiny{suffix}"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "changed":
        path.write_bytes(content.replace(b"0.25", b"0.20") + (b"x" if suffix == ".npz" else b""))
    elif suffix == ".npz":
        path.unlink()
    else:
        path.write_bytes(b"[]")
    with pytest.raises(ValueError, match=r"is damaged.*restore it from a copy"):
        Record.load(tmp_path, "figure2", "tiny", record.settings)


def test_environment_has_the_version_of_numba_where_it_is_installed(monkeypatch):
    version = metadata.version

    def without(name):
        if name == "numba":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(
        metadata, "version", lambda name: "1.2" if name == "numba" else version(name)
    )
    about = environment(torch.device("cpu"))["versions"]
    assert about["numba"] == "1.2"
    monkeypatch.setattr(metadata, "version", without)
    assert environment(torch.device("cpu"))["versions"] == {
        name: value for name, value in about.items() if name != "numba"
    }


# ---- runs


def same(first, second):
    """Equal up to what a repetition may change: times, machine and date."""
    assert first.settings == second.settings
    assert first.metrics == second.metrics
    assert first.history == second.history
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        assert np.array_equal(array, second.arrays[name]), name


def test_run_keeps_a_record_and_does_not_run_again(tmp_path, monkeypatch):
    case = Case("figure2", "tiny", TINY)
    record = runs.run(case, tmp_path, progress=False)
    assert sorted(path.name for path in (tmp_path / "figure2").iterdir()) == [
        "tiny.json",
        "tiny.npz",
    ]
    assert record.environment["versions"]["torch"] == torch.__version__
    assert 0 < record.processor_seconds < 60
    monkeypatch.setattr(KernelRun, "run", lambda *_, **__: pytest.fail("ran again"))
    same(runs.run(case, tmp_path), record)
    other = Case("figure2", "other", TINY)
    assert list(runs.available([case, other], tmp_path)) == ["tiny"]
    assert list(runs.recorded([case], tmp_path)) == ["tiny"]
    with pytest.raises(
        FileNotFoundError, match=r"figure2 other .*make it with python -m wpo_notes"
    ):
        runs.recorded([case, other], tmp_path)
    with pytest.raises(ValueError, match="made with other settings"):
        runs.run(Case("figure2", "tiny", replace(TINY, seed=1)), tmp_path)


# Runs of all kinds that have checkpoints, and the step at which one is killed, with that of step 20 on disk.
KILLED_RUNS = {
    "kernel": (TINY, 30),
    "denoising": (
        DenoisingRun(
            data=("swissroll", "moons"),
            n=200,
            steps=30,
            seed=0,
            hidden=(8, 8),
            record_every=2,
            measured=20,
            samples=20,
        ),
        24,
    ),
    # the earlier samples that it keeps are of step 10
    "denoiser": (
        DenoiserRun(
            data="swissroll",
            n=20,
            hidden=(8, 8),
            steps=40,
            seed=0,
            record_every=10,
            compared=50,
            measured=20,
            samples=20,
            shown=10,
        ),
        30,
    ),
}
KILLED = """
import os, signal, sys
from wpo_notes import fit
from wpo_notes.experiments import runs
from test_experiments import KILLED_RUNS
settings, last = KILLED_RUNS[sys.argv[1]]
record = fit._Run.record
def recorded(self, *arguments):
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return record(self, *arguments)
fit._Run.record = recorded
runs.run(runs.Case("figure2", "tiny", settings), sys.argv[2], progress=False)
"""


def resumptions(monkeypatch) -> list[Path]:
    """Checkpoints that `fit` goes on from, from now on."""
    taken, original = [], fit_module._Run.resume

    def resume(self, path, settings):
        taken.append(Path(path))
        original(self, path, settings)

    monkeypatch.setattr(fit_module._Run, "resume", resume)
    return taken


@pytest.mark.parametrize("kind", KILLED_RUNS)
def test_killed_run_goes_on_and_leaves_the_same_record(kind, tmp_path, monkeypatch):
    case = Case("figure2", "tiny", KILLED_RUNS[kind][0])
    whole = case.record()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(tmp_path)],
        env={
            "PYTHONPATH": str(runs.__file__).split("wpo_notes")[0] + "tests",
            "OMP_NUM_THREADS": "1",
        },
        cwd=str(runs.__file__).split("wpo_notes")[0],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (tmp_path / "figure2").iterdir()
    assert left.suffix == ".checkpoint"
    taken = resumptions(monkeypatch)
    resumed = runs.run(case, tmp_path, progress=False)
    assert taken == [left]
    assert not left.exists()
    assert resumed.history[-1]["step"] == case.settings.steps
    same(resumed, whole)


def test_checkpoint_of_other_code_is_not_taken_up(tmp_path, monkeypatch):
    case = Case("figure2", "tiny", TINY)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_code", lambda: b"former")
        patch.setattr(Record, "save", stop)  # after the last step's checkpoint
        with pytest.raises(KeyboardInterrupt):
            runs.run(case, tmp_path, progress=False)
    (left,) = (tmp_path / "figure2").iterdir()
    taken = resumptions(monkeypatch)
    runs.run(case, tmp_path, progress=False)
    assert not taken
    assert left.exists()


# ---- the kernel model, watched


@pytest.mark.parametrize("mode", kernel.MODES)
def test_kernel_run_measures_what_it_says(mode):
    settings = replace(TINY, mode=mode)
    result = settings.run(device=torch.device("cpu"))
    assert [entry["step"] for entry in result.history] == [10, 20, 30]
    assert ("objective_centers" in result.metrics) == (mode != "disjoint")
    model = kernel.kernel_model(result.arrays, settings.hidden)
    law = datasets.get("swissroll")
    generator = rng(10_000)
    fresh = law.sample(100, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        mixture = model()
        difference = law.log_prob(fresh) - mixture.log_prob(fresh)
    assert result.metrics["kl"] == pytest.approx(float(difference.mean()), rel=1e-12)
    deviations = torch.linalg.eigvalsh(torch.cholesky_inverse(mixture.precision_tril)).sqrt()
    assert result.metrics["narrowest_width"] == pytest.approx(float(deviations.min()), rel=1e-8)
    typical = deviations.log().mean(-1).exp().median()
    assert result.metrics["typical_width"] == pytest.approx(float(typical), rel=1e-8)


def test_literal_run_scores_centres_at_themselves():
    # At a centre the objective has the term -2 Tr Gamma, which the others lack; leaving it out cures it.
    literal, cured = (
        replace(TINY, mode=mode, steps=60, record_every=60).run(device=torch.device("cpu")).metrics
        for mode in ("literal", "leave one out")
    )
    assert literal["objective_centers"] < 2 * literal["objective_others"] < 0
    assert cured["objective_centers"] > literal["objective_centers"]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of"):
        replace(TINY, mode="leave-one-out")


def test_overflow_is_kept_in_the_record(monkeypatch):
    calls = []

    def loss(exclude):
        def overflowing(model, x, index, generator):
            calls.append(1)
            scale = math.inf if len(calls) > 15 else 1.0
            return scale * sum(p.square().sum() for p in model.parameters())

        return overflowing

    monkeypatch.setattr(kernel, "kernel_loss", loss)
    result = TINY.run(device=torch.device("cpu"))
    assert "training stopped at step 15" in result.metrics["stopped"]
    assert [entry["step"] for entry in result.history] == [10]


# ---- score networks side by side


def test_networks_side_by_side_are_the_networks():
    networks = [
        ScoreNetwork(2, hidden=(8, 8), data_std=s, dtype=torch.float64, generator=rng(k))
        for k, s in enumerate((0.5, 1.0, 2.0))
    ]
    for network in networks:
        torch.nn.init.normal_(network.network[-1].weight, generator=rng(7))
    model = SideBySide(networks)
    y = torch.randn(3, 5, 2, dtype=torch.float64, generator=rng())
    std = torch.rand(3, 5, dtype=torch.float64, generator=rng(1)) + 0.1
    expected = torch.stack([net(y[k], std[k]) for k, net in enumerate(networks)])
    torch.testing.assert_close(model(y, std), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = torch.stack([net(y[k], std[k]) for k, net in enumerate(model.networks())])
    torch.testing.assert_close(model(y, std), changed, rtol=1e-12, atol=1e-12)


def test_loss_side_by_side_is_the_sum_of_the_losses():
    networks = [
        ScoreNetwork(2, hidden=(8,), data_std=1.0, dtype=torch.float64, generator=rng(k))
        for k in range(2)
    ]
    for network in networks:
        torch.nn.init.normal_(network.network[-1].weight, generator=rng(7))
    rows = torch.randn(4000, 4, dtype=torch.float64, generator=rng())
    loss = denoising.side_by_side_loss(2, 0.4999, 0.5001)
    together = float(loss(SideBySide(networks), rows, None, rng(1)).detach())
    apart = sum(
        float(denoising_score_matching(network, part, std=0.5, generator=rng(k)).detach())
        for k, (network, part) in enumerate(zip(networks, rows.split(2, -1), strict=True))
    )
    # other noise: 8000 terms of standard deviation about 3 each side
    assert together == pytest.approx(apart, abs=0.4)


def test_training_side_by_side_learns_each_law_as_well_as_its_own_network():
    settings = DenoisingRun(
        data=("swissroll", "moons"),
        n=2000,
        steps=2000,
        seed=0,
        lr=3e-3,
        hidden=(64,) * 3,
        record_every=200,
        measured=300,
        samples=100,
    )
    result = settings.run(device=torch.device("cpu"))
    assert result.history[-1]["objective"] < result.history[0]["objective"]
    for name in settings.data:
        assert result.arrays[f"samples.{name}"].shape == (100, 2)
        # An untrained network's density is the normal one with the data's variance.
        law = datasets.get(name)
        x = law.sample(2000, generator=rng(5), dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(x[0]), x.T.cov())
        untrained = float((law.log_prob(x) - normal.log_prob(x)).mean())
        assert -0.05 < result.metrics[name]["kl"] < 0.75 * untrained


def test_denoiser_likelihood_of_a_normal_law_is_exact():
    # The untrained network has the score of N(0, data_std^2): its density at the smallest noise is known.
    network = ScoreNetwork(2, hidden=(8,), data_std=1.3, dtype=torch.float64, generator=rng())
    x = torch.randn(50, 2, dtype=torch.float64, generator=rng())
    log_prob = denoising.denoiser_log_prob(network, x, 0.01, 10.0)
    normal = torch.distributions.Normal(0.0, math.sqrt(1.3**2 + 0.01**2))
    torch.testing.assert_close(log_prob, normal.log_prob(x).sum(-1), rtol=0, atol=1e-5)
    drawn = denoising.denoiser_samples(network, 4000, 0.01, 10.0, generator=rng(1))
    # standard error of a standard deviation from 8000 numbers: 0.8 %
    assert float(drawn.std()) == pytest.approx(1.3, rel=0.04)


# ---- the figures' own functions


def test_conditional_blocks_are_narrower_than_marginals():
    covariance = torch.tensor(
        [[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    centers = torch.zeros(1, 3, dtype=torch.float64)
    mixture = GaussianMixture.from_covariance(centers, covariance)
    wrong = conditional_blocks(mixture, (0, 2)).covariance_matrix
    right = mixture.marginal((0, 2)).covariance_matrix
    torch.testing.assert_close(right, torch.eye(2, dtype=torch.float64))
    # given the second coordinate, the first has variance 1 - 0.81
    torch.testing.assert_close(wrong.diagonal(), torch.tensor([0.19, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("narrow", "dtype"), [(0.1, torch.float64), (1e-4, torch.float32)])
def test_conditional_blocks_are_those_of_the_precisions(narrow, dtype):
    # Rows nearly parallel: at 1e-4 the block has condition number about 1e8, which its entries do not resolve in float32.
    tril = torch.randn(50, 4, 4, generator=rng(), dtype=dtype).tril()
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    tril[:, 2, 0] = 1 / narrow
    mixture = GaussianMixture(torch.randn(50, 4, generator=rng(), dtype=dtype), tril)
    block = conditional_blocks(mixture, (0, 2)).precision_tril
    torch.testing.assert_close(block[:, 0, 0], tril[:, 0, 0])
    torch.testing.assert_close(block[:, 1, 0], tril[:, 2, 0])
    # the rounding of a row of size 1 / narrow, seen in what is orthogonal to the other
    last = torch.linalg.vector_norm(tril[:, 2, 1:], dim=-1)
    error = (block[:, 1, 1] - last).abs().max()
    assert float(error) < 10 * torch.finfo(dtype).eps / narrow


def test_axes_along_the_curve():
    # Kernels made to lie along the moons, turned by 10 degrees.
    law = datasets.get("moons")
    centers = law.sample(50, generator=rng(), dtype=torch.float64)
    nearest = law.nearest(centers)
    turn = math.radians(10)
    rotation = torch.tensor(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64
    )
    long_axis = nearest.tangent @ rotation.T
    short_axis = torch.stack([-long_axis[:, 1], long_axis[:, 0]], -1)
    axes = torch.stack([0.3 * long_axis, 0.01 * short_axis], -1)
    mixture = GaussianMixture.from_covariance(centers, axes @ axes.mT)
    found = figure5.axes_along_curve(mixture, law)
    torch.testing.assert_close(found.angle, torch.full_like(found.angle, 10.0))
    along = math.hypot(0.3 * math.cos(turn), 0.01 * math.sin(turn))
    across = math.hypot(0.3 * math.sin(turn), 0.01 * math.cos(turn))
    torch.testing.assert_close(found.along, torch.full_like(found.along, along))
    torch.testing.assert_close(found.across, torch.full_like(found.across, across))


def test_bandwidth_by_leave_one_out_is_its_definition():
    x = torch.randn(60, 2, dtype=torch.float64, generator=rng())
    variance = figure6.leave_one_out_variance(x)

    def objective(v):
        parts = [
            GaussianMixture.from_variance(torch.cat([x[:i], x[i + 1 :]]), v).log_prob(x[i : i + 1])
            for i in range(len(x))
        ]
        return float(torch.cat(parts).mean())

    best = objective(variance)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert objective(factor * variance) < best + 1e-4


def test_best_variance_finds_the_noise():
    # Points are centres plus noise of variance 0.09, and the centres are far apart.
    centers = 10 * torch.randn(30, 2, dtype=torch.float64, generator=rng())
    noise = torch.randn(40, 30, 2, dtype=torch.float64, generator=rng(1))
    points = (centers + 0.3 * noise).reshape(-1, 2)
    assert figure6.best_variance(centers, points) == pytest.approx(0.09, rel=0.1)


# ---- the records that the book shows


RESULTS = Path(runs.__file__).parents[2] / "book" / "results"


FOLDERS = sorted({path.parent for path in RESULTS.rglob("*.json")} - {RESULTS / "benchmarks"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_every_record_in_the_book_belongs_to_a_case_and_is_whole(folder):
    seed = {"seed": 1} if folder.parent.name == "seed1" else {}
    found = runs.available(EXPERIMENTS[folder.name].cases("paper", **seed), folder.parent)
    assert sorted(found) == sorted(path.stem for path in folder.glob("*.json"))
    for record in found.values():
        assert record.environment["commit"]
        assert record.seconds > 0


def test_records_are_small():
    assert sum(path.stat().st_size for path in RESULTS.rglob("*.*")) < 20e6


# ---- the command line


@pytest.mark.parametrize("scale", ["quick", "paper"])
def test_cases_have_names_and_settings_of_their_own(scale):
    for name, experiment in EXPERIMENTS.items():
        cases = experiment.cases(scale)
        assert cases, name
        found = {}
        for case in cases:
            assert found.setdefault(case.name, case) == case
            json.dumps(asdict(case.settings))


def test_command_runs_a_case_and_prints_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        EXPERIMENTS["figure2"],
        "cases",
        lambda scale, data=None, seed=0: [Case("figure2", "tiny", TINY)],
    )
    cli.main(["figure2", "--out", str(tmp_path), "--data", "swissroll", "--case", "tiny"])
    assert "figure2 tiny" in (line := capsys.readouterr().out)
    assert "kl 0." in line
    assert (tmp_path / "figure2" / "tiny.json").is_file()


@pytest.mark.parametrize("figure", ["figure3", "figure5", "figure6"])
def test_figures_on_one_law_name_the_folder_of_their_records(figure, tmp_path, monkeypatch, capsys):
    tiny = Case("figure2", "tiny", TINY).record()
    ran = []

    def record(case, **_):
        ran.append(case)
        return replace(tiny, case=case.name)

    monkeypatch.setattr(Case, "record", record)
    cli.main([figure, "--data", "moons", "--seed", "3", "--out", str(tmp_path)])
    assert [(case.settings.data, case.settings.seed) for case in ran] == [("moons", 3)]
    folder = tmp_path / "figure2"
    assert f"records in {folder}\n" in capsys.readouterr().out
    assert (folder / f"{ran[0].name}.json").is_file()


def test_list_has_every_case_once(capsys):
    cli.main(["list", "--scale", "paper"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["figure2", "--scale", "paper", "--case", "moons-literal-seed0"] in lines
    listed = [(experiment, name) for experiment, _, _, _, *names in lines for name in names]
    # Figures 3, 5 and 6 look into the runs of Figure 2, which two processes must not make at once.
    assert len(listed) == len(set(listed))
    cases = [case for module in EXPERIMENTS.values() for case in module.cases("paper")]
    assert set(listed) == {(case.experiment, case.name) for case in cases}
    # Long runs have a process each; short ones come last.
    assert {len(names) for experiment, _, _, _, *names in lines if experiment not in SHORT} == {1}
    assert lines[-1][0] == "ablation"


def test_a_command_of_the_list_runs_its_cases(tmp_path, monkeypatch):
    tiny = Case("figure2", "tiny", TINY).record()
    ran = []

    def record(case, **_):
        ran.append(case.name)
        about = {"experiment": case.experiment, "case": case.name, "settings": settings(case)}
        return replace(tiny, **about)

    def settings(case):
        return json.loads(json.dumps(asdict(case.settings)))

    monkeypatch.setattr(Case, "record", record)
    names = [case.name for case in EXPERIMENTS["ablation"].cases("paper")[3:6]]
    command = ["ablation", "--scale", "paper", "--out", str(tmp_path), "--case", *names]
    cli.main(command)
    cli.main(command)  # all recorded
    assert ran == names


def test_list_stops_quietly_when_nobody_reads_on():
    command = [sys.executable, "-m", "wpo_notes", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure4", "--data", "moons"], "figure4 has no --data: it is the same in all its cases"),
        (["figure5", "--data", "rings"], "data must be one of ('moons', 'swissroll'), got 'rings'"),
        (["figure2", "--data", "moon"], "argument --data: invalid choice: 'moon'"),
        (["figure2", "--case", "nothing"], "figure2 has no case 'nothing'"),
        (["figure7"], "invalid choice: 'figure7'"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err
