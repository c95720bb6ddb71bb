"""Prepares the probe: the steps of a LightningModule that will run, on the first batch that each will see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_cpipe.balance.costs import Costs
from lightning_cpipe.balance.measure import measure
from lightning_cpipe.balance.memory import MemoryNeeds
from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.probe import Check, probe
from lightning_cpipe.probe.step import Observed, Step, StepBatch
from lightning_cpipe.probe.survey import Survey, survey
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.randomness import derived_seed, unchanged
from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.data.micro_batches import micro_batches
from lightning_cpipe.strategy.lightning_private import (
    combined_loader_of,
    evaluation_arguments,
    instead_of,
    prepare_batch,
    training_arguments,
)
from lightning_cpipe.strategy.loops import PipelineEvaluationLoop, PipelinePredictionLoop
from lightning_cpipe.strategy.ranks.replicas import alone_in_steps
from lightning_cpipe.strategy.setup.refusals import refuse_broadcast
from lightning_cpipe.strategy.step_names import STEPS
from lightning_cpipe.tree import copied, flatten, signature


def training_probe_step(
    module: pl.LightningModule, drawn: Drawn, device: torch.device, seed: int, num_microbatches: int = 1
) -> Step:
    """`training_step` on the first mini-batch that will be trained, or on the first micro-batch of it that counts."""
    with unchanged():
        batch = prepare_batch(module, drawn.batch, device)
        if num_microbatches > 1:
            slices = micro_batches(drawn, batch, module, num_microbatches)
            # The loss of one that does not count may be no number, which compares with nothing.
            drawn = next((each for each in slices if each.weight), slices[0])
            batch = drawn.batch
    arguments = training_arguments(module.trainer, batch, drawn.index)
    return _step(module, "training_step", arguments, seed, drawn.signature)


def evaluation_probe_step(
    module: pl.LightningModule,
    loop: PipelineEvaluationLoop | PipelinePredictionLoop,
    name: str,
    device: torch.device,
    seed: int,
) -> list[Step]:
    """An evaluation's step on the first batch of its first loader; none if the evaluation will not run."""
    with unchanged():
        loop.set_up_once()
        loader = combined_loader_of(loop)
        if loader is None or not sum(loop.max_batches):
            return []
        batch, index, _ = next(iter(loader))
        loader.reset()
        prepared = prepare_batch(module, batch, device)
    return [_step(module, name, evaluation_arguments(loop, name, prepared, index), seed, signature(prepared))]


@dataclass(frozen=True)
class Choice:
    """Where a module is to be cut.

    Attributes:
        survey: of its first step.
        starts: the modules that begin stages 1, 2, ….
        costs: of the blocks; None where nothing depended on them.
    """

    survey: Survey
    starts: tuple[str, ...]
    costs: Costs | None


def find_cut(
    module: pl.LightningModule,
    steps: Sequence[Step],
    num_stages: int,
    split_points: str | Sequence[str],
    device: torch.device,
    check: Check | None,
    needs: MemoryNeeds | None = None,
    unread: Collection[int] = (),
) -> Cut:
    """Choose where to cut, and probe it; see `probe`.

    Args:
        module: the whole module.
        steps: its steps; the first one's costs are balanced.
        num_stages: p.
        split_points: see `ContinuousPipeStrategy`.
        device: where the module is.
        check: see `ContinuousPipeStrategy`.
        needs: of memory, if there is a limit.
        unread: the stages that will have no batch.

    Raises:
        CutError: if the module can't be cut there.
    """
    with not_compiled():
        choice = choose_starts(module, steps[0], num_stages, split_points, device, needs)
        if choice.costs is not None and num_stages > 1 and isinstance(split_points, str):
            by = "measured times" if choice.costs.by_time else "floating-point operations"
            rank_zero_info(
                f"{num_stages} stages, balanced by {by}. `split_points={list(choice.starts)}` would cut in the same"
                " places anywhere."
            )
        return probe(module, steps, choice.survey, choice.starts, device, check, unread)


