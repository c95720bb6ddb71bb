"""A forecast for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_cpipe.balance.costs import CLEAR_S
from lightning_cpipe.balance.forecast import Forecast, StageForecast
from lightning_cpipe.balance.memory import in_words


class Printout:
    """One forecast, ready to be printed.

    Args:
        forecast: which.
        about: what it is about: the module's class, the device and the precision.
        inside: the modules in which the dominant block could be cut.
    """

    def __init__(self, forecast: Forecast, about: dict[str, str], inside: Sequence[str]) -> None:
        self._forecast = forecast
        self._about = about
        self._inside = inside

    def text(self) -> str:
        """Tables of blocks, stages, memory and cuts, and what follows from them."""
        parts = [self._head(), self._blocks(), self._stages(), self._memory(), self._cuts(), self._summary()]
        return "\n\n".join([*parts, *(f"warning: {warning}" for warning in self._warnings())])

    def json(self) -> str:
        """One object with all numbers: seconds, bytes, updates; null where not known."""
        found = self._forecast
        stages = [
            {**asdict(stage), "memory": {**asdict(stage.memory), "total": stage.memory.total}} for stage in found.stages
        ]
        blocks = [
            {
                "name": block.name,
                "operations": block.operations,
                "forward_s": block.forward_s if found.costs.timed else None,
                "backward_s": block.backward_s if found.costs.timed else None,
                "trained": sum(block.trained.values()),
                "frozen": sum(block.frozen.values()),
                "saved": sum(block.saved.values()),
                "output": block.output,
            }
            for block in found.costs.blocks
        ]
        return json.dumps(
            {
                **self._about,
                "samples": found.num_samples,
                "balanced_by": "time" if found.costs.by_time else "operations",
                "blocks": blocks,
                "split_points": list(found.starts),
                "memory_limit": found.needs.limit,
                "stages": stages,
                "ties": [asdict(tie) for tie in found.ties],
                "period_s": found.period_s,
                "batches_per_s": _rate(1, found.period_s),
                "samples_per_s": _rate(found.num_samples, found.period_s),
                "imbalance": found.imbalance,
                "mini_batches": found.num_batches,
                "bubble": found.bubble,
                "warnings": self._warnings(),
            },
            indent=2,
        )

    def _head(self) -> str:
        found = self._forecast
        batch = "" if found.num_samples is None else f", mini-batches of {found.num_samples}"
        return (
            f"{self._about['module']} on {self._about['device']}, precision {self._about['precision']}{batch}:"
            f" {len(found.stages)} stages, {found.needs.schedule.name} schedule"
        )

    def _blocks(self) -> str:
        costs = self._forecast.costs
        rows = [
            [
                block.name,
                f"{block.operations / 1e6:.3g}",
                *self._times(block.forward_s, block.backward_s),
                in_words(sum(block.trained.values()) + sum(block.frozen.values())),
                in_words(sum(block.saved.values())),
                in_words(block.output),
            ]
            for block in costs.blocks
        ]
        heads = ["block", "MFLOP", "forward ms", "backward ms", "weights", "saved", "output"]
        if costs.by_time:
            how = "measured time"
        elif costs.timed:
            mean_s = sum(block.seconds for block in costs.blocks) / len(costs.blocks)
            how = (
                f"floating-point operations: with {1000 * mean_s:.2g} ms on average, below {1000 * CLEAR_S:g} ms, the"
                " blocks are too quick for the clock"
            )
        else:
            how = "floating-point operations: no time was taken"
        return f"{_table(heads, rows)}\nBalanced by {how}."

    def _stages(self) -> str:
        heads = ["stage", "begins at", "blocks", "forward ms", "backward ms", "in flight", "versions", "delay"]
        rows = [
            [
                str(stage.stage),
                stage.blocks[0],
                str(len(stage.blocks)),
                *self._times(stage.forward_s, stage.backward_s),
                str(stage.in_flight),
                str(stage.versions),
                str(stage.delay),
            ]
            for stage in self._forecast.stages
        ]
        return _table(heads, rows)

    def _memory(self) -> str:
        parts = list(asdict(self._forecast.stages[0].memory))
        rows = [
            [str(stage.stage), *map(in_words, (*asdict(stage.memory).values(), stage.memory.total))]
            for stage in self._forecast.stages
        ]
        limit = self._forecast.needs.limit
        more = "" if limit is None else f"\nWithin the limit of {in_words(limit)} per stage."
        return _table(["memory", *parts, "total"], rows) + more

    def _cuts(self) -> str:
        cuts: list[tuple[StageForecast, str]] = list(zip(self._forecast.stages, self._forecast.starts))
        rows = [[start, in_words(stage.sends), in_words(stage.gets_back)] for stage, start in cuts]
        lines = [_table(["cut at", "activations down", "gradients up"], rows)] if cuts else []
        lines += [
            f"Stages {tie.user} and {tie.owner} train the same weights: {in_words(tie.size)} of gradients go to"
            f" {tie.owner} for each mini-batch, and as much of weights back."
            for tie in self._forecast.ties
        ]
        return "\n".join([*lines, f"split_points: {json.dumps(list(self._forecast.starts))}"])

    def _summary(self) -> str:
        found = self._forecast
        lines = []
        if found.period_s is not None and found.imbalance is not None:
            rates = [(1, "mini-batches"), (found.num_samples, "samples")]
            told = [f"{_count(count / found.period_s)} {what}/s" for count, what in rates if count is not None]
            lines += [
                f"steady state  {1000 * found.period_s:.3g} ms per mini-batch, {', '.join(told)}"
                " (without updates and transfers)",
                f"imbalance     {found.imbalance:.1%} of it the stages wait for the slowest one, on average",
            ]
        if found.bubble is not None:
            lines.append(
                f"bubble        {found.bubble:.2%} of the slots of {found.num_batches} mini-batches: fill and drain"
            )
        return "\n".join(lines)

    def _warnings(self) -> list[str]:
        dominant = self._forecast.dominant
        if dominant is None:
            return []
        block, times = dominant
        where = f" ({', '.join(self._inside)})" if self._inside else ""
        return [
            f"{block.name!r}, with what runs after it until the next block, costs {times:.2g} times the mean stage, so"
            f" its stage is the slowest wherever is cut. Cut inside it, with modules in it as `split_points`{where},"
            " make it lighter, or take fewer stages."
        ]

    def _times(self, forward_s: float, backward_s: float) -> list[str]:
        return [f"{1000 * each:.3g}" if self._forecast.costs.timed else "-" for each in (forward_s, backward_s)]


def _rate(count: int | None, period_s: float | None) -> float | None:
    return None if count is None or not period_s else count / period_s


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    columns: Any = list(zip(heads, *rows))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (heads, *rows):
        first, *others = zip(row, widths)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(lines)
