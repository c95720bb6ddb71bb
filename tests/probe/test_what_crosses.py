"""What crosses a cut: every kind of value that a module returns, and nothing that each rank can compute itself.

What can't cross is refused, with the module that hands it on and the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.step import Observed
from lightning_cpipe.stage.cut import Value
from tests.helpers.chains import WIDTH, Block, Blocks, batches, linear
from tests.helpers.modules import Scale
from tests.helpers.probing import STEP, check_cut, cut_of, forward_of

HALVES = {"num_stages": 2, "split_points": ["blocks.2"]}


class ManyKinds(Block):
    """Floats of two sizes, complex and whole numbers, booleans, nothing at all, a tensor without elements, and plain
    values, in a dict with a tuple and a list inside."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = super().forward(x)
        return {
            "hidden": hidden,
            "double": hidden.double(),
            "complex": torch.complex(hidden, -hidden).detach(),
            "counts": ((hidden.sum() * 100).long(), [(hidden > 0).to(torch.uint8)]),
            "mask": hidden > 0.1,
            "mean": hidden.mean(),
            "none of it": hidden[:0],
            "nothing": None,
            "name": "block",
            "scale": 0.5,
        }


class UsesManyKinds(Blocks):
    def __init__(self) -> None:
        super().__init__(ManyKinds)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            made = block(x)
            total, (positive,) = made["counts"]
            x = made["hidden"].where(made["mask"], made["double"].float()) + made["complex"].abs() * made["scale"]
            x = x + total % 3 + positive + made["mean"] + len(made["none of it"]) + len(made["name"])
            if made["nothing"] is None:
                x = x - 0.5
        return x


@dataclass(frozen=True)
class State:
    hidden: Tensor
    mask: Tensor | None = None
    choices: dict[str, Tensor] | None = None


class Stateful(Block):
    def forward(self, state: State) -> State:
        hidden = super().forward(state.hidden)
        return State(hidden, hidden > 0, {"best": hidden.argmax(-1)})


class FrozenDataclasses(Blocks):
    def __init__(self) -> None:
        super().__init__(Stateful)

    def body(self, x: Tensor) -> Tensor:
        state = State(x)
        for block in self.blocks:
            state = block(state)
        return state.hidden * state.mask + state.choices["best"][:, None]


class MaskOfEmbedding(Blocks):
    """Which rows count at the end is told by the embedding at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        embedded = self.embedding((x.abs().sum(-1) * 3).long() % 9)
        return super().body(x + embedded) * (embedded.sum(-1, keepdim=True) > 0)


class Diffusion(Blocks):
    """Noise and times are drawn in the step; the noise is the target, and every block gets the time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(10, WIDTH)
        self.register_buffer("alphas", torch.linspace(0.99, 0.1, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        times, noise = torch.randint(0, 10, (len(x),)), torch.randn_like(x)
        alpha = self.alphas[times][:, None]
        hidden, time = alpha.sqrt() * x + (1 - alpha).sqrt() * noise, self.time(times)
        for block in self.blocks:
            hidden = block(hidden + time)
        return F.mse_loss(hidden, noise)


class MasksInput(Blocks):
    """Hides rows at random, and is judged by them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_row = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.rand(len(x)) < 0.5
        return (self.body(torch.where(hidden[:, None], self.hidden_row, x)) - x)[hidden].square().sum()


class Codebook(nn.Module):
    """Vector quantization; the codes are running means, written past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, WIDTH))
        self.register_buffer("counts", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = torch.cdist(x, self.codes).argmin(-1)
        found = F.embedding(nearest, self.codes)
        if self.training:
            chosen = F.one_hot(nearest, 5).to(x)
            self.counts.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.sums.data.mul_(0.9).add_(chosen.t() @ x.detach(), alpha=0.1)
            self.codes.data.copy_(self.sums / self.counts[:, None])
        return x + (found - x).detach(), F.mse_loss(x, found.detach()), nearest


class Quantized(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = Codebook()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        quantized, commitment, nearest = self.codebook(self.blocks[1](self.blocks[0](x)))
        late = self.blocks[3](self.blocks[2](quantized))
        return F.mse_loss(self.use(late, nearest), y) + 0.25 * commitment

    def use(self, late: Tensor, nearest: Tensor) -> Tensor:
        return late


class BareNorms(Blocks):
    """Norms that have statistics and no weights, as blocks of their own."""

    def __init__(self) -> None:
        super().__init__()
        norms = (nn.BatchNorm1d(WIDTH, affine=False, momentum=momentum) for momentum in (0.1, None, 0.5))
        self.blocks = nn.ModuleList(layer for norm in norms for layer in (linear(), norm))


class BufferBlocks(Blocks):
    """Blocks with a buffer that nobody writes, and no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scale(WIDTH), linear(), Scale(WIDTH), linear(), Scale(WIDTH), linear()])


class Prompts(Blocks):
    """Parameters that hang on containers of parameters, one for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in self.blocks])
        self.scales = nn.ParameterDict({"last": nn.Parameter(torch.randn(WIDTH))})

    def body(self, x: Tensor) -> Tensor:
        for prompt, block in zip(self.prompts, self.blocks):
            x = block(x + prompt)
        return x * self.scales["last"]


