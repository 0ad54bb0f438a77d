"""What `test_distributed.py` starts under torchrun: ``distributed_job.py SCENARIO FOLDER``.

Each rank leaves its results in FOLDER; the test compares them with one process, for which it imports this.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from wpo_notes._files import save_tensors
from wpo_notes.distributed import ShardedMixture
from wpo_notes.fit import TrainingStopped, fit, kernel_loss
from wpo_notes.losses import denoising_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel

KILLED_AT = 13


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(dtype=torch.float64):
    return torch.randn(200, 2, generator=seeded(0), dtype=torch.float64).to(dtype)


def train(*, dtype=torch.float64, seed=5, **options):
    """Leave-one-out training, so that the index of each point matters; 17 points do not divide evenly."""
    x = points(dtype)
    exclude = torch.full((200,), -1)
    exclude[:20] = torch.arange(20)
    model = KernelModel(x[:20], hidden=(8, 8), generator=seeded(0))
    options = {
        "steps": 30,
        "batch_size": 17,
        "record_every": 7,
        "loss": kernel_loss(exclude),
    } | options
    return fit(
        model,
        x,
        held_out=x[:50] + 0.1,
        checkpoint_every=5,
        generator=seeded(seed),
        progress=False,
        **options,
    )


def mixture(kind: str) -> GaussianMixture:
    """Mixture of 7 centres in 3 dimensions, with uniform or with very unequal weights."""
    generator = seeded(1)
    centers = 3 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    tril = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64).tril(-1)
    tril = tril + torch.diag_embed(torch.rand(7, 3, generator=generator, dtype=torch.float64) + 0.5)
    log_weights = torch.linspace(-4, 3, 7, dtype=torch.float64)
    return GaussianMixture(centers, tril, log_weights=log_weights if kind == "weighted" else None)


def places() -> torch.Tensor:
    """Points near the centres and far from them, where all densities underflow."""
    x = torch.randn(6, 5, 3, generator=seeded(2), dtype=torch.float64)
    return x * torch.tensor([1.0, 3, 10, 100, 1000, 10000], dtype=torch.float64)[:, None, None]


def shard(kind: str) -> ShardedMixture:
    whole = mixture(kind)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    if kind == "uniform":
        return ShardedMixture(GaussianMixture(whole.centers[part], whole.precision_tril[part]))
    log_weights = 100 + whole.log_weights[part]  # the constant must not matter
    return ShardedMixture(
        GaussianMixture(whole.centers[part], whole.precision_tril[part], log_weights=log_weights),
        log_weight=log_weights.logsumexp(0),
    )


def evaluate() -> dict[str, torch.Tensor]:
    """All that a sharded mixture gives, for both kinds."""
    tensors = {}
    for kind in ("uniform", "weighted"):
        sharded, x = shard(kind), places()
        tensors[f"{kind}.log_prob"], tensors[f"{kind}.score"] = sharded.log_prob_and_score(x)
        tensors[f"{kind}.laplacian_ratio"] = sharded.score_and_laplacian_ratio(x)[1]
        tensors[f"{kind}.sample"] = sharded.sample((100, 50), generator=seeded(3))
    return tensors


def message(call, error) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    return "no error"


def everything() -> tuple[dict, dict]:
    """Results of this rank: tensors, and what JSON holds."""
    rank = dist.get_rank()
    tensors, about = {}, {}
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        result = train(dtype=dtype)
        tensors |= {f"{name}.{key}": value for key, value in result.model.state_dict().items()}
        about[name] = result.history

    noises = []

    def noisy(model, x, index, generator):
        if index is not None:
            copy = torch.Generator()
            copy.set_state(generator.get_state())
            noises.append(torch.randn(2, generator=copy, dtype=x.dtype))
        score = model().score
        return denoising_score_matching(lambda y, std: score(y), x, std=0.5, generator=generator)

    result = train(loss=noisy)
    tensors |= {f"noisy.{key}": value for key, value in result.model.state_dict().items()}
    tensors["noises"] = torch.stack(noises)

    def infinite_on_rank_1(model, x, index, generator):
        return kernel_loss()(model, x, index, generator) * (float("inf") if rank == 1 else 1)

    about["stopped"] = message(lambda: train(loss=infinite_on_rank_1), TrainingStopped)
    about["seed"] = message(lambda: train(seed=rank), ValueError)
    about["steps"] = message(lambda: train(steps=30 + rank), ValueError)
    about["small"] = message(lambda: train(batch_size=1), ValueError)

    about["generators"] = message(
        lambda: shard("uniform").sample((50,), generator=seeded(rank)), ValueError
    )
    other = GaussianMixture.from_variance(torch.zeros(1, 2 + rank, dtype=torch.float64), 1.0)
    about["dimensions"] = message(lambda: ShardedMixture(other), ValueError)
    return tensors | evaluate(), about


def die(model, x, index, generator):
    """The loss of a run whose rank 1 is killed in a step."""
    die.calls += index is not None
    if dist.get_rank() == 1 and die.calls > KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    return kernel_loss()(model, x, index, generator)


die.calls = 0


def hang(model, x, index, generator):
    """The loss of a run whose rank 1 does not go on."""
    if dist.get_rank() == 1:
        time.sleep(600)
    return kernel_loss()(model, x, index, generator)


def main(scenario: str, folder: Path) -> None:
    timeout = 10 if scenario == "hang" else 300  # also bounds how much later a rank may start
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    rank = dist.get_rank()
    if scenario == "everything":
        tensors, about = everything()
    elif scenario == "die":
        train(loss=die, checkpoint=folder / "run")
    elif scenario == "hang":
        train(loss=hang)
    else:
        result = train(loss=kernel_loss(), checkpoint=folder / "run")
        tensors, about = dict(result.model.state_dict()) | evaluate(), {"history": result.history}
    save_tensors(
        folder / f"rank-{rank}", tensors, kind="test", ranks=dist.get_world_size(), **about
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
