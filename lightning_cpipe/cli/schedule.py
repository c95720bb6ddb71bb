"""``cpipe schedule``: prints, draws, counts and compares schedules. Imports neither torch nor Lightning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import SCHEDULES, Continuous, Given, Schedule, named
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.comparison import Cost, as_markdown, as_text
from lightning_cpipe.schedules.exchange import write_csv
from lightning_cpipe.schedules.policies import LATEST, POLICIES, TWO_BUFFERED, VERTICAL, VersionPolicy
from lightning_cpipe.schedules.table import Table

_BATCHES = {"mini-batch": 13, "micro-batch": 8}
_COMPARED = {"mini-batch": 100, "micro-batch": 8}
"""How many, where nobody says: for one schedule, and side by side."""

_OF_CONTINUOUS = ("accumulate", "versions", "early_input_gradient")
"""Options of the continuous schedule, by the names that it gives them."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 if the arguments can't be understood, or the plan has faults; all of them are told.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    for name in ("stages", "ranks", "mini_batches", "micro_batches", "accumulate", "slots"):
        if (number := getattr(asked, name)) is not None and number < 1:
            parser.error(f"{_option(name)} must be at least 1, not {number}.")
    try:
        printed = _compared(parser, asked) if asked.compare else _drawn(parser, asked)
    except PlanError as error:
        parser.error(str(error))
    print(printed)


