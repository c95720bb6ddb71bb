"""What is built in parts has, to the bit, the numbers of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lightning_cpipe.errors import LostNumbersError
from lightning_cpipe.stage.building import Built, building
from lightning_cpipe.stage.randomness import get_state, same_state
from tests.helpers.memory import forget_peak, peak, resident
from tests.helpers.probing import CPU
from tests.helpers.ranks import run_ranks


class Various(nn.Module):
    """Initialised in all the ways that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 30)
        self.embedding = nn.Embedding(50, 8, padding_idx=3)
        self.conv = nn.Conv2d(3, 5, 3)
        self.lstm = nn.LSTM(6, 7)
        self.attention = nn.MultiheadAttention(8, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(20, 20))
        self.drawn = nn.Parameter(torch.randn(70, 3))
        self.bare = nn.Parameter(torch.empty(9, 9))
        self.register_buffer("mask", torch.rand(5))
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        nn.init.orthogonal_(self.conv.weight)
        nn.init.trunc_normal_(self.linear.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.xavier_normal_(self.bare)
        nn.init.normal_(self.bare[:, 2])
        nn.init.sparse_(self.embedding.weight, 0.1)
        self.bare.data.bernoulli_(0.3)
        self.bare.data.exponential_()
        self.drawn.data = torch.rand(70, 3)
        self.tied = nn.Linear(30, 40, bias=False)
        self.tied.weight = nn.Parameter(torch.randn(40, 30))
        self.also_tied = nn.Linear(30, 40, bias=False)
        self.also_tied.weight = self.tied.weight


def layers() -> nn.Module:
    """Copies of a layer that is not among them."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)


def copies() -> nn.Module:
    """Copies of the first one."""
    first = nn.Linear(5, 5)
    return nn.Sequential(first, copy.deepcopy(first), nn.Linear(5, 2))


def on_meta() -> nn.Module:
    """As a module is built that is to be filled in by somebody else."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2, device="meta"))


def built(make: Callable[[], nn.Module], keeps: Callable[[int], bool]) -> tuple[nn.Module, Built]:
    torch.manual_seed(5)
    with building(keeps, CPU) as found:
        return make(), found


def plain(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make()


def is_hollow(parameter: nn.Parameter) -> bool:
    return parameter.untyped_storage().nbytes() == parameter.element_size() < parameter.nbytes


def order(make: Callable[[], nn.Module]) -> list[str | None]:
    """The names in the order of their places."""
    empty, found = built(make, lambda place: False)
    names = {id(parameter): name for name, parameter in empty.named_parameters()}
    return [names.get(id(parameter)) for parameter in found.parameters]


@pytest.mark.parametrize("make", [Various, layers, copies])
def test_what_is_not_kept_has_no_memory_and_all_else_is_as_ever(make: Callable[[], nn.Module]) -> None:
    whole = plain(make)
    state = get_state()
    empty, _ = built(make, lambda place: False)
    assert same_state(get_state(), state)
    assert all(map(is_hollow, empty.parameters()))
    described = [[(n, p.shape, p.dtype, p.device) for n, p in m.named_parameters()] for m in (empty, whole)]
    assert described[0] == described[1]
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in empty.named_buffers())
    assert set(order(make)) >= {name for name, _ in whole.named_parameters()}


@pytest.mark.parametrize("make", [Various, layers])
def test_what_is_kept_has_the_numbers_of_the_whole(make: Callable[[], nn.Module]) -> None:
    numbers = dict(plain(make).named_parameters())
    names = order(make)
    for name in numbers:
        part, _ = built(make, lambda place, name=name: names[place] in (None, name))
        own = {n: p for n, p in part.named_parameters() if not is_hollow(p)}
        assert own.keys() == {name}
        assert torch.equal(own[name], numbers[name]), name


def test_what_is_built_on_the_meta_device_is_built_for_real() -> None:
    def for_real() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))

    numbers = plain(for_real).state_dict()
    part, _ = built(on_meta, lambda place: place < 2)
    assert torch.equal(part[0].weight, numbers["0.weight"])
    assert is_hollow(part[1].weight)


