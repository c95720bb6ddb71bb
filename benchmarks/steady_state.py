"""How fast does it stream? ContinuousPipe inside Lightning against its peers, on the same model and mini-batches.

    python -m benchmarks.steady_state [--rounds 3] [--parts periods runs real] [--output benchmarks/results/FILE.json]
    python -m benchmarks.steady_state --rounds 1 --parts real --only "torch 1F1B" "ours, 1f1b"       # a short one

All contestants of a part run in turn, round after round, and every ratio is taken within a round; medians are printed.
One thread per process. The emulated stages sleep, so that eight of them fit on two cores; compare them with the p = 1
run of the same engine. The real ones are transformer blocks on two processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch

from benchmarks.contestants import (
    TWO_PARTS_PER_RANK,
    Outcome,
    Work,
    lightning_alone,
    lightning_ddp,
    ours,
    plain_loop,
    torch_schedule,
)
from benchmarks.quiet import run_quietly
from benchmarks.workloads import SleepingBlock, TransformerBlock
from tests.helpers.ranks import run_ranks

OURS = "ours"
EARLY = "ours, early_input_gradient"
TWICE = "ours, 2 stages per rank"
EXTRA = "ours, extra_in_flight=1"
INDEPENDENT = "two independent processes"
ONE_THREAD = "single process, 1 thread"
TWO_THREADS = "single process, 2 threads"
PLAIN = "Lightning, 1 thread"
DDP = "Lightning DDP"

SAME_SCHEDULE = {"1F1B": "1f1b", "GPipe": "gpipe", "Interleaved1F1B": "interleaved", "InterleavedZeroBubble": "zb"}
"""Schedules of torch, and ours that run the same plan. With one stage per rank, torch's last one is ZB-H1."""

SCHEDULES = (*SAME_SCHEDULE, "ZBVZeroBubble", "DualPipeV")
"""Those of torch."""


def torchs(schedule: str) -> str:
    """The contestant that runs a schedule of torch."""
    return f"torch {schedule}"


def flushed(schedule: str) -> str:
    """The contestant that runs a flush schedule of ours."""
    return f"ours, {schedule}"


CONTESTANTS = (
    *(OURS, EARLY, TWICE, EXTRA),
    *map(flushed, SAME_SCHEDULE.values()),
    *map(torchs, SCHEDULES),
    *(INDEPENDENT, ONE_THREAD, TWO_THREADS, PLAIN, DDP),
)
"""Whom `--only` may name."""

REAL_BATCHES = 18
"""Mini-batches of each run of the real blocks."""

Race = dict[str, Callable[[], list[Outcome]]]


def period(outcomes: list[Outcome], skip: int) -> float:
    """Seconds per mini-batch in the steady state: the mean over the run's middle, of the slowest rank."""
    return max((o.ends[-1 - skip] - o.ends[skip]) / (len(o.ends) - 1 - 2 * skip) for o in outcomes)


def wall(outcomes: list[Outcome]) -> float:
    """Seconds from the first rank's begin to the last rank's end."""
    return max(o.ends[-1] for o in outcomes) - min(o.begin for o in outcomes)


