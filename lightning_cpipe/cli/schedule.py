"""``cpipe schedule``: prints, draws and counts a schedule. Imports neither torch nor Lightning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import SCHEDULES, named
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.table import Table


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 if the arguments can't be understood.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    schedule = named(asked.schedule)
    whole = schedule.unit == "mini-batch"
    wrong, right = ("micro", "mini") if whole else ("mini", "micro")
    if getattr(asked, f"{wrong}_batches") is not None:
        parser.error(f"--schedule {asked.schedule} counts {schedule.unit}es: give --{right}-batches.")
    batches = getattr(asked, f"{right}_batches")
    if batches is None:
        batches = 13 if whole else 8
    for name, number in (("--stages", asked.stages), (f"--{right}-batches", batches), ("--slots", asked.slots)):
        if number is not None and number < 1:
            parser.error(f"{name} must be at least 1, not {number}.")
    faults = check(schedule.plan(asked.stages, batches), schedule)
    if faults:
        raise PlanError("\n".join(map(str, faults)))
    table = Table(schedule, asked.stages, batches, asked.slots)
    print({"text": table.text, "markdown": table.markdown, "json": table.json, "svg": table.svg}[asked.format]())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpipe schedule",
        description="Print who does what, when; check it; and count its bubbles, in the window and in the whole run.",
    )
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="continuous", help="default: continuous")
    parser.add_argument("--stages", type=int, default=4, metavar="P", help="default: 4")
    parser.add_argument("--mini-batches", type=int, metavar="N", help="of the run (continuous); default: 13")
    parser.add_argument("--micro-batches", type=int, metavar="M", help="of a mini-batch (gpipe, 1f1b); default: 8")
    parser.add_argument("--slots", type=int, metavar="S", help="width of the window; default: the whole run")
    parser.add_argument("--format", choices=["text", "markdown", "json", "svg"], default="text", help="default: text")
    return parser
