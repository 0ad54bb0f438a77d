"""What an experiment leaves behind: settings, measurements and arrays, readable and checked.

``<folder>/<experiment>/<case>.json`` holds everything but the arrays, which are in the ``.npz`` beside it. A
record is written whole or not at all, and loads only under the settings that it was made with.

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

__all__ = ["Record", "environment"]

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "POT", "torchdiffeq", "numba")


@dataclass(frozen=True)
class Record:
    """Result of one case of an experiment.

    Args:
        experiment: the module's name, and the folder's.
        case: name of the case, and the files'.
        settings: everything that determines the result, as JSON has it.
        metrics: final measurements.
        history: measurements while training, one dictionary a record.
        arrays: what the figure needs: samples, a model's parameters.
        seconds: wall time of training.
        environment: versions, machine, commit and date.
        processor_seconds: processor time of the same; None where it is among the metrics or, in older
            records, was not measured.
    """

    experiment: str
    case: str
    settings: dict
    metrics: dict
    history: list[dict]
    arrays: dict[str, np.ndarray]
    seconds: float
    environment: dict
    processor_seconds: float | None = None

    def save(self, folder: str | os.PathLike) -> None:
        """Write the record below `folder`; an earlier one stays whole until this one is."""
        path = _path(folder, self.experiment, self.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays)
        about = asdict(self) | {"arrays": hashlib.sha256(buffer.getvalue()).hexdigest()}
        about["sha256"] = _digest(about)
        # The arrays first: a JSON file without its arrays would be refused.
        _replace(path.with_suffix(".npz"), buffer.getvalue())
        _replace(path, json.dumps(about, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike, experiment: str, case: str, settings: dict) -> Record:
        """Read a record that was made with these `settings`.

        Raises:
            FileNotFoundError: no such record.
            ValueError: a damaged record, or one that was made with other settings.
        """
        path = _path(folder, experiment, case)
        if not path.is_file():
            raise FileNotFoundError(
                f"no record of {experiment} {case} at {path}: make it with "
                f"python -m wpo_notes {experiment} --scale paper --case {case}"
            )
        remedy = "restore it from a copy, or remove it and run the case again"
        try:
            about = json.loads(path.read_bytes())
            content = path.with_suffix(".npz").read_bytes()
        except (ValueError, OSError) as error:
            raise ValueError(f"the record {path} is damaged ({error}): {remedy}") from error
        whole = isinstance(about, dict) and about.pop("sha256", None) == _digest(about)
        if not whole or about["arrays"] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"the record {path} is damaged (its checksum differs): {remedy}")
        expected = json.loads(json.dumps(settings))
        if about["settings"] != expected:
            keys = sorted(expected.keys() | about["settings"].keys())
            differing = [
                f"{key} is {about['settings'].get(key)!r}, not {expected.get(key)!r}"
                for key in keys
                if about["settings"].get(key) != expected.get(key)
            ]
            raise ValueError(
                f"the record {path} was made with other settings ({'; '.join(differing)}): "
                "ask for those, or remove it and run the case again"
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            about["arrays"] = dict(file)
        return cls(**about)


def environment(device: torch.device) -> dict:
    """Versions, machine, threads, commit and date: what a measurement of time depends on."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # numba is optional
            versions[name] = metadata.version(name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _path(folder: str | os.PathLike, experiment: str, case: str) -> Path:
    return Path(folder) / experiment / f"{case}.json"


def _digest(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _commit() -> str | None:
    """The checkout's commit, with a + if the working tree differs; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return run.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return (
        commit + ("+" if git("status", "--porcelain", "--", str(here)) else "") if commit else None
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
