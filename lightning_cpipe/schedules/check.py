"""Walks any plan and lists every fault.

Order, pairing, deadlock, the bound of what is in flight, and the version that each forward and backward uses. The
walk is the *happens-before* relation itself: an action is done once everything it needs is done.

Two rules for sends are checked, since transports differ: a send that returns at once (what this package's transports
do), and a send that waits until its receiver has posted the receive. Walked under the second rule, two neighbours of
the continuous schedule lock at once if receives are not posted ahead: one sends an activation while the other sends
a gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_cpipe.schedules.action import GRADIENT_LEAVES, Action, Kind
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.policies import STASH, VersionPolicy
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
        row: the number of the row in those of its rank; None if it is about all of them.
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
        plan: rows of F, B (or I and W) and U. Its transfers are added here.
        schedule: whose promises on in-flight batches and versions the plan must keep; None to check no promise.
        sends_wait: whether to walk with sends that wait for their receiver.
    """
    faults = [*_strangers(plan), *_order(plan), *_pairing(plan)]
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
    waiting = [deque(plan.numbered(line)) for line in range(plan.num_ranks)]
    # Done or next to be done: a receive counts as posted as soon as its rank waits in it.
    reached: set[Action] = set()
    arrivals: dict[tuple[Kind, int], deque[int]] = {}
    moved = True
    while moved:
        moved = False
        for actions in waiting:
            while actions:
                action = actions[0][1]
                moved |= action not in reached
                reached.add(action)
                if not _may_run(plan, action, reached, arrivals, sends_wait):
                    break
                actions.popleft()
                assert action.stage is not None
                if action.kind in _POSTED_AS:
                    arrivals.setdefault((action.kind, action.stage), deque()).append(action.batch)
                elif action.kind in _NEEDS:
                    kind, offset = _NEEDS[action.kind]
                    arrivals[kind, action.stage + offset].popleft()
                moved = True
    return [
        Fault(actions[0][1].stage or 0, actions[0][0], f"{_word(actions[0][1])} waits for ever")
        for actions in waiting
        if actions
    ]


def versions(plan: Plan, stage: int, policy: VersionPolicy = STASH) -> dict[int, int]:
    """The version that each mini-batch uses on `stage`, counted by walking: mini-batch -> number of updates before."""
    chosen = {batch: policy.chosen_by(stage, batch, start) for batch, start in _window_starts(plan, stage).items()}
    newest = {chooser: _newest(plan, chooser) for chooser in {chooser for chooser, _ in chosen.values()}}
    return {batch: newest[chooser][by] for batch, (chooser, by) in chosen.items() if by in newest[chooser]}


def delays(plan: Plan, stage: int, policy: VersionPolicy = STASH) -> dict[int, int]:
    """The delay of each mini-batch on `stage`, counted by walking: version at its backward - version used.

    Of a backward in two halves, that of the weight gradient.
    """
    used = versions(plan, stage, policy)
    found: dict[int, int] = {}
    updates = 0
    for action in plan.actions(stage):
        if action.kind.frees:
            found[action.batch] = updates - used[action.batch]
        elif action.kind is Kind.UPDATE:
            updates += 1
    return found


def live_versions(plan: Plan, stage: int, policy: VersionPolicy = STASH) -> int:
    """The largest number of versions that are needed at once on `stage`, counted by walking.

    Needed are the newest, those of the mini-batches in flight, and what the next forward uses and all after that.
    """
    if not policy.keeps:
        return 1
    used = versions(plan, stage, policy)
    coming = deque(plan.batches(stage, Kind.FORWARD))
    in_flight: set[int] = set()
    updates = most = 0
    for action in plan.actions(stage):
        if action.kind is Kind.FORWARD:
            in_flight.add(coming.popleft())
        elif action.kind.frees:
            in_flight.discard(action.batch)
        elif action.kind is Kind.UPDATE:
            updates += 1
        later = range(used[coming[0]] if coming else updates, updates)
        most = max(most, len({updates, *(used[batch] for batch in in_flight), *later}))
    return most


def _newest(plan: Plan, stage: int) -> dict[int, int]:
    """The newest version at each forward of `stage`."""
    found: dict[int, int] = {}
    updates = 0
    for action in plan.actions(stage):
        if action.kind is Kind.FORWARD:
            found[action.batch] = updates
        elif action.kind is Kind.UPDATE:
            updates += 1
    return found


def _window_starts(plan: Plan, stage: int) -> dict[int, int]:
    """For each batch the first one that shares its update."""
    updated = set(plan.batches(stage, Kind.UPDATE))
    found: dict[int, int] = {}
    start = 0
    for batch in plan.batches(stage, Kind.FORWARD):
        found[batch] = start
        if batch in updated:
            start = batch + 1
    return found


def most_in_flight(plan: Plan, stage: int) -> int:
    """The largest number of batches in flight on `stage`, counted by walking."""
    return _most(plan.actions(stage))


def most_on_rank(plan: Plan, line: int) -> int:
    """The largest number of forwards whose backwards are still to come on all stages of a line together."""
    return _most(action for _, action in plan.numbered(line))


def _most(actions: Iterable[Action]) -> int:
    now = most = 0
    for action in actions:
        now += (action.kind is Kind.FORWARD) - action.kind.frees
        most = max(most, now)
    return most


def _word(action: Action) -> str:
    """The action without its stage, which a fault tells besides."""
    return str(Action(action.kind, action.batch))


