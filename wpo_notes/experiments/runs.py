"""Cases of experiments: run one, keep its record, and go on where a killed run stopped.

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

import wpo_notes
from wpo_notes.experiments.records import Record, environment

__all__ = ["Case", "Result", "available", "chosen", "recorded", "run"]


class Result(NamedTuple):
    """What running a case gives; see `Record` for the fields."""

    metrics: dict
    history: list[dict]
    arrays: dict[str, np.ndarray]
    seconds: float
    processor_seconds: float | None = None


@runtime_checkable
class Settings(Protocol):
    """A frozen dataclass that holds all that the result depends on, the seed included."""

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Run the case; with a checkpoint, go on from it if it exists."""


@dataclass(frozen=True)
class Case:
    """One run of an experiment: its settings, and the name under which its record is kept."""

    experiment: str
    name: str
    settings: Settings

    def record(
        self,
        *,
        device: torch.device | str = "cpu",
        checkpoint: Path | None = None,
        progress: bool = False,
    ) -> Record:
        """Run the case and return its record."""
        device = torch.device(device)
        about = environment(device)  # now: the commit may change while the case runs
        result = self.settings.run(device=device, checkpoint=checkpoint, progress=progress)
        return Record(
            self.experiment,
            self.name,
            json.loads(json.dumps(asdict(self.settings))),  # as they are read back
            result.metrics,
            result.history,
            result.arrays,
            result.seconds,
            environment=about,
            processor_seconds=result.processor_seconds,
        )

    def load(self, folder: str | os.PathLike) -> Record:
        """Read the case's record; see `Record.load`."""
        return Record.load(folder, self.experiment, self.name, asdict(self.settings))


def run(
    case: Case,
    folder: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Record:
    """Load the case's record, or run the case, from its checkpoint if there is one, and save it.

    Raises:
        ValueError: a record that is damaged or was made with other settings.
    """
    try:
        return case.load(folder)
    except FileNotFoundError:
        pass
    # Named by settings and code, so that a checkpoint of other ones is never taken up: the record names one commit.
    settings = json.dumps(asdict(case.settings), sort_keys=True).encode()
    digest = hashlib.sha256(settings + _code()).hexdigest()[:12]
    checkpoint = Path(folder) / case.experiment / f"{case.name}-{digest}.checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    record = case.record(device=device, checkpoint=checkpoint, progress=progress)
    record.save(folder)
    checkpoint.unlink(missing_ok=True)
    return record


def _code() -> bytes:
    """Digest of the package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(wpo_notes.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def chosen(laws: Sequence[str], data: str | None) -> Sequence[str]:
    """Laws of an experiment, or the one of them that is asked for.

    Raises:
        ValueError: a law that is not the experiment's.
    """
    if data is None:
        return laws
    if data not in laws:
        raise ValueError(f"data must be one of {tuple(laws)}, got {data!r}")
    return (data,)


def recorded(cases: Iterable[Case], folder: str | os.PathLike) -> dict[str, Record]:
    """Records of the cases, by their names.

    Raises:
        FileNotFoundError: a case has no record; says what makes it.
        ValueError: a damaged record, or one that was made with other settings.
    """
    return {case.name: case.load(folder) for case in cases}


def available(cases: Iterable[Case], folder: str | os.PathLike) -> dict[str, Record]:
    """Records that exist, by the case's name."""
    found = {}
    for case in cases:
        try:
            found[case.name] = case.load(folder)
        except FileNotFoundError:
            continue
    return found
