"""However a module keeps its weights between forward and backward, its gradients are those of the version it must use.

The rows of the plan are run as the engine runs them: forwards ahead, and updates between a forward and its backward.
Each gradient is compared, to the bit, with that of a module frozen at the version that the forward used. Where older
versions are not kept, that module is given the newest weights before its backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.equality import same_bits
from lightning_cpipe.errors import WeightWrittenError
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import LATEST, TWO_BUFFERED, VERTICAL
from lightning_cpipe.stage.versions import Version, Versions

WIDTH = 6
BATCHES = 7


class Tied(nn.Module):
    """One parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3), nn.BatchNorm2d(1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None, :, None].expand(-1, -1, -1, WIDTH)).mean((1, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[None].expand(3, -1, -1))[0][-1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


class OnContext(torch.autograd.Function):
    """A product that keeps the weight on `ctx`, where autograd does not know of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient @ ctx.weight, gradient.t() @ ctx.x


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return OnContext.apply(x, self.weight) + self.bias


class Checkpointed(nn.Module):
    """Reads its weights again in the backward, and draws the same dropout."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=self.use_reentrant)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def compiled() -> nn.Module:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        pytest.skip("torch.compile is switched off by TORCHDYNAMO_DISABLE")
    block = nn.Sequential(linear(), nn.LayerNorm(WIDTH), nn.Tanh(), linear())
    module = torch.compile(block, backend="aot_eager")
    try:
        module(torch.zeros(2, WIDTH))
    except Exception as error:
        pytest.skip(f"torch.compile does not work on this machine: {type(error).__name__}: {error}")
    return module


WAYS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "tied": Tied,
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "convolution_and_batch_norm": Convolutions,
    "lstm": Recurrent,
    "attention": Attention,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "custom_function": lambda: Custom(WIDTH, WIDTH),
    "reentrant_checkpoint": lambda: Checkpointed(use_reentrant=True),
    "checkpoint": lambda: Checkpointed(use_reentrant=False),
    "compiled": compiled,
}
if hasattr(nn.utils, "weight_norm"):
    WAYS["weight_norm_by_hook"] = lambda: nn.utils.weight_norm(linear())

NOT_SAVED_AS_NUMBERS = ["layer_norm", "custom_function", "reentrant_checkpoint", "checkpoint"]
"""The ways that read the parameter object in the backward."""


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.3, momentum=0.9)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.1)


def net_with(way: str) -> nn.Module:
    """The way, and a layer on each side of it: their gradients depend on its weights, and its own on theirs."""
    torch.manual_seed(3)
    head = nn.Linear(Convolutions()(torch.zeros(2, WIDTH)).shape[1], 3) if way.startswith("conv") else None
    return nn.Sequential(linear(), WAYS[way](), nn.Tanh(), head or nn.Linear(WIDTH, 3))


