"""Pictures are those that their scripts draw, and errors that a document quotes are said by the package."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import lightning_cpipe

PACKAGE = Path(lightning_cpipe.__file__).parent
DOCS = PACKAGE.parent / "docs"


@pytest.mark.parametrize(("script", "picture"), [("pictures", "schedules"), ("cut_picture", "cut")])
def test_a_picture_is_up_to_date(script: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    drawn = getattr(importlib.import_module(script), picture)()
    assert drawn == (DOCS / f"{picture}.svg").read_text(), f"run `python docs/{script}.py`"


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
