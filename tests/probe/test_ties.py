"""A parameter that gets a gradient on several stages is tied: its gradients add up to the uncut module's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.cut import Tie
from tests.helpers.modules import WIDTH, Block
from tests.helpers.probing import check_cut, cut_of


class Blocks(nn.Module):
    """Four blocks, with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


class TiedWeight(Blocks):
    """One parameter in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].linear.weight = self.blocks[0].linear.weight


class TiedNorm(Blocks):
    """One module, called after every block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.norm(block(x))
        return x


class TiedMlp(TiedNorm):
    """With modules inside, and dropout among them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))


class Embedded(Blocks):
    """An embedding for the encoder, for the decoder, and once more, past its module, for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        encoded = self.blocks[1](self.blocks[0](self.shared(x)))
        decoded = self.blocks[3](self.blocks[2](self.shared(y)) + encoded)
        return F.mse_loss(F.linear(decoded, self.shared.weight), y)


class OtherStagesWeight(Blocks):
    """Computes with the first block's weight at the end."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(F.linear(self.body(x), self.blocks[0].linear.weight), y)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(n, WIDTH, generator=generator), torch.randn(n, WIDTH, generator=generator)) for n in (4, 4, 3)]


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("kind", [TiedWeight, TiedNorm, TiedMlp, Embedded, OtherStagesWeight])
def test_gradients_of_all_stages_add_up(kind: type[Blocks], p: int) -> None:
    """Up to rounding: what comes from several stages is summed in another order."""
    torch.manual_seed(5)
    cut = check_cut(kind(), batches(), p, exact=False)
    assert cut.ties


@pytest.mark.parametrize(
    ("kind", "ties"),
    [
        (TiedWeight, [Tie(0, 2, ("blocks.0.linear.weight",))]),
        (TiedNorm, [Tie(user, 2, ("norm.bias", "norm.weight")) for user in (0, 1)]),
        (Embedded, [Tie(0, 2, ("shared.weight",))]),
    ],
)
def test_the_last_stage_owns_what_is_tied(kind: type[Blocks], ties: list[Tie]) -> None:
    cut = cut_of(kind(), batches()[0], 3, ["blocks.1", "blocks.3"] if kind is Embedded else ["blocks.1", "blocks.2"])
    if kind is Embedded:
        ties = [*ties, Tie(1, 2, ("shared.weight",))]
    assert cut.ties == ties
    for tie in ties:
        assert all(cut.homes[name][0] == 2 for name in tie.names)
        assert all(tie.user in cut.homes[name] for name in tie.names)


def test_what_an_earlier_call_of_a_tied_module_made_is_received() -> None:
    """The later stage runs the module's later calls itself."""
    cut = cut_of(TiedNorm(), batches()[0], 2, ["blocks.2"])
    first, second = cut.steps["training_step"].passages
    assert second.stubs["norm"] == 2
    assert [str(crossing.value) for crossing in first.sends] == ["the output of 'norm' (call 1)"]


def test_a_split_point_that_is_called_twice_is_refused() -> None:
    with pytest.raises(CutError, match="can't begin at 'norm': the module is called 4 times"):
        cut_of(TiedNorm(), batches()[0], 2, ["norm"])
