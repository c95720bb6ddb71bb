"""Prints a result of `benchmarks.steady_state` as Markdown tables.

python -m benchmarks.report benchmarks/results/steady_state.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
        waits = ", ".join(f"stage {s} {share:.1%}" for s, share in part["steady_wait_share_by_stage"].items())
        yield from (
            "",
            f"Waiting for a neighbour in the steady state: {waits}; mean {part['steady_wait_share_mean']:.1%}."
            f" {part['ours_times_faster_than_best_torch_schedule']:.2f} times as fast as the best torch schedule of"
            " each round.",
        )
    if "runs_40_80_ms_256_kb" in results:
        for p, part in results["runs_40_80_ms_256_kb"]["stages"].items():
            yield from ("", f"Stages that sleep 40 and 80 ms, {p} stages:", "")
            yield from _ranking(part["contestants"])
            yield from (
                "",
                f"Idle slots of a whole run of 24 mini-batches: {part['idle_slots_of_run']:.1f}"
                f" (ideal {part['ideal_idle_slots']}).",
            )
    if "periods_10_20_ms_64_kb" in results:
        part = results["periods_10_20_ms_64_kb"]
        over = ", ".join(f"p={p} {ms:.2f} ms" for p, ms in part["over_p1_ms"].items())
        yield from (
            "",
            "Stages that sleep 10 and 20 ms: steady period over that of one stage"
            f" ({part['period_p1_ms']:.1f} ms): {over}.",
        )


def _ranking(contestants: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield "| | ms per mini-batch | steps/s | idle or overhead | ours is faster by |"
    yield "|---|---|---|---|---|"
    for name, found in sorted(contestants.items(), key=lambda item: item[1]["ms_per_mini_batch"]):
        yield (
            f"| {name} | {found['ms_per_mini_batch']:.1f} | {found['steps_per_s']:.2f}"
            f" | {found['idle_or_overhead_share']:.1%} | {found['ours_times_faster']:.2f} |"
        )


def main() -> None:
    """Print the report of the file that is named on the command line."""
    print("\n".join(report(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