class Pass:
    """One mini-batch through a module, from the same random numbers each time."""

    def __init__(self, module: nn.Module, number: int) -> None:
        torch.manual_seed(number)
        self.module = module
        self.x = torch.randn(4, WIDTH, requires_grad=True)
        self.loss = module(self.x).square().mean()

    def backward(self) -> list[Tensor]:
        """The gradients, of the input too."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.loss.backward()
        return [self.x.grad, *(parameter.grad.clone() for parameter in self.module.parameters())]


class Stage:
    """One stage of a pipeline.

    Args:
        module: its part.
        lag: how far its forwards run ahead.
        stage: which.
        make_optimizer: of its parameters.
        points: whether a backward points the parameters at its version; if not, it sees the newest.
        copies: whether an update makes room first; if not, it is in place.
        schedule: the plan.
    """

    def __init__(
        self,
        module: nn.Module,
        lag: int,
        make_optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        *,
        points: bool = True,
        copies: bool = True,
        schedule: Continuous | None = None,
        stage: int = 0,
    ) -> None:
        self.module = module
        self.schedule = schedule or Continuous()
        self.place = stage, stage + lag + 1
        self.optimizer = make_optimizer(module.parameters())
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.versions = Versions(trained, self.schedule.versions.keeps)
        self.used: dict[int, int] = {}
        self.alive: list[int] = []
        self.in_flight: dict[int, tuple[Pass, Pass | None]] = {}
        self._points = points
        self._copies = copies

    def run(self, batches: int = BATCHES, twin: Callable[[], nn.Module] | None = None) -> Iterator[tuple[Any, Any]]:
        """For each backward, its gradients, and those of a twin frozen at what the forward used."""
        self.batches = batches
        for row in self.schedule.rows(*self.place, batches):
            for action in row:
                if action.kind is Kind.FORWARD:
                    self.forward(action.batch, twin)
                elif action.kind is Kind.BACKWARD:
                    yield self.backward(action.batch)
                else:
                    self.update()
                self.alive.append(self.versions.alive)

    def forward(self, number: int, twin: Callable[[], nn.Module] | None) -> None:
        chosen = self.schedule.version(*self.place, number) if self.schedule.versions.of_first_stage else None
        self.versions.use(number, chosen)
        self.used[number] = self.versions.number_of(number)
        self.forwarded = number
        with self.versions.of(number):
            frozen = None
            if twin is not None:
                module = twin()
                module.load_state_dict(self.module.state_dict())
                frozen = Pass(module, number)
            self.in_flight[number] = Pass(self.module, number), frozen

    def backward(self, number: int) -> tuple[Any, Any]:
        work, frozen = self.in_flight.pop(number)
        with self.versions.of(number) if self._points else nullcontext():
            gradients = work.backward()
        self.versions.release(number)
        if frozen is None:
            return gradients, None
        if not self.schedule.versions.keeps:
            for old, newest in zip(frozen.module.parameters(), self.module.parameters()):
                old.data.copy_(newest.data)
        return gradients, frozen.backward()

    def update(self) -> None:
        if self._copies:
            coming = self.forwarded + 1
            self.versions.advance(self.schedule.version(*self.place, coming) if coming < self.batches else None)
        with self.versions.updating():
            self.optimizer.step()


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_forward_s_version(way: str, lag: int, make_optimizer: Any) -> None:
    stage = Stage(net_with(way), lag, make_optimizer)
    compared = [same_bits(found, frozen) for found, frozen in stage.run(twin=lambda: net_with(way))]
    assert compared == [True] * BATCHES


@pytest.mark.parametrize(("lag", "stage"), [(1, 0), (1, 2), (0, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_version_that_the_first_stage_chose(way: str, lag: int, stage: int) -> None:
    made = Stage(net_with(way), lag, schedule=Continuous(versions=VERTICAL), stage=stage)
    compared = [same_bits(found, frozen) for found, frozen in made.run(twin=lambda: net_with(way))]
    assert compared == [True] * BATCHES


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_without_copies_a_backward_reads_the_newest_weights_in_every_way(
    way: str, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the module computed from them in the forward is what it was, as in the twin."""
    monkeypatch.setattr(Version, "flat_like", lambda parameters: pytest.fail("memory was allocated"))
    stage = Stage(net_with(way), lag, schedule=Continuous(versions=LATEST))
    places = [p.data_ptr() for p in stage.module.parameters()]
    for found, newest in stage.run(twin=lambda: net_with(way)):
        assert same_bits(found, newest)
        assert [p.data_ptr() for p in stage.module.parameters()] == places
    assert set(stage.alive) == {1}


