"""Modules that nobody changed train in a pipeline as the contract says.

The first step gives the loss and the gradients of the uncut module, and twenty steps give the bits of training with
delayed gradients. By default, an architecture of each kind is trained in three stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe import assert_pipeline_parity
from lightning_cpipe.equality import difference
from lightning_cpipe.probe.blocks import find_blocks
from tests.helpers.architectures import ARCHITECTURES, OPTIMIZER, Architecture
from tests.helpers.comparing import TrainingStep, random_numbers_of, require_equal_to_reference
from tests.helpers.fits import Seen
from tests.helpers.probing import cut_of

STAGES = (2, 3)
BY_DEFAULT = {"gpt2", "resnet", "mamba", "two towers"}
"""One of each kind: decoders, encoders, convolutions, recurrences, encoders with decoders, and what is no chain."""
EPOCHS = 2


def each() -> Iterator[Any]:
    """Every architecture with 2 and with 3 stages; by default one of each kind with 3."""
    for name in ARCHITECTURES:
        for p in STAGES:
            yield pytest.param(
                name, p, id=f"{name}-{p}", marks=() if name in BY_DEFAULT and p == 3 else pytest.mark.full
            )


@pytest.mark.parametrize(("name", "p"), [*each()])
def test_trains_as_the_contract_says(name: str, p: int) -> None:
    architecture = ARCHITECTURES[name]
    ranks = require_equal_to_reference(
        p,
        architecture.module,
        architecture.loader,
        OPTIMIZER,
        epochs=EPOCHS,
        split_points=architecture.split_points(p),
    )
    assert len(ranks[0].losses) == 20
    assert bool(ranks[0].found.cut.draws) is architecture.drops
    require_first_step_of_uncut_module(architecture, ranks)


def require_first_step_of_uncut_module(architecture: Architecture, ranks: list[Seen]) -> None:
    """Loss and every gradient of the first mini-batch, each of which one stage has.

    But for those that are tied: the owner adds what comes from other stages some mini-batches later.
    """
    module, cut = architecture.module(), ranks[0].found.cut
    rtol = 1e-6 * math.sqrt(len(find_blocks(module)))
    with random_numbers_of(module, cut, 0):
        loss = TrainingStep(module)(ranks[0].batches[0])
    loss.backward()
    assert difference(torch.tensor(ranks[0].losses[0]), loss.detach(), rtol) is None
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    gradients: dict[str, Tensor] = {}
    for rank, seen in enumerate(ranks):
        assert not gradients.keys() & seen.found.gradients.keys()
        assert {cut.homes[name][0] for name in seen.found.gradients} == {len(ranks) - 1 - rank}
        gradients |= seen.found.gradients
    assert gradients.keys() == expected.keys() == cut.trained_on.keys()
    untied = [name for name, stages in cut.trained_on.items() if len(stages) == 1]
    found = {name: difference(gradients[name], expected[name], rtol) for name in untied}
    assert not {name: each for name, each in found.items() if each is not None}


@pytest.mark.full
@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_is_in_stages_what_it_is_whole(name: str, p: int) -> None:
    architecture = ARCHITECTURES[name]
    first, *_, shorter = architecture.loader()
    split_points = architecture.split_points(p)
    assert_pipeline_parity(architecture.module(), first, p, split_points=split_points, more_batches=[shorter])


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@pytest.mark.parametrize(
    ("name", "begins", "travels"),
    [
        pytest.param(
            *("t5", ["encoder.block.2", "decoder.block.1", "decoder.block.2"], ["encoder"]), marks=pytest.mark.full
        ),
        ("whisper", ["model.encoder.layers.2", "model.decoder.layers.1", "model.decoder.layers.2"], ["model.encoder"]),
        ("unet", ["middle", "up.1"], ["down.0", "down.1"]),
        ("two towers", ["user.layers.2", "item.layers.1", "item.layers.2"], ["user"]),
    ],
)  # fmt: skip
def test_what_is_used_far_behind_travels_along(name: str, begins: list[str], travels: list[str]) -> None:
    """What an encoder, a level of a U-Net or the other tower made goes through every cut up to where it is used."""
    architecture = ARCHITECTURES[name]
    batch = next(iter(architecture.loader()))
    cut = cut_of(architecture.module().model, batch, len(begins) + 1, begins, run=loss_of)
    after = [passage for passage in cut.steps["training_step"].passages if travels[0] in passage.stubs]
    through = [[crossing.value.module for crossing in passage.receives] for passage in after]
    assert len(through) == 2
    assert all(set(travels) <= set(received) for received in through)
