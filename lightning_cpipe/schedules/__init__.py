"""Schedules as data: who does what, when. Nothing in this folder knows torch or Lightning.

action       the alphabet, and its text form
plan         the rows of all stages
schedule     what every schedule says of itself
continuous   the schedule of this package
flushed      GPipe and 1F1B, to compare with
transfers    adds sends and receives to a plan
check        lists every fault of a plan
clock        gives every action its slot
table        a plan as text, Markdown, JSON or SVG
"""

from __future__ import annotations

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.flushed import GPipe, OneFOneB
from lightning_cpipe.schedules.schedule import Schedule

__all__ = ["SCHEDULES", "Continuous", "GPipe", "OneFOneB", "Schedule", "named"]

SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (Continuous, GPipe, OneFOneB)}
"""Every schedule by its name."""


def named(name: str) -> Schedule:
    """The schedule of that name, with its defaults.

    Raises:
        PlanError: if there is none; the message lists what there is.
    """
    if name not in SCHEDULES:
        raise PlanError(f"there is no schedule {name!r}; there are: {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]()
