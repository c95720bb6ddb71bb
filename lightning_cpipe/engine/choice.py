"""Chooses the version that each mini-batch uses on a stage, as the schedule says, from the updates that were made.

The schedule names a local step: the version that was the newest when it began. So this counts the same whatever makes
updates few or many: accumulation, the end of an epoch, a run that goes on in the middle of one.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_cpipe.engine.mini_batch import MiniBatch, Source
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class Memory:
    """What further choices follow from. Mini-batch 0 is the next one to be backwarded, version 0 the newest.

    Attributes:
        first: the mini-batch that the pipeline was filled with; none after 0.
        newest_at: the newest version at the beginning of local steps before this one.
        window_start: the first mini-batch of the update that mini-batch 0 is for.
    """

    first: int
    newest_at: dict[int, int]
    window_start: int


class Choice:
    """The versions of one stage, from where the pipeline was filled on.

    Args:
        schedule: which chooses.
        stage: this one.
        num_stages: p.
        first: the mini-batch that the pipeline is filled with.
    """

    def __init__(self, schedule: Schedule, stage: int, num_stages: int, first: int) -> None:
        self._schedule = schedule
        self._place = stage, num_stages
        self._first = first
        self._newest_at: dict[int, int] = {}
        """The newest version at the beginning of each local step that may still be asked for."""
        self._chosen: dict[int, int] = {}
        """The local step that each mini-batch in flight has chosen."""
        self._last: MiniBatch | None = None
        self._window_start = first

    def memory(self, at: int, newest: int, in_window: int) -> Memory:
        """What a stream that goes on from here must remember.

        Args:
            at: the mini-batch that is backwarded next.
            newest: the newest version.
            in_window: how many mini-batches of the next update were backwarded.
        """
        newest_at = {self._first + step - at: version - newest for step, version in self._newest_at.items()}
        return Memory(self._first - at, newest_at, -in_window)

    def remember(self, memory: Memory) -> None:
        """Go on from there: what was in flight is forwarded once more, and uses what it used."""
        self._first, self._window_start = memory.first, memory.window_start
        self._newest_at = {step - memory.first: version for step, version in memory.newest_at.items()}

    def forward(self, mini_batch: MiniBatch, oldest_in_flight: int, newest: int) -> int:
        """The version that the next mini-batch to be forwarded uses.

        Args:
            mini_batch: that one.
            oldest_in_flight: the mini-batch that is backwarded next; this one, if nothing else is in flight.
            newest: the newest version.
        """
        self._window_start = self._window_start_of(mini_batch)
        self._last = mini_batch
        # A local step has the number of its backward, and updates after it.
        self._newest_at[oldest_in_flight - self._first] = newest
        chosen = self._chosen_at(mini_batch)
        # A run that goes on from here must know of what is in flight, too.
        self._chosen = {number: step for number, step in self._chosen.items() if number >= oldest_in_flight}
        self._chosen[mini_batch.number] = chosen
        oldest = min(self._chosen.values())
        for step in [step for step in self._newest_at if step < oldest]:
            del self._newest_at[step]
        return self._newest_at[chosen]

    def oldest_to_come(self, source: Source) -> int | None:
        """The version that the next forward uses, after an update; None if that is the new one, or there is none."""
        coming = None if self._last is None else source.mini_batch(self._last.number + 1)
        return None if coming is None else self._newest_at.get(self._chosen_at(coming))

    def _chosen_at(self, mini_batch: MiniBatch) -> int:
        place = mini_batch.number - self._first
        return self._schedule.chosen_at(*self._place, place, self._window_start_of(mini_batch) - self._first)

    def _window_start_of(self, mini_batch: MiniBatch) -> int:
        """The first mini-batch of the update that the last one forwarded, or this next one, is for."""
        if self._last is not None and self._last.updates_before != mini_batch.updates_before:
            return mini_batch.number
        return self._window_start
