"""Prints a result of `benchmarks.steady_state` as Markdown tables.

python -m benchmarks.report benchmarks/results/steady_state.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Contestants = Mapping[str, Mapping[str, float | str]]

COLUMNS = {
    "ms_per_mini_batch": ("ms per mini-batch", ".1f"),
    "steps_per_s": ("steps/s", ".2f"),
    "idle_or_overhead_share": ("idle or overhead", ".1%"),
    "ours_times_faster": ("ours is faster by", ".2f"),
    "steady_wait_share": ("waits", ".1%"),
    "kept_mini_batches": ("kept", "g"),
    "versions": ("versions", ""),
    "delay": ("delay", ""),
}
"""Head and form of each figure; one that no contestant of a result has is left out."""


def report(results: Mapping[str, Any]) -> Iterator[str]:
    """The lines of all tables."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    yield f"`{results['command']}`, {results['date']}, {results['machine']}, {versions}, {results['rounds']} rounds"
    if "real_d256_p2" in results:
        part = results["real_d256_p2"]
        yield from (
            "",
            "8 transformer blocks of width 256, mini-batches of 8 x 128, two processes, one thread each:",
            "",
        )
        yield from _ranking(part["contestants"])
        yield from _below(_said_of_real(part))
    if "runs_40_80_ms_256_kb" in results:
        for p, part in results["runs_40_80_ms_256_kb"]["stages"].items():
            yield from ("", f"Stages that sleep 40 and 80 ms, {p} stages:", "")
            yield from _ranking(part["contestants"])
            yield from _below(_said_of_run(part))
    if "periods_10_20_ms_64_kb" in results:
        part = results["periods_10_20_ms_64_kb"]
        over = ", ".join(f"p={p} {ms:.2f} ms" for p, ms in part["over_p1_ms"].items())
        yield from (
            "",
            "Stages that sleep 10 and 20 ms: steady period over that of one stage"
            f" ({part['period_p1_ms']:.1f} ms): {over}.",
        )


def _ranking(contestants: Contestants) -> Iterator[str]:
    shown = [key for key in COLUMNS if any(key in found for found in contestants.values())]
    yield f"| | {' | '.join(COLUMNS[key][0] for key in shown)} |"
    yield "|---" * (1 + len(shown)) + "|"
    for name, found in sorted(contestants.items(), key=lambda item: item[1]["ms_per_mini_batch"]):
        cells = [format(found[key], COLUMNS[key][1]) if key in found else "–" for key in shown]
        yield f"| {name} | {' | '.join(cells)} |"


def _below(sentences: Iterable[str]) -> Iterator[str]:
    if said := " ".join(sentences):
        yield from ("", said)


def _said_of_real(part: Mapping[str, Any]) -> Iterator[str]:
    if "steady_wait_share_by_stage" in part:
        waits = ", ".join(f"stage {s} {share:.1%}" for s, share in part["steady_wait_share_by_stage"].items())
        yield f"Waiting for a neighbour in the steady state: {waits}; mean {part['steady_wait_share_mean']:.1%}."
    if "ours_times_faster_than_best_torch_schedule" in part:
        times = part["ours_times_faster_than_best_torch_schedule"]
        yield f"{times:.2f} times as fast as the best torch schedule of each round."
    yield from _said_of_same_schedules(part)


def _said_of_run(part: Mapping[str, Any]) -> Iterator[str]:
    if "idle_slots_of_run" in part:
        idle, ideal = part["idle_slots_of_run"], part["ideal_idle_slots"]
        yield f"Idle slots of a whole run of 24 mini-batches: {idle:.1f} (ideal {ideal})."
    yield from _said_of_same_schedules(part)


def _said_of_same_schedules(part: Mapping[str, Any]) -> Iterator[str]:
    if found := part.get("ours_over_torch_by_schedule"):
        ratios = ", ".join(f"{schedule} {ratio:.3f}" for schedule, ratio in found.items())
        yield f"Our time over torch's for the same schedule: {ratios}."


def main() -> None:
    """Print the report of the file that is named on the command line."""
    print("\n".join(report(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
