"""Both halves of a backward give what a whole one gives, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.stage.halves import backward_in_halves

WIDTH = 6


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Net(nn.Module):
    """Parts of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.embedding = nn.Embedding(7, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.scale = nn.Parameter(torch.rand(WIDTH))


Step = Callable[[Net, Tensor, Tensor], list[Tensor]]


def chain(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    return [net.b(torch.relu(net.norm(net.a(x)))) + x]


def shared(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """A layer three times, and its weight alone."""
    return [net.a(torch.tanh(net.a(net.b(net.a(x))))) @ net.a.weight.T]


def several(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """Outputs from one input, from both, and one input itself."""
    return [net.a(x), net.b(torch.cat([x, z]))[: len(x)], z]


def weights_alone(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """An output that depends on nothing that was received; its weights lead to the other, too."""
    positions = net.embedding(torch.arange(len(x)) % 7)
    return [positions @ net.a.weight, net.b(x + positions), net.c(positions)]


def views(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """Parts of one tensor, one of them twice."""
    first, second = net.a(x).chunk(2, dim=-1)
    return [first, second.t(), first]


def blocks(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    out, _ = net.attention(x[None], x[None], x[None])
    return [net.lstm(out)[0][0] * net.scale]


def recomputed(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    return [net.c(checkpoint(lambda x: net.b(torch.tanh(net.a(x))), x, use_reentrant=False))]


def in_python(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    return [net.b(Squares.apply(net.a(x), net.scale))]


def reentrant(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    return [net.c(checkpoint(lambda x: net.b(torch.tanh(net.a(x))), x, use_reentrant=True))]


def hooked(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """Hooks of users that change gradients; on the way, of a weight, and of a node."""
    h = net.a(x)
    h.register_hook(lambda gradient: gradient * 0.5)
    h.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3,))
    net.b.weight.register_hook(lambda gradient: gradient * 2)
    return [net.b(torch.tanh(h))]


def unused(net: Net, x: Tensor, z: Tensor) -> list[Tensor]:
    """One input leads nowhere, and one layer has no gradient to make."""
    net.b.requires_grad_(False)
    return [net.b(net.a(x).detach()) + net.c(x)]


STEPS = [chain, shared, several, weights_alone, views, blocks, recomputed, in_python, reentrant, hooked, unused]


def gradients(step: Step, run: Callable[..., Any], times: int = 2) -> dict[str, Tensor | None]:
    """Of the weights and of what was received, after several backwards."""
    net = Net()
    found: dict[str, Tensor | None] = {}
    for number in range(times):
        generator = torch.Generator().manual_seed(number)
        x, z = (torch.randn(5, WIDTH, generator=generator).requires_grad_() for _ in range(2))
        outputs = step(net, x, z)
        run(outputs, [torch.randn(out.shape, generator=generator) for out in outputs], [x, z], found)
        found |= {f"x{number}": x.grad, f"z{number}": z.grad}
    return found | {name: parameter.grad for name, parameter in net.named_parameters()}


def whole(outputs: Any, grads: Any, received: Any, _: Any) -> None:
    torch.autograd.backward(outputs, grads)


def halves(outputs: Any, grads: Any, received: Any, found: dict[str, Any]) -> None:
    backward_in_halves(list(zip(outputs, grads)), received)()


@pytest.mark.parametrize("step", STEPS)
def test_both_halves_give_what_a_whole_backward_gives(step: Step) -> None:
    expected, found = gradients(step, whole), gradients(step, halves)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], gradient), name


def test_the_first_half_makes_no_gradient_of_a_weight() -> None:
    net = Net()
    x = torch.randn(5, WIDTH, requires_grad=True)
    out = chain(net, x, x)
    later = backward_in_halves([(out[0], torch.ones_like(out[0]))], [x])
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in net.parameters())
    del out
    later()
    assert all(each.grad is not None for part in (net.a, net.b, net.norm) for each in part.parameters())


def test_each_product_is_made_once() -> None:
    """Of three layers, three products for the inputs and three for the weights."""

    def products(run: Callable[[], object]) -> int:
        with torch.profiler.profile() as profile:
            run()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")

    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    x = torch.randn(5, WIDTH, requires_grad=True)
    out = net(x)
    later: list[Callable[[], None]] = []
    assert products(lambda: later.append(backward_in_halves([(out, torch.ones_like(out))], [x]))) == 3
    assert products(later[0]) == 3


def test_the_first_stage_has_received_nothing() -> None:
    net = Net()
    out = net.a(torch.randn(5, WIDTH))
    later = backward_in_halves([(out, torch.ones_like(out))], [])
    assert net.a.weight.grad is None
    later()
    assert net.a.weight.grad is not None
