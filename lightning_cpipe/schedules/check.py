"""Walks any plan and lists every fault.

Order, pairing, deadlock, the bound of what is in flight, and the version that each forward and backward uses. The
walk is the *happens-before* relation itself: an action is done once everything it needs is done.

Two rules for sends are checked, since transports differ: a send that returns at once (what this package's transports
do), and a send that waits until its receiver has posted the receive. Walked under the second rule, two neighbours of
the continuous schedule lock at once if receives are not posted ahead: one sends an activation while the other sends
a gradient.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import with_transfers

_NEEDS = {
    Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1),
    Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, +1),
}
"""What a receive waits for, and how far up or down its sender is."""

_POSTED_AS = {
    Kind.SEND_FORWARD: ((Kind.POST_FORWARD, Kind.RECV_FORWARD), +1),
    Kind.SEND_BACKWARD: ((Kind.POST_BACKWARD, Kind.RECV_BACKWARD), -1),
}
"""What a send that waits, waits for, and how far up or down its receiver is."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a plan, and where.

    Attributes:
        stage: the stage whose rows hold the fault.
        row: the number of the row in them; None if it is about all of them.
        message: what is wrong, with the action's text form.
    """

    stage: int
    row: int | None
    message: str

    def __str__(self) -> str:
        where = f"stage {self.stage}" if self.row is None else f"stage {self.stage}, row {self.row}"
        return f"{where}: {self.message}"


def check(plan: Plan, schedule: Schedule | None = None, *, sends_wait: bool = False) -> list[Fault]:
    """All faults of a plan of computation; an empty list if there are none.

    Args:
        plan: rows of F, B and U. Its transfers are added here.
        schedule: whose promises on in-flight batches and versions the plan must keep; None to check no promise.
        sends_wait: whether to walk with sends that wait for their receiver.
    """
    faults = [*_order(plan), *_pairing(plan)]
    if not faults:
        faults += check_transfers(with_transfers(plan), sends_wait=sends_wait)
    if schedule is not None:
        faults += _promises(plan, schedule)
    return faults


def check_transfers(plan: Plan, *, sends_wait: bool = False) -> list[Fault]:
    """The deadlocks of a plan that has its transfers already, such as one recorded from a run.

    Messages of one lane are taken in the order they were sent, as an NCCL communicator does it: a receive that asks
    for another mini-batch than the next one on its lane never gets it.
    """
    waiting = [deque(_numbered(plan, stage)) for stage in range(plan.num_stages)]
    # Done or next to be done: a receive counts as posted as soon as its stage waits in it.
    reached: set[Action] = set()
    arrivals: dict[tuple[Kind, int], deque[int]] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(waiting):
            while actions:
                action = actions[0][1].at(stage)
                moved |= action not in reached
                reached.add(action)
                if not _may_run(action, reached, arrivals, sends_wait):
                    break
                actions.popleft()
                if action.kind in _POSTED_AS:
                    arrivals.setdefault((action.kind, stage), deque()).append(action.batch)
                elif action.kind in _NEEDS:
                    kind, offset = _NEEDS[action.kind]
                    arrivals[kind, stage + offset].popleft()
                moved = True
    return [
        Fault(stage, actions[0][0], f"{actions[0][1]} waits for ever")
        for stage, actions in enumerate(waiting)
        if actions
    ]


def versions(plan: Plan, stage: int) -> dict[int, int]:
    """The version that each forward of `stage` finds, counted by walking: mini-batch -> number of updates before."""
    found: dict[int, int] = {}
    updates = 0
    for action in plan.actions(stage):
        if action.kind is Kind.FORWARD:
            found[action.batch] = updates
        elif action.kind is Kind.UPDATE:
            updates += 1
    return found


def delays(plan: Plan, stage: int) -> dict[int, int]:
    """The delay of each backward of `stage`, counted by walking: mini-batch -> version now - version used."""
    used = versions(plan, stage)
    found: dict[int, int] = {}
    updates = 0
    for action in plan.actions(stage):
        if action.kind is Kind.BACKWARD:
            found[action.batch] = updates - used[action.batch]
        elif action.kind is Kind.UPDATE:
            updates += 1
    return found


def live_versions(plan: Plan, stage: int) -> int:
    """The largest number of versions that are needed at once on `stage`, counted by walking."""
    used = versions(plan, stage)
    in_flight: set[int] = set()
    updates = most = 0
    for action in plan.actions(stage):
        if action.kind is Kind.FORWARD:
            in_flight.add(action.batch)
        elif action.kind is Kind.BACKWARD:
            in_flight.discard(action.batch)
        else:
            updates += 1
        most = max(most, len({updates, *(used[batch] for batch in in_flight)}))
    return most


def most_in_flight(plan: Plan, stage: int) -> int:
    """The largest number of batches in flight on `stage`, counted by walking."""
    now = most = 0
    for action in plan.actions(stage):
        now += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(action.kind, 0)
        most = max(most, now)
    return most


def _numbered(plan: Plan, stage: int) -> Iterator[tuple[int, Action]]:
    for number, row in enumerate(plan.rows[stage]):
        for action in row:
            yield number, action


def _may_run(
    action: Action, reached: set[Action], arrivals: dict[tuple[Kind, int], deque[int]], sends_wait: bool
) -> bool:
    stage = action.stage
    assert stage is not None
    if action.kind in _NEEDS:
        kind, offset = _NEEDS[action.kind]
        return next(iter(arrivals.get((kind, stage + offset), ())), None) == action.batch
    if sends_wait and action.kind in _POSTED_AS:
        kinds, offset = _POSTED_AS[action.kind]
        return any(Action(kind, action.batch, stage + offset) in reached for kind in kinds)
    return True


def _order(plan: Plan) -> Iterator[Fault]:
    """Each batch forwarded once, then backwarded once; an update only after the backward that it names."""
    for stage in range(plan.num_stages):
        seen: Counter[Action] = Counter()
        for row, action in _numbered(plan, stage):
            if action.stage not in (None, stage):
                yield Fault(stage, row, f"{action} stands in the rows of stage {stage}")
            here = Action(action.kind, action.batch)
            if seen[here]:
                yield Fault(stage, row, f"{here} a second time")
            needs = {Kind.BACKWARD: Kind.FORWARD, Kind.UPDATE: Kind.BACKWARD}.get(here.kind)
            if needs is not None and not seen[Action(needs, here.batch)]:
                yield Fault(stage, row, f"{here} before {Action(needs, here.batch)}")
            seen[here] += 1
        for batch in sorted(set(plan.batches(stage, Kind.FORWARD)) - set(plan.batches(stage, Kind.BACKWARD))):
            yield Fault(stage, None, f"F{batch} has no B{batch}")
        if not plan.batches(stage, Kind.UPDATE):
            yield Fault(stage, None, "never updates")


def _pairing(plan: Plan) -> Iterator[Fault]:
    """Neighbours run the same batches in the same order, each way."""
    for stage in range(plan.num_stages - 1):
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            here, there = plan.batches(stage, kind), plan.batches(stage + 1, kind)
            if here != there:
                where = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), min(len(here), len(there)))
                words = [f"{kind}{batches[where]}" if where < len(batches) else "nothing" for batches in (here, there)]
                yield Fault(stage, None, f"{words[0]} as its {kind} number {where}, but stage {stage + 1} {words[1]}")


def _promises(plan: Plan, schedule: Schedule) -> Iterator[Fault]:
    """What the schedule's closed forms say must be what the walk finds."""
    p = plan.num_stages
    for stage in range(p):
        bound = schedule.in_flight(stage, p, len(plan.batches(stage, Kind.FORWARD)))
        if (most := most_in_flight(plan, stage)) > bound:
            yield Fault(stage, None, f"{most} in flight where {schedule.name} allows {bound}")
        for batch, version in versions(plan, stage).items():
            if version != (promised := schedule.version(stage, p, batch)):
                yield Fault(stage, None, f"F{batch} finds version {version} where version {promised} is promised")
