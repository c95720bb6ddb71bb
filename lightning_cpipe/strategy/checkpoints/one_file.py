"""Writes a checkpoint so that a file of its name is always whole: the older one, until the new one is."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_cpipe.strategy.checkpoints.optimizer_states import State


def write_file(io: CheckpointIO, checkpoint: State, path: str | Path, storage_options: Any | None = None) -> None:
    """Write one plain file.

    On a local disk it is written under another name beside the old one, and then takes its place. What goes to a URL,
    or through a `CheckpointIO` of the user's own, is written in their way.
    """
    if type(io) is not TorchCheckpointIO or storage_options is not None or "://" in str(path):
        io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_beside(path)
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            # A sharded one of the same name.
            shutil.rmtree(path)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def unfinished_beside(path: Path) -> Path:
    """Where a checkpoint is written until it is whole.

    The name says nothing, since Lightning looks for names of checkpoints in that folder; it is the same each time, so
    that what a crash left there is overwritten.
    """
    return path.with_name(f".{hashlib.sha1(path.name.encode()).hexdigest()[:16]}.unfinished")
