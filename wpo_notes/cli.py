"""Commands for one's own samples: ``python -m wpo_notes fit samples.csv --out model.safetensors``.

Chapter: *Your own data* (``book/your-own-data.md``).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wpo_notes._optional import needed
from wpo_notes._tables import (
    Table,
    checked_for_density,
    default_names,
    read_table,
    write_table,
)
from wpo_notes.fit import TrainingStopped, fit_kernel_model
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel

__all__ = ["add_commands", "density", "fit", "plot", "report", "sample"]

_PLOTTED_SAMPLES = 2000
# Points whose density is computed at a time.
_BLOCK = 2**14


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of an ``argparse.ArgumentParser``."""
    about = "samples: .csv, .tsv, .txt, .npy, .npz or .parquet, one a row"

    command = _add(commands, fit, "fit a kernel model to samples")
    command.add_argument("samples", type=Path, help=about)
    command.add_argument("--out", type=Path, required=True, help="model file, .safetensors")
    _add_fit_options(command)

    command = _add(commands, sample, "draw new samples from a model")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("--count", type=int, default=1000, help="number of samples (1000)")
    command.add_argument("--out", type=Path, required=True, help=".csv, .tsv, .npy or .parquet")
    _add_seed(command)

    command = _add(commands, density, "log-density and score of points under a model")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("points", type=Path, help="points, as samples; columns are found by name")
    command.add_argument("--out", type=Path, required=True, help=".csv, .tsv, .npy or .parquet")

    command = _add(commands, plot, "draw a model's density, kernels and samples")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("--out", type=Path, required=True, help="picture: .png, .svg or .pdf")
    command.add_argument("--data", type=Path, help="samples to draw over it")
    _add_seed(command)

    command = _add(commands, report, "fit four fifths of samples and write a page on the fit")
    command.add_argument("samples", type=Path, help=about)
    command.add_argument("--out", type=Path, required=True, help="page, .html, complete in itself")
    _add_fit_options(command)


def fit(options: argparse.Namespace) -> None:
    """Fit a kernel model to the samples and save it with the names of its columns.

    Repeated rows are left out. A fit that was killed goes on when it is called again: until it is done, its parts
    are in a folder beside the model. The seed is fixed unless you give one, so a second fit gives the same model.
    """
    table, notes = _samples(options)
    _check_folder(options.out)
    x = torch.as_tensor(table.values)
    parts = options.out.with_name(options.out.name + ".parts")
    if parts.exists():
        print(f"going on from {parts}", file=sys.stderr)
    started = time.perf_counter()
    model = fit_kernel_model(x, checkpoint=parts, **_fit_options(options))
    model.column_names = table.columns if table.named else None
    model.save(options.out)
    shutil.rmtree(parts)
    with torch.no_grad():
        mean = float(model().log_prob(x).mean())
    print(
        f"{options.out}: {len(model.centers)} kernels for {len(x)} rows of {', '.join(table.columns)} in "
        f"{time.perf_counter() - started:.0f} s.\nMean log-density of these rows {mean:.3f} nats, in the columns' own units; "
        f"for one that counts, on held-out rows: python -m wpo_notes report {options.samples} --out report.html"
    )
    _print_notes(notes)


def sample(options: argparse.Namespace) -> None:
    """Draw independent samples, exactly, and write them under the names of the columns."""
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    mixture, columns = _load(options.model)
    columns = columns or default_names(mixture.event_shape[0])
    _check_folder(options.out)
    drawn = mixture.sample((options.count,), generator=_generator(options))
    write_table(options.out, columns, drawn.numpy())
    print(f"{options.out}: {options.count} samples of {', '.join(columns)}")


def density(options: argparse.Namespace) -> None:
    """Write the points with their log-density (nats, in the columns' own units) and their score, its gradient.

    Columns are found by name, further ones are left out; a file without names must have as many as the model.
    """
    mixture, columns = _load(options.model)
    _check_folder(options.out)
    table = _points(options.points, mixture, columns)
    x = torch.as_tensor(table.values).to(mixture.centers.dtype)
    found = [mixture.log_prob_and_score(part) for part in x.split(_BLOCK)]
    log_density, score = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    write_table(
        options.out,
        (*table.columns, "log_density", *(f"score {name}" for name in table.columns)),
        np.column_stack([table.values, log_density, score]),
    )
    print(f"{options.out}: {len(x)} points, mean log-density {log_density.mean():.3f} nats")