def test_the_gradient_without_copies_mixes_two_versions() -> None:
    """In numbers: dL/dx = g w_new, and dL/dw = g x of the forward."""
    weight = nn.Parameter(torch.tensor([[2.0]]))
    versions = Versions([("weight", weight)], keeps=False)
    x = torch.tensor([[3.0]], requires_grad=True)
    versions.use(0)
    with versions.of(0):
        y = nn.functional.linear(x, weight)
    versions.advance()
    with versions.updating(), torch.no_grad():
        weight.fill_(10)
    with versions.of(0):
        y.backward(torch.tensor([[7.0]]))
    assert (x.grad.item(), weight.grad.item()) == (70, 21)


def test_without_copies_an_optimizer_that_binds_other_memory_still_changes_what_the_backward_reads() -> None:
    weight = nn.Parameter(torch.ones(3))
    place = weight.data_ptr()
    versions = Versions([("weight", weight)], keeps=False)
    versions.use(0)
    loss = (weight * weight).sum()
    versions.advance()
    with versions.updating():
        weight.data = weight.data + 4
    assert weight.data_ptr() == place
    with versions.of(0):
        loss.backward()
    assert weight.grad.tolist() == [10, 10, 10]


def test_without_copies_a_hook_may_write_into_weights_that_are_in_use() -> None:
    weight = nn.Parameter(torch.ones(3))
    versions = Versions([("weight", weight)], keeps=False)
    versions.use(0)
    loss = (weight * weight).sum()
    with torch.no_grad():
        weight.mul_(3)
    with versions.of(0):
        loss.backward()
    assert weight.grad.tolist() == [6, 6, 6]


@pytest.mark.parametrize("way", WAYS)
def test_updates_in_place_give_other_gradients(way: str) -> None:
    """Else the test above would say nothing."""
    stage = Stage(net_with(way), 1, copies=False)
    compared = [same_bits(found, frozen) for found, frozen in stage.run(twin=lambda: net_with(way))]
    # No update is before the first backward.
    assert compared == [True] + [False] * (BATCHES - 1)


@pytest.mark.parametrize("way", NOT_SAVED_AS_NUMBERS)
def test_a_backward_at_the_newest_weights_gives_other_gradients(way: str) -> None:
    """Copies alone do not help a module that reads the parameter object again."""
    stage = Stage(net_with(way), 1, points=False)
    compared = [same_bits(found, frozen) for found, frozen in stage.run(twin=lambda: net_with(way))]
    assert compared == [True] + [False] * (BATCHES - 1)


