"""Under every version policy, losses and weights equal the reference's, and no stage holds more than is promised."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
from torch import nn

from lightning_cpipe.schedules.policies import POLICIES
from tests.helpers.comparing import require_equal_under_policy
from tests.helpers.fits import fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, make_optimizer, noise_loader
from tests.helpers.reference import train_delayed

EPOCH_LENGTH = 8
FULL = pytest.mark.full

CASES = [
    # policy, stages, accumulated (8 mini-batches make an epoch), extra in flight
    ("latest", 2, 1, 0),
    ("latest", 3, 3, 0),
    ("vertical", 2, 1, 0),
    ("vertical", 3, 3, 0),
    ("2bw", 2, 1, 0),
    ("2bw", 3, 3, 0),
    *(
        pytest.param(*each, marks=FULL)
        for each in (
            ("latest", 3, 1, 0),
            ("latest", 4, 1, 1),
            ("vertical", 3, 1, 0),
            ("vertical", 3, 1, 1),
            ("vertical", 4, 3, 0),
            ("2bw", 2, 3, 1),
            ("2bw", 3, 4, 0),
            ("2bw", 4, 3, 0),
        )
    ),
]


@pytest.mark.parametrize(("policy", "p", "accumulate", "extra"), CASES)
def test_equals_the_reference_within_what_is_promised(policy: str, p: int, accumulate: int, extra: int) -> None:
    """And needs all of it."""
    ranks, schedule = require_equal_under_policy(policy, p, accumulate, extra, Chain)
    assert schedule.epoch_length == EPOCH_LENGTH
    endless = replace(schedule, epoch_length=None)
    for of_rank, stage in zip(ranks, reversed(range(p))):
        assert of_rank.found.most_alive == schedule.live_versions(stage, p)
        assert of_rank.found.most_delay == schedule.most_delay(stage, p)
        assert of_rank.found.promised_delay == endless.most_delay(stage, p)


@pytest.mark.parametrize("policy", ["2bw", pytest.param("vertical", marks=FULL)])
def test_where_the_pipeline_is_filled_anew_the_first_mini_batches_use_the_newest(policy: str) -> None:
    """Each epoch trains as if it were the first; with a plain optimizer, the weights are all that it starts from."""
    accumulate = 2
    module = partial(Chain, optimizer="plain_sgd")
    seen = fit_in_pipeline(
        3,
        module,
        noise_loader,
        strategy={"versions": policy, "cross_epoch": False, "split_points": ["net.1", "net.2"]},
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )[0]
    reference = module()
    names = [name for name, _ in reference.named_parameters()]
    blocks_of = (["net.0"], ["net.1"], ["net.2", "net.3"])
    stages = [[name for name in names if name[: len("net.0")] in blocks] for blocks in blocks_of]
    losses = []
    for epoch in range(2):
        losses += train_delayed(
            reference,
            stages,
            [(seen.batches[epoch * EPOCH_LENGTH + i], i % accumulate == 1) for i in range(EPOCH_LENGTH)],
            lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
            make_optimizer("plain_sgd", None),
            accumulate,
            policy=policy,
        )
    assert losses == seen.losses
    require_same_bits(seen.weights, dict(reference.named_parameters()))


def test_policies_make_a_difference() -> None:
    """Else the tests above would say nothing."""
    losses = {
        policy: fit_in_pipeline(
            3, Chain, noise_loader, strategy={"versions": policy}, max_epochs=1, accumulate_grad_batches=3
        )[0].losses
        for policy in POLICIES
    }
    for one, other in itertools.combinations(losses.values(), 2):
        assert one[:2] == other[:2]
        assert one != other
