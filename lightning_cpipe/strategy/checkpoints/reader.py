"""Reads checkpoints, of one file or of a folder of shards, and of them what this rank needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lightning_cpipe.strategy.checkpoints.mapped_file import Reading, can_be_mapped, read_mapped
from lightning_cpipe.strategy.checkpoints.optimizer_states import State
from lightning_cpipe.strategy.checkpoints.sharded import is_sharded, read_shards
from lightning_cpipe.strategy.checkpoints.whole import Whole


class Reader:
    """One rank's.

    Attributes:
        copying: makes a context in which what was read last is to be copied; of a module in parts, no more is read.
    """

    def __init__(self) -> None:
        self.copying: Reading = nullcontext

    def read(
        self,
        path: str | Path,
        whole: Whole | None,
        io: CheckpointIO,
        as_usual: Callable[..., State],
        *args: Any,
        **kwargs: Any,
    ) -> State:
        """What a checkpoint holds.

        Args:
            path: of the file or folder.
            whole: this rank's share in a module that is cut.
            io: by which files are read.
            as_usual: reads a file as Lightning does.
            args: further ones, of Lightning's `load_checkpoint`.
            kwargs: likewise.
        """
        self.copying = nullcontext
        if is_sharded(path):
            return read_shards(path, _all if whole is None else whole.is_here, *args, **kwargs)
        if whole is not None and whole.stays_in_parts and can_be_mapped(path, io):
            content, self.copying = read_mapped(path, *args, **kwargs)
            return content
        return as_usual(path, *args, **kwargs)


def _all(_: str) -> bool:
    return True
