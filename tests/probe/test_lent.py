"""Lent weights let everything be seen that own ones would show, and take next to no memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cpipe.probe.lent import lent_weights
from lightning_cpipe.stage.weights import standing_in
from tests.helpers.probing import CPU

NAMES = ("0.weight", "0.bias", "3.weight")


def chain(depth: int = 40, width: int = 64) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_they_stand_in_where_they_are_asked_for() -> None:
    root = chain(4)
    root[0].weight.requires_grad_(False)
    root[3].weight.kind = "mine"
    own = dict(root.named_parameters())
    lent = lent_weights(root, NAMES, CPU)
    assert lent.keys() == set(NAMES)
    with standing_in(root, lent):
        now = dict(root.named_parameters())
        assert {name for name in own if now[name] is not own[name]} == set(NAMES)
        for name, parameter in lent.items():
            assert now[name] is parameter
            assert (parameter.shape, parameter.dtype) == (own[name].shape, own[name].dtype)
            assert parameter.requires_grad == own[name].requires_grad
        assert root[3].weight.kind == "mine"
    assert all(now is own[name] for name, now in root.named_parameters())


def test_a_tied_weight_is_lent_once() -> None:
    root = chain(3)
    root[2].weight = root[0].weight
    with standing_in(root, lent_weights(root, NAMES, CPU)):
        assert root[2].weight is root[0].weight


def test_all_of_them_take_the_memory_of_the_largest() -> None:
    root = chain()
    lent = lent_weights(root, dict(root.named_parameters()), CPU)
    storages = {id(parameter.untyped_storage()): parameter.untyped_storage() for parameter in lent.values()}
    assert sum(storage.nbytes() for storage in storages.values()) < 4 * root[0].weight.nbytes
    assert len({parameter.data_ptr() for parameter in lent.values()}) == len(lent)


def test_their_gradients_take_none() -> None:
    root = chain(3)
    with standing_in(root, lent_weights(root, dict(root.named_parameters()), CPU)):
        weights = [*root.parameters()]
        loss = root[1](root[0](torch.ones(2, 64))).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True] * 4 + [False] * 2
    assert all(each.untyped_storage().nbytes() == 4 for each in gradients if each is not None)


@pytest.mark.parametrize("width", [16, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_through_many_layers_neither_vanishes_nor_explodes(width: int, dtype: torch.dtype) -> None:
    root = chain(40, width).to(dtype)
    x = torch.randn(8, width, dtype=dtype)
    with standing_in(root, lent_weights(root, dict(root.named_parameters()), CPU)), torch.no_grad():
        made, other = root(x), root(-x)
    assert bool(made.isfinite().all())
    assert 1e-3 < float(made.float().std()) < 1e12
    assert not torch.equal(made, other)


def test_whole_numbers_are_lent_too() -> None:
    root = nn.Module()
    root.table = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
    assert lent_weights(root, ("table",), CPU)["table"].shape == (2, 3)
