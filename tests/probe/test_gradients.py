"""Gradients are computed for a look at them and left nowhere, through activation checkpoints of both kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.probe.gradients import gradients


def net(use_reentrant: bool | None) -> tuple[nn.Sequential, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    x = torch.ones(3, 2, requires_grad=True)
    hidden = layers[0](x)
    out = layers[1:](hidden) if use_reentrant is None else checkpoint(layers[1:], hidden, use_reentrant=use_reentrant)
    return layers, x, [out, hidden]


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_every_input_gets_its_gradient(use_reentrant: bool | None) -> None:
    layers, x, outputs = net(use_reentrant)
    unused = torch.ones(1, requires_grad=True)
    inputs = [x, *layers.parameters(), unused]
    arriving = [torch.full_like(out, 2.0) for out in outputs]
    found = gradients(outputs, arriving, inputs)
    plain_layers, plain_x, plain_outputs = net(None)
    torch.autograd.backward(plain_outputs, arriving)
    expected = [plain_x.grad, *(parameter.grad for parameter in plain_layers.parameters())]
    assert all(map(torch.equal, found[:-1], expected))
    assert found[-1] is None


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_nothing_is_left(use_reentrant: bool | None) -> None:
    layers, x, outputs = net(use_reentrant)
    kept = layers[2].weight.grad = torch.ones(2, 2)
    gradients(outputs, [torch.ones_like(out) for out in outputs], [x, *layers.parameters()])
    assert layers[2].weight.grad is kept
    assert kept.tolist() == [[1, 1], [1, 1]]
    assert x.grad is None
    assert layers[0].weight.grad is None


def test_hooks_that_update_weights_as_gradients_come_are_not_run() -> None:
    """The probe would train."""
    layers, _, outputs = net(None)
    layers[0].weight.register_post_accumulate_grad_hook(lambda parameter: pytest.fail("ran"))
    gradients(outputs, [torch.ones_like(out) for out in outputs], list(layers.parameters()))