RIGHT = [
    UsesManyKinds,
    FrozenDataclasses,
    MaskOfEmbedding,
    Diffusion,
    MasksInput,
    Quantized,
    BareNorms,
    BufferBlocks,
    Prompts,
]


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_in_stages(kind: type[Blocks], p: int) -> None:
    check_cut(kind(), batches(0, 1, 100), p, exact=kind is not Diffusion)


def test_a_stage_may_have_buffers_alone() -> None:
    cut = check_cut(BufferBlocks(), batches(0, 1), 3, split_points=["blocks.2", "blocks.3"])
    assert [name for name, stages in cut.homes.items() if stages == (1,)] == []


def received(module: nn.Module, run: Callable[[nn.Module, Any], Any] = forward_of) -> list[Value]:
    """What the second half receives."""
    cut = cut_of(module, batches(0)[0], run=run, **HALVES)
    return [crossing.value for crossing in cut.steps[STEP].passages[1].receives]


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), len(x)).tril()


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1 / torch.arange(1, WIDTH + 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(len(x))[:, None] * self.frequencies
        return angles.cos(), angles.sin()


class Attends(Blocks):
    """A mask, rotary embeddings, labels, noise and the batch itself are used in every block and in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.causal, self.rotary = Causal(), Rotary()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask, (cos, sin), noise = self.causal(x), self.rotary(x), torch.randn_like(x)
        padding = x.abs().sum(-1, keepdim=True) > 0.1
        hidden = x
        for block in self.blocks:
            hidden = block(mask @ (hidden * cos + hidden.roll(1, -1) * sin) + noise) * padding + y
        return F.mse_loss(hidden * sin, y * padding + x)


def test_what_every_rank_can_compute_from_the_batch_is_not_sent() -> None:
    assert received(Attends()) == [Value("blocks.1", 0, 0)]
    check_cut(Attends(), batches(0, 1), 3)


def log_early(module: Blocks, batch: Any) -> Observed:
    x, y = batch
    early, late = module.ends(x)
    return Observed(F.mse_loss(late, y), None, {"early": early.detach().mean()})


def test_what_is_logged_of_an_early_block_crosses() -> None:
    assert received(Blocks(), log_early) == [Value("blocks.0", 0, 0), Value("blocks.1", 0, 0)]


def log_time(module: Blocks, batch: Any) -> Observed:
    return Observed(module(*batch), None, {"seconds": perf_counter()})


def test_a_time_that_is_logged_says_nothing() -> None:
    """It is another one in each run; nothing crosses for it, and the cut is not refused."""
    assert received(Blocks(), log_time) == [Value("blocks.1", 0, 0)]


# ---- refused, by the name of the module that hands it on, and the cut ----


class FillsCache(Block):
    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(super().forward(x))
        return cache[-1]


class WritesArgument(Blocks):
    """Every block leaves its output in a list that it was given."""

    def __init__(self) -> None:
        super().__init__(FillsCache)

    def body(self, x: Tensor) -> Tensor:
        cache: list[Tensor] = []
        for block in self.blocks:
            x = block(x, cache)
        return x + sum(cache)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


class WritesInput(Blocks):
    """The second block writes into the output of the first, which is used at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = InPlace()

    def body(self, x: Tensor) -> Tensor:
        early, late = self.ends(x)
        return late + early.detach()


class WritesBatch(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = InPlace()

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + x


class Marks(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        hidden.loss = hidden.square().mean()
        return hidden


class MarksTensors(Blocks):
    """A loss on an attribute of the tensor."""

    def __init__(self) -> None:
        super().__init__(Marks)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        extra = 0.0
        for block in self.blocks:
            x = block(x)
            extra = extra + x.loss
        return F.mse_loss(x, y) + extra


LOSSES: dict[str, Tensor] = {}


class LeavesLossInGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        LOSSES["balance"] = hidden.detach().square().mean()
        return hidden


class LossInGlobal(Blocks):
    """In this process every stage would find it there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = LeavesLossInGlobal()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * LOSSES["balance"]


class LeavesMeanOnClass(Block):
    mean: ClassVar[Any] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        type(self).mean = hidden.detach().mean()
        return hidden


class MeanOnClass(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = LeavesMeanOnClass()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * LeavesMeanOnClass.mean


class Encoder(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = linear()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


class Encodes(Blocks):
    """Uses at the end what an encoder made at the beginning."""

    def __init__(self, wrap: Callable[[Tensor], Any], use: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.encoder = Encoder(wrap)
        self.use = use

    def body(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        return super().body(self.use(encoded)) + self.use(encoded)


def distribution(x: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(x, 1.0)


class ReadsCodes(Quantized):
    """The codes are read where the codebook does not see its input."""

    def use(self, late: Tensor, nearest: Tensor) -> Tensor:
        return late + F.embedding(nearest, self.codebook.codes)


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a list that was given": (WritesArgument, ["what blocks.0, blocks.1 returns", "Return the value"]),
    "an input that is written": (WritesInput, ["what blocks.1 returns", "by writing into an input"]),
    "a batch that is written": (WritesBatch, ["what blocks.0 returns", "by writing into an input"]),
    "an attribute of a tensor": (MarksTensors, ["what blocks.0, blocks.1 returns", "no attribute 'loss'"]),
    "a global variable": (LossInGlobal, ["what blocks.0 returns", "a global variable"]),
    "a class": (MeanOnClass, ["what blocks.0 returns"]),
    "a distribution": (partial(Encodes, distribution, lambda d: d.mean), ["`.mean`", "class Normal", "'encoder'"]),
    "a sparse tensor": (
        partial(Encodes, Tensor.to_sparse, lambda sparse: sparse.to_dense()),
        ["`.to_dense`", "Tensor (torch.sparse_coo)", "'encoder'", "Dense tensors travel"],
    ),
    "codes that are read elsewhere": (ReadsCodes, ["what codebook returns"]),
}


@pytest.mark.parametrize("check", ["full", "fills"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_name_of_its_origin_and_the_cut(case: str, check: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(CutError) as caught:
        cut_of(make(), batches(0)[0], check=check, **HALVES)
    said = str(caught.value)
    assert said.startswith("cut at blocks.2: ")
    assert [each for each in [*words, "split_points"] if each not in said] == []


class Logs(Block):
    """Logs its mean itself; `heard` stands for the trainer."""

    def __init__(self, heard: dict[str, Tensor]) -> None:
        super().__init__()
        self.log = heard.__setitem__

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        self.log("inner", hidden.detach().mean())
        return hidden


def test_a_log_inside_an_early_block_is_refused() -> None:
    """On the last stage, which logs, the block is a stub."""
    heard: dict[str, Tensor] = {}
    module = Blocks(lambda: Logs(heard))
    for block in module.blocks[1:]:
        block.log = lambda *_: None

    def run(module: nn.Module, batch: Any) -> Observed:
        heard.clear()
        return Observed(module(*batch), None, dict(heard))

    with pytest.raises(CutError, match=r"what blocks\.0 returns.*by a `self\.log` inside a module"):
        cut_of(module, batches(0)[0], run=run, **HALVES)