@pytest.mark.parametrize(
    "schedule",
    [
        Continuous(),
        Continuous(extra_in_flight=1),
        Continuous(accumulate=2),
        Continuous(accumulate=3, epoch_length=5),
        Continuous(extra_in_flight=1, accumulate=4, epoch_length=6),
        Continuous(versions=LATEST),
        Continuous(versions=VERTICAL),
        Continuous(versions=VERTICAL, accumulate=3, epoch_length=5),
        Continuous(versions=TWO_BUFFERED, accumulate=5),
        Continuous(versions=TWO_BUFFERED, accumulate=3, epoch_length=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("lag", "stage"), [(0, 0), (1, 0), (3, 0), (0, 3), (2, 2)])
def test_the_plan_says_which_versions_are_used_and_how_many_are_alive(
    lag: int, stage: int, schedule: Continuous
) -> None:
    batches = 32
    made = Stage(nn.Linear(WIDTH, 3), lag, schedule=schedule, stage=stage)
    for _ in made.run(batches):
        pass
    assert made.used == {batch: schedule.version(*made.place, batch) for batch in range(batches)}
    assert max(made.alive) == schedule.live_versions(*made.place)


@pytest.mark.parametrize("lag", [1, 3])
def test_memory_is_recycled(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Version] = []
    allocate = Version.flat_like
    monkeypatch.setattr(Version, "flat_like", lambda parameters: made.append(allocate(parameters)) or made[-1])
    stage = Stage(net_with("linear"), lag)
    versions = lag + 1
    weight = stage.module[0].weight
    places = [(weight.data_ptr(), len(made)) for _ in stage.run(6 * versions)][versions:-versions]
    # Once the memory that the weights came with is free, as many buffers as there are versions take turns.
    assert {count for _, count in places} == {versions}
    # A version that is free still holds its memory.
    assert set(stage.alive[5 * versions : -5 * versions]) == {versions}
    cycle = [place for place, _ in places]
    assert len(set(cycle[:versions])) == versions
    assert cycle[versions:] == cycle[:-versions]


def test_without_lag_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Version, "flat_like", lambda parameters: pytest.fail("memory was allocated"))
    stage = Stage(net_with("linear"), 0)
    places = [p.data_ptr() for p in stage.module.parameters()]
    before = [p.detach().clone() for p in stage.module.parameters()]
    assert all([p.data_ptr() for p in stage.module.parameters()] == places for _ in stage.run())
    assert not any(torch.equal(p, old) for p, old in zip(stage.module.parameters(), before))
    assert set(stage.alive) == {1}


def test_what_the_user_holds_stays_the_same_objects() -> None:
    module = net_with("linear")
    stage = Stage(module, 2)
    gradients_seen = []
    module[0].weight.register_hook(lambda gradient: gradients_seen.append(gradient))
    rows = stage.run()
    next(rows)
    stage.update()
    parameters = list(module.parameters())
    states = {parameter: stage.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters}
    grads = [parameter.grad for parameter in parameters]
    stage.versions.advance()
    stage.forward(8, None)
    with stage.versions.of(1):
        assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
        assert [p.grad is grad for p, grad in zip(parameters, grads)] == [True] * len(parameters)
    for _ in rows:
        pass
    assert all(stage.optimizer.state[p]["momentum_buffer"] is state for p, state in states.items())
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert len(gradients_seen) == BATCHES


def in_memory(name: str) -> nn.Parameter:
    numbers = torch.randn(4, 3, 2, 5)
    return nn.Parameter(
        {
            "contiguous": numbers,
            "channels last": numbers.contiguous(memory_format=torch.channels_last),
            "transposed": numbers[0, 0].t(),
            "permuted": numbers.permute(2, 0, 3, 1),
            "no dimension": numbers[0, 0, 0, 0].clone(),
            "empty": numbers[:0],
        }[name].detach()
    )


@pytest.mark.parametrize("name", ["contiguous", "channels last", "transposed", "permuted", "no dimension", "empty"])
def test_strides_are_kept(name: str) -> None:
    parameter = in_memory(name)
    before, strides = parameter.detach().clone(), parameter.stride()
    versions = Versions([("one", parameter), ("other", nn.Parameter(torch.ones(3)))])
    versions.use(0)
    versions.advance()
    assert parameter.stride() == strides
    assert torch.equal(parameter, before)


def test_gaps_are_closed() -> None:
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4)[:, :2])
    versions = Versions([("weight", parameter)])
    versions.use(0)
    versions.advance()
    assert parameter.is_contiguous()
    assert parameter.tolist() == [[0, 1], [4, 5], [8, 9]]


def test_dtypes_may_be_mixed() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float32]
    parameters = [nn.Parameter(torch.randn(5).to(dtype)) for dtype in dtypes]
    before = [p.detach().clone() for p in parameters]
    versions = Versions((str(number), parameter) for number, parameter in enumerate(parameters))
    for batch in range(3):
        versions.use(batch)
        versions.advance()
        with versions.updating(), torch.no_grad():
            for parameter in parameters:
                parameter.add_(1)
    assert [p.dtype for p in parameters] == dtypes
    assert all(torch.equal(p, old + 1 + 1 + 1) for p, old in zip(parameters, before))
    with versions.of(0):
        assert all(map(torch.equal, parameters, before))
    assert all(torch.equal(p, old + 1 + 1 + 1) for p, old in zip(parameters, before))


