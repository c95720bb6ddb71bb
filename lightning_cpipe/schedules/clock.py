"""Gives every forward and backward of a plan its slot, as the paper's tables do.

All slots are equal, transfers and updates take none. An action starts when its stage is free and what it needs is
there. A forward that would only wait at the next stage starts later, just in time: that is how the paper draws the
fill (`0F * 1F * 2F * 3F 0B`), and it moves no backward.
"""

from __future__ import annotations

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.plan import Plan

Slots = dict[Action, int]
"""The slot of each forward and backward, its stage written out."""


def clock(plan: Plan) -> Slots:
    """The slot of each forward and backward.

    Raises:
        PlanError: if the plan can't run to its end.
    """
    return _just_in_time(plan, _as_soon_as_possible(plan))


def _computes(plan: Plan, stage: int) -> list[Action]:
    return [action.at(stage) for action in plan.actions(stage) if action.kind.computes]


def _as_soon_as_possible(plan: Plan) -> Slots:
    start: Slots = {}
    queues = [_computes(plan, stage) for stage in range(plan.num_stages)]
    position = [0] * plan.num_stages
    free = [0] * plan.num_stages
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while position[stage] < len(queue):
                action = queue[position[stage]]
                needed = _needed(action, plan.num_stages)
                if needed is not None and needed not in start:
                    break
                start[action] = free[stage] if needed is None else max(free[stage], start[needed] + 1)
                free[stage] = start[action] + 1
                position[stage] += 1
                moved = True
    stuck = [str(queue[position[s]]) for s, queue in enumerate(queues) if position[s] < len(queue)]
    if stuck:
        raise PlanError(f"the plan can't run to its end: {', '.join(stuck)} wait for each other.")
    return start


def _needed(action: Action, num_stages: int) -> Action | None:
    """The neighbour's action that this one waits for."""
    assert action.stage is not None
    if action.kind is Kind.FORWARD:
        return Action(Kind.FORWARD, action.batch, action.stage - 1) if action.stage > 0 else None
    return Action(Kind.BACKWARD, action.batch, action.stage + 1) if action.stage < num_stages - 1 else None


def _just_in_time(plan: Plan, start: Slots) -> Slots:
    late = dict(start)
    for stage in reversed(range(plan.num_stages)):
        following: int | None = None
        for action in reversed(_computes(plan, stage)):
            if action.kind is Kind.FORWARD:
                limits = [] if following is None else [following]
                if stage + 1 < plan.num_stages:
                    limits.append(late[action.at(stage + 1)])
                late[action] = min(limits) - 1 if limits else start[action]
            following = late[action]
    return late
