"""Chooses the version that each mini-batch uses on a stage, as the schedule says, from the updates that were made.

The schedule names a local step: the version that was the newest when it began. So this counts the same whatever makes
updates few or many: accumulation, the end of an epoch, a run that goes on in the middle of one.
"""

from __future__ import annotations

from lightning_cpipe.engine.mini_batch import MiniBatch, Source
from lightning_cpipe.schedules.schedule import Schedule


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
        self._last: MiniBatch | None = None
        self._window_start = first

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
        for step in [step for step in self._newest_at if step < chosen]:
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
        if self._last is None or self._last.updates_before != mini_batch.updates_before:
            return mini_batch.number
        return self._window_start
