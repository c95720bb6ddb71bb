"""How fast does it stream? ContinuousPipe inside Lightning against its peers, on the same model and mini-batches.

    python -m benchmarks.steady_state [--rounds 3] [--parts periods runs real] [--output benchmarks/results/FILE.json]

All contestants of a part run in turn, round after round, and every ratio is taken within a round; medians are printed.
One thread per process. The emulated stages sleep, so that eight of them fit on two cores; compare them with the p = 1
run of the same engine. The real ones are transformer blocks on two processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch

from benchmarks.contestants import (
    Outcome,
    Work,
    lightning_alone,
    lightning_ddp,
    ours,
    plain_loop,
    torch_schedule,
)
from benchmarks.workloads import SleepingBlock, TransformerBlock
from tests.helpers.ranks import run_ranks

SCHEDULES = ("1F1B", "GPipe", "ZBVZeroBubble", "DualPipeV")
TWO_PARTS_PER_RANK = ("ZBVZeroBubble", "DualPipeV")

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


def emulated_periods(rounds: int, stages: tuple[int, ...]) -> dict[str, Any]:
    """Steady period at slots of 10 and 20 ms, 64 KB between stages, over that of one stage."""
    samples, batches = 8, 60
    race: Race = {}
    for p in (1, *stages):
        work = Work(partial(SleepingBlock, 0.010 / samples, 0.020 / samples), p, (samples, 2048), batches)
        race[f"ours p={p}"] = race_of(work, p, ours)
    found = run_rounds(race, rounds)
    floor = [period(each, 10) for each in found["ours p=1"]]
    return {
        "period_p1_ms": 1e3 * statistics.median(floor),
        "over_p1_ms": {
            p: 1e3 * statistics.median(period(each, 10) - one for each, one in zip(found[f"ours p={p}"], floor))
            for p in stages
        },
    }


def emulated_runs(rounds: int, stages: tuple[int, ...]) -> dict[str, Any]:
    """Idle slots of a whole run of 24 mini-batches at slots of 40 and 80 ms, 256 KB between stages, and the peers."""
    samples, batches, peers_batches = 16, 24, 8
    forward, backward = 0.040 / samples, 0.080 / samples
    race: Race = {}
    for p in (1, *stages):
        work = Work(partial(SleepingBlock, forward, backward), p, (samples, 4096), batches)
        race[f"ours p={p}"] = race_of(work, p, ours)
    for p in stages:
        for name in SCHEDULES:
            parts = 2 if name in TWO_PARTS_PER_RANK else 1
            block = partial(SleepingBlock, forward / parts, backward / parts)
            work = Work(block, parts * p, (samples, 4096), peers_batches)
            race[f"torch {name} p={p}"] = race_of(
                work, p, torch_schedule, name=name, micro_batches=micro_batches(name, p)
            )
    two = Work(partial(SleepingBlock, forward, backward), 2, (samples, 4096), peers_batches)
    race["Lightning DDP p=2"] = race_of(two, 2, lightning_ddp)
    race["two independent processes p=2"] = race_of(two, 2, plain_loop)
    found = run_rounds(race, rounds)
    one = [period(each, 2) for each in found["ours p=1"]]
    by_stages = {}
    for p in stages:
        mine = found[f"ours p={p}"]
        slots = [(wall(each) - batches * t) / (t / 2) for each, t in zip(mine, one)]
        times = {"ours": [period(each, 4) for each in mine]}
        for name, outcomes in found.items():
            if name.endswith(f" p={p}") and not name.startswith("ours"):
                times[name.removesuffix(f" p={p}")] = [period(each, 1) for each in outcomes]
        halved(times)
        by_stages[p] = {
            "idle_slots_of_run": statistics.median(slots),
            "ideal_idle_slots": 2 * (p - 1),
            "steady_wait_share_by_stage": steady_waits(mine),
            # One stage alone does nothing but its share of the work.
            "contestants": ranking(times, one),
        }
    return {"period_p1_ms": 1e3 * statistics.median(one), "stages": by_stages}


def real(rounds: int) -> dict[str, Any]:
    """8 transformer blocks of width 256 on mini-batches of 8 x 128, two processes with one thread each."""
    work = Work(partial(TransformerBlock, 256), 8, (8, 128, 256), 30)
    race: Race = {
        "ours": race_of(work, 2, ours),
        "ours, extra_in_flight=1": race_of(work, 2, ours, extra_in_flight=1),
        "two independent processes": race_of(work, 2, plain_loop),
        "single process, 1 thread": race_of(work, 1, plain_loop),
        "single process, 2 threads": race_of(work, 1, plain_loop, threads=2),
        "Lightning, 1 thread": race_of(work, 1, lightning_alone),
        "Lightning DDP": race_of(work, 2, lightning_ddp),
        **{
            f"torch {name}": race_of(work, 2, torch_schedule, name=name, micro_batches=micro_batches(name, 2))
            for name in SCHEDULES
        },
    }
    found = run_rounds(race, rounds)
    times = {name: [period(each, 3) for each in outcomes] for name, outcomes in found.items()}
    halved(times)
    best = [min(times[f"torch {name}"][i] for name in SCHEDULES) for i in range(rounds)]
    waits = steady_waits(found["ours"])
    return {
        "steady_wait_share_by_stage": waits,
        "steady_wait_share_mean": statistics.mean(waits.values()),
        "ours_times_faster_than_best_torch_schedule": ratio(best, times["ours"]),
        "contestants": ranking(times, times["two independent processes"]),
    }


def micro_batches(schedule: str, p: int) -> int:
    """Micro-batches per mini-batch."""
    return 2 * p if schedule == "DualPipeV" else max(4, p)


def halved(times: dict[str, list[float]]) -> None:
    """Two processes that know nothing of each other do two mini-batches at a time."""
    name = "two independent processes"
    if name in times:
        times[name] = [t / 2 for t in times[name]]


def steady_waits(outcomes: list[list[Outcome]]) -> dict[int, float]:
    """Measured share of the steady state in which a stage of ours waits for a neighbour."""
    ranks = len(outcomes[0])
    return {
        ranks - 1 - rank: statistics.median(each[rank].steady_idle or 0.0 for each in outcomes)
        for rank in reversed(range(ranks))
    }


def ranking(times: dict[str, list[float]], least: list[float]) -> dict[str, dict[str, float]]:
    """Every contestant's speed, and ours against it.

    Args:
        times: seconds per mini-batch, by round.
        least: what it would be if no process ever waited or did anything but the work itself.
    """
    return {
        name: {
            "ms_per_mini_batch": 1e3 * statistics.median(each),
            "steps_per_s": 1 / statistics.median(each),
            "idle_or_overhead_share": 1 - ratio(least, each),
            "ours_times_faster": ratio(each, times["ours"]),
        }
        for name, each in times.items()
    }


def ratio(a: list[float], b: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(a, b))


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=["periods", "runs", "real"], default=["periods", "runs", "real"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stages = tuple(asked.stages)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.steady_state " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "rounds": asked.rounds,
    }
    if "periods" in asked.parts:
        results["periods_10_20_ms_64_kb"] = emulated_periods(asked.rounds, stages)
    if "runs" in asked.parts:
        results["runs_40_80_ms_256_kb"] = emulated_runs(asked.rounds, stages)
    if "real" in asked.parts:
        results["real_d256_p2"] = real(asked.rounds)
    text = json.dumps(results, indent=2)
    print(text)
    if asked.output is not None:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
