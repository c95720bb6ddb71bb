"""Modules show all their parameters, or those that are here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_cpipe.errors import AbsentWeightError
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.view import View


def cut_module() -> nn.Sequential:
    """Of the first layer the weight lives elsewhere."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight = AbsentParameter.of(module[0].weight, "0.weight", 1, 0)
    return module


@contextmanager
def opened(view: View) -> Iterator[View]:
    close = view.open()
    try:
        yield view
    finally:
        close()


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


ALL = ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_what_is_here_can_be_shown_alone() -> None:
    module = cut_module()
    with opened(View()) as view:
        assert names(module) == ALL
        with view.of_own():
            assert names(module) == ALL[1:]
            assert names(module[0]) == ["bias"]
            assert len(list(module.parameters())) == 3
            with view.of_all():
                assert names(module) == ALL
            assert names(module) == ALL[1:]
            # What saves it must see it all.
            assert list(module.state_dict()) == ALL
        assert names(module) == ALL
    with view.of_own():
        assert names(module) == ALL


def test_what_is_not_shown_is_found_by_name_and_raises() -> None:
    module = cut_module()
    with opened(View()) as view, view.of_own(), torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        with pytest.raises(AbsentWeightError, match=r"'0\.weight'.*live on stage 1"):
            module[0].weight.zero_()
    assert module[1].weight.abs().sum() == 0


def test_a_copy_shows_what_the_module_shows() -> None:
    module = cut_module()
    with opened(View()) as view, view.of_own():
        assert names(copy.deepcopy(module)) == ALL[1:]
        averaged = AveragedModel(module)
        nn.init.ones_(module[1].weight)
        averaged.update_parameters(module)
    assert averaged.module[1].weight.tolist() == [[1, 1], [1, 1]]


def test_it_is_told_once_who_sees_a_part() -> None:
    told: list[str] = []
    module = cut_module()
    with opened(View(told.append)) as view:
        for by in ("first", "", "second", "first"):
            with view.of_own(by):
                names(module[1])
        assert told == []
        for by in ("first", "", "second", "first"):
            with view.of_own(by):
                names(module)
    assert told == ["first", "second"]


def test_other_modules_and_other_threads_are_left_alone() -> None:
    """Such as a metric's module, and a thread that saves while a hook runs."""
    module, other = cut_module(), nn.Sequential(nn.Linear(2, 2))
    with opened(View()) as view, view.of_own(), ThreadPoolExecutor(1) as thread:
        assert names(other) == ["0.weight", "0.bias"]
        assert thread.submit(names, module).result() == ALL
        with opened(View()) as another:
            assert names(module) == ALL[1:]
            assert thread.submit(lambda: names_of_own(another, module)).result() == ALL[1:]


def names_of_own(view: View, module: nn.Module) -> list[str]:
    with view.of_own():
        return names(module)


def test_views_are_closed_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainers, or one and somebody else's wrapper."""
    monkeypatch.setattr(nn.Module, "named_parameters", nn.Module.named_parameters)
    module = cut_module()
    first, second = View(), View()
    close_first, close_second = first.open(), second.open()
    close_first()
    with second.of_own():
        assert names(module) == ALL[1:]
    close_second()
    with first.of_own(), second.of_own():
        assert names(module) == ALL
