"""What is measured: each function makes one row of a table."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks.ways import exact, problem, training_step, ways
from wpo_notes import datasets
from wpo_notes.fit import fit, fit_kernel_model
from wpo_notes.metrics import kl_divergence
from wpo_notes.model import KernelModel

__all__ = ["accuracy", "evaluation", "floor", "growth", "quality", "training"]

_CHECKED = 500  # points at which the errors are measured


def milliseconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median time of run(), over at least so many seconds, after one call that does not count."""
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def peak_megabytes(run: Callable[[], object]) -> float | None:
    """Memory that run() takes beyond what the process holds, by its largest resident set; Linux alone tells."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there for use
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A field of the process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def evaluation(n: int, m: int, d: int, name: str, threads: int) -> dict:
    """Time, memory and errors of one way to log-density and score."""
    torch.set_num_threads(threads)
    mixture, x = problem(n, m, d)
    way, fewer = ways(mixture)[name]
    points = x[: max(_CHECKED // 4, m // fewer)]
    # Imports, and the pages of the libraries' code and buffers, are not the evaluation's: a call that does not count.
    way(points)
    memory = peak_megabytes(lambda: way(points))
    time_ = milliseconds(lambda: way(points), 3.0) * m / len(points)
    # of the evaluation that was timed: one of fewer points may take another way
    truth = exact(mixture, points[:_CHECKED])
    log_prob, score = (part if part is None else part[:_CHECKED] for part in way(points))
    result = {
        "way": name,
        "d": d,
        "threads": threads,
        "points": len(points),
        "milliseconds": time_,
        "megabytes": memory,
        "log-density": float((log_prob - truth.log_prob).abs().max()),
    }
    if score is not None:
        result["score"] = float((score - truth.score).norm() / truth.score.norm())
    return result


def accuracy(n: int, d: int, offset: float) -> dict:
    """Errors of float32 against exact differences in float64, the Laplacian ratio's included."""
    torch.set_num_threads(1)
    mixture, x = problem(n, 10_000, d, offset=offset)
    log_prob, score, ratio = (
        part[:_CHECKED] for part in mixture._evaluate(x, score=True, laplacian=True)
    )
    truth = exact(mixture, x[:_CHECKED])
    return {
        "d": d,
        "offset": offset,
        "log-density": float((log_prob - truth.log_prob).abs().max()),
        "score": float((score - truth.score).norm() / truth.score.norm()),
        "Laplacian ratio": float(
            (ratio - truth.laplacian_ratio).norm() / truth.laplacian_ratio.norm()
        ),
    }


def floor(n: int, m: int, d: int, threads: int) -> dict:
    """Time of the two matrix products and the exponentials that no way can do without, by blocks in cache."""
    torch.set_num_threads(threads)
    rows, length = 256, d * (d + 1) // 2 + d
    lifted, keys = torch.randn(rows, length), torch.randn(length, n)
    scores, values = torch.empty(rows, n), torch.randn(n, length)
    averages = torch.empty(rows, length)
    exponents = -torch.rand(rows, n)
    first = milliseconds(lambda: torch.mm(lifted, keys, out=scores))
    weights = torch.rand(rows, n)
    second = milliseconds(lambda: torch.mm(weights, values, out=averages))
    exp = milliseconds(lambda: torch.exp(exponents, out=scores))
    operations = 2 * rows * n * length
    return {
        "d": d,
        "threads": threads,
        "milliseconds": (first + second + exp) * m / rows,
        "GFLOP/s, keys": operations / first / 1e6,
        "GFLOP/s, values": operations / second / 1e6,
        "exp, 1e9/s": rows * n / exp / 1e6,
    }


def growth(n: int, m: int, d: int = 2) -> dict:
    """Time and memory at N centres and M points."""
    torch.set_num_threads(1)
    mixture, x = problem(n, m, d)
    mixture.log_prob_and_score(x)  # the pages of the libraries' code are not the evaluation's
    memory = peak_megabytes(lambda: mixture.log_prob_and_score(x))
    started = time.perf_counter()  # once more, now that the memory is there
    mixture.log_prob_and_score(x)
    seconds = time.perf_counter() - started
    return {"n": n, "m": m, "milliseconds": 1e3 * seconds, "megabytes": memory}


def training(n: int, d: int, batch: int) -> dict:
    """Time of a training step: ours, by einsum, and its network alone."""
    torch.set_num_threads(1)
    names = ("wpo_notes", "einsum over differences", "network alone")
    steps = {name: training_step(n, d, batch, closed_form=name) for name in names}
    return {"d": d, "batch": batch} | {name: milliseconds(run, 4.0) for name, run in steps.items()}


def quality(data: str, seed: int, n: int = 10_000) -> dict:
    """Time and KL of the default fit of n points, and the time of the paper's 50 000 steps, from 50 of them."""
    torch.set_num_threads(1)
    law = datasets.get(data)
    generator = torch.Generator().manual_seed(seed)
    x = law.sample(n, generator=generator).float()
    centers, rest = x[: n // 2], x[n // 2 :]
    paper = KernelModel(centers, generator=generator)

    def paper_steps(steps: int) -> float:
        options = {"batch_size": 64, "lr": 1e-3, "generator": generator, "progress": False}
        return fit(paper, rest, steps=steps, **options).seconds

    # what is imported and compiled in the first call does not count
    fit_kernel_model(x[:200], centers=10, steps=2, generator=generator, progress=False)
    paper_steps(2)
    started = time.perf_counter()
    model = fit_kernel_model(x, generator=generator, progress=False)
    seconds = time.perf_counter() - started
    paper_seconds = paper_steps(50) / 50 * 50_000
    with torch.no_grad():
        kl = kl_divergence(law, model().log_prob, n=10_000, generator=generator)
    return {
        "data": data,
        "seed": seed,
        "seconds": seconds,
        "paper_seconds": paper_seconds,
        "kl": float(kl.value),
        "kl_error": float(kl.error),
    }
