"""The schedule of this package: whole mini-batches stream through the stages, and the pipeline is never flushed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lightning_cpipe.schedules.action import Row, backward, forward, input_gradient, update, weight_gradient
from lightning_cpipe.schedules.policies import STASH, VersionPolicy
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class Continuous(Schedule):
    """ContinuousPipe.

    4 stages, as the paper draws it (`F` and `B` take one slot each, `*` is idle):

        stage 0 | 0F  *  1F  *  2F  *  3F  0B  4F  1B  5F  2B  6F ...
        stage 1 |  * 0F   * 1F   * 2F  0B  3F  1B  4F  2B  5F  3B ...
        stage 2 |  *  *  0F  * 1F  0B  2F  1B  3F  2B  4F  3B  5F ...
        stage 3 |  *  *   * 0F 0B  1F  1B  2F  2B  3F  3B  4F  4B ...

    The same in rows, one row per local step. Step i forwards mini-batch i + lag, then backwards mini-batch i and
    updates:

        stage 0 | F0 | F1 | F2 | F3 B0 U0 | F4 B1 U1 | ...
        stage 3 | F0 B0 U0 | F1 B1 U1 | ...

    Attributes:
        extra_in_flight: how much further a stage's forwards run ahead, in multiples of the least lag. It hides the
            time of the transfers and costs delay.
        accumulate: mini-batches per update.
        epoch_length: mini-batches per epoch, where known; as in Lightning, an epoch's last mini-batch updates even if
            `accumulate` does not divide the epoch.
        early_input_gradient: whether a backward is split, so that the input gradient leaves before the gradients of
            the weights are made: ``F3 I0 W0 U0``. It shortens the time that a stage waits for the one after it; the
            numbers stay the same.
        versions: which weights a mini-batch uses.
    """

    extra_in_flight: int = 0
    accumulate: int = 1
    epoch_length: int | None = None
    early_input_gradient: bool = False
    versions: VersionPolicy = STASH

    name: ClassVar[str] = "continuous"
    streams: ClassVar[bool] = True
    unit: ClassVar[str] = "mini-batch"
    mark: ClassVar[str] = "M"

    def lag(self, stage: int, num_stages: int) -> int:
        """The rows by which a stage's forwards run ahead of its backwards: ``(p - 1 - s) * (1 + extra)``."""
        return (num_stages - 1 - stage) * (1 + self.extra_in_flight)

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage: `lag` forwards, then one of each per row, until the data ends."""
        lag = self.lag(stage, num_stages)
        for step in range(num_batches + lag):
            row: Row = (forward(step),) if step < num_batches else ()
            if step >= lag:
                done = step - lag
                row += (input_gradient(done), weight_gradient(done)) if self.early_input_gradient else (backward(done),)
                row += (update(done),) if self.updates_after(done) else ()
            yield row

    def updates_after(self, batch: int) -> bool:
        """Whether the optimizer steps after the backward of `batch`, as Lightning's loop decides it."""
        if self.epoch_length is None:
            return (batch + 1) % self.accumulate == 0
        in_epoch = batch % self.epoch_length
        return (in_epoch + 1) % self.accumulate == 0 or in_epoch + 1 == self.epoch_length

    def updates_before(self, batch: int) -> int:
        """How many updates the first `batch` mini-batches make."""
        if self.epoch_length is None:
            return batch // self.accumulate
        epochs, rest = divmod(batch, self.epoch_length)
        return epochs * -(-self.epoch_length // self.accumulate) + rest // self.accumulate

    def window_start(self, batch: int) -> int:
        """The first of the mini-batches that share an update with `batch`."""
        in_epoch = batch if self.epoch_length is None else batch % self.epoch_length
        return batch - in_epoch % self.accumulate

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """``lag + 1``: the mini-batches forwarded in advance, and the one at hand."""
        return min(self.lag(stage, num_stages) + 1, num_batches)

    def chosen_at(self, stage: int, num_stages: int, batch: int, window_start: int) -> int:
        """``max(0, j - lag)`` of the stage and the mini-batch j that choose."""
        chooser, chosen = self.versions.chosen_by(stage, batch, window_start)
        lag = self.lag(chooser, num_stages)
        # One stage alone has nothing to wait for.
        return max(0, chosen - lag) if lag else batch

    def version(self, stage: int, num_stages: int, batch: int) -> int:
        """The updates before `chosen_at`; ``max(0, batch - lag)`` where each mini-batch updates and stages choose."""
        return self.updates_before(self.chosen_at(stage, num_stages, batch, self.window_start(batch)))

    def delay(self, stage: int, num_stages: int, batch: int) -> int:
        """The updates since `chosen_at`; ``lag`` in the steady state where each mini-batch updates and stages choose.

        Where older versions are not kept, this is the delay of the forward; the backward has none.
        """
        return self.updates_before(batch) - self.version(stage, num_stages, batch)

    def most_delay(self, stage: int, num_stages: int) -> int:
        """The largest delay in the steady state.

        ``ceil(lag / accumulate)`` where stages choose, and one more for each end of an epoch that cuts an accumulation
        short on the way.
        """
        return max(self.delay(stage, num_stages, batch) for batch in self._steady(num_stages))

    def rows_late(self, user: int, owner: int) -> int:
        """The least number of rows with a slot to spare for the message: ``(owner - user) * max(1, extra) // 2 + 1``.

        Stage `user` has backwarded mini-batch i so many slots after the owner: ``owner - user``, or the same times
        `extra_in_flight` where that is more. A row takes two slots.
        """
        return (owner - user) * max(1, self.extra_in_flight) // 2 + 1

    def live_versions(self, stage: int, num_stages: int) -> int:
        """The largest number of versions that some mini-batch in flight, or some later forward, needs at once.

        The newest counts, too. That is one more than the delay, except that 2bw may pass over a version: after an
        accumulation that was cut short.
        """
        if not self.versions.keeps:
            return 1
        return max(len(self._needed(stage, num_stages, step)) for step in self._steady(num_stages))

    def _needed(self, stage: int, num_stages: int, step: int) -> set[int]:
        """The versions that are needed when local step `step` begins."""
        coming = step + self.lag(stage, num_stages)
        in_flight = {self.version(stage, num_stages, batch) for batch in range(step, coming)}
        return in_flight | set(range(self.version(stage, num_stages, coming), self.updates_before(step) + 1))

    def _steady(self, num_stages: int) -> range:
        """One period of local steps, late enough to remember nothing of the start."""
        begun = self.lag(0, num_stages) + self.accumulate
        return range(begun, begun + (self.epoch_length or self.accumulate))

    @property
    def slots_per_batch(self) -> int:
        """A forward and a backward, which takes two if it is split."""
        return 3 if self.early_input_gradient else 2

    def idle_slots(self, num_stages: int, num_batches: int) -> int:
        """As without the split where a rank holds one stage; it is the input gradient that the others wait for.

        Where it holds several, their gradients of weights are in the way: one slot for each stage but one.
        """
        idle = super().idle_slots(num_stages, num_batches)
        ranks = num_stages // self.stages_per_rank
        return idle + (ranks - 1) * (self.stages_per_rank - 1) * self.early_input_gradient

    def idle_slots_so_far(self, stage: int, num_stages: int, num_batches: int) -> int:
        """Slots that the fill has left idle on a stage when the last one has backwarded `num_batches` (at least one).

        A stage waits `stage` slots for its first activation. Then it forwards until its first gradient comes: in every
        slot with extra in flight, else in every other one, with as many pauses as its lag.
        """
        if self.extra_in_flight:
            return stage
        pauses = self.lag(stage, num_stages)
        # So many of them come before slot 2 N + p - 1, in which the last stage is done.
        return stage + min(pauses, num_batches + pauses // 2)

    def idle_ratio(self, num_stages: int, num_batches: int, *, drained: bool) -> float:
        """Share of slots that the plan leaves idle, of all stages, when the last one has backwarded `num_batches`.

        As long as the first stage has mini-batches to forward, only the fill's, of the ``2 N + p - 1`` slots so far:
        when the fill has ended, ``p - 1`` on each stage, and half as many on average with extra in flight. Of a whole
        run, which also waits in the drain, `slot_exact_ratio`, whatever is in flight; and so where a rank holds
        several stages, or backwards are split, as if the run ended now.
        """
        if not num_batches:
            return 0.0
        if drained or self.stages_per_rank > 1 or self.early_input_gradient:
            return self.slot_exact_ratio(num_stages, num_batches)
        idle = sum(self.idle_slots_so_far(stage, num_stages, num_batches) for stage in range(num_stages))
        return idle / (num_stages * (2 * num_batches + num_stages - 1))

    def paper_ratio(self, num_stages: int, num_batches: int) -> float:
        """``1 / (N / (2 (p - 1)) + 1)``, as the paper prints it.

        The paper derives it from a total of ``N + 2 (p - 1)`` slots, which would hold N passes; the run of N
        mini-batches (a forward and a backward each) takes ``2 N + 2 (p - 1)``, see `slot_exact_ratio`.
        """
        idle = 2 * (num_stages - 1)
        return idle / (num_batches + idle)
