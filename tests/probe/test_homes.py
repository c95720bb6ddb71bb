"""Each weight lives where it gets its gradient; others where somebody needs them; nothing is left homeless."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.homes import Homes


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen, self.never = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
        self.outer = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.free = nn.Parameter(nn.Linear(1, 1).weight.detach())


def homes(called_on: dict[str, tuple[int, ...]], module: nn.Module | None = None, trains: bool = True) -> Homes:
    return Homes(module or Module(), 3, called_on, trains)


def test_a_weight_lives_where_it_gets_its_gradient() -> None:
    """Not where its module is called."""
    found = homes({"trained": (0, 1)})
    found.note_trained(2, ["trained.weight"])
    assert found.stages_of("trained.weight") == (2,)
    assert found.trained_on == {"trained.weight": (2,)}


def test_of_several_stages_that_give_a_gradient_the_last_owns_the_weight() -> None:
    found = homes({})
    found.note_trained(1, ["trained.weight", "free"])
    found.note_trained(2, ["free"])
    found.note_trained(0, ["free", "frozen.bias"])
    assert found.trained_on["free"] == (0, 1, 2)
    assert found.stages_of("free") == (2, 0, 1)
    found.require_few_ties()


def test_a_stage_that_has_nothing_of_its_own_is_refused() -> None:
    """One parameter alone may be: an embedding that is the head's weight."""
    found = homes({})
    found.note_trained(2, ["free", "trained.weight"])
    found.note_trained(1, ["free"])
    found.require_few_ties()
    found.note_trained(1, ["trained.weight"])
    with pytest.raises(CutError, match=r"each of the 2 .* on stage 1 gets.*'free' on the stages 1, 2.*`weight_decay`"):
        found.require_few_ties()


@pytest.mark.parametrize(
    ("name", "called_on", "expected"),
    [
        ("trained.weight", {"trained": (0, 1)}, (0,)),
        ("frozen.weight", {"frozen": (0, 2)}, (0, 2)),
        ("never.weight", {}, (2,)),
        ("free", {}, (2,)),
        ("outer.1.weight", {"outer": (0, 1), "outer.1": (1,)}, (1,)),
        ("outer.1.weight", {"outer": (1,)}, (1,)),
    ],
)
def test_a_weight_without_a_gradient_lives_where_its_innermost_module_is_called(
    name: str, called_on: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """A frozen one on every such stage; one that an optimizer may change on the first of them; else on the last."""
    assert homes(called_on).stages_of(name) == expected


def test_frozen_weights_live_where_code_touches_them_too() -> None:
    module = Module()
    found = homes({"frozen": (1,)}, module)
    found.note_touched(0, [id(module.frozen.weight), id(module.trained.weight)])
    assert found.stages_of("frozen.weight") == (0, 1)
    assert found.stages_of("frozen.bias") == (1,)


def test_where_nothing_is_trained_all_weights_may_lie_on_several_stages() -> None:
    module = Module()
    found = homes({"trained": (0, 2)}, module, trains=False)
    found.note_touched(1, [id(module.trained.weight)])
    assert found.stages_of("trained.weight") == (0, 1, 2)
    assert found.stages_of("trained.bias") == (0, 2)


def test_trained_weights_of_others_that_code_touches_stand_in() -> None:
    module = Module()
    found = homes({"trained": (0,)}, module)
    found.note_trained(0, ["trained.weight"])
    for stage in range(3):
        found.note_touched(stage, [id(module.trained.weight), id(module.frozen.weight)])
    assert [found.stand_ins(stage) for stage in range(3)] == [set(), {"trained.weight"}, {"trained.weight"}]


def test_a_buffer_is_true_on_the_first_stage_that_calls_its_module() -> None:
    found = homes({"outer": (0, 1), "outer.0": (1, 2)}).buffers()
    assert found == {f"outer.0.{name}": 1 for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_every_weight_has_a_home() -> None:
    module = Module()
    found = homes({"frozen": (0, 2)}, module).parameters()
    assert found.keys() == dict(module.named_parameters()).keys()
    assert all(found.values())


class Tied(nn.Module):
    """Holds a parameter and a buffer under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.two.weight, self.two.running_mean = self.one.weight, self.one.running_mean


def test_every_name_of_what_is_tied_within_a_stage_has_a_home() -> None:
    found = homes({"one": (1,), "two": (0,)}, Tied())
    found.note_trained(1, ["one.weight", "one.bias"])
    found.note_trained(0, ["two.bias"])
    assert found.parameters() == {"one.weight": (1,), "one.bias": (1,), "two.weight": (1,), "two.bias": (0,)}
    buffers = found.buffers()
    assert buffers["one.running_mean"] == buffers["two.running_mean"] == 0
    assert (buffers["one.running_var"], buffers["two.running_var"]) == (1, 0)
