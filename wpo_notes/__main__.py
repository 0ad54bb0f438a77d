"""Run the paper's experiments: ``python -m wpo_notes figure2 --scale quick``.

Chapter: *How to run this book* (``book/how-to-run.md``).
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch

from wpo_notes.experiments import EXPERIMENTS, runs

RESULTS = {"paper": Path("book/results"), "quick": Path("_build/quick")}


def main(arguments: list[str] | None = None) -> None:
    """Run the cases of one experiment, or list all of them."""
    parser = argparse.ArgumentParser(prog="python -m wpo_notes", description=__doc__.split("\n")[0])
    parser.add_argument(
        "experiment",
        choices=[*EXPERIMENTS, "list"],
        help="which experiment to run, or 'list': the commands of all of them, one a line",
    )
    parser.add_argument("--scale", choices=("quick", "paper"), default="quick")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--data", help="only this law")
    parser.add_argument("--seed", type=int, help="instead of the experiment's own")
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--out", type=Path, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.experiment == "list":
        cases = [case for module in EXPERIMENTS.values() for case in module.cases(options.scale)]
        # Figures share runs, and two processes must not make the same one.
        for experiment, name in dict.fromkeys((case.experiment, case.name) for case in cases):
            print(f"{experiment} --scale {options.scale} --case {name}")
        return
    cases = _cases(parser, options)
    torch.set_num_threads(1)  # one process a core is faster than spinning threads
    folder = options.out or RESULTS[options.scale]
    for case in cases:
        record = runs.run(case, folder, device=options.device)
        print(f"{record.experiment} {record.case}  {record.seconds:.0f} s  {_line(record.metrics)}")
    print(f"records in {folder / options.experiment}")


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[runs.Case]:
    function = EXPERIMENTS[options.experiment].cases
    chosen = {key: getattr(options, key) for key in ("data", "seed")}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    unknown = chosen.keys() - inspect.signature(function).parameters.keys()
    if unknown:
        parser.error(f"{options.experiment} has no --{unknown.pop()}")
    cases = function(options.scale, **chosen)
    if options.case:
        names = [case.name for case in cases]
        if options.case not in names:
            parser.error(f"{options.experiment} has no case {options.case!r}, but {names}")
        cases = [case for case in cases if case.name == options.case]
    return cases


def _line(metrics: dict) -> str:
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
    main()
