"""Imports go down only: each room knows the rooms below its own floor, and no neighbour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_cpipe

PACKAGE = Path(lightning_cpipe.__file__).parent

# From the ground up. What stands in one line are neighbours.
FLOORS = [
    {"errors", "torch_private"},
    {"tree"},
    {"equality"},
    {"schedules", "stage", "transport"},
    {"engine", "probe"},
    {"balance"},
    {"strategy"},
    {"callbacks"},
    {"cli"},
]

FLOORS_OF_STRATEGY = [
    {"lightning_private", "options", "step_names"},
    {"ranks", "data", "finetuning"},
    {"loops"},
    {"setup"},
    {"steps"},
    {"sharing"},
    {"checkpoints", "hooks", "summaries"},
    {"updates", "run_at_hand"},
    {"strategy"},
    {"planning", "__init__"},
]
"""The strategy is a house in the house."""

BESIDE = {"demos", "__init__", "__main__"}
"""The demos know nothing of the package, and nobody in it knows them; the face of the package hands all out lazily."""


def room_of(file: Path, house: Path = PACKAGE) -> str:
    return file.relative_to(house).with_suffix("").parts[0]


def floor_of(room: str, floors: list[set[str]] = FLOORS) -> int:
    return next(number for number, rooms in enumerate(floors) if room in rooms)


def imported_rooms(file: Path, house: str = "lightning_cpipe") -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if f"{name}.".startswith(f"{house}."):
                yield name[len(house) + 1 :].partition(".")[0] or "__init__"


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if room_of(file) not in BESIDE]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_knows_only_what_is_below_it(file: Path) -> None:
    here = room_of(file)
    others = {room for room in imported_rooms(file) if room not in (here, "__init__")}
    assert not [room for room in others if floor_of(room) >= floor_of(here)]


def test_every_room_has_a_floor_and_every_floor_has_its_rooms() -> None:
    assert {room_of(file) for file in FILES} == set().union(*FLOORS)


ROOMS_OF_STRATEGY = sorted((PACKAGE / "strategy").rglob("*.py"))


@pytest.mark.parametrize("file", ROOMS_OF_STRATEGY, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_of_the_strategy_knows_only_what_is_below_it(file: Path) -> None:
    here = room_of(file, PACKAGE / "strategy")
    others = {room for room in imported_rooms(file, "lightning_cpipe.strategy") if room != here}
    floor = floor_of(here, FLOORS_OF_STRATEGY)
    assert not [room for room in others if floor_of(room, FLOORS_OF_STRATEGY) >= floor]


def test_the_demos_are_ordinary_lightning_modules() -> None:
    assert not [room for file in (PACKAGE / "demos").glob("*.py") for room in imported_rooms(file) if room != "demos"]
    for file in FILES:
        assert "demos" not in set(imported_rooms(file))


KNOW_LIGHTNING = {"strategy", "callbacks", "cli"}


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS) - KNOW_LIGHTNING))
def test_the_floors_below_the_strategy_do_not_know_lightning(room: str) -> None:
    for file in FILES:
        if room_of(file) == room:
            names = [name for node in ast.walk(ast.parse(file.read_text())) for name in _names(node)]
            assert not [
                name for name in names if name.split(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning")
            ]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
