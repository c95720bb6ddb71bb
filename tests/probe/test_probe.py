"""Modules that nobody changed give the same loss, gradients and buffers in stages as they do whole.

Each stage is a copy of the module in which the weights of the others are absent. Gradients are equal to the bit, but
for those that come together from several stages, which are summed in another order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Crossing, Value
from tests.helpers.chains import WIDTH, Block, Blocks, linear
from tests.helpers.modules import Codebook
from tests.helpers.probing import SEED, STEP, Stages, check_cut, cut_of


class Plain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)


class Nested(nn.Module):
    """The chain hangs three modules down, and is walked in order there."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"backbone": Blocks()})
        self.stem, self.head = linear(), linear()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.model["backbone"].body(self.stem(x))), y)


class LongSkip(Blocks):
    """What the first block made is added at the end."""

    def body(self, x: Tensor) -> Tensor:
        early = self.blocks[0](x)
        late = early
        for block in self.blocks[1:]:
            late = block(late)
        return late + 0.5 * early


class UNet(nn.Module):
    """Skips across both cuts, with convolutions and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)])
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        image = F.pad(x, (0, 2))[:, None, :, None].expand(-1, -1, -1, 8)
        skips = []
        for down in self.down:
            skips.append(torch.relu(down(image)))
            image = F.max_pool2d(skips[-1], 2)
        image = torch.relu(self.middle(image))
        for up in self.up:
            image = F.interpolate(image, scale_factor=2)
            image = torch.relu(up(torch.cat([image, skips.pop()], 1)))
        return F.mse_loss(image.mean((1, 3))[:, :WIDTH], y)


@dataclass
class State:
    hidden: Tensor
    extra: dict[str, Tensor | int]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    """Takes and gives a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, given: tuple[State, Pair]) -> tuple[State, Pair]:
        state, pair = given
        hidden = torch.tanh(self.linear(state.hidden))
        return State(hidden, {"sum": state.extra["sum"] + hidden, "depth": 3}), Pair(pair.right, hidden * pair.left)


class Structures(Blocks):
    def __init__(self) -> None:
        super().__init__(Structured)

    def body(self, x: Tensor) -> Tensor:
        state, pair = State(x, {"sum": x, "depth": 0}), Pair(x, x)
        for block in self.blocks:
            state, pair = block((state, pair))
        return state.hidden + state.extra["sum"] * state.extra["depth"] + pair.left * pair.right


class Router(nn.Module):
    """Chooses by an argmax, through which no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.linear(x)
        return scores, scores.argmax(-1)


class Routed(Blocks):
    """The choice is made first and used last."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        scores, choice = self.router(x)
        return super().body(scores) * self.experts[choice]


class Masker(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(x)
        return hidden, hidden > 0


class Masked(Blocks):
    """A mask of booleans from the first stage decides in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.masker = Masker()

    def body(self, x: Tensor) -> Tensor:
        hidden, mask = self.masker(x)
        return super().body(hidden).masked_fill(mask, 0.1)


class Additive(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.zeros_like(x).masked_fill(x > 0, float("-inf"))


class AddsMask(Blocks):
    """A mask that is added to scores: 0, and −inf for what is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.masker = Additive()

    def body(self, x: Tensor) -> Tensor:
        hidden, mask = self.masker(x)
        return torch.sigmoid(super().body(hidden) + mask)


class Lengths(Router):
    """How much of each row counts: one number per row, in the first batch the same for all."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), (x > 100).sum(-1)


class Padded(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.lengths = Lengths()

    def body(self, x: Tensor) -> Tensor:
        hidden, lengths = self.lengths(x)
        return super().body(hidden) * (torch.arange(WIDTH) >= lengths[:, None])


class InPlace(Blocks):
    """Code between the blocks writes into what they returned."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x += 1
            x.mul_(0.5)
        return x


class Quantized(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = Codebook(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.codebook(block(x)) if block is self.blocks[1] else block(x)
        return x


class ClassToken(Blocks):
    """A free parameter at the root, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, WIDTH))
        self.positions = nn.Embedding(9, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token, x])
        return super().body(x + self.positions(torch.arange(len(x))))[1:]


class Frozen(Blocks):
    """A frozen block in front of, between and after trained ones, and a frozen table that is used on both sides."""

    def __init__(self) -> None:
        super().__init__(depth=5)
        for number in (0, 2, 4):
            self.blocks[number].requires_grad_(False)
        self.table = nn.Embedding(9, WIDTH).requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        numbers = torch.arange(len(x))
        return super().body(x + self.table(numbers)) * self.table(numbers)


class Unused(Blocks):
    """Parameters without a gradient: of a module that is never called, of the root, and of one that is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.detached = linear(), linear()
        self.free = nn.Parameter(torch.ones(3))

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + self.detached(x).detach())


class TiedInside(Blocks):
    """Two names for one parameter, on one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = linear()
        self.stem.weight = self.blocks[0].linear.weight

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.stem(x))


class StopGradient(Blocks):
    """The target is what an early block made."""

    def body(self, x: Tensor) -> Tensor:
        early = self.blocks[0](x)
        late = early
        for block in self.blocks[1:]:
            late = block(late)
        return late - early.detach()


class Repeated(Blocks):
    """A module that is called several times within one stage, and again where its weights do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.activation = nn.PReLU().requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.stem(x)
        for block in self.blocks:
            x = self.activation(block(x))
        return x


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        padding = torch.arange(len(x))[None] == len(x) - 1
        return F.mse_loss(self.encoder(x[None], src_key_padding_mask=padding)[0], y)


def normed() -> Plain:
    """Buffers inside blocks, activations in place, and a norm without weights between them."""
    plain, bare = (nn.BatchNorm1d(WIDTH, affine=affine) for affine in (True, False))
    relus = [nn.ReLU(inplace=True) for _ in range(3)]
    return Plain(linear(), plain, relus[0], linear(), bare, relus[1], linear(), relus[2], linear())


CASES: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: Plain(linear(), nn.Tanh(), linear(), nn.Tanh(), linear(), linear()),
    "nested": Nested,
    "structures": Structures,
    "argmax": Routed,
    "mask": Masked,
    "additive_mask": AddsMask,
    "lengths": Padded,
    "in_place": InPlace,
    "batch_norm": normed,
    "codebook": Quantized,
    "class_token": ClassToken,
    "frozen": Frozen,
    "unused": Unused,
    "tied_inside": TiedInside,
    "stop_gradient": StopGradient,
    "repeated": Repeated,
    "transformer": Transformer,
}
SEVERAL_STAGES_MAKE_A_GRADIENT: dict[str, Callable[[], nn.Module]] = {"long_skip": LongSkip, "u_net": UNet}


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, WIDTH), torch.randn(size, WIDTH)) for size in sizes]


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_stages_give_what_the_whole_module_gives(case: str, p: int) -> None:
    """The second batch has other numbers, the third another shape."""
    check_cut(CASES[case](), batches(4, 4, 3), p)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("case", SEVERAL_STAGES_MAKE_A_GRADIENT)
