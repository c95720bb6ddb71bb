"""A table shows every slot of a plan as drawn, counts its bubbles, and says the same in each of its formats."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from lightning_cpipe.schedules import Continuous, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.table import COLOURS, Bubbles, Table

CONTINUOUS = """
    0MF  *   1MF  *   2MF 0MB  *  1MB  *  2MB
     *  0MF   *  1MF  0MB 2MF 1MB  *  2MB  *
     *   *   0MF 0MB  1MF 1MB 2MF 2MB  *   *
"""

GPIPE = """
    0F 1F 2F 3F  *  *  *  * 3B 2B 1B 0B
     * 0F 1F 2F 3F  *  * 3B 2B 1B 0B  *
     *  * 0F 1F 2F 3F 3B 2B 1B 0B  *  *
"""

ONE_F_ONE_B = """
    0F  * 1F  * 2F 0B 3F 1B  * 2B  * 3B
     * 0F  * 1F 0B 2F 1B 3F 2B  * 3B  *
     *  * 0F 0B 1F 1B 2F 2B 3F 3B  *  *
"""

INTERLEAVED = """
    0F0 0F1 2F0  *  2F1 2B0  *  2B1 0B0 0B1
     *  1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1  *
"""

ZERO_BUBBLE = """
    0F  * 1F  * 2F 0I 0W 3F 1I 1W 2I 2W 3I 3W
     * 0F  * 1F 0I 2F 1I 0W 3F 2I 1W 3I 2W 3W
     *  * 0F 0I 1F 1I 2F 2I 0W 3F 3I 1W 2W 3W
"""

# The picture of three mini-batches on two stages, seen through a window of five slots.
IN_A_WINDOW = """
    0MF  *  1MF 0MB 2MF
     *  0MF 0MB 1MF 1MB
"""


def cells(drawn: str) -> list[list[str]]:
    return [line.split() for line in drawn.strip().splitlines()]


def shown(table: Table) -> list[list[str]]:
    return [[table.text_of(cell) for cell in row] for row in table.cells]


@pytest.fixture
def table() -> Table:
    return Table(Continuous(), num_stages=2, num_batches=3, window=5)


@pytest.mark.parametrize(
    ("schedule", "drawn", "p", "n"),
    [
        (Continuous(), CONTINUOUS, 3, 3),
        (GPipe(), GPIPE, 3, 4),
        (OneFOneB(), ONE_F_ONE_B, 3, 4),
        (Interleaved(), INTERLEAVED, 4, 2),
        (ZeroBubble(), ZERO_BUBBLE, 3, 4),
    ],
)
def test_the_cells_are_as_drawn(schedule: Schedule, drawn: str, p: int, n: int) -> None:
    assert shown(Table(schedule, p, n)) == cells(drawn)


def test_a_window_shows_the_first_slots(table: Table) -> None:
    assert shown(table) == cells(IN_A_WINDOW)
    assert (table.window, table.run_slots) == (5, 8)


def test_a_window_is_no_wider_than_the_run() -> None:
    assert Table(GPipe(), 3, 4, window=100).window == 12
    assert Table(GPipe(), 3, 4).window == 12


def test_the_bubbles_of_the_window_and_of_the_run_are_counted_apart(table: Table) -> None:
    assert table.in_window == Bubbles(10, 2, paper=2 / 5, slot_exact=2 / 10)
    assert table.in_run == Bubbles(16, 4, paper=2 / 5, slot_exact=4 / 16)


@pytest.mark.parametrize(
    "schedule", [Continuous(), Continuous(1), Continuous(2), GPipe(), OneFOneB(), ZeroBubble()], ids=str
)
def test_a_window_over_the_whole_run_counts_what_the_closed_forms_say(schedule: Schedule) -> None:
    for p, n in itertools.product(range(1, 9), range(1, 17)):
        table = Table(schedule, p, n)
        assert table.in_window == table.in_run
        assert table.run_slots == schedule.slots(p, n)


def test_the_summary_says_both_ratios_of_both_and_what_each_stage_pays() -> None:
    assert Table(Continuous(), 2, 3, 5).summary() == [
        "window of 5 slots x 2 stages: 10 slots, 2 idle; bubble ratio 0.4000 (paper), 0.2000 (slot-exact)",
        "whole run of 3 mini-batches: 16 slots, 4 idle; bubble ratio 0.4000 (paper), 0.2500 (slot-exact)",
        "each stage, at most: in flight 2 1; versions of its weights 2 1; updates late 1 0",
    ]
    assert Table(GPipe(), 2, 3).summary()[1].startswith("whole step of 3 micro-batches: 16 slots, 4 idle;")


def test_text_is_one_aligned_line_per_stage_with_the_slots_above(table: Table) -> None:
    assert table.text().splitlines() == [
        "slot    |   0   1   2   3   4",
        "stage 0 | 0MF   * 1MF 0MB 2MF",
        "stage 1 |   * 0MF 0MB 1MF 1MB",
        "",
        *table.summary(),
    ]


def test_where_ranks_hold_several_stages_lines_begin_with_them() -> None:
    table = Table(Interleaved(), 4, 2)
    assert [line.split(" | ")[0] for line in table.text().splitlines()[:3]] == [
        "slot       ",
        "stages 0, 2",
        "stages 1, 3",
    ]
    assert "| 1 3 | * | 1F0 |" in table.markdown()
    told = json.loads(table.json())
    assert told["held"] == [[0, 2], [1, 3]]
    assert told["cells"][1][:2] == [None, "1F0"]
    assert table.summary()[0].startswith("window of 10 slots x 2 ranks: 20 slots, 4 idle;")
    assert ">stages 1, 3</text>" in table.svg()


def test_columns_stay_aligned_where_numbers_grow() -> None:
    grid = Table(Continuous(), 11, 101).text().split("\n\n")[0].splitlines()
    assert len(grid) == 12
    assert len({len(line) for line in grid}) == 1


def test_markdown_is_a_table_with_a_column_for_the_stage_and_one_per_slot(table: Table) -> None:
    assert table.markdown().splitlines() == [
        "| stage | 0 | 1 | 2 | 3 | 4 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 0 | 0MF | * | 1MF | 0MB | 2MF |",
        "| 1 | * | 0MF | 0MB | 1MF | 1MB |",
        "",
        *(f"- {line}" for line in table.summary()),
    ]


def test_json_holds_the_request_the_cells_and_the_counts(table: Table) -> None:
    assert json.loads(table.json()) == {
        "schedule": "continuous",
        "stages": 2,
        "batches": 3,
        "unit": "mini-batch",
        "cells": [["0MF", None, "1MF", "0MB", "2MF"], [None, "0MF", "0MB", "1MF", "1MB"]],
        "window": {"slots": 5, "total_slots": 10, "idle_slots": 2, "paper": 0.4, "slot_exact": 0.2},
        "run": {"slots": 8, "total_slots": 16, "idle_slots": 4, "paper": 0.4, "slot_exact": 0.25},
        "per_stage": {"in_flight": [2, 1], "versions": [2, 1], "delay": [1, 0]},
    }


class Box(NamedTuple):
    """Where a rectangle of a picture lies, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def of(cls, rect: ElementTree.Element) -> Box:
        x, y, width, height = (int(rect.get(name, "0")) for name in ("x", "y", "width", "height"))
        return cls(x, y, x + width, y + height)


