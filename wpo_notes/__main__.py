"""Fit a kernel model to your own samples, or run the paper's experiments.

Chapters: *Your own data* (``book/your-own-data.md``) and *How to run it* (``book/how-to-run.md``).
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from wpo_notes import cli
from wpo_notes.datasets import NAMES

try:
    from wpo_notes.experiments import EXPERIMENTS, SHORT, runs
except ModuleNotFoundError as error:
    sys.exit(f"python -m wpo_notes: {error}")

RESULTS = {"paper": Path("book/results"), "quick": Path("_build/quick")}
_EXAMPLES = """
your own samples:
  python -m wpo_notes fit samples.csv --out model.safetensors
  python -m wpo_notes sample model.safetensors --count 1000 --out new.csv
  python -m wpo_notes density model.safetensors points.csv --out density.csv
  python -m wpo_notes plot model.safetensors --data samples.csv --out picture.png
  python -m wpo_notes report samples.csv --out report.html

an experiment of the paper:
  python -m wpo_notes figure2 --scale quick --data moons
"""


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m wpo_notes",
        description=__doc__.split("\n")[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    cli.add_commands(commands)
    for name, module in EXPERIMENTS.items():
        about = str(inspect.getdoc(module)).split("\n")[0]
        command = commands.add_parser(name, help=about.replace("%", "%%"), description=about)
        _add_experiment_options(command)
        command.set_defaults(run=_run, parser=command)
    command = commands.add_parser("list", help="the commands of all experiments, one a line")
    _add_experiment_options(command)
    command.set_defaults(run=_list)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_experiment_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", choices=("quick", "paper"), default="quick")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    command.add_argument("--data", choices=NAMES, metavar="LAW", help="only this law")
    command.add_argument("--seed", type=int, help="instead of the experiment's own")
    command.add_argument(
        "--case", nargs="+", default=[], metavar="NAME", help="only the cases of these names"
    )
    command.add_argument("--out", type=Path, help="folder of the records")


def _list(options: argparse.Namespace) -> None:
    """Print the commands of all experiments."""
    # Last comes the experiment with the shortest cases, so that no process is busy long after the others.
    modules = reversed(EXPERIMENTS.values())
    # Figures share runs, and two processes must not make the same one.
    cases = dict.fromkeys((c.experiment, c.name) for m in modules for c in m.cases(options.scale))
    for experiment, group in groupby(cases, key=lambda case: case[0]):
        names = [name for _, name in group]
        size = 10 if experiment in SHORT else 1
        for start in range(0, len(names), size):
            chosen = " ".join(names[start : start + size])
            print(f"{experiment} --scale {options.scale} --case {chosen}")


def _run(options: argparse.Namespace) -> None:
    """Run the cases of one experiment."""
    cases = _cases(options)
    torch.set_num_threads(1)  # one process a core is faster than spinning threads
    folder = options.out or RESULTS[options.scale]
    for case in cases:
        record = runs.run(case, folder, device=options.device)
        print(f"{record.experiment} {record.case}  {record.seconds:.0f} s  {_line(record.metrics)}")
    # Figures 3, 5 and 6 look into the runs of Figure 2.
    places = dict.fromkeys(str(folder / case.experiment) for case in cases)
    print(f"records in {', '.join(places)}")


def _cases(options: argparse.Namespace) -> list[runs.Case]:
    function = EXPERIMENTS[options.command].cases
    chosen = {key: getattr(options, key) for key in ("data", "seed")}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    unknown = chosen.keys() - inspect.signature(function).parameters.keys()
    if unknown:
        options.parser.error(
            f"{options.command} has no --{unknown.pop()}: it is the same in all its cases"
        )
    try:
        cases = function(options.scale, **chosen)
    except ValueError as error:
        options.parser.error(f"{options.command}: {error}")
    names = [case.name for case in cases]
    for name in options.case:
        if name not in names:
            options.parser.error(f"{options.command} has no case {name!r}, but {names}")
    return [case for case in cases if case.name in options.case or not options.case]


def _line(metrics: dict[str, Any]) -> str:
    """Numbers of a record's metrics, the nested ones by their names."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            parts.append(f"{name}: {_line(value)};")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.3g}")
        elif value is not None:
            parts.append(f"{name} {value}")
    return " ".join(parts)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader like `head` has had enough. Python would write the rest at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
