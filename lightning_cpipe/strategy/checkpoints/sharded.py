"""A checkpoint as a folder into which each rank writes its own part, with `torch.distributed.checkpoint`.

The folder has the keys that Lightning's own tool expects, which makes one plain file of it: ``model``, ``optimizer_0``,
…, in which parameters are known by name, and beside them ``meta.pt`` with all that is small. Each rank reads only what
its stages need, however many wrote it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_cpipe.errors import SaveError
from lightning_cpipe.strategy.checkpoints.one_file import unfinished_beside
from lightning_cpipe.strategy.checkpoints.optimizer_states import State
from lightning_cpipe.strategy.checkpoints.promised import settled

_MODEL = "model"
_OPTIMIZER = "optimizer_"
_REST = "meta.pt"


def is_sharded(path: str | Path) -> bool:
    """Whether it is a folder of this kind."""
    return (Path(path) / _REST).is_file()


def take_shard(checkpoint: State) -> State:
    """Take out of this rank's checkpoint what each rank writes itself."""
    optimizers = checkpoint.pop("optimizer_states", [])
    parts = {f"{_OPTIMIZER}{number}": state for number, state in enumerate(optimizers)}
    return {_MODEL: checkpoint.pop("state_dict"), **parts}


def write_shard(shard: State, rest: State, path: str | Path, group: dist.ProcessGroup | None) -> None:
    """Write this rank's part; all ranks must call it, and the folder has its name when all parts are there.

    Args:
        shard: see `take_shard`.
        rest: what rank 0 writes besides.
        path: of the folder.
        group: of all ranks; None if there is one.

    Raises:
        SaveError: if a rank can't write its part; what is there stays as it is.
    """
    path = Path(path)
    unfinished = unfinished_beside(path)
    leads = group is None or dist.get_rank(group) == 0
    if leads:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    if group is not None:
        dist.barrier(group=group)
    try:
        with nullcontext() if group is not None else _alone():
            save(shard, storage_writer=FileSystemWriter(unfinished), process_group=group, no_dist=group is None)
    except CheckpointException as failed:
        # It is no `Exception`.
        reasons = [f"rank {rank}: {type(error).__name__}: {error}" for rank, (error, _) in failed.failures.items()]
        raise SaveError("; ".join(reasons)) from failed
    if leads:
        torch.save(settled(rest), unfinished / _REST)
        _exchange(unfinished, path)


def _exchange(new: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    # A folder can't be replaced in one step; for a moment the older one has this name.
    old = new.with_suffix(".old")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def read_shards(path: str | Path, is_needed: Callable[[str], bool], weights_only: bool | None = None) -> State:
    """The checkpoint as in one file, of which this rank reads what it needs.

    Args:
        path: of the folder.
        is_needed: by the name of a parameter, whether its numbers are; without, its weights have none.
        weights_only: see `torch.load`.
    """
    path = Path(path)
    content: State = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    stored = FileSystemReader(path).read_metadata()
    places: Mapping[str, tuple[str | int, ...]] = stored.planner_data
    found: dict[str, Any] = {}
    for key, what in stored.state_dict_metadata.items():
        kind, *inside = places[key]
        name = inside[0] if kind == _MODEL else inside[1] if inside[0] == "state" else None
        needed = name is None or is_needed(str(name))
        if isinstance(what, TensorStorageMetadata):
            if needed or kind == _MODEL:
                device = "cpu" if needed else "meta"
                found[key] = torch.empty(what.size, dtype=what.properties.dtype, device=device)
        elif needed:
            found[key] = None
    numbers = {key: room for key, room in found.items() if room is None or room.device.type != "meta"}
    with _alone():
        load(numbers, storage_reader=FileSystemReader(path), no_dist=True)
    whole = _nested({places[key]: numbers.get(key, room) for key, room in found.items()})
    content["state_dict"] = whole.pop(_MODEL)
    if whole:
        content["optimizer_states"] = [{"state": {}, **whole[f"{_OPTIMIZER}{n}"]} for n in range(len(whole))]
    return content


def _nested(flat: Mapping[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """Dicts and lists out of the values at their places."""
    root: dict[str, Any] = {}
    for place, value in flat.items():
        inside: Any = root
        for key, following in zip(place, (*place[1:], None)):
            new = value if following is None else [] if isinstance(following, int) else {}
            if isinstance(inside, list):
                inside.extend([None] * (int(key) + 1 - len(inside)))
                inside[int(key)] = new if inside[int(key)] is None else inside[int(key)]
                inside = inside[int(key)]
            else:
                inside = inside.setdefault(key, new)
    return root


@contextmanager
def _alone() -> Iterator[None]:
    """One process does all, which torch would warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
