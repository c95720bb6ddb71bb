"""Schedules, and the command that prints them, work where torch, Lightning and NumPy are not installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_cpipe
from lightning_cpipe import schedules
from lightning_cpipe.cli import schedule as command

FOLDER = Path(schedules.__file__).parent
FILES = [*sorted(FOLDER.glob("*.py")), Path(command.__file__)]

HIDDEN = [
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "matplotlib",
    "numpy",
    "pytorch_lightning",
    "sklearn",
    "torch",
    "torchmetrics",
    "typing_extensions",
    "wandb",
]

TRY_EACH = """
import importlib, sys

for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""

# Run in a file of this name, since the package tells its own command by it and imports Lightning anywhere else.
CPIPE = """
import importlib, pkgutil, sys
import lightning_cpipe.schedules as schedules

for module in pkgutil.iter_modules(schedules.__path__):
    importlib.import_module(f"lightning_cpipe.schedules.{module.name}")

from lightning_cpipe.schedules.check import check
for name in schedules.SCHEDULES:
    schedule = schedules.named(name)
    assert check(schedule.plan(4, 8), schedule) == []
print(schedules.Continuous().plan(2, 2))
"""


def imported(file: Path) -> Iterator[str]:
    """The full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which the hidden packages can't be imported."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in HIDDEN:
        (hidden / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')\n")
    package = str(Path(lightning_cpipe.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(hidden), package])}


def run(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_nothing_is_imported_but_python_itself_and_this_floor(file: Path) -> None:
    for module in imported(file):
        first = module.partition(".")[0]
        own = module.startswith("lightning_cpipe.schedules") or module == "lightning_cpipe.errors"
        assert own or first in sys.stdlib_module_names, module


def test_what_is_hidden_below_can_not_be_imported(bare: dict[str, str]) -> None:
    done = run(bare, sys.executable, "-c", TRY_EACH, *HIDDEN)
    assert done.stdout.splitlines() == [f"{name} is hidden" for name in HIDDEN]


def test_schedules_work_on_bare_python(tmp_path: Path, bare: dict[str, str]) -> None:
    script = tmp_path / "cpipe"
    script.write_text(CPIPE)
    done = run(bare, sys.executable, script)
    assert done.stderr == ""
    assert done.stdout == "0 | F0 | F1 B0 U0 | B1 U1\n1 | F0 B0 U0 | F1 B1 U1\n"


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).with_name("cpipe")], [sys.executable, "-m", "lightning_cpipe"]],
    ids=["cpipe", "python -m lightning_cpipe"],
)
def test_the_command_works_on_bare_python(command: list[str | Path], bare: dict[str, str]) -> None:
    done = run(bare, *command, "schedule", "--stages", "2", "--mini-batches", "3")
    assert done.stderr == ""
    assert done.returncode == 0
    assert "stage 1 |   * 0MF 0MB 1MF 1MB 2MF 2MB   *" in done.stdout
