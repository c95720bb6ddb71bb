"""Plans in and out, as CSV: the text form of `torch.distributed.pipelining`.

One line per rank and one action per cell, such as ``2F0``; an empty cell is an idle slot. Line k is torch's rank k, and
rank R - 1 - k here, since torch's rank 0 holds the first stage. torch has no word for an update: what is not written is
one update of every stage, at the end. A plan with others has them written, ``2U0``, which torch refuses to read.
"""

from __future__ import annotations

import csv
import io
import re
from itertools import chain

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.plan import Plan

_TOGETHER = re.compile(r"\((?P<actions>.*)\)OVERLAP_F_B")
"""What torch runs at the same time; here, one after the other."""

_LEFT_OUT = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
"""What torch adds to a plan of computation, as `lightning_cpipe.schedules.transfers` does here."""


def write_csv(plan: Plan) -> str:
    """A plan of computation as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    at_end = all(_updates_at_end(plan, line) for line in range(plan.num_ranks))
    for line in range(plan.num_ranks):
        actions = (action for _, action in plan.numbered(line))
        writer.writerow([str(action) for action in actions if not (at_end and action.kind is Kind.UPDATE)])
    return text.getvalue()


def read_csv(text: str) -> Plan:
    """The plan that `write_csv` or torch wrote, one action per row.

    Raises:
        PlanError: if there is no action, a cell is none or names no stage, or the lines do not hold stages 0, 1, 2, …
            once each.
    """
    lines = [actions for cells in csv.reader(io.StringIO(text)) if (actions := [*chain(*map(_read_cell, cells))])]
    if not any(lines):
        raise PlanError("the plan is empty: write one line for each rank, for example 0F0,0B0.")
    if not any(action.kind is Kind.UPDATE for action in chain(*lines)):
        for actions in lines:
            last = {action.stage: action.batch for action in actions if action.kind.frees}
            actions += [Action(Kind.UPDATE, batch, stage) for stage, batch in last.items()]
    # Sorted, since the lines of a plan go along with the data.
    lines.sort(key=_stages)
    rows = tuple(tuple((action,) for action in actions) for actions in lines)
    return Plan(rows, tuple(map(_stages, lines)))


def _stages(actions: list[Action]) -> tuple[int, ...]:
    return tuple(sorted({action.stage or 0 for action in actions}))


def _read_cell(cell: str) -> list[Action]:
    cell = cell.strip()
    if not cell or _LEFT_OUT.fullmatch(cell):
        return []
    together = _TOGETHER.fullmatch(cell)
    actions = [Action.parse(word) for word in (together["actions"].split(";") if together else [cell])]
    for action in actions:
        if action.stage is None:
            raise PlanError(f"{action} in a plan as CSV names no stage: write it in front, for example 2{action}.")
    return actions


def _updates_at_end(plan: Plan, line: int) -> bool:
    kinds = [action.kind for _, action in plan.numbered(line)]
    return Kind.UPDATE not in kinds[: -len(plan.held[line])]
