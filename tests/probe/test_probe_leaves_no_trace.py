"""The probe leaves the module, the batch and the random generators as they were, whether it finds a cut or refuses."""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.randomness import get_state, same_state
from tests.helpers.probing import cut_of

WIDTH = 6


class AverageMeter:
    """A plain object, as it stands in many a training script."""

    def __init__(self) -> None:
        self.sum, self.values = 0.0, [0.0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AverageMeter) and vars(self) == vars(other)

    def update(self, value: float) -> None:
        self.sum += value
        self.values.append(value)


class Restless(nn.Module):
    """Changes whatever a module may change in a step, and draws from every generator."""

    def __init__(self, refused: bool = False) -> None:
        super().__init__()
        layers = (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([nn.Sequential(*copy.deepcopy(layers)) for _ in range(3)])
        self.register_buffer("center", torch.zeros(WIDTH))
        self.register_buffer("lazy", None)
        self.last = torch.zeros(4, WIDTH)
        self.losses: list[Tensor] = []
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.seen: dict[str, Any] = {"sizes": {0}, "nested": [[]]}
        self.collected: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.sizes: Counter[int] = Counter()
        self.meters = {"loss": AverageMeter()}
        self.steps = 0
        self.refused = refused

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"] + random.random() + np.random.rand() + torch.randn(WIDTH)
        self.seen["sizes"].add(len(x))
        self.seen["nested"][0].append(x)
        self.train()
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        self.center = 0.9 * self.center + x.detach().mean(0)
        self.lazy = x.detach().clone()
        self.last = batch["x"]
        loss = x.square().mean() + self.steps * 0
        if self.refused:
            loss = loss + sum(parameter.square().sum() for parameter in self.parameters())
        self.losses.append(loss.detach())
        self.recent.append(loss.detach())
        self.collected["losses"].append(loss.detach())
        self.sizes.update([len(x)])
        self.meters["loss"].update(float(loss.detach()))
        self.new = x
        return loss


def everything(module: nn.Module) -> dict[str, Any]:
    """Copies of all that a module holds, by where it is."""
    attributes = {
        f"{name}.{key}": copy.deepcopy(value)
        for name, each in module.named_modules()
        for key, value in each.__dict__.items()
        if key != "_modules"
    }
    grads = {name: copy.deepcopy(parameter.grad) for name, parameter in module.named_parameters()}
    return {"attributes": attributes, "grads": grads, "modules": list(module.named_modules())}


def require_equal(a: Any, b: Any) -> None:
    """Nested structures of tensors are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            require_equal(a[key], b[key])
    elif isinstance(a, (list, tuple, deque)):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for one, other in zip(a, b):
            require_equal(one, other)
    elif not isinstance(a, nn.Module):
        assert a == b


@pytest.mark.parametrize("check", ["fills", "full"])
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("p", [1, 3])
def test_everything_is_as_it_was(p: int, refused: bool, check: str) -> None:
    module = Restless(refused)
    module.blocks[1].eval()
    module.blocks[0][0].weight.grad = torch.ones(WIDTH, WIDTH)
    module.blocks[2][0].bias.requires_grad_(False)
    batch = {"x": torch.randn(4, WIDTH)}
    module.collected["losses"].append(torch.zeros(()))
    before, numbers, generators = everything(module), batch["x"].clone(), get_state()
    objects = {key: value for key, value in module.__dict__.items() if isinstance(value, (Tensor, list, dict, deque))}
    if refused and p > 1:
        with pytest.raises(CutError, match="get a gradient on stage 0 gets one on another"):
            cut_of(module, (batch,), p, check=check)
    else:
        cut_of(module, (batch,), p, check=check)
    assert same_state(generators, get_state())
    require_equal(before, everything(module))
    assert all(module.__dict__[key] is value for key, value in objects.items())
    assert torch.equal(batch["x"], numbers)


@pytest.mark.parametrize("p", [1, 3])
def test_no_hook_and_no_stub_is_left(p: int) -> None:
    module = Restless()
    cut_of(module, ({"x": torch.randn(4, WIDTH)},), p)
    for each in module.modules():
        assert not {"forward", "_compiled_call_impl"} & each.__dict__.keys() - {"_compiled_call_impl"}
        assert not each._forward_hooks
        assert not each._forward_pre_hooks


def test_a_step_that_binds_an_attribute_to_the_batch_does_not_have_it_overwritten() -> None:
    """A step before left a tensor of the batch's shape on the attribute; putting that back must not write into x."""
    module, x = Restless(), torch.randn(4, WIDTH)
    module.last = torch.full((4, WIDTH), 7.0)
    numbers = x.clone()
    cut_of(module, ({"x": x},), 2)
    assert torch.equal(x, numbers)
    assert module.last.tolist() == [[7.0] * WIDTH] * 4
