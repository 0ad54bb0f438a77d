"""Measure and keep the tables of the chapter on performance: ``python -m benchmarks``.

Each row is measured in a process of its own, on one thread; evaluations also on all cores. Ways that are slow get fewer points and their
time is scaled: all are linear in the points, as the table of growth shows. The result is a record like those of
the experiments.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measurements import accuracy, evaluation, floor, growth, quality, training
from benchmarks.ways import problem, ways
from wpo_notes.datasets import PLANAR
from wpo_notes.experiments.records import Record, environment


def alone(function: Callable, *arguments: object) -> dict:
    """Call a function in a process of its own, so that its memory is its own."""
    with get_context("spawn").Pool(1) as pool:
        result = pool.apply(function, arguments)
        # an orderly end, which is when PyKeOps writes its cache
        pool.close()
        pool.join()
    return result


def measure(n: int, m: int) -> dict[str, list[dict]]:
    """All tables, each row in a process of its own."""
    dims = (2, 6, 16, 64)
    names = list(ways(problem(10, 10, 2)[0]))
    jobs: list[tuple] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        for d in dims:
            jobs += [("evaluation", evaluation, (n, m, d, name, threads)) for name in names]
            jobs.append(("floor", floor, (n, m, d, threads)))
    jobs += [("accuracy", accuracy, (n, d, offset)) for d in dims for offset in (0.0, 100.0)]
    jobs += [("training", training, (n, d, batch)) for d in (2, 6) for batch in (64, 512)]
    jobs += [("growth", growth, (10**k, 10_000)) for k in (2, 3, 4, 5, 6)]
    jobs += [("growth", growth, (n, 10**k)) for k in (3, 4, 5, 6)]
    jobs += [("quality", quality, (law, seed)) for law in PLANAR for seed in (0, 1, 2)]
    tables: dict[str, list[dict]] = {}
    for table, function, arguments in tqdm(jobs, desc="bench"):
        tables.setdefault(table, []).append(alone(function, *arguments))
    return tables


def main() -> None:
    """Measure, print, and keep the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--centers", type=int, default=5000)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument(
        "--out", type=Path, default=Path("book/results"), help="folder of the record"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    tables = measure(options.centers, options.points)
    for table, rows in tables.items():
        print(f"\n{table}")
        for row in rows:
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    settings = {"centers": options.centers, "points": options.points}
    seconds = time.perf_counter() - started
    about = environment(torch.device("cpu"))
    if importlib.util.find_spec("pykeops"):
        about["versions"]["pykeops"] = version("pykeops")
    Record("benchmarks", "cpu", settings, tables, [], {}, seconds, about).save(options.out)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
