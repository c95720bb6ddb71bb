"""A module is built a second time as if there had been no first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.randomness import get_state, same_state
from lightning_cpipe.strategy.setup.blueprint import Blueprint
from tests.helpers.probing import CPU


class Late(nn.Module):
    """Makes most of itself in `build`, and notes what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.parts = nn.ModuleList([nn.Linear(2, 2)])
        self.late = None
        self.sizes: list[int] = []
        self.options = {"depth": 1}
        self.seen: set[str] = set()
        self.calls = 0
        self.untouched = [1]

    def build(self) -> None:
        self.late = nn.Linear(3, 3)
        self.parts.append(nn.Linear(2, 4))
        self.register_buffer("mask", torch.rand(3))
        self.sizes.append(3)
        self.options["depth"] += 1
        self.seen.add("late")
        self.calls += 1
        self.more = nn.Parameter(torch.randn(2, 2))
        self.first.register_forward_hook(lambda *_: None)


def drawn(module: nn.Module, build: Any) -> Blueprint:
    blueprint = Blueprint(module, build, CPU)
    with blueprint.drawn():
        build()
    return blueprint


def state_of(module: Late) -> Any:
    attributes = {
        key: value for key, value in vars(module).items() if not key.startswith("_") and not key.startswith("late")
    }
    hooks = [len(each._forward_hooks) for each in module.modules()]
    return attributes, hooks, {name: value.clone() for name, value in module.state_dict().items()}


def require_same_state(a: Any, b: Any) -> None:
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys()
    assert all(torch.equal(value, b[2][name]) for name, value in a[2].items())


def built_once() -> tuple[Late, Any]:
    torch.manual_seed(3)
    module = Late()
    module.build()
    return module, get_state()


@pytest.mark.parametrize("whole", [True, False])
def test_the_second_time_is_like_a_first_one(whole: bool) -> None:
    once, state = built_once()
    torch.manual_seed(3)
    module = Late()
    blueprint = drawn(module, module.build)
    assert blueprint.hollow == {"late.weight", "late.bias", "parts.1.weight", "parts.1.bias", "more"}
    assert same_state(get_state(), state)
    if whole:
        blueprint.build_whole()
    else:
        blueprint.build(blueprint.hollow)
    require_same_state(state_of(module), state_of(once))
    assert same_state(get_state(), state)


def test_what_is_not_wanted_is_on_the_meta_device() -> None:
    once, _ = built_once()
    torch.manual_seed(3)
    module = Late()
    blueprint = drawn(module, module.build)
    torch.rand(5)
    blueprint.build({"more", "late.bias", "first.weight"})
    numbers = once.state_dict()
    on_meta = {name for name, parameter in module.named_parameters() if parameter.is_meta}
    assert on_meta == {"late.weight", "parts.1.weight", "parts.1.bias"}
    for name, value in module.state_dict().items():
        assert name in on_meta or torch.equal(value, numbers[name])


def test_what_others_change_in_between_stays() -> None:
    module = Late()
    blueprint = drawn(module, module.build)
    module.untouched.append(2)
    module.of_a_loader = "mine"
    blueprint.build({"more"})
    assert module.untouched == [1, 2]
    assert module.of_a_loader == "mine"


def test_a_module_that_is_another_one_each_time_is_refused() -> None:
    module = Late()
    calls: list[int] = []

    def build() -> None:
        calls.append(0)
        module.late = nn.Linear(3, 2 + len(calls))

    with pytest.raises(CutError, match="`configure_model` of Late built something else the second time"):
        drawn(module, build).build(())


def test_a_module_that_draws_from_a_generator_of_its_own_is_refused() -> None:
    module = Late()
    calls: list[int] = []

    def build() -> None:
        calls.append(0)
        module.late = nn.Linear(3, 3)
        torch.rand(len(calls))

    with pytest.raises(CutError, match="drew other random numbers"):
        drawn(module, build).build(())


def test_it_is_known_by_what_was_built_and_drawn() -> None:
    torch.manual_seed(3)
    module = Late()
    first = drawn(module, module.build)
    torch.manual_seed(3)
    same = Late()
    assert drawn(same, same.build).fingerprint == first.fingerprint
    other = Late()
    assert drawn(other, other.build).fingerprint != first.fingerprint
