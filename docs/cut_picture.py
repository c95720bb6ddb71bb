"""Draws `cut.svg` from a real cut of a small module, found by the package's own probe: `python docs/cut_picture.py`.

A row for each stage: what of the step it runs, what is a stub there, and what it never comes to; between two rows,
what crosses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pictures import label
from torch import Tensor, nn

from lightning_cpipe.probe.step import Observed, Step
from lightning_cpipe.stage.cut import Cut, Passage
from lightning_cpipe.strategy.setup.probing import find_cut
from lightning_cpipe.tree import signature

WIDTH = 4
STARTS = ("blocks.1", "blocks.3")

BOX, GAP, ROW, LEFT, TOP = 92, 10, 34, 66, 60
"""Pixels."""

COLOURS = {"runs here": "#3b7dd8", "stub": "#d5d5d5", "not reached": "#ffffff"}


class Example(nn.Module):
    """An embedding, four blocks, a long skip and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.mask = nn.Identity()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 9)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        early = x = self.embed(ids)
        mask = self.mask(ids > 2)
        for block in self.blocks:
            x = torch.relu(block(x)) * mask[:, None]
        return nn.functional.cross_entropy(self.head(x + early), labels)


def example_cut() -> Cut:
    """The example's cut into three stages."""
    torch.manual_seed(0)
    module, batch = Example(), (torch.arange(6), torch.arange(6))
    step = Step("training_step", lambda: Observed(module(*batch)), True, 1, signature(batch))
    return find_cut(module, [step], len(STARTS) + 1, STARTS, torch.device("cpu"), "full")  # type: ignore[arg-type]


def cut() -> str:
    """The picture."""
    called = ["embed", "mask", *(f"blocks.{number}" for number in range(4)), "head"]
    passages = example_cut().steps["training_step"].passages
    period = 2 * ROW
    width, height = LEFT + len(called) * (BOX + GAP), TOP + len(passages) * period - ROW + 14
    shapes = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, (state, colour) in enumerate(COLOURS.items()):
        shapes += [
            _box(LEFT + 130 * number, 14, 14, 14, colour),
            label(LEFT + 130 * number + 20, 26, state, anchor="start"),
        ]
    for passage in passages:
        top = TOP + passage.stage * period
        shapes.append(label(LEFT - 8, top + 22, f"stage {passage.stage}", anchor="end"))
        for place, name in enumerate(called):
            state = _state(name, called, passage)
            x = LEFT + place * (BOX + GAP)
            shapes.append(_box(x, top, BOX, ROW, COLOURS[state]))
            ink = "white" if state == "runs here" else "#222222" if state == "stub" else "#bbbbbb"
            shapes.append(label(x + BOX / 2, top + 22, name, ink))
        if passage.end is not None:
            values = ", ".join(
                f"{sent.value}{'' if sent.gradient else ' (no gradient back)'}" for sent in passage.sends
            )
            x = LEFT + called.index(passage.end) * (BOX + GAP)
            shapes.append(label(x, top + ROW + 22, f"↓ {values}; gradients ↑"))
            shapes.append(f'<path stroke="#c0392b" stroke-width="3" d="M{x - GAP / 2:g} {top - 6}v{ROW + 12}"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    )
    about = "<title>Three stages replay one step: what each runs, what is a stub there, and what crosses</title>"
    return "\n".join([head, about, *shapes, "</svg>", ""])


def _state(name: str, called: list[str], passage: Passage) -> str:
    if name in passage.stubs:
        return "stub"
    reached = passage.end is None or called.index(name) < called.index(passage.end)
    return "runs here" if reached else "not reached"


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="#999999"/>'


if __name__ == "__main__":
    (Path(__file__).parent / "cut.svg").write_text(cut())
