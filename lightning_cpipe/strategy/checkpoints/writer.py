"""Writes checkpoints of a run at hand: what each rank gives to one, and which of them writes what."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning_cpipe.strategy.checkpoints.exact_resume import ExactResume
from lightning_cpipe.strategy.checkpoints.optimizer_states import IN_FLIGHT, State
from lightning_cpipe.strategy.checkpoints.promised import PromisedState, as_it_is_now
from lightning_cpipe.strategy.checkpoints.saves import Saves, Write
from lightning_cpipe.strategy.checkpoints.sharded import take_shard, write_shard
from lightning_cpipe.strategy.checkpoints.whole import Whole
from lightning_cpipe.strategy.ranks.processes import Processes


class Writer:
    """One rank's.

    Args:
        processes: the ranks.
        whole: this rank's share in the module; None where there is one stage.
        exact: its share in what is in flight; None where that is not kept.
        write: writes a checkpoint to a path.
        ahead: steps by which this rank is ahead of the first stage, in each of which it may save.
        in_shards: whether a checkpoint is a folder into which each rank writes.
        in_background: whether nobody waits for the disk.

    Attributes:
        saves: what is still to be written.
    """

    def __init__(
        self,
        processes: Processes,
        whole: Whole | None,
        exact: ExactResume | None,
        write: Write,
        *,
        ahead: int,
        in_shards: bool,
        in_background: bool,
    ) -> None:
        self.saves = Saves(processes.parcels, write, in_background=in_background)
        self._processes = processes
        self._whole = whole
        self._exact = exact
        self._in_shards = in_shards and whole is not None
        # Of a save: weights, optimizer's state, averages, what is in flight, and on rank 0 the file. All but what is in
        # flight is the first pipeline's.
        of_a_save = int(exact is not None)
        if processes.replica == 0:
            of_a_save += 1 if in_shards else 3 if processes.rank == 0 else 2
            of_a_save += 0 if whole is None else len(whole.averages)
        processes.parcels.most = max(1, of_a_save) * (2 + ahead)

    def write(self, checkpoint: State, path: str | Path, storage_options: Any | None, *, at_once: bool) -> None:
        """Write a checkpoint, of which parts may still be promised; all ranks must call it.

        Args:
            checkpoint: the same on all ranks, but for what is this rank's.
            path: where.
            storage_options: see Lightning.
            at_once: whether it must be there when this returns.
        """
        leads = self._processes.rank == 0
        if self._exact is not None and "optimizer_states" in checkpoint:
            parts = self._processes.parcels.give("what is in flight", self._exact.part, of_all=True)
            if leads:
                replicas = self._processes.num_replicas
                checkpoint[IN_FLIGHT] = PromisedState(lambda: ExactResume.whole(parts.result(), replicas))
        if self._in_shards and self._processes.replica == 0:
            shard, group = take_shard(checkpoint), self._processes.shards
            write = partial(write_shard, shard, as_it_is_now(checkpoint), path, group)
            self.saves.save_shard(write, path, at_once=at_once, leads=leads)
        elif leads and not self._in_shards:
            self.saves.save(checkpoint, path, storage_options, at_once=at_once)