def _may_run(
    plan: Plan,
    action: Action,
    reached: set[Action],
    arrivals: dict[tuple[Kind, int], deque[int]],
    sends_wait: bool,
) -> bool:
    stage = action.stage
    assert stage is not None
    if action.kind in _NEEDS:
        kind, offset = _NEEDS[action.kind]
        return next(iter(arrivals.get((kind, stage + offset), ())), None) == action.batch
    if sends_wait and action.kind in _POSTED_AS:
        kinds, offset = _POSTED_AS[action.kind]
        return any(Action(kind, action.batch, stage + offset) in reached for kind in kinds)
    if action.kind is Kind.FORWARD and plan.together(stage, stage - 1):
        return Action(Kind.FORWARD, action.batch, stage - 1) in reached
    if action.kind in GRADIENT_LEAVES and plan.together(stage, stage + 1):
        return any(Action(kind, action.batch, stage + 1) in reached for kind in GRADIENT_LEAVES)
    return True


def _strangers(plan: Plan) -> Iterator[Fault]:
    """Actions that stand in the rows of a rank that does not hold their stage, or do not say which of several."""
    for stages, rows in zip(plan.held, plan.rows):
        allowed = {*stages} if len(stages) > 1 else {None, *stages}
        whose = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
        for number, row in enumerate(rows):
            for action in row:
                if action.stage not in allowed:
                    yield Fault(stages[0], number, f"{action} stands in the rows of {whose}")


def _order(plan: Plan) -> Iterator[Fault]:
    """Each batch forwarded once, then backwarded once; an update only after the backward that it names."""
    seen: set[Action] = set()
    for line, stages in enumerate(plan.held):
        for row, action in plan.numbered(line):
            if action.stage not in stages:
                continue
            if action in seen:
                yield Fault(action.stage, row, f"{_word(action)} a second time")
            elif other := next((each for each in _instead_of(action) if each in seen), None):
                yield Fault(action.stage, row, f"{_word(action)} besides {_word(other)}")
            before = _before(action)
            if before and not any(each in seen for each in before):
                yield Fault(action.stage, row, f"{_word(action)} before {_word(before[0])}")
            seen.add(action)
    for stage in range(plan.num_stages):
        done = {kind: set(plan.batches(stage, kind)) for kind in Kind if kind.computes}
        for batch in sorted(done[Kind.FORWARD] - done[Kind.BACKWARD] - done[Kind.INPUT_GRADIENT]):
            yield Fault(stage, None, f"F{batch} has no B{batch}")
        for batch in sorted(done[Kind.INPUT_GRADIENT] - done[Kind.WEIGHT_GRADIENT]):
            yield Fault(stage, None, f"I{batch} has no W{batch}")
        if not plan.batches(stage, Kind.UPDATE):
            yield Fault(stage, None, "never updates")


def _before(action: Action) -> list[Action]:
    """One of these comes before the action, on its own stage."""
    kinds = {
        Kind.BACKWARD: [Kind.FORWARD],
        Kind.INPUT_GRADIENT: [Kind.FORWARD],
        Kind.WEIGHT_GRADIENT: [Kind.INPUT_GRADIENT],
        Kind.UPDATE: [Kind.BACKWARD, Kind.WEIGHT_GRADIENT],
    }.get(action.kind, [])
    return [Action(kind, action.batch, action.stage) for kind in kinds]


def _instead_of(action: Action) -> list[Action]:
    """With one of these, the action would be a second backward."""
    halves = [Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
    kinds = halves if action.kind is Kind.BACKWARD else [Kind.BACKWARD] if action.kind in halves else []
    return [Action(kind, action.batch, action.stage) for kind in kinds]


def _pairing(plan: Plan) -> Iterator[Fault]:
    """Neighbours run the same batches in the same order, each way."""
    for stage in range(plan.num_stages - 1):
        for kinds in ((Kind.FORWARD,), GRADIENT_LEAVES):
            here, there = ([a for a in plan.actions(each) if a.kind in kinds] for each in (stage, stage + 1))
            if [action.batch for action in here] != [action.batch for action in there]:
                batches = zip(here, there)
                where = next((i for i, (a, b) in enumerate(batches) if a.batch != b.batch), min(len(here), len(there)))
                words = [_word(each[where]) if where < len(each) else "nothing" for each in (here, there)]
                kind = next(each[where].kind for each in (here, there) if where < len(each))
                yield Fault(stage, None, f"{words[0]} as its {kind} number {where}, but stage {stage + 1} {words[1]}")


def _promises(plan: Plan, schedule: Schedule) -> Iterator[Fault]:
    """What the schedule's closed forms say must be what the walk finds."""
    p = plan.num_stages
    for stage in range(p):
        bound = schedule.in_flight(stage, p, len(plan.batches(stage, Kind.FORWARD)))
        if (most := most_in_flight(plan, stage)) > bound:
            yield Fault(stage, None, f"{most} in flight where {schedule.name} allows {bound}")
        newest = _newest(plan, stage)
        for batch, version in versions(plan, stage, schedule.versions).items():
            if version > newest[batch]:
                yield Fault(stage, None, f"F{batch} needs version {version} where {newest[batch]} is the newest")
            if version != (promised := schedule.version(stage, p, batch)):
                yield Fault(stage, None, f"F{batch} finds version {version} where version {promised} is promised")
