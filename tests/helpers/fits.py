"""Runs a fit on every rank of a pipeline, forked from this process, and brings back what each of them saw."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.stage.absent import AbsentParameter
from tests.helpers.ranks import run_ranks

Numbers = dict[str, Tensor]


@dataclass
class Seen:
    """What one rank saw of a fit.

    Attributes:
        losses: of each mini-batch, before the division by `accumulate_grad_batches`.
        batches: the mini-batches that its loop came by.
        weights: at the end; whole on rank 0, unless the module stays in parts.
        spans: what the stage did, in order: (kind, mini-batch).
        metrics: the trainer's callback metrics at the end.
        found: whatever the test's own `look` returned.
    """

    losses: list[float] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    weights: Numbers = field(default_factory=dict)
    spans: list[tuple[str, int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    found: Any = None


class Watcher(pl.Callback):
    """Notes each mini-batch and its loss."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # There are none where the step returned None.
        if outputs:
            self.seen.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.seen.batches.append(batch)


class Notes(Logger):
    """A logger that keeps in memory what it is given."""

    name = "notes"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        """The rows with a name that begins so."""
        return [(step, row) for step, row in self.rows if any(name.startswith(prefix) for name in row)]


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer that writes nothing, unless told otherwise."""
    # Lightning advises data loader workers, which would only slow these tests down.
    warnings.filterwarnings("ignore", module="lightning")
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **options})


def fit_in_pipeline(
    stages: int,
    module: Callable[[], pl.LightningModule],
    train: Callable[[], Any],
    val: Callable[[], Any] | None = None,
    *,
    devices: int | None = None,
    nodes: int = 1,
    strategy: dict[str, Any] | None = None,
    **options: Any,
) -> list[Seen]:
    """Fit in `stages` processes, or in fewer that hold several each.

    Args:
        stages: p.
        module: makes the module, on each rank.
        train: makes the training loader.
        val: makes the validation loader.
        devices: processes; None for one per stage.
        nodes: machines that they are spread over, as torchrun tells its workers of them; all of them are this one.
        strategy: options of the strategy.
        options: see `fit_on_rank`.

    Returns:
        What each rank saw, rank 0 (the last stage) first.
    """

    def on_rank(rank: int) -> Seen:
        chosen = ContinuousPipeStrategy(num_stages=stages, **(strategy or {}))
        node, local_rank = divmod(rank, per_node)
        told = {"GROUP_RANK": node, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": per_node}
        os.environ.update({name: str(number) for name, number in told.items()})
        return fit_on_rank(module, train, val, strategy=chosen, devices=per_node, num_nodes=nodes, **options)

    ranks = devices or stages
    per_node = ranks // nodes
    return run_ranks(on_rank, ranks)


def fit_alone(
    module: Callable[[], pl.LightningModule],
    train: Callable[[], Any],
    val: Callable[[], Any] | None = None,
    **options: Any,
) -> Seen:
    """The same fit in plain Lightning, on one device."""
    return run_ranks(lambda _: fit_on_rank(module, train, val, strategy="auto", devices=1, **options), 1)[0]


def fit_on_rank(
    module: Callable[[], pl.LightningModule],
    train: Callable[[], Any],
    val: Callable[[], Any] | None,
    *,
    callbacks: Callable[[], list[pl.Callback]] = list,
    look: Callable[[pl.Trainer, pl.LightningModule], Any] | None = None,
    seed: int = 7,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Seen:
    """This process's part of a fit.

    Args:
        module: makes the module.
        train: makes the training loader.
        val: makes the validation loader.
        callbacks: makes further callbacks.
        look: runs after the fit; what it returns comes back in `Seen.found`.
        seed: of everything.
        ckpt_path: where to resume from.
        options: of the Trainer.
    """
    pl.seed_everything(seed, verbose=False)
    watcher = Watcher()
    trainer = quiet_trainer(callbacks=[watcher, *callbacks()], **options)
    made = module()
    trainer.fit(made, train(), None if val is None else val(), ckpt_path=ckpt_path)
    seen = watcher.seen
    here = {name: p for name, p in made.named_parameters() if not isinstance(p, AbsentParameter)}
    seen.weights = {name: p.detach().clone() for name, p in here.items()}
    if isinstance(trainer.strategy, ContinuousPipeStrategy):
        seen.spans = [(span.kind, span.batch) for span in trainer.strategy.timeline.spans]
    seen.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seen.found = None if look is None else look(trainer, made)
    return seen


def in_pipeline(stages: int, scenario: Callable[..., Any]) -> list[Any]:
    """What `scenario(**options)` returns on each rank; with `options`, a Trainer runs in a pipeline."""
    return run_ranks(lambda _: scenario(strategy=ContinuousPipeStrategy(), devices=stages), stages)


def alone(scenario: Callable[..., Any]) -> Any:
    """What `scenario(**options)` returns in plain Lightning, on one device."""
    return run_ranks(lambda _: scenario(strategy="auto", devices=1), 1)[0]


def require_plain_results(
    stages: int, module: Callable[[], pl.LightningModule], train: Callable[[], Any], **options: Any
) -> Seen:
    """An epoch with one update at its end has no delay, so that plain Lightning gives the same bits for any p.

    Returns:
        What rank 0 saw.
    """
    options = {"max_epochs": 1, "accumulate_grad_batches": 1000, **options}
    seen = fit_in_pipeline(stages, module, train, **options)[0]
    plain = fit_alone(module, train, **options)
    assert seen.losses == plain.losses
    assert len(seen.losses) > 0
    assert seen.metrics == plain.metrics
    require_same_bits(seen.weights, plain.weights)
    return seen


def require_same_bits(a: Numbers, b: Numbers) -> None:
    """Every tensor equal to the bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"
