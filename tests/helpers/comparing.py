"""Holds a run in a pipeline against the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.probe.balance import balanced_starts
from lightning_cpipe.stage.randomness import derived_seed
from tests.helpers.fits import fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, make_optimizer, noise_loader
from tests.helpers.reference import train_delayed

EPOCHS = 3
SEED = 7


def require_equal_to_reference(
    p: int,
    optimizer: str = "sgd",
    accumulate: int = 1,
    schedule: str | None = None,
    extra_in_flight: int = 0,
    dropout: float = 0.0,
    noise: bool = False,
) -> None:
    """Losses of every step and final weights of three shuffled epochs of 8 mini-batches, the last one shorter."""
    module = partial(Chain, optimizer=optimizer, schedule=schedule, dropout=dropout, noise=noise)
    seen = fit_in_pipeline(
        p,
        module,
        partial(noise_loader, samples=22, batch_size=3, shuffle=True),
        strategy={"extra_in_flight": extra_in_flight},
        seed=SEED,
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )[0]
    reference = module()
    per_epoch = len(seen.batches) // EPOCHS
    losses = train_delayed(
        reference,
        stages_of(reference, p),
        [(batch, _updates_after(i % per_epoch, per_epoch, accumulate)) for i, batch in enumerate(seen.batches)],
        partial(loss_of, noise=noise),
        make_optimizer(optimizer, schedule),
        accumulate,
        extra_in_flight,
        partial(random_numbers_of, reference),
    )
    # Lightning shows the loss divided by `accumulate`.
    assert [float(torch.tensor(loss) / accumulate) * accumulate for loss in losses] == seen.losses
    require_same_bits(seen.weights, dict(reference.named_parameters()))


def stages_of(module: Chain, num_stages: int) -> list[list[str]]:
    """The parameters of each stage; the blocks are all alike."""
    starts = [0, *balanced_starts([1.0] * len(module.net), num_stages), len(module.net)]
    names = [name for name, _ in module.named_parameters()]
    return [
        [name for name in names if int(name.split(".")[1]) in range(begin, end)]
        for begin, end in itertools.pairwise(starts)
    ]


def loss_of(net: Callable[[Tensor], Tensor], batch: Any, noise: bool) -> Tensor:
    """What `Chain.loss` computes."""
    x, y = batch
    if noise:
        x = x + 0.1 * torch.randn_like(x)
    return nn.functional.mse_loss(net(x), y)


@contextmanager
def random_numbers_of(module: Chain, batch: int) -> Iterator[None]:
    """The contract: a step starts from RNG(seed, j), and a block that draws from RNG(seed, j, block)."""
    seed = derived_seed(SEED, "mini-batch", batch)
    outer: list[Tensor] = []

    def before(name: str, *_: Any) -> None:
        outer.append(torch.get_rng_state())
        torch.manual_seed(derived_seed(seed, name))

    def after(*_: Any) -> None:
        torch.set_rng_state(outer.pop())

    with ExitStack() as hooks, torch.random.fork_rng(devices=[]):
        for name, block in module.net.named_children():
            hooks.callback(block.register_forward_pre_hook(partial(before, f"net.{name}")).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        torch.manual_seed(seed)
        yield


def _updates_after(place: int, per_epoch: int, accumulate: int) -> bool:
    return (place + 1) % accumulate == 0 or place + 1 == per_epoch