def test_gradients_from_several_stages_add_up(case: str, p: int) -> None:
    check_cut(SEVERAL_STAGES_MAKE_A_GRADIENT[case](), batches(4, 4, 3), p, exact=False)


@pytest.mark.parametrize("check", ["fills", "full"])
@pytest.mark.parametrize("case", ["structures", "argmax", "mask", "lengths", "stop_gradient"])
def test_random_fills_alone_find_what_crosses(case: str, check: str) -> None:
    check_cut(CASES[case](), batches(4, 4), 3, check=check)


def test_numbers_decide_that_the_first_batch_did_not_show() -> None:
    """All lengths are 0 in the first batch, as in a filler; in the second they are not."""
    first, second = batches(4, 4)
    check_cut(Padded(), [first, (second[0] + 200, second[1])], 3)


@pytest.mark.parametrize("p", [2, 3])
def test_each_stage_holds_its_own_weights_and_no_others(p: int) -> None:
    module = Nested()
    cut = cut_of(module, batches(4)[0], p)
    stages = Stages(module, cut)
    held = [
        {name for name, parameter in each.named_parameters() if not isinstance(parameter, AbsentParameter)}
        for each in stages.modules
    ]
    assert held[0] >= {"stem.weight", "stem.bias"}
    assert held[-1] >= {"head.weight", "head.bias"}
    assert sorted(name for names in held for name in names) == sorted(name for name, _ in module.named_parameters())
    for name, stages_of in cut.homes.items():
        assert [name in names for names in held] == [stage in stages_of for stage in range(p)]


def crossings(module: nn.Module, p: int = 3, **options: Any) -> list[list[Crossing]]:
    """What each stage but the first receives."""
    cut = cut_of(module, batches(4)[0], p, **options)
    return [list(passage.receives) for passage in cut.steps[STEP].passages[1:]]


THIRDS = {"split_points": ["blocks.1", "blocks.3"]}


def test_a_chain_hands_over_the_last_output_alone() -> None:
    outputs = [Value(f"blocks.{number}", 0, 0) for number in (0, 2)]
    assert crossings(Blocks(), **THIRDS) == [[Crossing(value, True, False)] for value in outputs]


def test_a_skip_travels_along_with_its_gradient() -> None:
    early, late = (Crossing(Value(f"blocks.{number}", 0, 0), True, False) for number in (0, 2))
    assert crossings(LongSkip(), **THIRDS) == [[early], [early, late]]


def test_a_stopped_gradient_does_not_travel() -> None:
    early = Crossing(Value("blocks.0", 0, 0), True, False)
    assert crossings(StopGradient(), **THIRDS) == [
        [early],
        [early._replace(gradient=False), Crossing(Value("blocks.2", 0, 0), True, False)],
    ]


