"""Tensors on disk: the safetensors format with a checksum, written at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wpo_notes._optional import needed

__all__ = ["load_tensors", "save_tensors"]


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], *, kind: str, **about: Any
) -> None:
    """Write tensors and JSON-serialisable facts; an earlier file stays whole until the new one is."""
    save_file = needed("safetensors.torch").save_file
    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {"kind": kind, "about": text, "sha256": _digest(tensors, text)}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    os.replace(part, path)


def load_tensors(
    path: str | os.PathLike[str], *, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. No code in the file is ever run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, or one of another kind.
    """
    safetensors = needed("safetensors")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not a {kind} file of wpo_notes ({error}): restore it from a copy"
        ) from error
    if metadata.get("kind") != kind:
        raise ValueError(
            f"{path} is not a {kind} file of wpo_notes (its kind is {metadata.get('kind')!r})"
        )
    if metadata.get("sha256") != _digest(tensors, metadata.get("about", "")):
        raise ValueError(
            f"{path} is damaged: its checksum does not match its content; restore it from a copy"
        )
    return tensors, json.loads(metadata["about"])
