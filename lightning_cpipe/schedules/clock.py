"""Gives every forward and backward of a plan its slot, as the paper's tables do.

All slots are equal unless it is told otherwise; transfers and updates take none. An action starts when its rank is free
and what it needs is there. A forward that would only wait at the next stage starts later, just in time: that is how the
paper draws the fill (`0F * 1F * 2F * 3F 0B`), and it moves no backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import GRADIENT_LEAVES, Action, Kind
from lightning_cpipe.schedules.plan import Plan

Slots = dict[Action, int]
"""The first slot of each forward and backward, its stage written out."""

Lengths = Mapping[Kind, int]
"""How many slots each kind takes."""

EQUAL: Lengths = {kind: 1 for kind in Kind if kind.computes}
WHOLE_BACKWARD_TWICE: Lengths = {**EQUAL, Kind.BACKWARD: 2}
"""A backward lasts as long as its two halves together: for comparing schedules that split it with those that don't."""


def clock(plan: Plan, lengths: Lengths = EQUAL) -> Slots:
    """The slot in which each forward and backward begins.

    Raises:
        PlanError: if the plan can't run to its end.
    """
    queues = [[each for _, each in plan.numbered(line) if each.kind.computes] for line in range(plan.num_ranks)]
    return _just_in_time(queues, _as_soon_as_possible(queues, lengths), lengths)


def span(plan: Plan, lengths: Lengths = EQUAL) -> int:
    """Slots from the first forward to the last backward.

    Raises:
        PlanError: if the plan can't run to its end.
    """
    return max((slot + lengths[action.kind] for action, slot in clock(plan, lengths).items()), default=0)


def _as_soon_as_possible(queues: list[list[Action]], lengths: Lengths) -> Slots:
    start: Slots = {}
    needed = _needed([action for queue in queues for action in queue])
    position = [0] * len(queues)
    free = [0] * len(queues)
    moved = True
    while moved:
        moved = False
        for line, queue in enumerate(queues):
            while position[line] < len(queue):
                action = queue[position[line]]
                before = needed.get(action)
                if before is not None and before not in start:
                    break
                there = 0 if before is None else start[before] + lengths[before.kind]
                start[action] = max(free[line], there)
                free[line] = start[action] + lengths[action.kind]
                position[line] += 1
                moved = True
    stuck = [str(queue[position[line]]) for line, queue in enumerate(queues) if position[line] < len(queue)]
    if stuck:
        raise PlanError(f"the plan can't run to its end: {', '.join(stuck)} wait for each other.")
    return start


def _needed(actions: list[Action]) -> dict[Action, Action]:
    """The action of the stage before, or after, that an action waits for."""
    makes = {(action.kind in GRADIENT_LEAVES, action.stage, action.batch): action for action in actions}
    last = max((action.stage or 0 for action in actions), default=0)
    needed: dict[Action, Action] = {}
    for action in actions:
        assert action.stage is not None
        if action.kind is Kind.FORWARD and action.stage > 0:
            needed[action] = Action(Kind.FORWARD, action.batch, action.stage - 1)
        elif action.kind in GRADIENT_LEAVES and action.stage < last:
            after = (True, action.stage + 1, action.batch)
            needed[action] = makes.get(after, Action(Kind.BACKWARD, action.batch, action.stage + 1))
    return needed


def _just_in_time(queues: list[list[Action]], start: Slots, lengths: Lengths) -> Slots:
    late = dict(start)
    follower = {action: then for queue in queues for action, then in pairwise(queue)}
    # Whatever waits for an action, or follows it, starts after it, and has been moved when it is its turn.
    for action in sorted(start, key=start.__getitem__, reverse=True):
        if action.kind is not Kind.FORWARD:
            continue
        assert action.stage is not None
        limits = [late[each] for each in (follower.get(action), action.at(action.stage + 1)) if each in late]
        if limits:
            late[action] = min(limits) - lengths[action.kind]
    return late
