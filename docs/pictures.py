"""Draws the pictures of this folder from the package's own schedules: `python docs/pictures.py`.

schedules.svg       1F1B, which is flushed after every mini-batch, above the continuous schedule, on one time axis
schedules/NAME.svg  one schedule each
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from lightning_cpipe.schedules import Continuous, GPipe, Interleaved, OneFOneB, ZeroBubble
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.table import COLOURS, Table

STAGES = 4
MICRO_BATCHES = 8
SLOTS = 26
"""Width of the picture. A slot is the time of one forward, or one backward, of a whole mini-batch on one stage."""

SLOT, ROW, LEFT, TOP = 40, 26, 66, 56
"""Pixels."""

IDLE = "#d5d5d5"

FIGURES = {
    "continuous": Table(Continuous(), STAGES, 13, SLOTS),
    "continuous-early": Table(Continuous(early_input_gradient=True), STAGES, 10, SLOTS),
    "continuous-two-per-rank": Table(Continuous(stages_per_rank=2), STAGES, 8, SLOTS),
    "gpipe": Table(GPipe(), STAGES, MICRO_BATCHES),
    "1f1b": Table(OneFOneB(), STAGES, MICRO_BATCHES),
    "interleaved": Table(Interleaved(), 2 * STAGES, MICRO_BATCHES),
    "zb": Table(ZeroBubble(), STAGES, MICRO_BATCHES),
}
"""One schedule each."""

Cell = tuple[Action, float, float]
"""What is done, and its begin and end in slots."""


def flushed() -> list[Cell]:
    """One step of 1F1B after the other; a micro-batch takes its share of a slot."""
    schedule = OneFOneB()
    one_step = clock(schedule.plan(STAGES, MICRO_BATCHES))
    period = schedule.slots(STAGES, MICRO_BATCHES)
    steps = range(1 + SLOTS * MICRO_BATCHES // period)
    begins = [(action, (step * period + slot) / MICRO_BATCHES) for step in steps for action, slot in one_step.items()]
    return [(action, begin, begin + 1 / MICRO_BATCHES) for action, begin in begins if begin < SLOTS]


def continuous() -> list[Cell]:
    """The stream from its start; it goes on to the right."""
    slots = clock(Continuous().plan(STAGES, SLOTS))
    return [(action, slot, slot + 1) for action, slot in slots.items() if slot < SLOTS]


def panel(cells: list[Cell], top: int, title: str) -> list[str]:
    """One schedule: a grey band per stage, and on it what the stage does. Whole mini-batches carry their numbers."""
    shapes = []
    idle = 1 - sum(end - begin for _, begin, end in cells) / (STAGES * SLOTS)
    shapes.append(label(LEFT, top - 10, f"{title} Idle in this window: {idle:.0%}", size=14, anchor="start"))
    shapes += [label(LEFT - 8, _y(top, stage) + 17, f"stage {stage}", anchor="end") for stage in range(STAGES)]
    shapes.append(_boxes(IDLE, ((LEFT, _y(top, stage), SLOTS * SLOT) for stage in range(STAGES))))
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        of_kind = [(action, LEFT + begin * SLOT, (end - begin) * SLOT) for action, begin, end in cells]
        of_kind = [each for each in of_kind if each[0].kind is kind]
        shapes.append(_boxes(COLOURS[kind], ((x, _y(top, a.stage or 0), width - 0.5) for a, x, width in of_kind)))
        for action, x, width in of_kind:
            if width >= SLOT:
                shapes.append(label(x + width / 2, _y(top, action.stage or 0) + 17, f"{kind}{action.batch}", "white"))
    return shapes


def schedules() -> str:
    """Both, one above the other."""
    below = TOP + STAGES * ROW + 48
    width, height = LEFT + SLOTS * SLOT + 12, below + STAGES * ROW + 32
    shapes = [f'<rect width="{width}" height="{height}" fill="white"/>']
    shapes += panel(flushed(), TOP, f"1F1B with {MICRO_BATCHES} micro-batches: flushed after every mini-batch.")
    shapes += panel(continuous(), below, "Continuous: filled once, then never flushed.")
    legend = {"forward": COLOURS[Kind.FORWARD], "backward": COLOURS[Kind.BACKWARD], "idle": IDLE}
    for number, (name, colour) in enumerate(legend.items()):
        x = width - 280 + 94 * number
        shapes += [f'<rect x="{x}" y="14" width="14" height="14" fill="{colour}"/>']
        shapes += [label(x + 20, 26, name, anchor="start")]
    shapes.append(label(LEFT, height - 12, "time →", anchor="start"))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    )
    about = "<title>What 4 stages do when: a flushed schedule above the continuous one</title>"
    return "\n".join([head, about, *shapes, "</svg>", ""])


def _y(top: int, stage: int) -> int:
    return top + stage * ROW


def _boxes(fill: str, boxes: Iterable[tuple[float, float, float]]) -> str:
    """Boxes of one colour, each by its left, its top and its width."""
    height = ROW - 2
    path = "".join(f"M{x:g} {y:g}h{width:g}v{height}h{-width:g}z" for x, y, width in boxes)
    return f'<path fill="{fill}" d="{path}"/>'


def label(x: float, y: float, text: str, fill: str = "#222222", *, size: int = 12, anchor: str = "middle") -> str:
    """A text in a picture; `anchor` says which end of it stands at `x`."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "schedules.svg").write_text(schedules())
    (folder / "schedules").mkdir(exist_ok=True)
    for name, table in FIGURES.items():
        (folder / "schedules" / f"{name}.svg").write_text(table.svg() + "\n")
