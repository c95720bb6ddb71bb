"""Weights of other stages leave the module, and come back from where they were."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import AbsentWeightError
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.stage.weights import (
    fill,
    held_by,
    keep_only,
    make_room,
    room_for_all,
    standing_in,
    unfreeze_stand_ins,
)


class Module(nn.Module):
    """Two stages: `first` and `second`; a frozen table on both; one weight under two names; a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.table = nn.Embedding(3, 2).requires_grad_(False)
        self.twin = nn.Linear(2, 2, bias=False)
        self.twin.weight = self.first.weight
        self.touched = nn.Parameter(torch.randn(2))


CUT = Cut(
    starts=("second",),
    steps={},
    homes={
        "first.weight": (0,),
        "first.bias": (0,),
        "second.weight": (1,),
        "second.bias": (1,),
        "table.weight": (0, 1),
        "touched": (1,),
    },
    buffer_homes={"second.running_mean": 1, "second.running_var": 1, "second.num_batches_tracked": 0},
    stand_ins=(frozenset({"touched"}), frozenset()),
)


def numbers(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def absent(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if isinstance(parameter, AbsentParameter)}


@pytest.mark.parametrize(
    ("stage", "missing"), [(0, {"second.weight", "second.bias"}), (1, {"first.weight", "first.bias", "twin.weight"})]
)
def test_a_stage_keeps_its_own_weights(stage: int, missing: set[str]) -> None:
    module = Module()
    kept = {name: p for name, p in module.named_parameters(remove_duplicate=False) if name not in missing}
    keep_only(module, CUT, stage)
    assert absent(module) == missing
    assert all(p is kept[n] for n, p in module.named_parameters(remove_duplicate=False) if n in kept)


def test_absent_weights_say_where_they_are() -> None:
    module = Module()
    keep_only(module, CUT, 1)
    assert module.twin.weight is module.first.weight
    with pytest.raises(AbsentWeightError, match=r"stage 1 used the parameter 'first\.weight'.*live on stage 0"):
        module.twin(torch.ones(1, 2))


def test_a_stand_in_keeps_its_numbers_and_is_not_trained() -> None:
    module = Module()
    before = module.touched.detach().clone()
    keep_only(module, CUT, 0)
    assert torch.equal(module.touched, before)
    assert not module.touched.requires_grad
    unfreeze_stand_ins(module, CUT, 0)
    assert module.touched.requires_grad


def test_the_memory_of_other_stages_weights_is_free() -> None:
    module = Module()
    dropped = weakref.ref(module.first.weight)
    storage = weakref.ref(module.first.weight.untyped_storage())
    keep_only(module, CUT, 1)
    gc.collect()
    assert dropped() is None
    assert storage() is None


def test_weights_come_back_to_where_they_were() -> None:
    whole = Module()
    before = numbers(whole)
    stages = []
    for stage in range(2):
        module = Module()
        module.load_state_dict(before)
        keep_only(module, CUT, stage)
        stages.append(module)
    parts = [held_by(module, CUT, stage) for stage, module in enumerate(stages)]
    last = stages[1]
    make_room(last)
    assert not absent(last)
    assert last.twin.weight is last.first.weight
    for part in parts:
        fill(last, part)
    after = numbers(last)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in last.parameters()] == [p.requires_grad for p in whole.parameters()]


def test_other_numbers_stand_in_for_a_while() -> None:
    """Of absent weights, under all their names, and of buffers; the module's own are there again afterwards."""
    module = Module()
    keep_only(module, CUT, 1)
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    given = {"first.weight": torch.ones(2, 2), "second.running_mean": torch.ones(2), "gone": torch.ones(1)}
    with standing_in(module, given):
        assert absent(module) == {"first.bias"}
        state = module.state_dict()
    assert state["first.weight"].tolist() == state["twin.weight"].tolist() == [[1, 1], [1, 1]]
    assert state["second.running_mean"].tolist() == [1, 1]
    assert absent(module) == {"first.weight", "first.bias", "twin.weight"}
    again = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    assert all(now is before for (_, now), (_, before) in zip(again, own, strict=True))


def test_numbers_of_all_can_be_loaded_where_some_are_absent() -> None:
    module = Module().to(torch.float64)
    keep_only(module, CUT, 1)
    before = module.first.weight
    with room_for_all(module):
        assert (module.first.weight.shape, module.first.weight.dtype) == ((2, 2), torch.float64)
        module.load_state_dict({name: torch.ones_like(each) for name, each in Module().state_dict().items()})
    assert module.first.weight is before
    assert module.second.weight.tolist() == [1, 1]


def test_everything_is_held_by_one_stage() -> None:
    """What lies on several, by the first."""
    module = Module()
    parts = [set(held_by(module, CUT, stage)) for stage in range(2)]
    assert parts[0] == {"first.weight", "first.bias", "table.weight", "second.num_batches_tracked"}
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert parts[0] | parts[1] == names
    assert not parts[0] & parts[1]


def test_what_is_held_is_a_copy() -> None:
    """A weight is a view into a buffer of all weights: sent as it is, it would take the whole buffer along."""
    module = Module()
    versions = Versions(module.named_parameters())
    versions.use(0)
    versions.advance()
    held = held_by(module, CUT, 0)["first.weight"]
    assert module.first.weight.untyped_storage().nbytes() > 1024
    assert held.untyped_storage().nbytes() == 16
    assert len(pickle.dumps(held)) < 1024
    assert not held.requires_grad
    with torch.no_grad():
        module.first.weight.zero_()
    assert held.abs().sum() > 0


def test_room_is_made_with_the_looks_of_the_absent() -> None:
    module = Module().to(torch.float64)
    module.second.bias.requires_grad_(False)
    keep_only(module, CUT, 0)
    make_room(module)
    assert not absent(module)
    assert module.second.bias.dtype == torch.float64
    assert (module.second.weight.requires_grad, module.second.bias.requires_grad) == (True, False)


def test_filling_hides_from_autograd() -> None:
    module = Module()
    fill(module, {"first.weight": torch.ones(2, 2), "second.running_mean": torch.ones(2)})
    assert module.first.weight.is_leaf
    assert module.twin.weight.tolist() == [[1, 1], [1, 1]]
    assert module.second.running_mean.tolist() == [1, 1]


def test_what_users_hung_on_a_weight_stays_with_it() -> None:
    module = Module()
    module.second.bias.no_decay = True
    keep_only(module, CUT, 0)
    assert module.second.bias.no_decay
    keep_only(module, CUT, 0)
    make_room(module)
    assert vars(module.second.bias) == {"no_decay": True}