class TestSvg:
    SVG = "{http://www.w3.org/2000/svg}"

    @pytest.fixture
    def picture(self, table: Table) -> ElementTree.Element:
        return ElementTree.fromstring(table.svg())

    def titled(self, picture: ElementTree.Element) -> dict[str, ElementTree.Element]:
        """The rectangles of the cells by their titles."""
        rectangles = {rect.findtext(f"{self.SVG}title"): rect for rect in picture.iter(f"{self.SVG}rect")}
        return {title: rect for title, rect in rectangles.items() if title is not None}

    def test_each_cell_is_a_rectangle_that_says_what_it_is(self, picture: ElementTree.Element) -> None:
        assert sorted(self.titled(picture)) == sorted(
            [
                *("0F0, slot 0", "idle, slot 1", "0F1, slot 2", "0B0, slot 3", "0F2, slot 4"),
                *("idle, slot 0", "1F0, slot 1", "1B0, slot 2", "1F1, slot 3", "1B1, slot 4"),
            ]
        )
        rectangles = list(picture.iter(f"{self.SVG}rect"))
        assert len(rectangles) == 1 + 2 * 5, "one for the background, one per cell"

    def test_each_kind_has_its_colour(self, picture: ElementTree.Element) -> None:
        colours = Counter(rect.get("fill") for rect in self.titled(picture).values())
        assert colours == {COLOURS[Kind.FORWARD]: 5, COLOURS[Kind.BACKWARD]: 3, "#eeeeee": 2}

    def test_cells_stand_side_by_side_in_the_column_of_their_slot_and_the_row_of_their_stage(
        self, picture: ElementTree.Element
    ) -> None:
        at = {title: Box.of(rect) for title, rect in self.titled(picture).items()}
        corner = at["0F0, slot 0"]
        assert at["0F1, slot 2"][:2] == (corner.left + 2 * 36, corner.top)
        assert at["1B1, slot 4"][:2] == (corner.left + 4 * 36, corner.top + 24)
        assert corner.right < at["idle, slot 1"].left
        assert corner.bottom < at["idle, slot 0"].top

    def test_every_word_stands_where_it_belongs(self, picture: ElementTree.Element) -> None:
        _, *shapes = picture
        at = [Box.of(shape) for shape in shapes if shape.tag == f"{self.SVG}rect"]
        grid = Box(at[0].left, at[0].top, at[-1].right, at[-1].bottom)
        words = {shape.text: (float(shape.get("x", "")), float(shape.get("y", ""))) for shape in shapes}
        for slot in range(5):
            x, y = words[str(slot)]
            assert at[slot].left < x < at[slot].right
            assert 0 < y < grid.top
        for stage in range(2):
            x, y = words[f"stage {stage}"]
            assert 0 < x < grid.left
            assert at[5 * stage].top < y < at[5 * stage].bottom
        for rect, word in itertools.pairwise(shapes):
            if (rect.findtext(f"{self.SVG}title") or "idle")[0].isdigit():
                box = Box.of(rect)
                assert box.left < float(word.get("x", "")) < box.right
                assert box.top < float(word.get("y", "")) < box.bottom
        window, run, per_stage = (y for text, (_, y) in words.items() if text and ("idle;" in text or "late" in text))
        assert grid.bottom < window < window + 11 < run < run + 11 < per_stage < int(picture.get("height", ""))

    def test_everything_lies_within_the_picture(self) -> None:
        picture = ElementTree.fromstring(Table(Continuous(), 6, 40).svg())
        width, height = int(picture.get("width", "")), int(picture.get("height", ""))
        for rect in picture.iter(f"{self.SVG}rect"):
            assert Box.of(rect).right <= width
            assert Box.of(rect).bottom <= height

    def test_the_words_are_those_of_the_paper_and_the_bubbles(self, picture: ElementTree.Element, table: Table) -> None:
        words = [text.text for text in picture.iter(f"{self.SVG}text")]
        drawn = [cell for row in cells(IN_A_WINDOW) for cell in row if cell != "*"]
        assert words == ["0", "1", "2", "3", "4", "stage 0", *drawn[:4], "stage 1", *drawn[4:], *table.summary()]