def _drawn(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> str:
    """One schedule, in the format that is asked for."""
    schedule, stages, batches = _sized(parser, asked)
    plan = schedule.plan(stages, batches)
    if faults := check(plan, schedule):
        parser.error("\n  ".join(["the plan has faults:", *map(str, faults)]))
    if asked.format == "csv":
        return write_csv(plan).rstrip("\n")
    table = Table(schedule, stages, batches, asked.slots)
    return {"text": table.text, "markdown": table.markdown, "json": table.json, "svg": table.svg}[asked.format]()


def _sized(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> tuple[Schedule, int, int]:
    """The schedule, its stages and its batches."""
    schedule: Schedule = asked.schedule or Continuous()
    of_continuous = {name: given for name in _OF_CONTINUOUS if (given := getattr(asked, name)) is not None}
    if of_continuous:
        if not isinstance(schedule, Continuous):
            parser.error(f"{_option(next(iter(of_continuous)))} is for --schedule continuous, not {schedule.name}.")
        schedule = replace(schedule, **of_continuous)
    if isinstance(schedule, Given):
        if any(each is not None for each in (asked.stages, asked.mini_batches, asked.micro_batches)):
            parser.error("a plan in a file has its own size: leave out --stages and the number of batches.")
        stages = schedule.given.num_stages
        on_ranks = schedule.on(stages, asked.ranks or schedule.given.num_ranks)
        if asked.ranks not in (None, on_ranks.given.num_ranks):
            parser.error(
                f"--ranks {asked.ranks}: the plan is for {schedule.given.num_ranks} ranks. Give a divisor of that, for"
                " a plan without faults that is one optimizer step."
            )
        return on_ranks, stages, schedule.num_batches
    wrong, right = ("micro", "mini") if schedule.unit == "mini-batch" else ("mini", "micro")
    if getattr(asked, f"{wrong}_batches") is not None:
        parser.error(f"--schedule {schedule.name} counts {schedule.unit}es: give --{right}-batches.")
    stages = asked.stages or (asked.ranks or 4) * schedule.stages_per_rank
    if stages % (asked.ranks or schedule.stages_per_rank):
        held = f"{asked.ranks} ranks" if asked.ranks else f"ranks of {schedule.stages_per_rank}"
        parser.error(f"{stages} stages do not go into {held}: --stages must be a multiple.")
    if isinstance(schedule, Continuous) and (why := schedule.too_few(stages, schedule.accumulate)):
        parser.error(
            f"--versions {schedule.versions.name} with --accumulate {schedule.accumulate}: {why}. Set --accumulate"
            f" {schedule.lag(0, stages)} or more, or --versions stash, which takes any number."
        )
    if asked.ranks:
        schedule = replace(schedule, stages_per_rank=stages // asked.ranks)
    return schedule, stages, getattr(asked, f"{right}_batches") or _BATCHES[schedule.unit]


def _compared(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> str:
    """All schedules, side by side."""
    if asked.format not in ("text", "markdown"):
        parser.error("--compare prints a table: --format text or markdown.")
    for name in ("schedule", "slots", *_OF_CONTINUOUS):
        if getattr(asked, name) is not None:
            parser.error(f"--compare shows every schedule whole: leave out {_option(name)}.")
    if asked.stages and asked.ranks and asked.stages != asked.ranks:
        parser.error("--compare chooses how many stages a rank holds: give --ranks alone.")
    ranks = asked.ranks or asked.stages or 4
    most = max(1, ranks - 1)
    schedules = {name: cls() for name, cls in SCHEDULES.items()} | {
        "continuous, early input gradient": Continuous(early_input_gradient=True),
        "continuous, 2 stages per rank": Continuous(stages_per_rank=2),
        f"continuous, accumulate {most}": Continuous(accumulate=most),
        f"continuous, accumulate {most}, 2bw": Continuous(accumulate=most, versions=TWO_BUFFERED),
        "continuous, vertical": Continuous(versions=VERTICAL),
        "continuous, latest": Continuous(versions=LATEST),
    }
    sizes = {"mini-batch": asked.mini_batches, "micro-batch": asked.micro_batches}
    sizes = {unit: number or _COMPARED[unit] for unit, number in sizes.items()}
    costs = [Cost.of(name, schedule, ranks, sizes[schedule.unit]) for name, schedule in schedules.items()]
    return "\n".join(
        [
            (as_text if asked.format == "text" else as_markdown)(costs),
            "",
            f"{ranks} ranks. Continuous: a run of {sizes['mini-batch']} mini-batches, whose idle slots grow no more"
            f" however long it is. The others: one mini-batch of {sizes['micro-batch']} micro-batches; each further one"
            " idles as much.",
            "A slot is a forward through what one rank holds; a backward takes two. Kept: how many batches' forwards"
            " the fullest rank keeps at once.",
            "In flight, versions and delay: of each stage, from the first to the last.",
        ]
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _schedule(name: str) -> Schedule:
    try:
        return named(name)
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _policy(name: str) -> VersionPolicy:
    if name not in POLICIES:
        raise argparse.ArgumentTypeError(f"there is no policy {name!r}; there are: {', '.join(POLICIES)}.")
    return POLICIES[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpipe schedule",
        description="Print who does what, when; check it; and count its bubbles, and what it costs each stage.",
    )
    parser.add_argument(
        "--schedule",
        type=_schedule,
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)}, or the path of a plan.csv; default: continuous",
    )
    parser.add_argument("--stages", type=int, metavar="P", help="default: 4, or 2 for each of 4 ranks (interleaved)")
    parser.add_argument("--ranks", type=int, metavar="R", help="that hold P/R stages each; default: one stage each")
    parser.add_argument(
        "--mini-batches", type=int, metavar="N", help="of the run (continuous); default: 13; 100 to compare"
    )
    parser.add_argument("--micro-batches", type=int, metavar="M", help="of a mini-batch (the others); default: 8")
    parser.add_argument("--accumulate", type=int, metavar="K", help="mini-batches per update (continuous); default: 1")
    parser.add_argument(
        "--versions",
        type=_policy,
        metavar="POLICY",
        help=f"which weights a mini-batch uses (continuous): {', '.join(POLICIES)}; default: stash",
    )
    parser.add_argument(
        "--early-input-gradient", action="store_true", default=None, help="split the backwards (continuous)"
    )
    parser.add_argument("--slots", type=int, metavar="S", help="width of the window; default: the whole run")
    parser.add_argument("--compare", action="store_true", help="all schedules, side by side, on R ranks")
    formats = ["text", "markdown", "json", "svg", "csv"]
    parser.add_argument("--format", choices=formats, default="text", help="default: text; csv is torch's form")
    return parser
