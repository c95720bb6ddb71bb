"""On NCCL the stages issue their operations in the plan's order, and no two of them can lock.

NCCL itself is never run here. What is run is everything that would be on NCCL: a real pipeline with `NcclEdge` on every
lane that carries tensors, over communicators that are gloo's. Each send, posted receive and wait is written down as it
is issued, on the lanes for records too, and held against the plan and walked for deadlocks, under the rule that counts
on NCCL: a send of tensors may wait until its receiver has posted.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, UPDATE, Timeline
from lightning_cpipe.schedules.action import Action, Kind, format_row
from lightning_cpipe.schedules.check import check_transfers
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.transfers import with_transfers
from lightning_cpipe.strategy.ranks import processes
from lightning_cpipe.transport import control, edge, wiring
from lightning_cpipe.transport.records import Records
from lightning_cpipe.transport.wiring import RECORD_LANES, TENSOR_LANES, UP, Lanes, Wiring
from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import WIDTH, Block, Chain

EPOCHS = 3


class Op(NamedTuple):
    """One thing that a process issues.

    Attributes:
        kind: ``send``, ``post``, ``wait`` (for what was posted, or for a record), ``wait_sent``, ``meet`` (a
            collective of all ranks), ``group`` (a process group is made), or ``F``, ``B``, ``U``.
        lane: between which stages, by the upper one, and which; for a group its ranks and backend.
        number: how many of the kind came before on the lane; of computation, the mini-batch.
    """

    kind: str
    lane: Any
    number: int


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        p: stages.
        sizes: of the batches of an epoch.
        extra_in_flight: of the strategy.
        accumulate: mini-batches per update.
        skip: whether two tensors cross each cut.
        save: whether checkpoints are saved while training streams.
        tie: whether the first and the last stage share a weight.
    """

    p: int
    sizes: tuple[int, ...] = (3,) * 7
    extra_in_flight: int = 0
    accumulate: int = 1
    skip: bool = False
    save: bool = False
    tie: bool = False

    def __str__(self) -> str:
        words = [f"p={self.p}"]
        words += ["further ahead"] * bool(self.extra_in_flight) + ["accumulating"] * (self.accumulate > 1)
        words += ["changing shapes"] * (len(set(self.sizes)) > 1) + ["skip"] * self.skip + ["saving"] * self.save
        words += ["tied"] * self.tie
        return " ".join(words)

    @property
    def plan(self) -> Plan:
        schedule = Continuous(self.extra_in_flight, self.accumulate, len(self.sizes))
        return with_transfers(schedule.plan(self.p, EPOCHS * len(self.sizes)))


CHANGING = (3, 3, 5, 3, 2, 2, 5, 4)

STEADY = [
    case
    for p in (2, 3, 4)
    for case in (Case(p, save=True), Case(p, accumulate=3), Case(p, extra_in_flight=1), Case(p, skip=True))
]
STEADY += [Case(2, tie=True), Case(3, extra_in_flight=1, tie=True), Case(4, accumulate=2, tie=True)]
OTHERS = [Case(p, CHANGING, extra) for p, extra in ((2, 0), (3, 0), (3, 1), (4, 0))]


def each_of(cases: list[Case]) -> pytest.MarkDecorator:
    """By default those with three stages, and those with a tie."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=() if case.p == 3 or case.tie else pytest.mark.full, id=str(case)) for case in cases],
    )


every_case = each_of([*STEADY, *OTHERS])


class Skipping(Chain):
    """The input is added again at the end, so it crosses all cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        return self.net(kept) + kept


class Sharing(Chain):
    """The first block's weight is the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self.net[-1].linear.weight = self.net[0].linear.weight


TIE_LANES = ("tied gradients", "tied weights")
NORM_LANES = ("norms of stages before", "norms of stages after")
LINK_LANES = (*TIE_LANES, *NORM_LANES)
"""The first of each link's two goes to the later stage."""

WITH_TENSORS = (*TENSOR_LANES, *LINK_LANES)