def plot(options: argparse.Namespace) -> None:
    """Draw the marginal densities of the first columns, the kernels as ellipses, and new samples."""
    needed("matplotlib")  # says how it is installed
    from wpo_notes import _figures

    mixture, columns = _load(options.model)
    _check_folder(options.out)
    names, data = columns or default_names(mixture.event_shape[0]), None
    if options.data is not None:
        names, values, _ = _points(options.data, mixture, columns)
        data = torch.as_tensor(values).to(mixture.centers.dtype)
    samples = mixture.sample((_PLOTTED_SAMPLES,), generator=_generator(options))
    figure = _figures.pairs(mixture, names, samples=samples, data=data)
    figure.savefig(options.out, dpi=160)
    print(f"{options.out}: {len(mixture.centers)} kernels")


def report(options: argparse.Namespace) -> None:
    """Fit four fifths of the rows, judge the fit on the others, and write it all on one HTML page.

    The page compares the held-out log-density with one Gaussian, a kernel density estimate and a mixture by
    expectation maximisation, shows density and samples, and says whether the model copies its training rows.
    """
    needed("matplotlib")  # now, not after the fit
    from wpo_notes.report import FOLDS, findings, page

    table, notes = _samples(options, folds=FOLDS)
    _check_folder(options.out)
    found = findings(torch.as_tensor(table.values), **_fit_options(options))
    text = page(found, title=options.samples.name, columns=table.columns, notes=notes)
    options.out.write_text(text, encoding="utf-8")
    for one in found.competitors:
        print(
            f"{one.name:18}{one.log_density.value:8.3f} ± {one.log_density.error:.3f} nats a held-out row"
        )
    print(options.out)
    _print_notes(notes)


def _add(
    commands: Any, function: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    """Add a command, described by its function, that turns errors of the input into a message."""
    command = commands.add_parser(function.__name__, help=about, description=function.__doc__)

    def run(options: argparse.Namespace) -> None:
        try:
            function(options)
        except (OSError, ValueError, ModuleNotFoundError, TrainingStopped) as error:
            command.error(str(error))

    command.set_defaults(run=run)
    return command


def _add_fit_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--columns", nargs="+", metavar="NAME", help="only these (x1, x2, ... if unnamed)"
    )
    command.add_argument(
        "--centers", type=int, help="number of kernels; by cross-validation if not given"
    )
    command.add_argument("--steps", type=int, default=200, help="training steps of each part (200)")
    _add_seed(command)


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")


def _fit_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"centers": options.centers, "steps": options.steps, "generator": _generator(options)}


def _generator(options: argparse.Namespace) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed)


def _samples(options: argparse.Namespace, *, folds: int | None = None) -> tuple[Table, list[str]]:
    """The table to fit, and what speaks against it."""
    table = read_table(options.samples, columns=options.columns)
    return checked_for_density(table, options.samples, folds=folds)


def _load(path: Path) -> tuple[GaussianMixture, tuple[str, ...] | None]:
    """A model's mixture, and the names of its columns if they had names."""
    model = KernelModel.load(path)
    with torch.no_grad():
        return model(), model.column_names


def _points(path: Path, mixture: GaussianMixture, columns: tuple[str, ...] | None) -> Table:
    """Points for a model: its columns by name, or if the model or the file has no names, by their order."""
    table = read_table(path, columns=columns, in_order=True)
    count = mixture.event_shape[0]
    if len(table.columns) != count:
        raise ValueError(
            f"{path} has {len(table.columns)} columns, but the model's rows have {count}: bring those columns alone"
        )
    return table


def _check_folder(out: Path) -> None:
    """Before the work, not after it."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} into: make it first")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
