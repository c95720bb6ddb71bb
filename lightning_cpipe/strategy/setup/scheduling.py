"""The schedule that a user asks for: by name, as the file of a plan, or as an object of a class of the user's own."""

from __future__ import annotations

from dataclasses import replace

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import Given, named
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import POLICIES, STASH
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.strategy.options import Options


def schedule_of(asked: Options) -> Schedule:
    """The schedule that is asked for.

    Raises:
        PlanError: if there is no such schedule, or the file of the plan can't be read.
    """
    if isinstance(asked.schedule, Continuous):
        raise PlanError("the continuous schedule is asked for by name, its options beside it: schedule='continuous'.")
    if isinstance(asked.schedule, Schedule):
        return asked.schedule
    if not isinstance(asked.schedule, str):
        raise PlanError("give a name, the path of a plan as a .csv file, or an object of a subclass of `Flushed`.")
    schedule = named(asked.schedule)
    if not isinstance(schedule, Continuous):
        return schedule
    return Continuous(
        extra_in_flight=max(0, asked.extra_in_flight),
        early_input_gradient=asked.early_input_gradient,
        versions=POLICIES.get(asked.versions, STASH),
    )


def sized(asked: Options, schedule: Schedule) -> Options:
    """The same with the numbers of stages and micro-batches that a given plan is for, unless the user says others."""
    if not isinstance(schedule, Given):
        return asked
    stages = schedule.given.num_stages if asked.num_stages == "auto" else asked.num_stages
    m = schedule.num_batches if asked.num_microbatches == 1 else asked.num_microbatches
    return replace(asked, num_stages=stages, num_microbatches=m)


def in_words(asked: Options) -> str:
    """What the user wrote."""
    if isinstance(asked.schedule, Schedule):
        return f"schedule={type(asked.schedule).__name__}(…)"
    return f"schedule={asked.schedule!r}"