def test_a_copy_is_known_by_what_it_was_copied_from() -> None:
    empty, found = built(copies, lambda place: False)
    where = {id(parameter): place for place, parameter in enumerate(found.parameters)}
    sources = {name: found.copied_from.get(where[id(p)]) for name, p in empty.named_parameters()}
    assert sources["1.weight"] == where[id(empty[0].weight)]
    assert sources["2.weight"] is None


def test_a_parameter_that_is_tied_stays_so() -> None:
    empty, _ = built(Various, lambda place: False)
    assert empty.tied.weight is empty.also_tied.weight


class Scaled(nn.Module):
    """The second weight is made from the first, with none or one between them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8))
        if between:
            self.between = nn.Parameter(torch.randn(8, 8))
        self.second = nn.Parameter(torch.empty(8, 8))
        with torch.no_grad():
            self.second.copy_(2 * self.first)


def test_numbers_that_are_gone_are_not_read() -> None:
    part, _ = built(lambda: Scaled(between=False), lambda place: place == 1)
    assert torch.equal(part.second, plain(lambda: Scaled(between=False)).second)
    with pytest.raises(LostNumbersError, match=r"reads, in aten.mul.Tensor"):
        built(lambda: Scaled(between=True), lambda place: place == 2)


class MadeFromASmallOne(nn.Module):
    """The large weight makes room for the small one's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(64, 64))
        self.first = nn.Parameter(torch.randn(8, 8))
        self.between = nn.Parameter(torch.randn(8, 8))
        self.second = nn.Parameter(torch.empty(8, 8))
        with torch.no_grad():
            self.second.copy_(2 * self.first)


@pytest.mark.parametrize("kept", [{0}, {3}, {0, 3}])
def test_what_can_be_read_does_not_depend_on_what_is_kept(kept: set[int]) -> None:
    built(MadeFromASmallOne, lambda place: False)
    _, found = built(MadeFromASmallOne, kept.__contains__)
    numbers = [*plain(MadeFromASmallOne).parameters()]
    assert all(torch.equal(found.parameters[place], numbers[place]) for place in kept)


MB = 2**20


def chain(width: int) -> nn.Module:
    chain = nn.Sequential(*(nn.Linear(width, width) for _ in range(24)))
    for layer in chain:
        nn.init.normal_(layer.weight)
    return chain


def peak_of_building(rank: int) -> tuple[int, int]:
    """Bytes above the start: at most, and at the end."""
    # The code that runs takes memory, too.
    built(partial(chain, 50), lambda place: False)
    start = forget_peak()
    kept, _ = built(partial(chain, 1024), (10, 11, 20, 21).__contains__)
    assert sum(not is_hollow(parameter) for parameter in kept.parameters()) == 4
    return peak() - start, resident() - start


def test_memory_is_that_of_what_is_kept_and_of_one_parameter_more() -> None:
    ((most, left),) = run_ranks(peak_of_building, 1)
    # Of 160 MB, 8 are kept. The rest is what torch and the system take at their own times.
    assert 8 * MB < most < 20 * MB
    assert 7 * MB < left < 16 * MB


def test_numbers_that_somebody_else_holds_stay() -> None:
    mine = torch.randn(100, 100)
    expected = mine.clone()

    def make() -> nn.Module:
        module = nn.Linear(100, 100)
        module.other = nn.Parameter(mine)
        module.last = nn.Parameter(torch.randn(100, 100))
        return module

    built(make, lambda place: False)
    assert torch.equal(mine, expected)


def test_torch_is_as_before() -> None:
    before = nn.Parameter.__deepcopy__
    built(Various, lambda place: False)
    assert nn.Parameter.__deepcopy__ is before
    assert not is_hollow(nn.Linear(2, 2).weight)
