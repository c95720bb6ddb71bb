"""A zero-bubble schedule: backwards in two halves, and the half that nobody waits for is done where the bubble was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lightning_cpipe.schedules.action import Row, forward, input_gradient, update, weight_gradient
from lightning_cpipe.schedules.clock import span
from lightning_cpipe.schedules.flushed import Flushed
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class ZeroBubble(Flushed):
    """ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.2).

    3 stages, 4 micro-batches; `I` is the input gradient, which leaves at once, `W` the gradient of the weights:

        stage 0 | 0F  * 1F  * 2F 0I 0W 3F 1I 1W 2I 2W 3I 3W
        stage 1 |  * 0F  * 1F 0I 2F 1I 0W 3F 2I 1W 3I 2W 3W
        stage 2 |  *  * 0F 0I 1F 1I 2F 2I 0W 3F 3I 1W 2W 3W

    1F1B, in which stage s makes the gradients of its weights s micro-batches later. So every stage has as many in
    flight as the first stage of 1F1B.
    """

    name: ClassVar[str] = "zb"

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage: warm-up, one of each per row, weights' gradients that are left, update."""
        ahead = self.lag(stage, num_stages)
        for step in range(-ahead, num_batches + stage):
            turns = ((forward, step + ahead), (input_gradient, step), (weight_gradient, step - stage))
            yield tuple(action(batch) for action, batch in turns if 0 <= batch < num_batches)
        yield (update(num_batches - 1),)

    # Its forwards run ahead of its backwards by `lag` rows.
    rows_in_turn = Schedule.rows_in_turn

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """``p`` on every stage, or all of them where they are fewer."""
        return min(num_stages, num_batches)

    @property
    def slots_per_batch(self) -> int:
        """3: a forward and two halves of a backward."""
        return 3

    def idle_slots(self, num_stages: int, num_batches: int) -> int:
        """``p - 1`` where there are at least p micro-batches, and one more for each that is missing.

        ``(p - 1) (F + I - W)``, Qi et al. 2023, table 1. With two stages per rank likewise; for more there is no
        formula here, and the slots of the plan are counted.
        """
        if self.stages_per_rank > 2:
            return span(self.plan(num_stages, num_batches)) - 3 * self.stages_per_rank * num_batches
        others = num_stages - self.stages_per_rank
        return 2 * others - min(others, num_batches - 1)
