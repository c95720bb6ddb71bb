"""Reads of a checkpoint what is used: the file is mapped into memory, not read as a whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_cpipe.stage.pages import drop_numbers
from lightning_cpipe.strategy.checkpoints.optimizer_states import IN_FLIGHT, State, on_cpu
from lightning_cpipe.torch_private import TorchDispatchMode, pytree

Reading = Callable[[], AbstractContextManager[Any]]

_READ_BY_PARTS = ("state_dict", "optimizer_states", IN_FLIGHT)


def can_be_mapped(path: str | Path, io: CheckpointIO) -> bool:
    """Whether it is a file of torch's on this machine, and nobody asked for it to be read in another way."""
    return type(io) is TorchCheckpointIO and Path(path).is_file() and zipfile.is_zipfile(path)


def read_mapped(path: str | Path, weights_only: bool | None = None) -> tuple[State, Reading]:
    """The content of a file, of which weights and the states of optimizers lie in the file until they are copied.

    Returns:
        The content, and what makes a context: what is copied inside does not stay in memory besides.
    """
    content: State = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    by_parts = {key: content.pop(key) for key in _READ_BY_PARTS if key in content}
    mapped = set(map(StorageWeakRef, _storages_in(by_parts)))
    # All else may be kept, and the file may be written anew.
    return {**on_cpu(content), **by_parts}, partial(_GivesBack, mapped)


class _GivesBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, mapped: set[StorageWeakRef]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mapped = mapped

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in _storages_in((args, kwargs)):
            if StorageWeakRef(storage) in self._mapped:  # type: ignore[no-untyped-call]
                # They are in the file, and come again if need be.
                drop_numbers(storage)
        return made


def _storages_in(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
