"""Parameters that several stages train: one owner, whose versions all others hold."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.fits import fit_in_pipeline, require_same_bits
from tests.helpers.modules import WIDTH, Block, Chain, make_optimizer, noise_loader
from tests.helpers.reference import train_delayed

DEPTH = 4
EPOCHS = 3


class Tied(Chain):
    """The first layer's weight is the last one's, too; both lie outside the blocks."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(DEPTH, optimizer=optimizer)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.first(x)))


class TiedThrice(Tied):
    """And a bias in the middle that is the last one's, and a weight in the middle that is the first one's.

    With three stages, each pair of them is tied.
    """

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.net[1].linear.bias = self.head.bias
        self.net[1].linear.weight = self.first.weight


STARTS = {2: ["net.2"], 3: ["net.1", "net.2"], 4: ["net.1", "net.2", "net.3"]}


def stages_of(module: Chain, p: int) -> list[list[str]]:
    """The parameters of each stage, those that are tied under the name that it uses."""
    starts = [int(start.rpartition(".")[2]) for start in STARTS[p]]
    bounds = [*itertools.pairwise([0, *starts, DEPTH])]
    found = []
    for stage, (begin, end) in enumerate(bounds):
        places = [f"net.{number}." for number in range(begin, end)]
        places += ["first."] * (stage == 0) + ["head."] * (stage == p - 1)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        found.append([name for name in names if any(name.startswith(place) for place in places)])
    return found


def require_equal_to_reference(
    kind: type[Tied], p: int, optimizer: str, accumulate: int = 1, extra_in_flight: int = 0, **options: Any
) -> None:
    module = partial(kind, optimizer)
    seen = fit_in_pipeline(
        p,
        module,
        partial(noise_loader, shuffle=True),
        strategy={"split_points": STARTS[p], "extra_in_flight": extra_in_flight, **options},
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )[0]
    reference = module()
    per_epoch = len(seen.batches) // EPOCHS
    updates = [(i % per_epoch + 1) % accumulate == 0 or i % per_epoch + 1 == per_epoch for i in range(len(seen.batches))]
    losses = train_delayed(
        reference,
        stages_of(reference, p),
        list(zip(seen.batches, updates)),
        lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
        make_optimizer(optimizer, None),
        accumulate,
        extra_in_flight,
    )
    assert [float(torch.tensor(loss) / accumulate) * accumulate for loss in losses] == seen.losses
    require_same_bits(seen.weights, dict(reference.named_parameters()))


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ties_equal_the_reference(p: int, optimizer: str) -> None:
    """The first stage's gradient comes so many rows later, and its copy is the owner's version of the same number."""
    require_equal_to_reference(Tied, p, optimizer)


@pytest.mark.parametrize(("accumulate", "extra"), [(3, 0), (1, 1), (1, 2), (2, 2)])
def test_accumulated_and_further_ahead(accumulate: int, extra: int) -> None:
    require_equal_to_reference(Tied, 3, "sgd", accumulate, extra)


@pytest.mark.parametrize("p", [3, 4])
def test_ties_between_all_pairs(p: int) -> None:
    require_equal_to_reference(TiedThrice, p, "adamw")
