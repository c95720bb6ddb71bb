"""Several ranks of a plan on one: it does in turn what they do side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind, Row
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.plan import Plan


def folded(plan: Plan, num_ranks: int) -> Plan:
    """One optimizer step on fewer ranks, neighbouring lines of the plan on each; each stage does what it did, in order.

    Args:
        plan: in which every stage updates once, after all else.
        num_ranks: how many; a divisor of those of the plan.

    Raises:
        PlanError: if the plan can't run to its end; the message lists all faults.
    """
    size = plan.num_ranks // num_ranks
    held = [sorted(sum(plan.held[line * size : (line + 1) * size], ())) for line in range(num_ranks)]
    return Plan(tuple(tuple(in_turn(plan, stages)) for stages in held), tuple(map(tuple, held)))


def in_turn(plan: Plan, stages: Sequence[int]) -> Iterator[Row]:
    """The rows of one rank for `stages`, which lie on several in the plan: one action each, in the order of its slots.

    So no action comes before one that it waits for, whatever the plan and wherever the stages lie. Of those that begin
    together, forwards come first, the last stage's before others; and of backwards, the first stage's: what is made for
    another rank is made soon. Updates come at the end.

    Raises:
        PlanError: if the plan can't run to its end; the message lists all faults.
    """
    try:
        slots = clock(plan)
    except PlanError as error:
        raise PlanError("; ".join(map(str, check(plan))) or str(error)) from error

    def turn(action: Action) -> tuple[int, int]:
        assert action.stage is not None
        return slots[action], -action.stage if action.kind is Kind.FORWARD else action.stage

    yield from ((action,) for action in sorted((each for each in slots if each.stage in stages), key=turn))
    for stage in reversed(stages):
        yield tuple(action.at(stage) for action in plan.actions(stage) if action.kind is Kind.UPDATE)
