"""Packages that only some functions need, imported where they are used: all modules import without them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["needed", "progress_bar"]

# By the name under which it is imported: the package's own name, and what installs it.
_INSTALLED_BY = {
    "sklearn": ("scikit-learn", "wpo_notes[fit]"),
    "safetensors": ("safetensors", "wpo_notes[fit]"),
    "ot": ("POT", "wpo_notes[experiments]"),
    "torchdiffeq": ("torchdiffeq", "wpo_notes[experiments]"),
    "matplotlib": ("matplotlib", "wpo_notes[plots]"),
    "pyarrow": ("PyArrow", "wpo_notes[parquet]"),
}


def needed(module: str) -> Any:
    """Import a module of one of these packages and return it.

    Raises:
        ModuleNotFoundError: the package is not there; says what installs it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, and misses something itself
            raise
        name, source = _INSTALLED_BY[package]
        raise ModuleNotFoundError(
            f"this needs {name}, which is not installed: pip install '{source}'", name=package
        ) from error


def progress_bar(*, shown: bool, **options: Any) -> Any:
    """Return a bar of tqdm with these options; one that shows nothing if not `shown`, or where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar()
    return tqdm(disable=not shown, **options)


class _NoBar:
    """What `fit` calls of a bar."""

    def update(self) -> None:
        pass

    def set_postfix(self, **values: object) -> None:
        pass

    def close(self) -> None:
        pass
