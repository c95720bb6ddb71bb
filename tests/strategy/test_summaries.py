"""The summaries that Lightning prints say where weights live, and count those of the whole module."""

from __future__ import annotations

import io
import logging
import re
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch import Tensor, nn

from lightning_cpipe.strategy.summaries import stages_of
from tests.helpers.fits import alone, in_pipeline, quiet_trainer
from tests.helpers.modules import WIDTH, Chain, noise_loader

HOMES = {"net.0.weight": (0,), "net.0.bias": (0,), "net.1.weight": (1,), "net.10.weight": (3,), "scale": (3, 0, 2)}


@pytest.mark.parametrize(
    ("name", "stages"),
    [("net", "0-1, 3"), ("net.0", "0"), ("net.1", "1"), ("net.10", "3"), ("head", ""), ("other params", "0, 2-3")],
)
def test_stages_are_those_of_all_weights_inside(name: str, stages: str) -> None:
    assert dict(zip(["net", name], stages_of(["net", name], HOMES)))[name] == stages


class Summarized(Chain):
    """Has a scale that is frozen and used between all blocks, and reads a weight of the first one in vain."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.scale = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net:
            x = block(x) * self.scale
        self.net[0].linear.weight.sum()
        return self.activation(x)


def printed(callback: ModelSummary, **options: Any) -> str:
    """What a fit prints of a module."""
    out = io.StringIO()
    if isinstance(callback, RichModelSummary):
        import rich

        rich.reconfigure(file=out, width=120)
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("lightning.pytorch.callbacks.model_summary")
    logger.addHandler(handler)
    try:
        quiet_trainer(callbacks=[callback], max_steps=1, **options).fit(module := Summarized(), noise_loader())
    finally:
        logger.removeHandler(handler)
    assert all(each.requires_grad for each in module.net.parameters())
    return out.getvalue()


def in_a_pipeline_and_alone_afterwards(kind: type[ModelSummary], max_depth: int, **options: Any) -> list[str]:
    """With one and the same callback."""
    callback = kind(max_depth=max_depth)
    texts = [printed(callback, **options)]
    if pl.utilities.rank_zero.rank_zero_only.rank == 0:
        texts.append(printed(callback, strategy="auto", devices=1))
    return texts


def rows_of(text: str) -> list[list[str]]:
    """The cells of a table's rows, the header first."""
    lines = re.sub("[│┃]", "|", text).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


def lines_below(text: str) -> list[str]:
    """The numbers of trainable parameters, of all, and the like."""
    return [line.strip() for line in text.splitlines() if re.search("params|mode|flops", line, re.IGNORECASE)][-7:]


def without(rows: list[list[str]], column: str) -> list[list[str]]:
    place = rows[0].index(column)
    return [row[:place] + row[place + 1 :] for row in rows]


STAGES = {
    "net": "0-2",
    "activation": "",
    "other params": "0-2",
    "net.0": "0",
    "net.0.linear": "0",
    "net.0.dropout": "",
    "net.3.norm": "2",
}


@pytest.mark.parametrize(
    ("kind", "max_depth", "rows"),
    [
        (ModelSummary, -1, 18),
        *(pytest.param(*each, marks=pytest.mark.full) for each in ((ModelSummary, 1, 3), (ModelSummary, 2, 6))),
        (RichModelSummary, 1, 3),
    ],
)
def test_a_column_says_where_weights_live(kind: type[ModelSummary], max_depth: int, rows: int) -> None:
    if kind is RichModelSummary:
        pytest.importorskip("rich")
    (ours, afterwards), *others = in_pipeline(3, partial(in_a_pipeline_and_alone_afterwards, kind, max_depth))
    assert others == [[""]] * 2, "only rank 0 prints"
    plain = alone(partial(printed, kind(max_depth=max_depth)))
    assert afterwards == plain
    table = rows_of(ours)
    assert table[0][1:5] == ["Name", "Type", "Params", "Stage"]
    assert len(table) == 1 + rows
    assert without(table, "Stage") == rows_of(plain)
    found = {row[1]: row[4] for row in table[1:]}
    assert {name: stage for name, stage in found.items() if name in STAGES} == {
        name: stage for name, stage in STAGES.items() if name in found
    }
    assert lines_below(ours) == lines_below(plain)
    assert "".join(lines_below(ours)).count("rainable") == 2


def test_one_stage_has_no_column() -> None:
    (ours,) = in_pipeline(1, partial(printed, ModelSummary()))
    assert ours == alone(partial(printed, ModelSummary()))
