"""This process among the ranks: its groups, its watch, and how it ends."""

from __future__ import annotations

import subprocess
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.schedules.placement import in_words as stages_in_words
from lightning_cpipe.schedules.placement import places_of, rank_of, stages_of
from lightning_cpipe.schedules.plan import Held
from lightning_cpipe.strategy.lightning_private import default_backend_for, init_dist_connection
from lightning_cpipe.strategy.ranks.ending import Ending, in_words, wait_for
from lightning_cpipe.transport.control import NEVER, Content, Control
from lightning_cpipe.transport.counterparts import Counterparts
from lightning_cpipe.transport.first_cause import ORPHANED, say, sentence_if_killed
from lightning_cpipe.transport.last_words import LastWords
from lightning_cpipe.transport.launched import Guard, launcher
from lightning_cpipe.transport.liveness import Watch
from lightning_cpipe.transport.parcels import Parcels
from lightning_cpipe.transport.records import Records
from lightning_cpipe.transport.wiring import BatchLane, Lanes, Link, Wiring

START_UP = timedelta(minutes=10)
"""How long the ranks wait for each other at the start; importing torch in many processes at once takes its time."""


class Processes:
    """The ranks of all pipelines, seen from one of them.

    Args:
        environment: knows the ranks and their address.
        held: the stages of each rank of a pipeline, in the order in which data flows.
        device: where this rank computes.
        backend: of the groups that carry tensors; None for the device's own.
        num_replicas: pipelines side by side.
        all_save: whether those beside the first one have something for a checkpoint, too.
    """

    def __init__(
        self,
        environment: ClusterEnvironment,
        held: Held,
        device: torch.device,
        backend: str | None,
        num_replicas: int = 1,
        *,
        all_save: bool = False,
    ) -> None:
        self.rank = environment.global_rank()
        self.held = held
        self.num_replicas = num_replicas
        self.replica = self.rank // len(held)
        self.stages = stages_of(self.rank, held)
        self.counterparts: Counterparts | None = None
        """Those of this rank; None where there is one pipeline."""
        self._wiring: Wiring | None = None
        self._watch: Watch | None = None
        self._words: LastWords | None = None
        self._ending = Ending()
        self._backend = backend or default_backend_for(device)
        self._launcher = launcher()
        self._guard = Guard(self.rank, self._named_stages(self.rank), self._launcher)
        if self.num_ranks > 1:
            self._guard.start()
            init_dist_connection(environment, self._backend, timeout=START_UP)
        self.control = Control(self.num_ranks)
        if len(held) > 1:
            first = self.replica * len(held)
            places = sorted(place for stages in held for place in places_of(stages))
            ranks = [first + rank_of(place[0], held) for place in places]
            replicas = [replica * len(held) - first for replica in range(num_replicas)]
            self._wiring = Wiring(self.control, ranks, ranks.index(self.rank), device, self._backend, places, replicas)
        if num_replicas > 1:
            self.counterparts = Counterparts(self.control, self.rank, len(held), num_replicas, device, self._backend)
        self.shards: dist.ProcessGroup | None = None
        """Of the ranks of the first pipeline, for what they write together in the background."""
        self._groups: list[dist.ProcessGroup] = []
        # Those of other pipelines hold the same weights, and send none.
        self.parcels = Parcels(self.control, self.rank, len(held), self.num_ranks if all_save else None)
        # The connections outlive a run, for the next one with the same strategy, and end with the strategy.
        self._letting_go = weakref.finalize(
            self, _let_go_of, self._wiring, self.counterparts, self._groups, self.parcels, self.control, self._ending
        )
        self._letting_go.atexit = False

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return sum(map(len, self.held))

    @property
    def num_ranks(self) -> int:
        """Ranks of all pipelines together."""
        return len(self.held) * self.num_replicas

    def collect(self, of_rank: Callable[[], Content]) -> list[Content]:
        """On rank 0, what the ranks of the first pipeline have, in their order; an empty list elsewhere.

        All ranks must call it. Those of other pipelines are not asked.
        """
        found: list[Any] = self.control.collect(of_rank() if self.replica == 0 else None)
        return self.of_pipeline(found, 0)

    def of_pipeline(self, everyones: Sequence[Content], replica: int) -> list[Content]:
        """Of what all ranks have, that of one pipeline's ranks, in their order."""
        return list(everyones[replica * len(self.held) : (replica + 1) * len(self.held)])

    def _named_stages(self, rank: int) -> str:
        return named_stages(rank, self.held, self.num_replicas)

    def connect_shards(self) -> None:
        """Make the group for what the first pipeline's ranks write together; all ranks must call it."""
        if len(self.held) > 1 and self.shards is None:
            self.shards = dist.new_group(list(range(len(self.held))), backend="gloo", timeout=NEVER)
            if self.replica == 0:
                self._groups.append(self.shards)

    def begin(self, silence_s: float, words_folder: Path | None) -> None:
        """Watch each other from here on.

        Args:
            silence_s: seconds without a beat after which a rank counts as dead.
            words_folder: where the launcher looks for the last words of a rank; None for a temporary file.
        """
        if self.num_ranks == 1:
            return
        path = None if words_folder is None else words_folder / f"rank_{self.rank}"
        self._words = LastWords(sentence_if_killed(self.rank, self._named_stages(self.rank)), path)
        stages = [self._named_stages(rank) for rank in range(self.num_ranks)]
        run = self.control.share(uuid.uuid4().hex)
        self._watch = Watch(self.rank, stages, run, silence_s, self._words, self._launcher)
        self.control.barrier()
        self._watch.start()
        self._guard.stop()

    def end(self) -> None:
        """All went well; returns once it did on every rank."""
        self.parcels.rest()
        self.control.barrier()
        if self._watch is not None:
            self._watch.stop()
            # Rank 0 holds the store: it goes on only when nobody looks there any more.
            self.control.barrier()
            self._watch = None
        if self._words is not None:
            self._words.forget()
            self._words = None

    def at(self, batch: int) -> None:
        """This rank is at that mini-batch."""
        if self._words is not None:
            self._words.at(batch)

    def lanes(self, in_flight: int, links: Mapping[Link, int]) -> list[Lanes]:
        """The lanes to the neighbours of each of its places, and the links with stages of other ranks."""
        return [Lanes()] if self._wiring is None else self._wiring.lanes(in_flight, links)

    def batch_lane(self, lane: BatchLane) -> tuple[Records | None, Records | None]:
        """The ends, in and out, of a lane on which a rank tells the next one what batches are like.

        Neither reaches a rank that loads them itself: the first and the last.
        """
        if self._wiring is None:
            return None, None
        hears, tells = self._wiring.batch_lane(lane)
        return None if self.is_at_an_end else hears, None if self._place <= 1 else tells

    @property
    def is_at_an_end(self) -> bool:
        """Whether this rank holds the first stage or the last one."""
        return self._place in (0, len(self.held) - 1)

    @property
    def _place(self) -> int:
        """Of this rank among those of its pipeline."""
        return self.rank % len(self.held)

    @property
    def stages_between(self) -> frozenset[int]:
        """The stages of all other ranks."""
        return frozenset(stage for rank in range(1, len(self.held) - 1) for stage in stages_of(rank, self.held))

    def fail(self, error: BaseException, where: str, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """This rank can't go on: find out, or say, what the first cause was.

        Args:
            error: what was raised here.
            where: what this rank was doing.
            children: the ranks that this one started; it ends after them.
        """
        watch, words = self._watch, self._words
        if watch is None or words is None:
            return
        self._letting_go.detach()
        if isinstance(error, RankLostError):
            cause = watch.explain(error.lost)
        else:
            # Children of a launcher that is gone are interrupted.
            orphaned = watch.is_orphan and isinstance(error, KeyboardInterrupt)
            cause = watch.report(ORPHANED if orphaned else f"{where}: {in_words(error)}")
        # A connection broke because something else did, if only that this rank's own launcher is gone.
        echo = cause.rank != self.rank or isinstance(error, RankLostError)
        if isinstance(error, RankLostError):
            error.args = (cause.text,)
        watch.stop()
        words.replace(cause.text)
        says = cause if watch.is_spokesman else None
        if watch.is_orphan and words.is_awaited:
            # Nobody will read the words, and what `multiprocessing` made may end without `atexit`.
            if says is not None:
                say(says)
            says = None
            words.forget(with_folder=True)
        self._ending.because(says, error, echo=echo)
        self._ending.afterwards(partial(wait_for, children))
        # The words of the rank that failed are for others to read; whoever speaks removes them.
        self._ending.afterwards(watch.clean_up)
        if echo:
            if not words.is_awaited:
                self._ending.afterwards(words.forget)
            watch.linger()
        self._let_go()

    def _let_go(self) -> None:
        """Break the connections, so that ranks which wait for this one learn of it at once.

        On NCCL, ending a group could wait for the messages that never come; there, only the sockets are closed.
        """
        if self.num_ranks == 1:
            return
        self.parcels.abandon()
        connected = [each for each in (self._wiring, self.counterparts) if each is not None]
        for each in connected:
            each.abandon() if self._backend == "gloo" else each.disconnect()
        if self._backend == "gloo":
            dist.destroy_process_group()


def named_stages(rank: int, held: Held, num_replicas: int) -> str:
    """The stages that a rank holds, in words; with those of other pipelines, also which one it belongs to."""
    words = stages_in_words(stages_of(rank, held))
    return words if num_replicas == 1 else f"{words} of pipeline {rank // len(held)}"


def _let_go_of(
    wiring: Wiring | None,
    counterparts: Counterparts | None,
    groups: list[dist.ProcessGroup],
    parcels: Parcels,
    control: Control,
    ending: Ending,
) -> None:
    parcels.close()
    for group in groups if dist.is_initialized() else ():
        dist.destroy_process_group(group)
    for each in (wiring, counterparts):
        if each is not None:
            each.close()
    control.close()
    ending.call_off()
