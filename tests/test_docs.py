"""Pictures are those that their scripts draw, and errors that a document quotes are said by the package."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

import lightning_cpipe
from lightning_cpipe.cli.schedule import main as command
from lightning_cpipe.schedules import SCHEDULES
from lightning_cpipe.schedules.check import check
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import POLICIES
from lightning_cpipe.schedules.table import Table
from tests.helpers.fits import Seen, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, noise_loader

PACKAGE = Path(lightning_cpipe.__file__).parent
DOCS = PACKAGE.parent / "docs"


@pytest.mark.parametrize(("script", "picture"), [("pictures", "schedules"), ("cut_picture", "cut")])
def test_a_picture_is_up_to_date(script: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    drawn = getattr(importlib.import_module(script), picture)()
    assert drawn == (DOCS / f"{picture}.svg").read_text(), f"run `python docs/{script}.py`"


def test_every_schedule_has_a_figure_that_is_up_to_date_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    figures = importlib.import_module("pictures").FIGURES
    assert {table.schedule.name for table in figures.values()} == set(SCHEDULES)
    text = (DOCS / "schedules.md").read_text()
    for name, table in figures.items():
        assert (DOCS / "schedules" / f"{name}.svg").read_text() == table.svg() + "\n", "run `python docs/pictures.py`"
        assert f"](schedules/{name}.svg)" in text
    assert len(list((DOCS / "schedules").iterdir())) == len(figures)


def test_the_table_of_schedules_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command(["--compare", "--format", "markdown"])
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert table in (DOCS / "schedules.md").read_text()


def test_the_schedule_that_a_document_adds_has_no_faults_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, in rehearsal. It adds gradients in the order of 1F1B."""
    text = (DOCS / "schedules.md").read_text().partition("## Add a schedule")[2]
    code, drawn = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)[:2]
    names: dict[str, Any] = {}
    exec(code, names)
    schedule = names["InOrder"]()
    for p, v in itertools.product(range(1, 4), range(1, 4)):
        several = replace(schedule, stages_per_rank=v)
        assert check(several.plan(p * v, 4), several) == []
    assert Table(schedule, 3, 4).text().partition("\n\n")[0] == drawn.strip()
    monkeypatch.setitem(SCHEDULES, "in-order", names["InOrder"])

    def fit(name: str) -> Seen:
        strategy = {"schedule": name, "num_microbatches": 4}
        return fit_in_pipeline(3, Chain, noise_loader, devices=1, strategy=strategy, max_steps=2)[0]

    seen, plain = fit("in-order"), fit("1f1b")
    assert seen.losses == plain.losses
    require_same_bits(seen.weights, plain.weights)


def said() -> str:
    """All texts of the package, with nothing in place of what is filled in."""
    texts = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_errors_of_the_table_are_said() -> None:
    table = (DOCS / "cutting.md").read_text().partition("## What can't be cut")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row[1])]
    assert len(quoted) == len(rows) > 10
    everything = said()
    assert [quote for quote in quoted if quote not in everything] == []


def test_what_the_first_stage_pays_is_what_the_schedule_says() -> None:
    rows = re.findall(
        r"^\| ([a-z][^|]*?) \| (\d+) \| (\d+) \| (\d+) \|$", (PACKAGE.parent / "README.md").read_text(), re.MULTILINE
    )
    shown = {name: [int(each) for each in numbers] for name, *numbers in rows}
    sizes = (2, 4, 8)
    plain = [Continuous() for _ in sizes]
    accumulating = [Continuous(accumulate=p) for p in sizes]
    assert shown == {
        "mini-batches whose activations it keeps": [each.in_flight(0, p, 100) for each, p in zip(plain, sizes)],
        "versions of its weights that it keeps": [each.live_versions(0, p) for each, p in zip(plain, sizes)],
        "updates by which its gradients are late": [each.most_delay(0, p) for each, p in zip(plain, sizes)],
        "versions with `accumulate_grad_batches=p`": [each.live_versions(0, p) for each, p in zip(accumulating, sizes)],
        "updates late with `accumulate_grad_batches=p`": [
            each.most_delay(0, p) for each, p in zip(accumulating, sizes)
        ],
    }


def test_the_costs_of_the_version_policies_are_those_of_the_schedule() -> None:
    table = (DOCS / "versions.md").read_text().partition("| updates late |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").replace("`", "").split(" | ") for line in table.splitlines()[2:]]
    assert {name for name, *_ in rows} == set(POLICIES)
    for name, accumulate, late, alive in rows:
        schedule = Continuous(accumulate=int(accumulate), versions=POLICIES[name])
        assert late.split() == [str(schedule.most_delay(stage, 4)) for stage in range(4)], (name, accumulate)
        assert alive.split() == [str(schedule.live_versions(stage, 4)) for stage in range(4)], (name, accumulate)


def test_every_argument_of_the_trainer_has_a_row() -> None:
    text = (DOCS / "lightning.md").read_text().partition("## Trainer flags")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(inspect.signature(pl.Trainer).parameters)
    assert {row.split(" | ")[1] for row in rows} == {"works", "differs", "refused"}