def test_each_parameter_starts_where_an_allocator_would_let_it() -> None:
    parameters = [nn.Parameter(torch.randn(size)) for size in (1, 7, 128, 129)]
    made = Version.flat_like(parameters)
    assert len(made.flats) == 1
    offsets = [data.data_ptr() - made.flats[0].data_ptr() for data in made.data]
    assert offsets == [0, 512, 1024, 1536]


def test_frozen_parameters_are_left_alone() -> None:
    module = net_with("linear")
    module[0].weight.requires_grad_(False)
    place = module[0].weight.data_ptr()
    versions = Versions((n, p) for n, p in module.named_parameters() if p.requires_grad)
    versions.use(0)
    versions.advance()
    assert module[0].weight.data_ptr() == place
    assert module[0].bias.data_ptr() != place


def test_an_update_is_hidden_from_the_graphs_in_flight() -> None:
    parameter = nn.Parameter(torch.ones(3))
    versions = Versions([("weight", parameter)])
    loss = (parameter * parameter).sum()
    with versions.updating(), torch.no_grad():
        parameter.mul_(1)
    assert parameter._version == 0
    loss.backward()
    assert parameter.grad.tolist() == [2, 2, 2]


def test_an_error_in_a_backward_leaves_the_newest_weights() -> None:
    parameter = nn.Parameter(torch.ones(3))
    versions = Versions([("weight", parameter)])
    versions.use(0)
    versions.advance()
    with versions.updating(), torch.no_grad():
        parameter.add_(1)

    def fail() -> None:
        with versions.of(0):
            assert parameter.tolist() == [1, 1, 1]
            raise KeyError("in the user's hook")

    with pytest.raises(KeyError):
        fail()
    assert parameter.tolist() == [2, 2, 2]


def test_an_optimizer_may_bind_its_parameters_to_other_memory() -> None:
    """`p.data = p.data - ...` instead of `p.data.sub_(...)`: the update must outlive the next backward."""
    parameter = nn.Parameter(torch.zeros(3))
    versions = Versions([("weight", parameter)])
    for batch in range(4):
        versions.use(batch)
        if batch:
            with versions.of(batch - 1):
                assert parameter.tolist() == [max(0, batch - 1)] * 3
            versions.release(batch - 1)
        versions.advance()
        with versions.updating():
            parameter.data = parameter.data + 1
    assert parameter.tolist() == [4, 4, 4]


def test_a_hook_may_write_into_weights_right_after_an_update() -> None:
    """As weight clamping does. Autograd took the older versions in flight for changed, and refused their backward."""
    parameter = nn.Parameter(torch.ones(3))
    versions = Versions([("weight", parameter)])
    versions.use(0)
    loss = (parameter * parameter).sum()
    versions.advance()
    with versions.updating(), torch.no_grad():
        parameter.add_(1)
    with torch.no_grad():
        parameter.clamp_(max=1.5)
    versions.use(1)
    with versions.of(0):
        loss.backward()
    assert parameter.grad.tolist() == [2, 2, 2]
    assert parameter.tolist() == [1.5, 1.5, 1.5]


def test_a_write_that_batches_in_flight_would_not_see_is_refused_by_name() -> None:
    still, written = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    versions = Versions([("net.still", still), ("net.written", written)])
    versions.use(0)
    with torch.no_grad():
        written.clamp_(max=0.5)
    with pytest.raises(WeightWrittenError, match=r"^net\.written changed outside the optimizer's step"):
        versions.use(1)


def test_when_nothing_is_in_flight_any_more_older_versions_are_free() -> None:
    """A run that was stopped leaves mini-batches that will not be backwarded; another one may follow on the stage."""
    versions = Versions(nn.Linear(2, 2).named_parameters())
    for batch in range(3):
        versions.use(batch)
        versions.advance()
    assert versions.alive == 4
    versions.release_all()
    for batch in range(3):
        versions.use(batch)
        versions.release(batch)
        versions.advance()
    assert versions.alive <= 3
