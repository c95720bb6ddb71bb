"""Adds the sends and receives to a plan. Whoever writes a schedule never writes one.

A forward needs the activation of the stage before and hands on its own; a backward needs the gradient of the stage
after and hands on its own. Each arrow between two stages is a *lane* with a process group of its own, so what counts
on a lane is only that both ends name the mini-batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee

from lightning_cpipe.schedules.action import Action, Kind, Row
from lightning_cpipe.schedules.plan import Plan

POSTED_AHEAD = 2
"""How many receives of activations a stage posts before it needs them, so that a send can start at once even while
the receiver validates or saves."""


def with_transfers(plan: Plan, posted_ahead: int = POSTED_AHEAD) -> Plan:
    """Lower a plan of computation to one with transfers.

    Roughly, for stage s in the middle:

        F3  ->  POST_F5 RECV_F3 F3 POST_B3 SEND_F3
        B0  ->  RECV_B0 B0 SEND_B0
    """
    last = plan.num_stages - 1
    return Plan(
        tuple(
            tuple(rows_with_transfers(rows, first=stage == 0, last=stage == last, posted_ahead=posted_ahead))
            for stage, rows in enumerate(plan.rows)
        )
    )


def rows_with_transfers(
    rows: Iterable[Row], *, first: bool, last: bool, posted_ahead: int = POSTED_AHEAD
) -> Iterator[Row]:
    """The rows of one stage with its transfers, in the order in which the engine issues them; they may be endless.

    The receive of a gradient is posted as soon as the forward has told its shape. The gradient is sent directly after
    the backward, before the update, which then hides the transfer.

    Args:
        rows: of computation.
        first: whether the stage is the first, which receives no activations.
        last: whether it is the last, which receives no gradients.
        posted_ahead: how many receives of activations are posted before they are needed.
    """
    rows, rows_ahead = tee(rows)
    to_post = (action.batch for row in rows_ahead for action in row if action.kind is Kind.FORWARD)
    posted = forwarded = 0
    for row in rows:
        actions: list[Action] = []
        for action in row:
            batch = action.batch
            if action.kind is Kind.FORWARD:
                while not first and posted <= forwarded + posted_ahead and (ahead := next(to_post, None)) is not None:
                    actions.append(Action(Kind.POST_FORWARD, ahead))
                    posted += 1
                forwarded += 1
                actions += [] if first else [Action(Kind.RECV_FORWARD, batch)]
                actions.append(action)
                actions += [] if last else [Action(Kind.POST_BACKWARD, batch), Action(Kind.SEND_FORWARD, batch)]
            elif action.kind is Kind.BACKWARD:
                actions += [] if last else [Action(Kind.RECV_BACKWARD, batch)]
                actions.append(action)
                actions += [] if first else [Action(Kind.SEND_BACKWARD, batch)]
            else:
                actions.append(action)
        yield tuple(actions)
