"""Reads of a checkpoint what is used: the file is mapped into memory, not read as a whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_cpipe.strategy.checkpoint import State, on_cpu

_READ_BY_PARTS = ("state_dict", "optimizer_states")


def can_be_mapped(path: _PATH, io: CheckpointIO) -> bool:
    """Whether it is a file of torch's on this machine, and nobody asked for it to be read in another way."""
    return type(io) is TorchCheckpointIO and Path(path).is_file() and zipfile.is_zipfile(path)


def read_mapped(path: _PATH, weights_only: bool | None = None) -> State:
    """The content of the file. Weights and the states of optimizers lie in the file until they are copied."""
    content: State = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    by_parts = {key: content.pop(key) for key in _READ_BY_PARTS if key in content}
    # All else may be kept, and the file may be written anew.
    return {**on_cpu(content), **by_parts}
