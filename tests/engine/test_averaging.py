"""Gradients are summed while the backward runs, in one order everywhere; what nobody has stays away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.engine import averaging
from lightning_cpipe.engine.averaging import Averaging
from lightning_cpipe.errors import CPipeError

LAYERS = 3


class Counterpart:
    """Stands for one other pipeline, whose gradients are ones wherever it has any.

    Attributes:
        begun: for each sum that began, how many gradients had been made by then.
    """

    def __init__(self, layers: nn.Sequential, has: bool = True) -> None:
        self.layers = layers
        self.has = has
        self.begun: list[int] = []

    def start_sum(self, flat: Tensor) -> Callable[[], None]:
        self.begun.append(sum(each.grad is not None for each in self.layers.parameters()))

        def wait() -> None:
            flat.add_(float(self.has))

        return wait


def chain() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(LAYERS)))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket for each parameter."""
    monkeypatch.setattr(averaging, "FIRST_BUCKET", 1)
    monkeypatch.setattr(averaging, "BUCKET", 1)


def update(average: Averaging, *losses: Tensor) -> None:
    """One update, with these as the losses of its micro-batches."""
    average.begin(len(losses))
    for loss in losses:
        loss.backward()
    average.finish()


def attached(layers: nn.Sequential, other: Counterpart, late: list[nn.Parameter] | None = None) -> Averaging:
    average = Averaging(reversed(list(layers.parameters())), late or [], other.start_sum, 2)
    average.attach()
    return average


@pytest.mark.usefixtures("small_buckets")
def test_sums_begin_while_the_backward_runs_from_the_second_update_on() -> None:
    layers, x = chain(), torch.ones(1, 2)
    other = Counterpart(layers)
    average = attached(layers, other)
    expected = [(each.grad + 1) / 2 for each in _with_gradients(layers, x)]
    for _ in range(2):
        layers.zero_grad()
        update(average, layers(x).sum())
        for each, gradient in zip(layers.parameters(), expected):
            assert torch.equal(each.grad, gradient)
    assert other.begun == [3, 3, 3, 1, 2, 3]
    average.detach()
    layers.zero_grad()
    layers(x).sum().backward()
    assert len(other.begun) == 6


@pytest.mark.usefixtures("small_buckets")
def test_with_several_backwards_sums_begin_in_the_last_one() -> None:
    layers, x = chain(), torch.ones(1, 2)
    other = Counterpart(layers)
    average = attached(layers, other)
    for _ in range(2):
        layers.zero_grad()
        update(average, layers(x).sum(), layers(2 * x).sum())
    whole = layers(3 * x).sum()
    found = [each.grad.clone() for each in layers.parameters()]
    layers.zero_grad()
    whole.backward()
    for gradient, each in zip(found, layers.parameters()):
        assert torch.allclose(gradient, (each.grad + 1) / 2)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("has", [True, False])
def test_a_gradient_that_is_not_here_is_taken_from_others_if_they_have_it(has: bool) -> None:
    layers, x = chain(), torch.ones(1, 2)
    average = attached(layers, Counterpart(layers, has))
    for _ in range(2):
        layers.zero_grad()
        # The last layer is left out.
        update(average, layers[:-1](x).sum())
        left_out = layers[-1].weight.grad
        assert (left_out is None) == (not has)
        assert left_out is None or torch.equal(left_out, torch.full((2, 2), 0.5))


@pytest.mark.usefixtures("small_buckets")
def test_what_is_added_to_after_the_backward_is_summed_last() -> None:
    layers, x = chain(), torch.ones(1, 2)
    other = Counterpart(layers)
    late = layers[-1].weight
    average = attached(layers, other, [late])
    for _ in range(2):
        layers.zero_grad()
        average.begin(1)
        layers(x).sum().backward()
        made = late.grad.clone()
        late.grad.add_(10)
        average.finish()
        assert torch.equal(late.grad, (made + 10 + 1) / 2)
    assert other.begun == [3, 3, 3, 2, 3, 3]


@pytest.mark.usefixtures("small_buckets")
def test_a_second_gradient_after_the_sum_began_is_an_error() -> None:
    layers, x = chain(), torch.ones(1, 2)
    average = attached(layers, Counterpart(layers))
    update(average, layers(x).sum())
    average.begin(1)
    layers(x).sum().backward()
    with pytest.raises(CPipeError, match="more often than the first one did"):
        layers(x).sum().backward()


def _with_gradients(layers: nn.Sequential, x: Tensor) -> list[nn.Parameter]:
    layers.zero_grad()
    layers(x).sum().backward()
    return list(layers.parameters())


def test_the_first_bucket_is_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of_one = 2 * 2 * 4
    monkeypatch.setattr(averaging, "FIRST_BUCKET", bytes_of_one)
    monkeypatch.setattr(averaging, "BUCKET", 3 * bytes_of_one)
    layers = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(6)))
    other = Counterpart(layers)
    average = attached(layers, other)
    for _ in range(2):
        other.begun.clear()
        layers.zero_grad()
        update(average, layers(torch.ones(1, 2)).sum())
    assert other.begun == [1, 4, 6]
