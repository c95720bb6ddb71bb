"""Schedules as data: who does what, when. Nothing in this folder knows torch or Lightning.

action       the alphabet, and its text form
plan         the rows of all stages
schedule     what every schedule says of itself
placement    which stages a rank holds
continuous   the schedule of this package
flushed      GPipe and 1F1B, to compare with
interleaved  interleaved 1F1B: several stages per rank
zero_bubble  ZB-H1: backwards in two halves
given        a plan that somebody else wrote
policies     which version of the weights a mini-batch uses
transfers    adds sends and receives to a plan
check        lists every fault of a plan
as_one_step  whether a plan is one optimizer step
clock        gives every action its slot
exchange     plans in and out, as CSV
table        a plan as text, Markdown, JSON or SVG
per_stage    what a plan costs each stage: in flight, versions, delay
comparison   what each schedule costs, side by side
"""

from __future__ import annotations

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.flushed import GPipe, OneFOneB
from lightning_cpipe.schedules.given import Given
from lightning_cpipe.schedules.interleaved import Interleaved
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.zero_bubble import ZeroBubble

__all__ = ["SCHEDULES", "Continuous", "GPipe", "Given", "Interleaved", "OneFOneB", "Schedule", "ZeroBubble", "named"]

SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (Continuous, GPipe, OneFOneB, Interleaved, ZeroBubble)}
"""Every schedule by its name."""


def named(name: str) -> Schedule:
    """The schedule of that name, with its defaults, or the plan in the file of that name.

    Raises:
        PlanError: if there is none; the message lists what there is.
    """
    if name.endswith(".csv"):
        return Given.read(name)
    if name not in SCHEDULES:
        raise PlanError(f"there is no schedule {name!r}; there are: {', '.join(SCHEDULES)}, and plans as .csv files.")
    return SCHEDULES[name]()