def test_an_argmax_travels_without_a_gradient() -> None:
    choice = Crossing(Value("router", 0, 1), False, False)
    assert [choice in found for found in crossings(Routed(), **THIRDS)] == [True, True]


def test_what_is_written_in_place_is_known() -> None:
    assert all(found.rewritten for stage in crossings(InPlace(), **THIRDS) for found in stage)


def test_a_module_that_writes_buffers_runs_on_one_stage_though_it_has_no_weights() -> None:
    """What it made travels, not what it was made of."""
    assert crossings(Quantized(), p=2, split_points=["blocks.2"]) == [[Crossing(Value("codebook", 0, 0), True, False)]]


def test_what_nobody_needs_does_not_travel() -> None:
    """Not the frozen table, which lies on every stage that uses it."""
    found = [crossing.value.module for stage in crossings(Frozen(), **THIRDS) for crossing in stage]
    assert found == ["blocks.0", "blocks.2"]


def test_frozen_weights_may_lie_on_several_stages() -> None:
    cut = cut_of(Frozen(), batches(4)[0], 3, **THIRDS)
    assert cut.homes["table.weight"] == (0, 1, 2)
    assert "table.weight" not in cut.trained_on


def test_weights_that_nobody_uses_lie_on_one_stage() -> None:
    homes = cut_of(Unused(), batches(4)[0], 3).homes
    assert homes["never.weight"] == homes["free"] == (2,)
    assert homes["detached.weight"] == (0,)


def test_a_buffer_is_true_where_its_module_sees_real_numbers() -> None:
    homes = cut_of(Quantized(), batches(4)[0], 3, **THIRDS).buffer_homes
    assert homes == {"codebook.codes": 1}


class Meter:
    """Adds up; and knows when."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0
        self.when = perf_counter()

    def update(self, x: Tensor) -> None:
        self.sum += float(x.sum())
        self.count += 1


class Leaves(Blocks):
    """Leaves a number on the root: of the first block, of the last one, or of nothing that crosses."""

    def __init__(self, place: int | None, left: Any) -> None:
        super().__init__()
        self.place = place
        self.left = left
        self.clock = Meter()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.clock.when = perf_counter()
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.place:
                self.leave(x.detach())
        return F.mse_loss(x, y)

    def leave(self, x: Tensor) -> None:
        if isinstance(self.left, Meter):
            self.left.update(x)
        elif isinstance(self.left, dict):
            self.left["seen"].append(x)
        else:
            self.left.append(x)


@pytest.mark.parametrize("left", [list, partial(defaultdict, list), Meter], ids=["list", "default dict", "meter"])
@pytest.mark.parametrize(("place", "leaves"), [(None, False), (0, False), (1, True), (3, True)])
def test_what_only_late_stages_leave_behind_is_known(place: int | None, leaves: bool, left: Callable[[], Any]) -> None:
    """In an object of whatever class; and a time, which every stage leaves, is another one each time."""
    cut = check_cut(Leaves(place, left()), batches(4, 4), 2, split_points=["blocks.1"])
    assert cut.steps[STEP].leaves_behind is leaves


def test_a_clock_on_the_root_lets_nothing_cross_that_nobody_needs() -> None:
    """The time differed whatever stood in the stubs, as if all of them mattered."""
    outputs = [Value(f"blocks.{number}", 0, 0) for number in (0, 2)]
    assert crossings(Leaves(None, []), **THIRDS) == [[Crossing(value, True, False)] for value in outputs]


def predict(module: nn.Module, batch: Any) -> Any:
    return {"prediction": module.body(batch[0])}


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("case", ["argmax", "codebook", "class_token", "in_place", "repeated"])
def test_a_step_that_does_not_train_gives_the_same_too(case: str, p: int) -> None:
    module = CASES[case]()
    first, second, shorter = batches(4, 4, 3)
    cut = cut_of(module, first, p, others={"predict_step": predict})
    assert module.training
    assert not any(crossing.gradient for passage in cut.steps["predict_step"].passages for crossing in passage.receives)
    stages = Stages(module, cut)
    module.eval()
    for each in stages.modules:
        each.eval()
    for batch in (first, second, shorter):
        found = stages.evaluate("predict_step", predict, batch)
        assert torch.equal(found["prediction"], predict(module, batch)["prediction"])


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_dropout_and_noise_do_not_depend_on_the_cuts(p: int) -> None:
    class Noisy(Transformer):
        def __init__(self) -> None:
            super().__init__(dropout=0.3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = self.drop(x + torch.randn_like(x))
            hidden = self.drop(self.encoder(x[None])[0])
            return F.mse_loss(hidden + torch.randn_like(hidden), y)

    torch.manual_seed(1)
    module = Noisy()
    batch = batches(4)[0]
    one, several = (Stages(module, cut_of(module, batch, stages)).step(batch, SEED) for stages in (1, p))
    assert torch.equal(one.loss, several.loss)
    assert all(torch.equal(one.gradients[name], several.gradients[name]) for name in one.gradients)
