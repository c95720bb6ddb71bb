"""Whether a plan is one optimizer step: what the engine runs anew for the micro-batches of each mini-batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.check import Fault
from lightning_cpipe.schedules.placement import places_of
from lightning_cpipe.schedules.plan import Plan


def not_one_step(plan: Plan) -> list[Fault]:
    """What of a plan without faults is not as in one optimizer step; an empty list if nothing.

    Every stage forwards micro-batches 0, 1, 2, … in order, since logged values are collected as they come, and updates
    once, after all else. The last stages of the ranks lie in the order of the ranks: rank 0 holds the very last one,
    which makes the loss, and what it decides goes from neighbour to neighbour.
    """
    return [*not_once(plan), *_chain(plan)]


def not_once(plan: Plan) -> list[Fault]:
    """The same wherever its stages lie."""
    return [*_forwards(plan), *_updates(plan)]


def _forwards(plan: Plan) -> Iterator[Fault]:
    for stage in range(plan.num_stages):
        for due, batch in enumerate(plan.batches(stage, Kind.FORWARD)):
            if batch != due:
                yield Fault(stage, None, f"F{batch} where F{due} is due: micro-batches are forwarded in order")
                break


def _updates(plan: Plan) -> Iterator[Fault]:
    for stage in range(plan.num_stages):
        actions = list(plan.actions(stage))
        for update, after in pairwise(actions):
            if update.kind is Kind.UPDATE:
                words = f"U{update.batch} before {after.kind}{after.batch}"
                yield Fault(stage, None, f"{words}: a stage updates once, after all micro-batches")
                break


def _chain(plan: Plan) -> Iterator[Fault]:
    places = sorted(place for stages in plan.held for place in places_of(stages))
    for due, stages in zip(places[-plan.num_ranks :], plan.held):
        if stages[-1] != due[-1]:
            words = f"is the last one of its rank where stage {due[-1]} is due: what is decided goes from rank to rank"
            yield Fault(stages[-1], None, words)
