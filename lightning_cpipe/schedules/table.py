"""A plan as a table: text, Markdown (as the paper prints it), JSON or SVG, with its bubbles counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.per_stage import PerStage
from lightning_cpipe.schedules.schedule import Schedule

IDLE = "*"

COLOURS = {
    Kind.FORWARD: "#4c78a8",
    Kind.BACKWARD: "#f58518",
    Kind.INPUT_GRADIENT: "#e45756",
    Kind.WEIGHT_GRADIENT: "#b279a2",
    Kind.UPDATE: "#54a24b",
}
"""One colour per kind, the same in every picture of this package."""


@dataclass(frozen=True)
class Bubbles:
    """The idle slots of all ranks together, and the bubble ratio twice.

    Attributes:
        total_slots: slots times ranks.
        idle_slots: how many of them are idle.
        paper: the ratio by the paper's formula.
        slot_exact: the ratio of the two counts above.
    """

    total_slots: int
    idle_slots: int
    paper: float
    slot_exact: float

    def __str__(self) -> str:
        return (
            f"{self.total_slots} slots, {self.idle_slots} idle; bubble ratio {self.paper:.4f} (paper),"
            f" {self.slot_exact:.4f} (slot-exact)"
        )


class Table:
    """The slots of one schedule, through a window.

    Args:
        schedule: which.
        num_stages: p.
        num_batches: mini-batches of the run, or micro-batches of the step.
        window: how many slots to show; None for the whole run.
    """

    def __init__(self, schedule: Schedule, num_stages: int, num_batches: int, window: int | None = None) -> None:
        self.schedule = schedule
        self.num_stages = num_stages
        self.num_batches = num_batches
        self.plan = schedule.plan(num_stages, num_batches)
        self.several = self.plan.num_ranks < num_stages
        """Whether some rank holds several stages; then cells name them."""
        slots = clock(self.plan)
        self.run_slots = 1 + max(slots.values())
        self.window = self.run_slots if window is None else min(window, self.run_slots)
        self.cells: list[list[Action | None]] = [[None] * self.window for _ in range(self.plan.num_ranks)]
        for action, slot in slots.items():
            if slot < self.window and action.stage is not None:
                self.cells[self.plan.line_of[action.stage]][slot] = action

    def text_of(self, cell: Action | None) -> str:
        """A cell as the paper writes it: ``3MF``, ``3F``, or ``*`` where the stage is idle.

        Where a rank holds several stages, the action's own word: ``2F3``.
        """
        if cell is None:
            return IDLE
        return str(cell) if self.several else f"{cell.batch}{self.schedule.mark}{cell.kind}"

    @property
    def heads(self) -> list[str]:
        """What stands before each line: ``stage 1``, or ``stages 1, 3``."""
        return [f"stage{'s' * (len(held) > 1)} {', '.join(map(str, held))}" for held in self.plan.held]

    @property
    def in_window(self) -> Bubbles:
        """Counted cell by cell."""
        total = len(self.cells) * self.window
        idle = sum(cell is None for row in self.cells for cell in row)
        return Bubbles(total, idle, self.schedule.paper_ratio(self.num_stages, self.num_batches), idle / total)

    @property
    def in_run(self) -> Bubbles:
        """In closed form, for the whole plan."""
        p, n = self.num_stages, self.num_batches
        total = len(self.cells) * self.schedule.slots(p, n)
        return Bubbles(
            total,
            total - self.plan.busy_slots,
            self.schedule.paper_ratio(p, n),
            self.schedule.slot_exact_ratio(p, n),
        )

    @cached_property
    def per_stage(self) -> PerStage:
        """Batches in flight, versions and delay, for the whole plan."""
        return PerStage.of(self.plan, self.schedule.versions)

    def summary(self) -> list[str]:
        """Three lines: the bubbles of the window and of the whole run, and what it costs each stage."""
        kind = {"mini-batch": "run", "micro-batch": "step"}.get(self.schedule.unit, "plan")
        lines = f"{len(self.cells)} {'ranks' if self.several else 'stages'}"
        in_flight, versions, delay = self.per_stage.words()
        return [
            f"window of {self.window} slots x {lines}: {self.in_window}",
            f"whole {kind} of {self.num_batches} {self.schedule.unit}es: {self.in_run}",
            f"each stage, at most: in flight {in_flight}; versions of its weights {versions}; updates late {delay}",
        ]

    def _texts(self) -> list[list[str]]:
        return [[self.text_of(cell) for cell in row] for row in self.cells]

    def text(self) -> str:
        """Aligned columns, one line per stage."""
        rows = [[str(slot) for slot in range(self.window)], *self._texts()]
        width = max(len(cell) for row in rows for cell in row)
        heads = ["slot", *self.heads]
        margin = max(map(len, heads))
        lines = [
            f"{head:<{margin}} | " + " ".join(f"{cell:>{width}}" for cell in row) for head, row in zip(heads, rows)
        ]
        return "\n".join([*lines, "", *self.summary()])

    def markdown(self) -> str:
        """A Markdown table with the paper's cells, and a first column for the stage."""
        head = ["stages" if self.several else "stage", *map(str, range(self.window))]
        body = [[" ".join(map(str, held)), *row] for held, row in zip(self.plan.held, self._texts())]
        lines = [_pipe(head), _pipe(["---"] * len(head)), *map(_pipe, body)]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.summary())])

    def json(self) -> str:
        """One object: the request, the cells (null where idle), the bubbles, and what it costs each stage."""
        return json.dumps(
            {
                "schedule": self.schedule.name,
                "stages": self.num_stages,
                **({"held": self.plan.held} if self.several else {}),
                "batches": self.num_batches,
                "unit": self.schedule.unit,
                "cells": [[None if cell is None else self.text_of(cell) for cell in row] for row in self.cells],
                "window": {"slots": self.window, **asdict(self.in_window)},
                "run": {"slots": self.run_slots, **asdict(self.in_run)},
                "per_stage": asdict(self.per_stage),
            },
            indent=2,
        )

    def svg(self) -> str:
        """A picture of 36 x 24 pixels per cell, with a title on each cell and the bubbles below."""
        width, height, top = 36, 24, 20
        left = 18 + 6 * max(map(len, self.heads))
        shapes = []
        for slot in range(self.window):
            shapes.append(_svg_text(left + slot * width + width / 2, top - 6, str(slot), size=9))
        for line, (head, row) in enumerate(zip(self.heads, self.cells)):
            y = top + line * height
            shapes.append(_svg_text(left / 2, y + height / 2 + 4, head, size=11))
            for slot, cell in enumerate(row):
                x = left + slot * width
                colour = "#eeeeee" if cell is None else COLOURS[cell.kind]
                title = "idle" if cell is None else str(cell)
                shapes.append(
                    f'<rect x="{x}" y="{y}" width="{width - 1}" height="{height - 1}" fill="{colour}">'
                    f"<title>{title}, slot {slot}</title></rect>"
                )
                if cell is not None:
                    shapes.append(_svg_text(x + width / 2, y + height / 2 + 4, self.text_of(cell), fill="white"))
        bottom = top + len(self.cells) * height
        for number, words in enumerate(self.summary()):
            shapes.append(_svg_text(left, bottom + 18 + 16 * number, words, size=11, anchor="start"))
        total_width, total_height = max(left + self.window * width + 8, 720), bottom + 60
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}"'
                ' font-family="sans-serif">',
                f'<rect width="{total_width}" height="{total_height}" fill="white"/>',
                *shapes,
                "</svg>",
            ]
        )


def _pipe(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _svg_text(x: float, y: float, text: str, *, size: int = 10, fill: str = "#222222", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{text}</text>'
