"""Whether a plan is one optimizer step: what the engine runs anew for the micro-batches of each mini-batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.check import Fault
from lightning_cpipe.schedules.placement import in_words
from lightning_cpipe.schedules.plan import Plan


def not_one_step(plan: Plan) -> list[Fault]:
    """What of a plan without faults is not as in one optimizer step; an empty list if nothing.

    Every stage forwards micro-batches 0, 1, 2, … in order, since logged values are collected as they come, and updates
    once, after all else. The last line, which is that of rank 0, holds the last stage, which makes the loss.
    """
    return [*_forwards(plan), *_updates(plan), *_last_stage(plan)]


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


def _last_stage(plan: Plan) -> Iterator[Fault]:
    line = plan.line_of[plan.num_stages - 1]
    if line != plan.num_ranks - 1:
        held = (in_words(plan.held[each]) for each in (line, -1))
        words = "is with stages {}, and rank 0, which logs the loss, holds stages {}: the last stage must be there"
        yield Fault(plan.num_stages - 1, None, words.format(*held))
