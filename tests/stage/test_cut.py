"""A cut is data: it travels from the rank that found it to the others, and its values read as words."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lightning_cpipe.stage.cut import Value
from tests.helpers.probing import STEP, cut_of


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Value("net.0", 0, 0), "the output of 'net.0'"),
        (Value("net.0", 2, 0), "the output of 'net.0' (call 2)"),
        (Value("net.0", 0, 1), "the output of 'net.0' (tensor 1)"),
        (Value("net.0", 2, 1), "the output of 'net.0' (call 2, tensor 1)"),
    ],
)
def test_values_are_called_by_what_made_them(value: Value, words: str) -> None:
    assert str(value) == words


def test_a_cut_survives_the_journey() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)) for _ in range(3)))
    batch = (torch.randn(4, 3),)
    cut = cut_of(module, batch, 3, run=lambda module, batch: module(*batch).square().mean())
    arrived = pickle.loads(pickle.dumps(cut))
    assert arrived == cut
    assert arrived.num_stages == 3
    templates = arrived.steps[STEP].templates
    assert all(template.build([batch[0]]) is batch[0] for template in templates.values())
    assert templates
