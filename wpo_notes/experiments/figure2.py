"""Figure 2: samples of eight laws, of the kernel model, and of denoising score matching.

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wpo_notes.datasets import PLANAR
from wpo_notes.experiments.denoising import DenoisingRun
from wpo_notes.experiments.kernel import KernelRun
from wpo_notes.experiments.runs import Case, chosen

__all__ = ["KERNELS", "KINDS", "cases", "denoising_cases", "kernel_cases", "kernel_name", "kind"]

# Section 5.1: 5e4 training points, 5000 of them centres, 5e4 steps of batch 64.
_KERNEL = {
    "paper": {"n": 50_000, "centers": 5000, "steps": 50_000, "record_every": 2500},
    "quick": {
        "n": 2000,
        "centers": 200,
        "steps": 400,
        "record_every": 400,
        "measured": 1000,
        "samples": 1000,
    },
}
# After as many steps as the kernel model, and after twenty times as many.
_STEPS = {"paper": (50_000, 1_000_000), "quick": (400, 8000)}
_DENOISING = {
    "paper": {"n": 50_000},
    "quick": {"n": 2000, "measured": 500, "samples": 1000, "record_every": 400},
}
# Learning rates besides the default, at as many steps as the kernel model has: is the default fair?
_RATES = {"paper": (1e-3, 1e-2), "quick": ()}
# How the centres are scored, and the schedule of the learning rate, of which the paper names none. At a constant rate most
# runs leave their good values, also with the centres left out; at a falling one fewer do, with one seed more than with another.
KERNELS = {
    "paper": (
        ("leave one out", "cosine"),
        ("leave one out", "constant"),
        ("literal", "constant"),
    ),
    "quick": (("leave one out", "constant"),),
}


# By how the centres are scored and by the learning rate's schedule.
KINDS = ("left out, falling rate", "left out", "literal")


def cases(scale: str, *, data: str | None = None, seed: int = 0) -> list[Case]:
    """All runs of the figure, or those on one law."""
    return [
        *denoising_cases(scale, data=data, seed=seed),
        *kernel_cases(scale, data=data, seed=seed),
    ]


def kernel_cases(scale: str, *, data: str | None = None, seed: int = 0) -> list[Case]:
    """Runs of the kernel model: with the centres left out and, at paper scale, also as printed."""
    return [
        Case(
            "figure2",
            f"{name}-{kernel_name(mode, schedule, seed)}",
            KernelRun(data=name, mode=mode, schedule=schedule, seed=seed, **_KERNEL[scale]),
        )
        for mode, schedule in KERNELS[scale]
        for name in chosen(PLANAR, data)
    ]


def kernel_name(mode: str, schedule: str, seed: int) -> str:
    """How the names of a kernel model's runs end."""
    return f"{mode.replace(' ', '-')}{'-cosine' * (schedule == 'cosine')}-seed{seed}"


def kind(settings: Mapping[str, Any]) -> str:
    """Which of `KINDS` a kernel model's run is, by the settings of its record."""
    if settings["mode"] == "literal":
        return "literal"
    return "left out" + ", falling rate" * (settings["schedule"] == "cosine")


def denoising_cases(scale: str, *, data: str | None = None, seed: int = 0) -> list[Case]:
    """Runs of denoising score matching, one network a law, side by side."""
    names = chosen(PLANAR, data)
    prefix = f"{data}-" if data else ""
    few, many = _STEPS[scale]
    options = {f"{many}": {"steps": many}, f"{few}": {"steps": few}}
    options |= {f"{few}-lr{lr:g}": {"steps": few, "lr": lr} for lr in _RATES[scale]}
    return [
        Case(
            "figure2",
            f"{prefix}dsm-{name}-seed{seed}",
            DenoisingRun(data=names, seed=seed, **option, **_DENOISING[scale]),
        )
        for name, option in options.items()
    ]