class Recorder:
    """Writes down what this process issues from now on, and lets it run NCCL's code over gloo.

    Args:
        ties: how many ties the module has; their links come before those of neighbours.
    """

    def __init__(self, ties: int) -> None:
        self.ops: list[Op] = []
        self._ties = ties
        self._numbers: Counter[Any] = Counter()
        self._lanes: dict[int, Any] = {}
        edge.dist = self._instead(isend=self._isend, irecv=self._irecv)
        wiring.dist = self._instead(new_group=self._new_group)
        # No limit: where a send waits for the next one to be posted is for the walk to try, everywhere.
        wiring.NcclEdge = lambda *ends, **_: edge.NcclEdge(*ends[:3], in_flight=10**6)
        meet = {name: self._met(getattr(dist, name)) for name in _COLLECTIVES}
        control.dist = self._instead(new_group=self._new_group, **meet)
        connect = processes.init_dist_connection
        processes.init_dist_connection = lambda environment, backend, **options: connect(environment, "gloo", **options)
        note = Timeline._note

        def noted(timeline: Timeline, kind: str, batch: int) -> Any:
            if kind in _LETTERS:
                self.ops.append(Op(_LETTERS[kind], None, batch))
            return note(timeline, kind, batch)

        Timeline._note = noted
        Wiring.lanes = self._with_noted_records(Wiring.lanes)

    def _with_noted_records(self, make: Callable[..., list[Lanes]]) -> Callable[..., list[Lanes]]:
        def lanes(wired: Wiring, *asked: Any, **options: Any) -> list[Lanes]:
            (made,) = make(wired, *asked, **options)
            (place,) = wired._own
            for ends, kind in ((made.records_in, "wait"), (made.records_out, "send")):
                for lane, records in ends.items():
                    upper = place - ((lane in UP) == (kind == "send"))
                    ends[lane] = NotedRecords(records, partial(self._note, kind, (upper, lane)))
            return [made]

        return lanes

    def _instead(self, **functions: Any) -> Any:
        return SimpleNamespace(**{**vars(dist), **functions})

    def _new_group(self, ranks: list[int] | None = None, *, backend: str, **options: Any) -> Any:
        self.ops.append(Op("group", (None if ranks is None else tuple(ranks), backend), 0))
        group = dist.new_group(ranks, backend="gloo", **options)
        if ranks is not None:
            last = dist.get_world_size() - 1
            further = self._numbers["lanes"] - last * len(TENSOR_LANES)
            if further < 0:
                upper, lane = divmod(self._numbers["lanes"], len(TENSOR_LANES))
                self._lanes[id(group)] = upper, TENSOR_LANES[lane]
            else:
                link, up = divmod(further, 2)
                names = TIE_LANES if link < self._ties else NORM_LANES
                self._lanes[id(group)] = tuple(last - rank for rank in ranks), names[up]
            self._numbers["lanes"] += 1
        return group

    def _isend(self, tensor: Tensor, dst: int, group: Any) -> Any:
        self._note("send", self._lanes[id(group)])
        return Noted(dist.isend(tensor, dst=dst, group=group), partial(self._note, "wait_sent", self._lanes[id(group)]))

    def _irecv(self, tensor: Tensor, src: int, group: Any) -> Any:
        self._note("post", self._lanes[id(group)])
        return Noted(dist.irecv(tensor, src=src, group=group), partial(self._note, "wait", self._lanes[id(group)]))

    def _met(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._note("meet", "all")
            return collective(*args, **kwargs)

        return run

    def _note(self, kind: str, lane: Any) -> None:
        self.ops.append(Op(kind, lane, self._numbers[kind, lane]))
        self._numbers[kind, lane] += 1


class Noted:
    """A work whose wait is written down; as on gloo, it never says that it is completed."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self._work = work
        self._note = note

    def wait(self) -> None:
        self._note()
        self._work.wait()

    def is_completed(self) -> bool:
        return False


class NotedRecords(Records):
    """Records whose sends or receives are written down."""

    def __init__(self, records: Records, note: Callable[[], None]) -> None:
        super().__init__(records._connection, records._peer)
        self._note = note

    def send(self, record: Any) -> None:
        self._note()
        super().send(record)

    def receive(self) -> Any:
        self._note()
        return super().receive()


_COLLECTIVES = ("barrier", "broadcast", "broadcast_object_list", "gather_object", "all_gather_object")
_LETTERS = {FORWARD: "F", BACKWARD: "B", UPDATE: "U"}


@functools.cache
def recorded(case: Case) -> list[list[Op]]:
    """What each stage issued, from the first process group to the last goodbye; stage 0 first."""
    recorders: list[Recorder] = []

    def module() -> Chain:
        return Skipping() if case.skip else Sharing() if case.tie else Chain()

    def batches() -> DataLoader[Any]:
        recorders or recorders.append(Recorder(ties=int(case.tie)))
        made: Any = [(torch.randn(size, WIDTH), torch.randn(size, WIDTH)) for size in case.sizes]
        return DataLoader(made, batch_size=None)

    seen = fit_in_pipeline(
        case.p,
        module,
        batches,
        batches,
        strategy={"extra_in_flight": case.extra_in_flight, "process_group_backend": "nccl"},
        callbacks=lambda: [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)] if case.save else [],
        enable_checkpointing=case.save,
        max_epochs=EPOCHS,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=0.1,
        look=lambda *_: recorders[0].ops,
    )
    return [of_rank.found for of_rank in reversed(seen)]


def actions(case: Case, stage: int) -> list[Action]:
    """What a stage issued for training, in the plan's words."""
    ops = recorded(case)[stage]
    mini_batches = EPOCHS * len(case.sizes)
    names = {
        ("post", (stage - 1, "activations")): Kind.POST_FORWARD,
        ("wait", (stage - 1, "activations")): Kind.RECV_FORWARD,
        ("send", (stage, "activations")): Kind.SEND_FORWARD,
        ("post", (stage, "gradients")): Kind.POST_BACKWARD,
        ("wait", (stage, "gradients")): Kind.RECV_BACKWARD,
        ("send", (stage - 1, "gradients")): Kind.SEND_BACKWARD,
    }
    counts = Counter((op.kind, op.lane) for op in ops)
    found = []
    for op in ops:
        key = op.kind, op.lane
        if key in names and op.number > 0:
            # Number 0 is the warm-up's; each message has as many tensors.
            tensors, rest = divmod(counts[key] - 1, mini_batches)
            assert rest == 0
            message, tensor = divmod(op.number - 1, tensors)
            action = Action(names[key], message)
            if tensor == 0:
                found.append(action)
            else:
                assert found[-1] == action, "a message's tensors come one after the other"
        elif op.kind in _LETTERS.values():
            found.append(Action(Kind(op.kind), op.number))
    return found


def postponed(planned: list[Action], signatures: list[int]) -> list[Action]:
    """The plan where shapes change.

    A receive can be posted once the shapes are known, which are told with the first mini-batch that has them: POST_F
    waits for that mini-batch, and for the POST_F before it. It stands before its own RECV_F still.
    """
    known = {signatures[0]}
    waiting: list[Action] = []
    found = []
    for action in planned:
        if action.kind is Kind.POST_FORWARD:
            waiting.append(action)
            continue
        if action.kind is Kind.RECV_FORWARD:
            known.add(signatures[action.batch])
        while waiting and signatures[waiting[0].batch] in known:
            found.append(waiting.pop(0))
        found.append(action)
    return found


@each_of(STEADY)
def test_every_operation_of_a_run_is_the_plans_in_the_plans_order(case: Case) -> None:
    """From the first mini-batch to the last, across epochs, validations and saves: the probe has told all shapes."""
    for stage in range(case.p):
        assert format_row(actions(case, stage)) == format_row(case.plan.actions(stage))


@each_of(OTHERS)
def test_with_new_shapes_the_order_differs_only_in_receives_that_are_posted_later(case: Case) -> None:
    signatures = list(case.sizes) * EPOCHS
    postponements = 0
    for stage in range(case.p):
        planned = list(case.plan.actions(stage))
        found = actions(case, stage)
        assert format_row(found) == format_row(postponed(planned, signatures))
        without = [[a for a in each if a.kind is not Kind.POST_FORWARD] for each in (found, planned)]
        assert without[0] == without[1]
        # All shapes were seen in the first epoch.
        second = Action(Kind.RECV_FORWARD, len(case.sizes) - 1)
        if stage > 0:
            assert found[found.index(second) :] == planned[planned.index(second) :]
        postponements += found != planned
    assert postponements == case.p - 1


@every_case
@pytest.mark.parametrize("sends_wait", [False, True])
def test_the_recorded_order_of_training_has_no_deadlock(case: Case, sends_wait: bool) -> None:
    plan = Plan(tuple((tuple(actions(case, stage)),) for stage in range(case.p)))
    assert not check_transfers(plan, sends_wait=sends_wait)


def ends(lane: tuple[Any, str]) -> tuple[int, int]:
    """The stages that send and receive on a lane."""
    upper, name = lane
    if name in LINK_LANES:
        earlier, later = upper
        return (later, earlier) if name in (TIE_LANES[1], NORM_LANES[1]) else (earlier, later)
    return (upper + 1, upper) if name in UP else (upper, upper + 1)


def stuck(stages: list[list[Op]], *, sends_wait: bool) -> list[Op]:
    """Walk everything that all stages issued: all lanes, evaluation's too, the warm-up, and what all ranks do together.

    Args:
        stages: what each issued.
        sends_wait: whether a send of tensors waits until its receiver has posted. The first message on such a lane
            makes the communicator, for which both ends wait. A record is sent at once.

    Returns:
        The operations that can't run, one for each stage that does not come to its end.
    """
    places = [{op: place for place, op in enumerate(ops)} for ops in stages]
    at = [0] * len(stages)

    def reached(stage: int, op: Op) -> bool:
        return places[stage].get(op, len(stages[stage])) <= at[stage]

    def done(stage: int, op: Op) -> bool:
        return places[stage].get(op, len(stages[stage])) < at[stage]

    def may_run(op: Op) -> bool:
        if op.kind == "meet":
            return all(reached(stage, op) for stage in range(len(stages)))
        if op.kind not in ("send", "post", "wait", "wait_sent"):
            return True
        sender, receiver = ends(op.lane)
        waits = sends_wait and op.lane[1] in WITH_TENSORS
        if op.kind == "wait":
            return done(sender, op._replace(kind="send"))
        if op.kind == "wait_sent" or (op.kind == "send" and waits):
            return reached(receiver, op._replace(kind="post"))
        return not (op.kind == "post" and waits and op.number == 0) or reached(sender, op._replace(kind="send"))

    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(stages):
            while at[stage] < len(ops) and may_run(ops[at[stage]]):
                at[stage] += 1
                moved = True
    return [ops[place] for ops, place in zip(stages, at) if place < len(ops)]


@every_case
@pytest.mark.parametrize("sends_wait", [False, True])
def test_nothing_that_a_run_issues_can_lock(case: Case, sends_wait: bool) -> None:
    assert not stuck(recorded(case), sends_wait=sends_wait)


def test_without_receives_posted_ahead_the_walk_finds_the_lock() -> None:
    """Else the test above would say nothing."""
    late = [list(posted_late(ops)) for ops in recorded(STEADY[0])]
    assert not stuck(late, sends_wait=False)
    assert {op.kind for op in stuck(late, sends_wait=True)} == {"send"}


def posted_late(ops: list[Op]) -> Iterator[Op]:
    """The same with each receive posted only when it is waited for."""
    for op in ops:
        if op.kind == "wait" and op.lane[1] in WITH_TENSORS:
            yield op._replace(kind="post")
        if op.kind != "post" or op._replace(kind="wait") not in ops:
            yield op


@every_case
def test_training_and_evaluation_never_wait_for_what_they_sent(case: Case) -> None:
    """On NCCL that would make the stage's own stream wait for its neighbour."""
    for stage, ops in enumerate(recorded(case)):
        last = max(place for place, op in enumerate(ops) if op.kind in ("B", "U"))
        waits = [op for op in ops[:last] if op.kind == "wait_sent" and op.lane[1] in WITH_TENSORS and op.number > 0]
        assert not waits, f"stage {stage}"


@every_case
def test_every_message_is_sent_posted_and_waited_for_once(case: Case) -> None:
    """Nothing is left on its way at the end, on any lane."""
    stages = recorded(case)
    sent, posted, waited, reaped = (
        Counter(op._replace(kind="") for ops in stages for op in ops if op.kind == kind)
        for kind in ("send", "post", "wait", "wait_sent")
    )
    tensors = Counter({op: count for op, count in sent.items() if op.lane[1] in WITH_TENSORS})
    assert sent == waited
    assert tensors == posted == reaped
    assert {op.lane[1] for op in sent} == {*TENSOR_LANES, *RECORD_LANES, *NORM_LANES, *(TIE_LANES if case.tie else ())}
    assert set(sent.values()) == {1}


@pytest.mark.parametrize("p", [2, 3, 4])
def test_groups_are_made_and_warmed_up_in_one_order_on_all_ranks(p: int) -> None:
    stages = recorded(Case(p, extra_in_flight=1))
    every_lane = [(upper, lane) for upper in range(p - 1) for lane in TENSOR_LANES]
    # Rank r holds stage p - 1 - r.
    pairs = [((p - 1 - upper, p - 2 - upper), "nccl") for upper, _ in every_lane]
    links = [((p - 1 - upper, p - 2 - upper), "nccl") for upper in range(p - 1) for _ in NORM_LANES]
    for stage, ops in enumerate(stages):
        groups = [place for place, op in enumerate(ops) if op.kind == "group"]
        assert [ops[place].lane for place in groups] == [(None, "gloo"), *pairs, *links]
        last_group = groups[len(pairs)]
        warm_up = list(itertools.takewhile(lambda op: op.kind != "meet", ops[last_group + 1 :]))
        own = [lane for lane in every_lane if stage in ends(lane)]
        assert warm_up == [Op(kind, lane, 0) for lane in own for kind in HELLO[stage == ends(lane)[0]]]


HELLO = {True: ("send", "wait_sent"), False: ("post", "wait")}
"""How the sender and the receiver of a lane warm it up."""
