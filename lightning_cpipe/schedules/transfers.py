"""Adds the sends and receives to a plan. Whoever writes a schedule never writes one.

A forward needs the activation of the stage before and hands on its own; a backward needs the gradient of the stage
after and hands on its own. Each arrow between two stages is a *lane* with a process group of its own, so what counts
on a lane is only that both ends name the mini-batches in the same order. Stages that one rank holds send each other
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee

from lightning_cpipe.schedules.action import GRADIENT_LEAVES, Action, Kind, Row
from lightning_cpipe.schedules.plan import Plan

POSTED_AHEAD = 2
"""How many receives of activations a stage posts before it needs them, so that a send can start at once even while
the receiver validates or saves."""


def with_transfers(plan: Plan, posted_ahead: int = POSTED_AHEAD) -> Plan:
    """Lower a plan of computation to one with transfers.

    Roughly, for stage s in the middle:

        F3  ->  POST_F5 RECV_F3 F3 POST_B3 SEND_F3
        B0  ->  RECV_B0 B0 SEND_B0
        I0  ->  RECV_B0 I0 SEND_B0
    """
    lines = [
        tuple(with_transfers_of_rank(rows, stages, plan.num_stages, posted_ahead))
        for stages, rows in zip(plan.held, plan.rows)
    ]
    return Plan(tuple(lines), plan.held)


def with_transfers_of_rank(
    rows: Iterable[Row], stages: Sequence[int], num_stages: int, posted_ahead: int = POSTED_AHEAD
) -> Iterator[Row]:
    """The same for the rank that holds `stages`; its rows may be endless."""
    for stage in stages:
        first = stage == 0 or stage - 1 in stages
        last = stage == num_stages - 1 or stage + 1 in stages
        only = None if len(stages) == 1 else stage
        rows = rows_with_transfers(rows, first=first, last=last, stage=only, posted_ahead=posted_ahead)
    return iter(rows)


def rows_with_transfers(
    rows: Iterable[Row], *, first: bool, last: bool, stage: int | None = None, posted_ahead: int = POSTED_AHEAD
) -> Iterator[Row]:
    """The rows of a rank with the transfers of one stage, in the order in which the engine issues them.

    They may be endless. The receives of gradients are posted in the order in which the next stage sends them, each as
    soon as the forward has told its shape. The gradient is sent directly after the backward, or its first half, before
    the update, which then hides the transfer.

    Args:
        rows: of the rank.
        first: whether no other rank holds the stage before: then the stage receives no activations.
        last: whether no other rank holds the stage after: then it receives no gradients.
        stage: which one; None where the rank holds no other, so that actions need not name it.
        posted_ahead: how many receives of activations are posted before they are needed.
    """
    rows, to_forward, to_backward = tee(rows, 3)
    to_post = iter(()) if first else _batches(to_forward, stage, Kind.FORWARD)
    # All stages run their backwards in the same order.
    to_post_back = iter(()) if last else _batches(to_backward, stage, *GRADIENT_LEAVES)
    # Rows are kept for whoever may still read them.
    del to_forward, to_backward
    posted = forwarded = 0
    waiting: set[int] = set()
    back: int | None = None
    for row in rows:
        actions: list[Action] = []
        for action in row:
            batch = action.batch
            if stage not in (None, action.stage):
                actions.append(action)
            elif action.kind is Kind.FORWARD:
                while not first and posted <= forwarded + posted_ahead and (ahead := next(to_post, None)) is not None:
                    actions.append(Action(Kind.POST_FORWARD, ahead, stage))
                    posted += 1
                forwarded += 1
                actions += [] if first else [Action(Kind.RECV_FORWARD, batch, stage)]
                actions.append(action)
                if not last:
                    waiting.add(batch)
                    back = next(to_post_back, None) if back is None else back
                    while back in waiting:
                        actions.append(Action(Kind.POST_BACKWARD, back, stage))
                        waiting.remove(back)
                        back = next(to_post_back, None)
                    actions.append(Action(Kind.SEND_FORWARD, batch, stage))
            elif action.kind in GRADIENT_LEAVES:
                actions += [] if last else [Action(Kind.RECV_BACKWARD, batch, stage)]
                actions.append(action)
                actions += [] if first else [Action(Kind.SEND_BACKWARD, batch, stage)]
            else:
                actions.append(action)
        yield tuple(actions)


def _batches(rows: Iterable[Row], stage: int | None, *kinds: Kind) -> Iterator[int]:
    """The batches that one stage does one of `kinds` for, in order."""
    return (action.batch for row in rows for action in row if action.kind in kinds and stage in (None, action.stage))
