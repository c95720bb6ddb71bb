"""Holds a run in a pipeline against the oracle."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.policies import POLICIES
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.randomness import derived_seed
from lightning_cpipe.strategy.ranks.replicas import seed_of_replica
from tests.helpers.fits import Numbers, Seen, fit_in_pipeline, require_same_bits
from tests.helpers.modules import make_optimizer, noise_loader
from tests.helpers.reference import ByNorm, Scaled, train_delayed

SEED = 7


@dataclass
class Found:
    """What one rank knows besides.

    Attributes:
        cut: of the module.
        gradients: of the first mini-batch, on this stage.
        buffers: at the end; whole on rank 0.
        most_alive: versions that held memory at once on the last of this rank's stages.
        all_alive: likewise on each of them, in order.
        most_delay: of its gradients, as measured.
        promised_delay: as promised.
    """

    cut: Cut
    gradients: Numbers
    buffers: Numbers
    most_alive: int
    all_alive: list[int]
    most_delay: int
    promised_delay: int


class Witness(pl.Callback):
    """Notes the cut, the gradients of the first mini-batch, and what the versions of the weights cost."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.cut = trainer.strategy.stage_run.cut
        self.gradients: Numbers = {}
        self.alive: dict[int, int] = {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = pl_module.named_parameters()
        self.gradients = self.gradients or {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        training = trainer.strategy.stage_run.training
        for stage, stream in training.stages.items():
            self.alive[stage] = max(self.alive.get(stage, 0), stream.versions.alive)
        self.most_delay = training.last.news.books.figures().most_delay
        self.promised_delay = trainer.strategy.promised_delay(trainer.strategy.stage)


def look(trainer: pl.Trainer, module: pl.LightningModule) -> Found:
    """What a `Witness` noted, after the fit."""
    seen = next(each for each in trainer.callbacks if isinstance(each, Witness))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    alive = [seen.alive[stage] for stage in sorted(seen.alive)]
    return Found(seen.cut, seen.gradients, buffers, alive[-1], alive, seen.most_delay, seen.promised_delay)


def require_equal_to_reference(
    p: int,
    module: Callable[[], pl.LightningModule],
    train: Callable[[], Any],
    optimizer_of: Callable[[list[nn.Parameter]], tuple[torch.optim.Optimizer, Any]],
    *,
    epochs: int,
    accumulate: int = 1,
    devices: int | None = None,
    clip: ByNorm | None = None,
    scaled: Scaled | None = None,
    options: dict[str, Any] | None = None,
    replicas: int = 1,
    nodes: int = 1,
    **strategy: Any,
) -> list[Seen]:
    """The loss of every step and the final weights and buffers are those of training with delayed gradients.

    Args:
        p: stages.
        module: makes the module.
        train: makes its loader.
        optimizer_of: see `train_delayed`; what the module configures.
        epochs: how many are trained.
        accumulate: mini-batches for an update.
        devices: processes; None for one per stage.
        clip: how gradients are clipped.
        scaled: how the loss is scaled.
        options: further ones of the Trainer.
        replicas: pipelines side by side. Their mean gradient is the reference's to the bit for two; the sums of more
            may round otherwise.
        nodes: machines that they are spread over.
        strategy: options of the strategy.

    Returns:
        What the ranks saw; each has `Found`.
    """
    ranks = fit_in_pipeline(
        p,
        module,
        train,
        devices=devices or replicas * p,
        nodes=nodes,
        strategy={**strategy, "data_parallel_size": replicas, **({} if clip is None else {"clip": clip.how})},
        callbacks=lambda: [Witness()],
        look=look,
        seed=SEED,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if clip is None else clip.largest,
        **(options := options or {}),
    )
    lasts = ranks[:: len(ranks) // replicas]
    seen = lasts[0]
    precision = "16-mixed" if scaled is not None else options.get("precision", "32-true")
    whole = TrainingStep(module(), precision)
    per_epoch = len(seen.batches) // epochs
    stages, aliases = names_on_stages(whole, seen.found.cut, seen.batches[0])
    losses: list[list[float]] = [[] for _ in lasts]

    def losses_of(net: Callable[..., Any], batches: tuple[int, list[Any]]) -> list[Tensor | None]:
        number, own = batches
        found: list[Tensor | None] = []
        for replica, batch in enumerate(own):
            with random_numbers_of(whole.module, seen.found.cut, number, seed_of_replica(SEED, replica)):
                found.append(net(batch))
        for told, loss in zip(losses, found):
            told += [] if loss is None else [loss.item()]
        return found

    train_delayed(
        whole,
        stages,
        [
            ((i, batches), _updates_after(i % per_epoch, per_epoch, accumulate))
            for i, batches in enumerate(zip(*(each.batches for each in lasts)))
        ],
        losses_of,
        optimizer_of,
        accumulate,
        strategy.get("extra_in_flight", 0),
        aliases=aliases,
        policy=strategy.get("versions", "stash"),
        **({} if clip is None else {"clip": clip}),
        scaled=scaled,
    )
    for own, each in zip(losses, lasts):
        # Lightning shows the loss divided by `accumulate`, in the precision that it has.
        shown = torch.tensor(own, dtype=torch.float64 if precision == "64-true" else torch.float32) / accumulate
        assert [loss * accumulate for loss in shown.tolist()] == each.losses
    require_same_bits(seen.weights, dict(whole.module.named_parameters()))
    require_same_bits(seen.found.buffers, dict(whole.module.named_buffers()))
    return ranks


def require_equal_under_policy(
    policy: str, p: int, accumulate: int, extra: int, module: Callable[..., pl.LightningModule], **options: Any
) -> tuple[list[Seen], Continuous]:
    """The same with a version policy, in three shuffled epochs.

    Returns:
        What the ranks saw, and the schedule that was trained.
    """
    optimizer = "adamw" if accumulate > 1 else "sgd"
    ranks = require_equal_to_reference(
        p,
        partial(module, optimizer=optimizer),
        partial(noise_loader, shuffle=True),
        make_optimizer(optimizer, None),
        epochs=(epochs := 3),
        accumulate=accumulate,
        extra_in_flight=extra,
        versions=policy,
        **options,
    )
    per_epoch = len(ranks[0].batches) // epochs
    return ranks, Continuous(extra, accumulate, epoch_length=per_epoch, versions=POLICIES[policy])


def names_on_stages(whole: TrainingStep, cut: Cut, batch: Any) -> tuple[list[list[str]], dict[str, str]]:
    """The parameters that each stage trains, by the name that it uses; and further names that it uses for them.

    Seen by running the step on a copy: a stage begins where the module that begins it is entered.
    """
    used: list[set[str]] = [set() for _ in range(cut.num_stages)]
    starts = [f"module.{start}" for start in cut.starts]
    at = [0]

    def enter(name: str, module: nn.Module, *_: Any) -> None:
        at[0] += at[0] < len(starts) and name == starts[at[0]]
        used[at[0]].update(f"{name}.{key}" for key in module._parameters)

    watched = copy.deepcopy(whole)
    for name, each in watched.named_modules(remove_duplicate=False):
        each.register_forward_pre_hook(partial(enter, name))
    with torch.random.fork_rng(devices=[]):
        watched(copy.deepcopy(batch))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    stages: list[list[str]] = [[] for _ in used]
    aliases: dict[str, str] = {}
    for first, *others in names.values():
        for stage in cut.trained_on.get(first.removeprefix("module."), ()):
            # What hangs in no module that is called is used by the name that it has.
            name, *more = [name for name in (first, *others) if name in used[stage]] or [first]
            stages[stage].append(name)
            aliases.update(dict.fromkeys(more, name))
    return stages, aliases


class TrainingStep(nn.Module):
    """A LightningModule's `training_step` as a forward, heard by nobody."""

    def __init__(self, module: pl.LightningModule, precision: str = "32-true") -> None:
        super().__init__()
        module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        self.module = module.to({"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision))
        self.autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def forward(self, batch: Any) -> Tensor:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            loss: Tensor = self.module.training_step(batch, 0)
        return loss


@contextmanager
def random_numbers_of(module: nn.Module, cut: Cut, batch: int, seed: int = SEED) -> Iterator[None]:
    """The contract: a step starts from RNG(seed, j), and a module that draws from RNG(seed, j, module).

    A module that draws and is called more than once takes a number from the step's own generator, too.
    """
    seed = derived_seed(seed, "mini-batch", batch)
    outer: list[Tensor] = []

    def before(name: str, *_: Any) -> None:
        again = [int(torch.empty((), dtype=torch.int64).random_())] if name in cut.draws_repeatedly else []
        outer.append(torch.get_rng_state())
        torch.manual_seed(derived_seed(seed, name, *again))

    def after(*_: Any) -> None:
        torch.set_rng_state(outer.pop())

    numpy, python = np.random.get_state(), random.getstate()
    try:
        with ExitStack() as hooks, torch.random.fork_rng(devices=[]):
            for name in cut.draws:
                each = module.get_submodule(name)
                hooks.callback(each.register_forward_pre_hook(partial(before, name)).remove)
                hooks.callback(each.register_forward_hook(after).remove)
            torch.manual_seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy)
        random.setstate(python)


def _updates_after(place: int, per_epoch: int, accumulate: int) -> bool:
    return (place + 1) % accumulate == 0 or place + 1 == per_epoch
