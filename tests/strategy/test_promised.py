"""What stands for numbers on their way can be renamed, dropped and saved; who looks at it waits."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.stage.weights import standing_in
from lightning_cpipe.strategy.checkpoints.promised import Promised, PromisedState, as_it_is_now, settled


class NotYetError(Exception):
    """Somebody would have waited."""


def not_yet() -> Any:
    raise NotYetError


def promised(module: nn.Module) -> dict[str, Promised]:
    return {name: Promised.of(not_yet) for name, _ in module.named_parameters()}


def test_a_module_gives_its_state_without_a_wait() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    with standing_in(module, promised(module)):
        state = module.state_dict()
    assert list(state) == list(module.state_dict())
    assert state._metadata == module.state_dict()._metadata
    state = OrderedDict((name.removeprefix("0."), value) for name, value in state.items() if "bias" not in name)
    as_it_is_now({"state_dict": state})
    for look in (torch.sum, repr, lambda x: x + 1, lambda x: x.shape, lambda x: x.half(), lambda x: x.numpy()):
        with pytest.raises(NotYetError):
            look(state["weight"])


def test_who_looks_gets_the_tensor() -> None:
    tensor = torch.tensor([1.0, 2.0])
    here = Promised.of(lambda: tensor)
    assert float(here.detach().sum()) == 3
    assert here.tolist() == [1, 2]
    assert type(here * 2) is Tensor
    here.mul_(3)
    assert tensor.tolist() == [3, 6]


def test_the_file_is_that_of_the_tensors_themselves() -> None:
    """Those that share memory, too."""

    def saved(tree: Any) -> bytes:
        file = io.BytesIO()
        torch.save(tree, file)
        return file.getvalue()

    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).t()
    state: Any = OrderedDict(a=weight.detach(), b=weight.detach())
    state._metadata = {"": {"version": 1}}
    numbers = {0: {"step": torch.tensor(1.0)}}
    plain = {"state_dict": state, "optimizer_states": [{"state": numbers, "param_groups": [{"lr": 0.1}]}]}

    one = Promised.of(lambda: weight)
    theirs: Any = OrderedDict(a=one.detach(), b=one.detach())
    theirs._metadata = {"": {"version": 1}}
    state_of_optimizer = PromisedState(lambda: numbers)
    found = {"state_dict": theirs, "optimizer_states": [{"state": state_of_optimizer, "param_groups": [{"lr": 0.1}]}]}
    assert saved(settled(as_it_is_now(found))) == saved(plain)


def test_what_is_noted_stays_as_it_is() -> None:
    live = torch.ones(2, requires_grad=True)
    best = {"a": torch.tensor(1.0)}
    noted = as_it_is_now({"best": best, "made": live * 2, "live": live})
    best["a"].add_(1)
    best["b"] = torch.tensor(0.0)
    with torch.no_grad():
        live.zero_()
    assert {name: float(value) for name, value in noted["best"].items()} == {"a": 1.0}
    assert noted["live"].tolist() == [1, 1]
    assert noted["made"].tolist() == [2, 2]
