"""Training and evaluation on several ranks equal those of one process; a lost rank ends the job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import distributed_job as job
import pytest
import torch
import torch.distributed as dist

from wpo_notes._files import load_tensors
from wpo_notes.distributed import ShardedMixture, average_gradients, check_same, own_generator
from wpo_notes.fit import kernel_loss
from wpo_notes.mixture import GaussianMixture

QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def torchrun(ranks: int, scenario: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *command, job.__file__, scenario, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | QUIET,
        timeout=240,
    )


def results(folder: Path, ranks: int) -> list[tuple[dict, dict]]:
    loaded = [load_tensors(folder / f"rank-{rank}", kind="test") for rank in range(ranks)]
    assert all(about["ranks"] == ranks for _, about in loaded)
    return loaded


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of both ranks of a job of two."""
    folder = tmp_path_factory.mktemp("job")
    run = torchrun(2, "everything", folder)
    assert run.returncode == 0, run.stderr
    return results(folder, 2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of a job of two ranks of which one was killed, its output, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("killed")
    started = time.monotonic()
    return folder, torchrun(2, "die", folder), time.monotonic() - started


@pytest.fixture(scope="module")
def three(killed, tmp_path_factory):
    """Results of the ranks of a job of three that went on from the checkpoint of the one that was killed."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copy(killed[0] / "run", folder / "run")
    run = torchrun(3, "resume", folder)
    assert run.returncode == 0, run.stderr
    return results(folder, 3)


# ---- training


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "relative"),
    [("double", torch.float64, 1e-8, 1e-8), ("single", torch.float32, 1e-5, 1e-4)],
)
def test_training_is_that_of_one_process(two, name, dtype, tolerance, relative):
    one = job.train(dtype=dtype)
    for tensors, about in two:
        for key, value in one.model.state_dict().items():
            theirs = tensors[f"{name}.{key}"]
            torch.testing.assert_close(theirs, value, rtol=0, atol=tolerance)
            assert torch.equal(theirs, two[0][0][f"{name}.{key}"])  # equal on all ranks
        for record, (step, objective, held_out, _) in zip(one.history, about[name], strict=True):
            assert record.step == step
            assert objective == pytest.approx(record.objective, rel=relative)
            assert held_out == pytest.approx(record.held_out, rel=relative)


def test_noise_is_of_each_ranks_own_and_the_parameters_are_common(two):
    noises = torch.cat([tensors["noises"] for tensors, _ in two])
    assert len(noises) == 30 * len(two)
    assert len(torch.unique(noises)) == noises.numel()
    for tensors, _ in two:
        for key, value in tensors.items():
            if key.startswith("noisy."):
                assert torch.equal(value, two[0][0][key])


def test_what_is_not_finite_on_one_rank_stops_all(two):
    for _, about in two:
        assert "training stopped at step 0: the objective is" in about["stopped"]


def test_ranks_that_differ_are_refused_on_all(two):
    for _, about in two:
        assert "the same generator, but rank 1 has another than rank 0" in about["seed"]
        assert "the same steps, but rank 1 has another than rank 0" in about["steps"]
        assert "at least the number of ranks, got 1 points a step" in about["small"]


def test_a_killed_rank_ends_the_job_with_a_clear_error(killed):
    _, run, seconds = killed
    assert run.returncode != 0
    assert seconds < 150  # the other rank would wait 300 for it
    report = run.stderr.split("FAILED")[-1]
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 .*SIGKILL", report)


def test_a_killed_job_resumes_on_another_number_of_ranks(killed, three, tmp_path):
    shutil.copy(killed[0] / "run", tmp_path / "run")
    # All state is in the file: another seed does not matter.
    alone = job.train(loss=kernel_loss(), seed=77, checkpoint=tmp_path / "run")
    for key, value in job.train(loss=kernel_loss()).model.state_dict().items():
        for theirs in (alone.model.state_dict(), *(tensors for tensors, _ in three)):
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-8)


def test_a_rank_that_hangs_ends_the_job_after_the_timeout(tmp_path):
    run = torchrun(2, "hang", tmp_path)
    assert run.returncode != 0
    assert "Timed out waiting 10000ms" in run.stderr


def test_the_slurm_script_of_the_chapter_starts_one_group_of_all_ranks(tmp_path):
    # With stand-ins for Slurm's commands: srun runs what follows its options once a node, here at once on
    # this machine, and scontrol names it as the first node.
    page = Path(job.__file__).parents[1] / "book" / "many-machines.md"
    (script,) = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (tmp_path / "bin").mkdir()
    files = {
        "job.sh": script,
        "bin/srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\none=$!\n"$@" && wait $one\n',
        "bin/scontrol": "echo localhost\n",
        "bin/torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
        ".venv/bin/activate": "",
        "train.py": (
            "import sys, torch, torch.distributed as dist\n"
            "dist.init_process_group('gloo')\n"
            "total = torch.ones(1)\n"
            "dist.all_reduce(total)\n"
            "open(f'{sys.argv[1]}/{dist.get_rank()}', 'w').write(str(int(total)))\n"
            "dist.destroy_process_group()\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}" if name.startswith("bin/") else text)
        path.chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": str(os.getpid()), "JOB_NODELIST": "node[1-2]"}
    slurm |= {"JOB_NUM_NODES": "2", "CPUS_PER_TASK": "1"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {
        "0": "2",
        "1": "2",
    }


# ---- evaluation


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
@pytest.mark.parametrize("job_of", ["two", "three"])
def test_sharded_evaluation_is_that_of_the_whole_mixture(request, job_of, kind):
    ranks = request.getfixturevalue(job_of)
    whole, x = job.mixture(kind), job.places()
    score, ratio = whole.score_and_laplacian_ratio(x)
    expected = {"log_prob": whole.log_prob(x), "score": score, "laplacian_ratio": ratio}
    for tensors, _ in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(tensors[f"{kind}.{name}"], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
@pytest.mark.parametrize("job_of", ["two", "three"])
def test_sharded_samples_are_common_and_of_the_mixture(request, job_of, kind):
    ranks = request.getfixturevalue(job_of)
    whole = job.mixture(kind)
    x = ranks[0][0][f"{kind}.sample"]
    assert x.shape == (100, 50, 3)
    assert all(torch.equal(tensors[f"{kind}.sample"], x) for tensors, _ in ranks)
    x = x.reshape(-1, 3)
    assert len(torch.unique(x, dim=0)) == len(x)
    # The shares of the components, by the nearest in the mixture's own posterior, and the mean. Margin:
    # 4.5 standard errors of 5000 independent draws.
    posterior = whole.responsibilities(x)
    weights = whole.log_weights.exp()
    error = (posterior.mean(0) - weights) / (posterior.std(0) / len(x) ** 0.5)
    assert error.abs().max() < 4.5
    error = (x.mean(0) - whole.mean) / (whole.variance / len(x)).sqrt()
    assert error.abs().max() < 4.5


def test_shards_and_generators_must_fit(two):
    for _, about in two:
        assert "generator must be in the same state on all ranks" in about["generators"]
        assert "the same dimension, but rank 1 has another" in about["dimensions"]


# ---- one rank, in this process


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_one_rank_is_one_process():
    inside = job.train()
    dist.destroy_process_group()
    outside = job.train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for key, value in outside.model.state_dict().items():
        assert torch.equal(inside.model.state_dict()[key], value)
    assert inside.history == outside.history


@pytest.mark.usefixtures("one_rank")
def test_one_shard_is_the_mixture():
    whole, x = job.mixture("uniform"), job.places()
    sharded = ShardedMixture(whole)
    assert "rank 0 of 1" in repr(sharded)
    torch.testing.assert_close(sharded.log_prob(x), whole.log_prob(x))
    torch.testing.assert_close(sharded.score(x), whole.score(x))
    torch.testing.assert_close(sharded.laplacian_ratio(x), whole.laplacian_ratio(x))
    for one, other in zip(sharded.log_prob_and_score(x), whole.log_prob_and_score(x), strict=True):
        torch.testing.assert_close(one, other)
    pair = zip(
        sharded.score_and_laplacian_ratio(x), whole.score_and_laplacian_ratio(x), strict=True
    )
    for one, other in pair:
        torch.testing.assert_close(one, other)
    assert sharded.score(x[:0]).shape == (0, 5, 3)
    assert sharded.sample((0,), generator=job.seeded(0)).shape == (0, 3)
    assert sharded.sample((2, 3), generator=job.seeded(0)).shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"weights are not uniform.*logsumexp"):
        ShardedMixture(job.mixture("weighted"))


@pytest.mark.usefixtures("one_rank")
def test_gradients_are_weighted_by_the_shares():
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    x = job.points()
    objective = model(x).mean()
    objective.backward()
    mean = average_gradients(model, objective, 0.25)
    assert float(mean) == pytest.approx(0.25 * float(objective.detach()))
    torch.testing.assert_close(model.weight.grad, 0.25 * x.mean(0, keepdim=True))
    check_same({"name": 1})


def test_own_generators_differ_and_leave_the_shared_one_alone():
    shared = job.seeded(0)
    state = shared.get_state()
    draws = [torch.rand(2, generator=own_generator(shared, rank)) for rank in (0, 1, 0)]
    assert torch.equal(shared.get_state(), state)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_a_mixture_without_a_process_group_is_refused():
    with pytest.raises(ValueError, match="init_process_group"):
        ShardedMixture(GaussianMixture.from_variance(torch.zeros(1, 2), 1.0))