def not_compiled() -> AbstractContextManager[Any]:
    """Inside, `torch.compile` does nothing: the probe runs each block in more ways than training ever will.

    They would count against the limit of compilations, and take longest of all.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)  # Since torch 2.6.
    return nullcontext() if set_stance is None else set_stance("force_eager")


def choose_starts(
    module: pl.LightningModule,
    step: Step,
    num_stages: int,
    split_points: str | Sequence[str],
    device: torch.device,
    needs: MemoryNeeds | None = None,
    *,
    measured: bool = False,
) -> Choice:
    """Choose where to cut.

    Args:
        module: the whole module.
        step: the one whose costs are balanced.
        num_stages: p.
        split_points: see `ContinuousPipeStrategy`.
        device: where the module is.
        needs: of memory. A limit counts for what trains.
        measured: whether to measure costs even if nothing depends on them.

    Raises:
        CutError: if there are no such places, or no cut is within the limit.
    """
    with untouched(module):
        seen = survey(module, step.run)
    if num_stages == 1:
        split_points = []
    auto = isinstance(split_points, str)
    given: list[str] = []
    if auto:
        _require_enough_blocks(module, seen, num_stages)
    else:
        given = _existing(module, seen, num_stages, split_points)
    if needs is None or not step.trains:
        needs = MemoryNeeds(Continuous(), num_stages)
    # Stages may begin inside blocks; where a module is not called once, the probe says so.
    places = [name for name in seen.begun if name in seen.blocks or name in given]
    countable = bool(places) and all(seen.calls[name] == 1 for name in given)
    if not countable or not (measured or needs.limit is not None or auto):
        return Choice(seen, tuple(given), None)
    costs = measure(module, step, seen, places, device)
    if auto:
        starts = needs.balanced_starts(costs)
        return Choice(seen, tuple(places[start] for start in starts), costs)
    needs.require_within(costs, sorted(map(places.index, given)), "the cut that `split_points` asks for")
    return Choice(seen, tuple(given), costs)


def _require_enough_blocks(module: pl.LightningModule, seen: Survey, num_stages: int) -> None:
    if len(seen.blocks) < num_stages:
        raise CutError(
            f"{num_stages} stages need as many blocks, and {type(module).__name__} has {len(seen.blocks)} where a"
            f" stage could begin: {', '.join(seen.blocks) or 'none'}. A block is a child of the `nn.Sequential` or"
            " `nn.ModuleList` that holds most parameters, called exactly once per step."
            + (f" Called more often: {', '.join(seen.repeated)}." if seen.repeated else "")
            + " Lower `devices` (or `num_stages`), or name the modules that begin a stage with `split_points`."
        )


def _existing(module: pl.LightningModule, seen: Survey, num_stages: int, split_points: Sequence[str]) -> list[str]:
    """The split points, which must be modules, as many as there are cuts."""
    names = dict(module.named_modules())
    unknown = [name for name in split_points if name not in names]
    if unknown:
        raise CutError(
            f"split_points names modules that {type(module).__name__} does not have: {', '.join(unknown)}. Where a"
            f" stage could begin: {', '.join(seen.blocks)}."
        )
    if len(split_points) != num_stages - 1:
        raise CutError(
            f"{num_stages} stages begin at {num_stages - 1} split points besides the start; `split_points` has"
            f" {len(split_points)}."
        )
    return list(split_points)


def observe(module: pl.LightningModule, name: str, arguments: tuple[Any, ...]) -> Observed:
    """Run a step, unheard by the trainer and its loggers, and see what it gives.

    Raises:
        CutError: if training's step gives no loss.
    """
    returned, logged = run_unheard(module, name, arguments)
    if name != "training_step":
        return Observed(None, returned, logged)
    return Observed(_loss_of(returned), _without_loss(returned), logged)


def run_unheard(module: pl.LightningModule, name: str, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """What a step returns and logs; the trainer and its loggers hear nothing."""
    logged: dict[str, Any] = {}
    with unheard(module, logged), getattr(module.trainer.precision_plugin, STEPS[name].context)():
        if name != "training_step":
            module.eval()
        # A step may write into its batch, or take things out of it; each run of it gets a batch of its own.
        return getattr(module, name)(*copied(arguments)), logged


def _step(module: pl.LightningModule, name: str, arguments: tuple[Any, ...], seed: int, kind: Any) -> Step:
    call, trains = partial(observe, module, name, arguments), name == "training_step"
    batch, *others = arguments
    on_another = StepBatch(batch, lambda batch: observe(module, name, (batch, *others)))
    return Step(name, call, trains, derived_seed(seed, name), kind, str(module.trainer.precision), on_another)


@contextmanager
def unheard(module: pl.LightningModule, logged: dict[str, Any]) -> Iterator[None]:
    """What the step logs goes to `logged`, and nothing to the trainer, its loggers or the screen."""

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        logged[name] = _comparable(value)

    trainer = module.trainer
    loggers = trainer.loggers
    by_hand: list[Any] = []
    logged["by hand"] = by_hand
    undo: list[Callable[[], None]] = [
        instead_of(module, "log", log),
        instead_of(module, "print", lambda *_, **__: None),
    ]
    if trainer.world_size > 1:
        # Only rank 0 is here.
        undo.append(instead_of(trainer.strategy, "broadcast", refuse_broadcast))
        # While training streams it is nothing either.
        undo.append(instead_of(trainer.strategy, "barrier", lambda *_, **__: None))
        undo += alone_in_steps(trainer.strategy)
    trainer.loggers = [_Listener(by_hand) for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        for each in undo:
            each()


class _Listener(DummyLogger):
    """Stands for a logger; notes what it or its `experiment` is told, by whatever method, and writes nothing."""

    def __init__(self, told: list[Any]) -> None:
        super().__init__()
        self._told = told

    @property
    @override
    def experiment(self) -> Any:
        return self

    @override
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._told += map(_comparable, flatten((args, kwargs))[0])

    @override
    def __getattr__(self, name: str) -> Callable[..., None]:
        return self.log_metrics


def _comparable(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return torch.tensor(value)
    return value if isinstance(value, (Tensor, int, float, str)) else None


def _loss_of(returned: Any) -> Tensor:
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise CutError(
            f"`training_step` returned {type(loss).__name__} for the first batch, where a pipeline needs the loss: a"
            " tensor, or a dict with one under 'loss'. It may return None for later ones."
        )
    return loss


def _without_loss(returned: Any) -> Any:
    return {key: value for key, value in returned.items() if key != "loss"} if isinstance(returned, Mapping) else None
