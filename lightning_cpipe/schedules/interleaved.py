"""Interleaved 1F1B: every rank holds several stages that are not neighbours, so that the pipeline fills sooner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from lightning_cpipe.schedules.action import Row, backward, forward, update
from lightning_cpipe.schedules.flushed import Flushed
from lightning_cpipe.schedules.placement import interleaved
from lightning_cpipe.schedules.plan import Held


@dataclass(frozen=True)
class Interleaved(Flushed):
    """Interleaved 1F1B (Megatron-LM; Narayanan et al. 2021, section 2.2).

    4 stages on 2 ranks, 4 micro-batches:

        stages 0, 2 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1   * 2B2   * 2B3 0B2 0B3
        stages 1, 3 |   * 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3   *

    The micro-batches go in rounds of as many as there are ranks: a rank runs one round through its first stage, then
    through its next one, and so on, and then the next round; backwards the other way round. Micro-batches that are left
    over make some rounds one longer (Megatron-LM refuses them).

    Attributes:
        stages_per_rank: v. The pipeline idles v times less than 1F1B with stages v times as big, and sends v times as
            much.
    """

    stages_per_rank: int = field(default=2, kw_only=True)

    name: ClassVar[str] = "interleaved"

    def held(self, num_stages: int) -> Held:
        """Every R-th stage on one of R ranks.

        Raises:
            PlanError: if `stages_per_rank` does not divide `num_stages`.
        """
        return interleaved(num_stages, self.stages_per_rank)

    def rank_rows(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of a rank: warm-up, one forward and one backward per row, cool-down, updates."""
        rounds = _rounds(num_batches, self._ranks(num_stages))
        forwards = [forward(batch).at(stage) for each in rounds for stage in stages for batch in each]
        backwards = [backward(batch).at(stage) for each in rounds for stage in reversed(stages) for batch in each]
        ahead = self._ahead(stages[0], num_stages, num_batches)
        for step in range(len(forwards) + ahead):
            row: Row = (forwards[step],) if step < len(forwards) else ()
            yield row + ((backwards[step - ahead],) if step >= ahead else ())
        yield tuple(update(num_batches - 1).at(stage) for stage in reversed(stages))

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """What one stage does of the rows of its rank."""
        stages = next(held for held in self.held(num_stages) if stage in held)
        for row in self.rank_rows(stages, num_stages, num_batches):
            if own := tuple(action for action in row if action.stage == stage):
                yield own

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """No more than this, and exactly this where all rounds are equally long.

        From the forward of a micro-batch to its backward, the rank begins so many forwards; of every v rounds of them,
        one is of this stage. All stages of a rank together have its warm-up in flight, and one more.
        """
        v, ranks = self.stages_per_rank, self._ranks(num_stages)
        ahead = self._ahead(stage % ranks, num_stages, num_batches)
        lengths = {len(each) for each in _rounds(num_batches, ranks)}
        longest = max(lengths)
        most = 0
        for length in lengths:
            forwards = 1 + ahead + (v - 1 - 2 * (stage // ranks)) * length
            whole, rest = divmod(forwards, v * length)
            most = max(most, whole * longest + min(longest, rest))
        return min(most, num_batches)

    def idle_slots(self, num_stages: int, num_batches: int) -> int:
        """``2 (R - 1)``, as for 1F1B, but its slots are v times shorter (Narayanan et al. 2021, section 2.2).

        With fewer micro-batches than ranks, each one that is missing leaves two slots idle for each further stage.
        """
        ranks = self._ranks(num_stages)
        return 2 * (ranks - 1) + 2 * (self.stages_per_rank - 1) * max(0, ranks - num_batches)

    def _ranks(self, num_stages: int) -> int:
        return num_stages // self.stages_per_rank

    def _ahead(self, line: int, num_stages: int, num_batches: int) -> int:
        """Forwards of the warm-up: a round for all stages of the rank but one, and two for each rank to come."""
        ranks = self._ranks(num_stages)
        longest = max(map(len, _rounds(num_batches, ranks)))
        return min((self.stages_per_rank - 1) * longest + 2 * (ranks - 1 - line), self.stages_per_rank * num_batches)


def _rounds(num_batches: int, ranks: int) -> list[range]:
    """The micro-batches in rounds of `ranks`, some longer by what is left over; one short round if they are fewer."""
    count = max(1, num_batches // ranks)
    borders = [number * num_batches // count for number in range(count + 1)]
    return [range(first, after) for first, after in pairwise(borders)]