def run_rounds(race: Race, rounds: int) -> dict[str, list[list[Outcome]]]:
    """Every contestant once per round."""
    found: dict[str, list[list[Outcome]]] = {name: [] for name in race}
    for number in range(rounds):
        for name, contestant in race.items():
            found[name].append(contestant())
            print(f"  round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found


def race_of(work: Work, ranks: int, contestant: Callable[..., Outcome], threads: int = 1, **options: Any) -> Any:
    """A contestant, ready to run."""
    return partial(run_ranks, lambda rank: contestant(work, rank, ranks, **options), ranks, threads)


def pipelines(work: Callable[[int], Work], p: int) -> Race:
    """The flush schedules, ours after torch's that does the same.

    Args:
        work: to be done, given the parts of the model that each rank holds.
        p: ranks.
    """
    race: Race = {}
    for theirs in SCHEDULES:
        m = micro_batches(theirs, p)
        parts = 2 if theirs in TWO_PARTS_PER_RANK else 1
        race[torchs(theirs)] = race_of(work(parts), p, torch_schedule, name=theirs, micro_batches=m)
        if (mine := SAME_SCHEDULE.get(theirs)) is not None:
            race[flushed(mine)] = race_of(work(parts), p, ours, schedule=mine, num_microbatches=m)
    return race


def emulated_periods(rounds: int, stages: tuple[int, ...]) -> dict[str, Any]:
    """Steady period at slots of 10 and 20 ms, 64 KB between stages, over that of one stage."""
    samples, batches = 8, 60
    race: Race = {}
    for p in (1, *stages):
        work = Work(partial(SleepingBlock, 0.010 / samples, 0.020 / samples), p, (samples, 2048), batches)
        race[at(p, OURS)] = race_of(work, p, ours)
    found = run_rounds(race, rounds)
    floor = [period(each, 10) for each in found[at(1, OURS)]]
    return {
        "period_p1_ms": 1e3 * statistics.median(floor),
        "over_p1_ms": {
            p: 1e3 * statistics.median(period(each, 10) - one for each, one in zip(found[at(p, OURS)], floor))
            for p in stages
        },
    }


def emulated_runs(rounds: int, stages: tuple[int, ...], only: tuple[str, ...]) -> dict[str, Any]:
    """Idle slots of a whole run of 24 mini-batches at slots of 40 and 80 ms, 256 KB between stages, and the peers."""
    samples, batches, peers_batches = 16, 24, 8

    def work(p: int, batches: int, parts: int = 1) -> Work:
        block = partial(SleepingBlock, 0.040 / samples / parts, 0.080 / samples / parts)
        return Work(block, parts * p, (samples, 4096), batches)

    # One stage alone does nothing but its share of the work.
    race: Race = {at(1, OURS): race_of(work(1, batches), 1, ours)}
    for p in stages:
        of_p: Race = {
            OURS: race_of(work(p, batches), p, ours),
            EARLY: race_of(work(p, batches), p, ours, early_input_gradient=True),
            TWICE: race_of(work(p, batches, 2), p, ours, num_stages=2 * p),
            **pipelines(partial(work, p, peers_batches), p),
        }
        if p == 2:
            of_p[DDP] = race_of(work(p, peers_batches), p, lightning_ddp)
            of_p[INDEPENDENT] = race_of(work(p, peers_batches), p, plain_loop)
        race |= {at(p, name): contestant for name, contestant in of_p.items() if name in only}
    found = run_rounds(race, rounds)
    one = [period(each, 2) for each in found[at(1, OURS)]]
    by_stages: dict[int, dict[str, Any]] = {}
    for p in stages:
        of_stages = {name: found[at(p, name)] for name in CONTESTANTS if at(p, name) in found}
        if not of_stages:
            continue
        times = {
            name: [period(each, 4 if name in (OURS, EARLY, TWICE) else 1) for each in outcomes]
            for name, outcomes in of_stages.items()
        }
        by_stages[p] = compared(of_stages, times, one)
        if OURS in of_stages:
            mine = of_stages[OURS]
            slots = [(wall(each) - batches * t) / (t / 2) for each, t in zip(mine, one)]
            by_stages[p] |= {
                "idle_slots_of_run": statistics.median(slots),
                "ideal_idle_slots": 2 * (p - 1),
                "steady_wait_share_by_stage": steady_waits(mine),
            }
    return {"period_p1_ms": 1e3 * statistics.median(one), "stages": by_stages}


def at(p: int, name: str) -> str:
    """A contestant with p stages."""
    return f"{name} p={p}"


def real(rounds: int, only: tuple[str, ...]) -> dict[str, Any]:
    """8 transformer blocks of width 256 on mini-batches of 8 x 128, two processes with one thread each."""
    work = Work(partial(TransformerBlock, 256), 8, (8, 128, 256), REAL_BATCHES)
    race: Race = {
        OURS: race_of(work, 2, ours),
        EARLY: race_of(work, 2, ours, early_input_gradient=True),
        TWICE: race_of(work, 2, ours, num_stages=4),
        EXTRA: race_of(work, 2, ours, extra_in_flight=1),
        INDEPENDENT: race_of(work, 2, plain_loop),
        ONE_THREAD: race_of(work, 1, plain_loop),
        TWO_THREADS: race_of(work, 1, plain_loop, threads=2),
        PLAIN: race_of(work, 1, lightning_alone),
        DDP: race_of(work, 2, lightning_ddp),
        **pipelines(lambda parts: work, 2),
    }
    found = run_rounds({name: contestant for name, contestant in race.items() if name in only}, rounds)
    times = {name: [period(each, 3) for each in outcomes] for name, outcomes in found.items()}
    results = compared(found, times, times.get(INDEPENDENT))
    theirs = [times[torchs(name)] for name in SCHEDULES if torchs(name) in times]
    if OURS in found:
        waits = steady_waits(found[OURS])
        results |= {"steady_wait_share_by_stage": waits, "steady_wait_share_mean": statistics.mean(waits.values())}
        if theirs:
            best = [min(of_round) for of_round in zip(*theirs)]
            results["ours_times_faster_than_best_torch_schedule"] = ratio(best, times[OURS])
    return results


def micro_batches(schedule: str, p: int) -> int:
    """Micro-batches per mini-batch."""
    return 2 * p if schedule == "DualPipeV" else max(4, p)


def steady_waits(outcomes: list[list[Outcome]]) -> dict[int, float]:
    """Measured share of the steady state in which a stage of ours waits for a neighbour."""
    ranks = len(outcomes[0])
    return {
        ranks - 1 - rank: statistics.median(each[rank].steady_idle or 0.0 for each in outcomes)
        for rank in reversed(range(ranks))
    }


def compared(
    found: dict[str, list[list[Outcome]]], times: dict[str, list[float]], least: list[float] | None
) -> dict[str, Any]:
    """Every contestant, and what can be said of several of them.

    Args:
        found: by round.
        times: seconds per mini-batch, by round; those of two independent processes are halved here.
        least: what it would be if no process ever waited or did anything but the work itself, by round; None where
            nobody ran who says it.
    """
    if INDEPENDENT in times:
        # They know nothing of each other, and do two mini-batches at a time. In place, since `least` may be theirs.
        times[INDEPENDENT][:] = [t / 2 for t in times[INDEPENDENT]]
    same = {
        mine: ratio(times[flushed(mine)], times[torchs(theirs)])
        for theirs, mine in SAME_SCHEDULE.items()
        if flushed(mine) in times and torchs(theirs) in times
    }
    return {
        "ours_over_torch_by_schedule": same,
        "contestants": {name: _figures(found[name], each, least, times.get(OURS)) for name, each in times.items()},
    }


def _figures(
    outcomes: list[list[Outcome]], times: list[float], least: list[float] | None, of_ours: list[float] | None
) -> dict[str, float | str]:
    price = outcomes[0][0].price
    figures: dict[str, float | str] = {
        "ms_per_mini_batch": 1e3 * statistics.median(times),
        "steps_per_s": 1 / statistics.median(times),
    }
    if least is not None:
        figures["idle_or_overhead_share"] = 1 - ratio(least, times)
    if of_ours is not None:
        figures["ours_times_faster"] = ratio(times, of_ours)
    waits = [[rank.steady_idle for rank in each if rank.steady_idle is not None] for each in outcomes]
    if all(waits):
        figures["steady_wait_share"] = statistics.median(map(statistics.mean, waits))
    return {**figures, "kept_mini_batches": price.kept, "versions": price.versions, "delay": price.delay}


def ratio(a: list[float], b: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(a, b))


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=["periods", "runs", "real"], default=["periods", "runs", "real"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 8])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTESTANTS,
        default=CONTESTANTS,
        metavar="CONTESTANT",
        help=f"one or more of: {'; '.join(CONTESTANTS)}",
    )
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    run_quietly()
    stages, only = tuple(asked.stages), tuple(asked.only)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.steady_state " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "rounds": asked.rounds,
    }
    if "periods" in asked.parts and OURS in only:
        results["periods_10_20_ms_64_kb"] = emulated_periods(asked.rounds, stages)
    if "runs" in asked.parts:
        results["runs_40_80_ms_256_kb"] = emulated_runs(asked.rounds, stages, only)
    if "real" in asked.parts:
        results["real_d256_p2"] = real(asked.rounds, only)
    text = json.dumps(results, indent=2)
    print(text)
    if asked.output is not None:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
