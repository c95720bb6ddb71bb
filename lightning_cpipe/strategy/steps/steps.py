"""One rank's steps: what the mini-batches that Lightning's loops hand over mean to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cpipe.engine.mini_batch import Mark, MiniBatch, fingerprint
from lightning_cpipe.engine.stage_stream import InFlight, OfLoss
from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.randomness import GeneratorState, derived_seed, get_state, seeded
from lightning_cpipe.strategy.data.drawn import Drawn, Released
from lightning_cpipe.strategy.data.micro_batches import MicroBatch, MicroBatches
from lightning_cpipe.strategy.finetuning import finetunes
from lightning_cpipe.strategy.lightning_private import (
    end_open_records,
    has_transfer_hooks,
    prepare_batch,
    training_arguments,
    updates_after_this_batch,
)
from lightning_cpipe.strategy.loops import at_its_own_time, fetcher_of
from lightning_cpipe.strategy.ranks.elsewhere import on_another_rank
from lightning_cpipe.strategy.setup.looks import Looks, is_due
from lightning_cpipe.strategy.steps.not_finite import refuse_nan
from lightning_cpipe.strategy.steps.one_step import OneStep
from lightning_cpipe.strategy.steps.stage_run import StageRun
from lightning_cpipe.tree import Content, TemplateTable, TensorSpec, copied


class Steps:
    """Runs a step's forward on one mini-batch and its backward on another.

    Args:
        trainer: whose loops hand over the mini-batches.
        run: the stages and their streams.
        seed: what all random numbers follow from.
        device: where the stages compute.
        loads: whether this rank loads batches, with numbers of their own.
    """

    def __init__(self, trainer: pl.Trainer, run: StageRun, seed: int, device: torch.device, loads: bool = True) -> None:
        self._trainer = trainer
        self._lightning_module = trainer.lightning_module
        self._precision = trainer.precision_plugin
        self._scaler = getattr(self._precision, "scaler", None)
        self._run = run
        self._several = run.cut.num_stages > 1
        self.seed = seed
        """What all random numbers follow from."""
        self._device = device
        self._loads = loads
        self._takes_batch_idx = self._transfers_its_own_way = True
        self.evaluations = 0
        """How many evaluations were begun; their random numbers follow from that, too."""
        self._mark: Mark = (-1, None)
        self._outside: GeneratorState | None = None
        self._trainable: dict[str, bool] = {}
        self._looks = {each.stage: Looks(self._lightning_module, each, device, loads) for each in run.modules}
        self._micro_batches: MicroBatches | None = None
        self._one_step = OneStep(trainer)
        self.running = False
        """Whether the user's `training_step` is running."""
        self.left_out = False
        """Whether the mini-batch at hand has no loss, so that it is left out on all stages."""

    def begin_training(
        self,
        schedule: Schedule,
        num_microbatches: int | None,
        looks: bool,
        sums: Mapping[str, TensorSpec],
        *,
        keep: bool = False,
    ) -> TrainingStream:
        """Be ready to train the weights that are on this rank's stages.

        Args:
            schedule: who does what, when.
            num_microbatches: slices of a mini-batch; None where the schedule streams whole mini-batches.
            looks: whether stages look for what they use and do not receive.
            sums: what the stages tell each other of their gradients, by purpose.
            keep: whether a later run may go on from any step of this one.
        """
        # What a callback may unfreeze has a place in all that is made here.
        self._trainable = {} if finetunes(self._trainer) else self._trainable_now()
        self._takes_batch_idx = len(training_arguments(self._trainer, None, 0)) > 1
        self._transfers_its_own_way = has_transfer_hooks(self._trainer)
        source = fetcher_of(self._trainer)
        if num_microbatches is not None:
            self._micro_batches = MicroBatches(
                source, self._lightning_module, num_microbatches, self._prepared, weighs=self._run.has_last
            )
        training = self._run.train(schedule, source, self._run_training_step, self._micro_batches, sums, keep=keep)
        if self._several and looks:
            for stage, stream in training.stages.items():
                stream.before_forward = partial(self._look, stage)
        return training

    def require_same_trainable(self) -> None:
        """The weights that get a gradient must be those for which the module was cut.

        Raises:
            MisconfigurationException: if some were frozen or unfrozen since.
        """
        now = self._trainable_now()
        changed = [name for name, was in self._trainable.items() if self._several and now.get(name) != was]
        if changed:
            raise MisconfigurationException(
                f"`requires_grad` of {len(changed)} parameters changed since the module was cut, that of {changed[0]!r}"
                " first: stages send each other the gradients that were needed then. Let a `BaseFinetuning` callback do"
                " it; or freeze and unfreeze before `fit`, and fit again after a change."
            )

    def _trainable_now(self) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in self._lightning_module.named_parameters()}

    def prepare(self, batch: Any, as_usual: Callable[[Any], Any]) -> Any:
        """A batch as the step gets it; `as_usual` does what Lightning does with those of an evaluation."""
        if isinstance(batch, Released):
            return self._prepared(batch.drawn)
        number = self._mark[0] + 1
        own = derived_seed(self.seed, "transfer", self.evaluations, number)
        with seeded(own) if self._several and self._transfers_its_own_way else nullcontext():
            prepared = as_usual(batch)
        self._mark = (number, fingerprint(batch) if self._several and self._loads else None)
        return prepared

    def train(self) -> Any:
        """The forwards of this local step; returns what `training_step` returned for the loop's own mini-batch."""
        drawn = self._at
        if not self._several:
            self._run.training.skip_to(drawn.number)
        self._run.training.forward_until(drawn.number)
        numbers = self._numbers
        returned = None
        if self._run.has_last and len(numbers) == 1:
            returned = self._run.training.last.in_flight[numbers[0]].returned
        if len(numbers) == 1 and self._several:
            self.left_out = self._run.agree_to_leave_out(drawn.number, returned is None)
        elif len(numbers) == 1 and returned is None:
            self._run.training.skip(drawn.number)
            return None
        if returned is None:
            # Lightning wants a loss on every rank; `backward` uses the gradient that comes instead, or the losses of
            # the micro-batches, of which some are forwarded later, or nothing.
            return torch.zeros((), device=self._device, requires_grad=True)
        if isinstance(loss := returned.get("loss") if isinstance(returned, Mapping) else returned, Tensor):
            refuse_nan(drawn, loss)
        return returned

    def backward(self, loss: Tensor, run: Callable[[Tensor], object]) -> None:
        """The backward of the loop's own mini-batch; on the last stage, `run` runs that of its loss."""
        sliced = len(self._numbers) > 1

        def of_loss(work: InFlight) -> OfLoss:
            micro_batch = work.mini_batch
            if sliced and isinstance(micro_batch, MicroBatch):
                share = self._one_step.share_of(micro_batch, work.returned)
                return share if self._scaler is None else self._scaler.scale(share), run
            return loss, run

        self._run.training.last.of_loss = of_loss if self._run.has_last else None
        self._run.training.backward(self._at.number, before_update=updates_after_this_batch(self._trainer))
        # It holds the loss, and with it whatever its graph keeps.
        self._run.training.last.of_loss = None
        if sliced and self._run.has_last:
            self._one_step.end()

    def output(self, output: dict[str, Any]) -> dict[str, Any]:
        """What the hooks get as the output of the local step; on the last stage, with the true loss."""
        if self.left_out:
            return {}
        sliced = len(self._numbers) > 1
        return self._one_step.output(output) if sliced and self._run.has_last else output

    def begin_update_if_due(self) -> None:
        """After a backward: the optimizer steps next, unless gradients are still being accumulated."""
        if updates_after_this_batch(self._trainer):
            self._run.training.begin_update(self._at.number)

    def require_complete_gradients(self) -> None:
        """The gradients must be those of the mini-batches that share an update, all of them.

        Raises:
            RuntimeError: if the update at hand has not begun.
        """
        if self.running or self._run.training.updated != self._numbers[0]:
            raise RuntimeError(
                f"the gradients are not complete at mini-batch {self._at.number}: look at them in"
                " `on_before_optimizer_step`, or after it until the next step begins."
            )

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The optimizer's step, closure included, runs inside."""
        with self._run.training.updating():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation runs inside, in a random scope of its own where several ranks must agree."""
        self.evaluations += 1
        self._mark = (-1, None)
        if not self._several:
            yield
            return
        self._outside = get_state()
        with seeded(derived_seed(self.seed, "evaluation", self.evaluations)):
            yield
        self._outside = None

    @property
    def random_state(self) -> GeneratorState:
        """What training's hooks draw from next, asked in an evaluation, too."""
        return self._outside or get_state()

    def evaluate(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """`validation_step`, `test_step` or `predict_step` on this rank's stages."""
        step = getattr(self._lightning_module, name)
        seed = derived_seed(self.seed, name, self.evaluations, self._mark[0])
        returned = None
        for stage, stream in zip(self._run.stages, self._run.evaluations[name]):
            own = self._own(arguments, stage)
            with self._where_it_belongs(stage):
                returned = stream.run(own[0], self._mark, seed, partial(step, *own))
            end_open_records(self._trainer)
        return returned

    def _own(self, batch: Content, stage: int) -> Content:
        """For each stage a batch of its own, as in a process of its own: a step may write into it.

        The last one has the batch that the loop's hooks see.
        """
        return batch if stage == self._run.stages[-1] else copied(batch)

    def _where_it_belongs(self, stage: int) -> AbstractContextManager[None]:
        """A stage's step runs inside, as if each stage had a rank."""
        last = self._run.cut.num_stages - 1
        if stage == last or not self._run.has_last:
            return nullcontext()
        return on_another_rank(self._lightning_module, last - stage)

    @property
    def _numbers(self) -> range:
        """What the plan says of the mini-batch at hand is about these: its micro-batches, or itself."""
        if self._micro_batches is not None:
            return self._micro_batches.numbers
        return range(self._at.number, self._at.number + 1)

    @property
    def _at(self) -> Drawn:
        """The mini-batch that the training loop is at."""
        released = fetcher_of(self._trainer).released
        assert released is not None
        return released

    def _run_training_step(self, stage: int, mini_batch: MiniBatch) -> Any:
        """Call the user's step for a stage, on a mini-batch that may be ahead of the loop."""
        assert isinstance(mini_batch, Drawn)
        with at_its_own_time(self._trainer, mini_batch), self._where_it_belongs(stage):
            arguments = self._arguments(stage, mini_batch)
            self.running = True
            try:
                with self._heard_for(stage, mini_batch), self._precision.train_step_context():
                    return self._lightning_module.training_step(*arguments)
            finally:
                self.running = False
                end_open_records(self._trainer)

    def _look(self, stage: int, mini_batch: MiniBatch, received: Sequence[Tensor], table: TemplateTable) -> None:
        """See whether the user's step still uses no more than what crosses the cut."""
        assert isinstance(mini_batch, Drawn)
        with at_its_own_time(self._trainer, mini_batch):
            # Here no stage's own state hangs in the module: what transfer hooks write there is for all.
            self._prepared(mini_batch)
            if is_due(mini_batch.number):
                with self._where_it_belongs(stage):
                    self._looks[stage].look(mini_batch, self._arguments(stage, mini_batch), received, table)

    def _arguments(self, stage: int, drawn: Drawn) -> tuple[Any, ...]:
        batch = self._own(self._prepared(drawn), stage)
        return (batch, drawn.index) if self._takes_batch_idx else (batch,)

    def _heard_for(self, stage: int, mini_batch: Drawn) -> AbstractContextManager[None]:
        """What is logged inside is logged for this mini-batch, or for this slice of one."""
        last = self._run.cut.num_stages - 1
        if not (isinstance(mini_batch, MicroBatch) and stage == last and len(self._numbers) > 1):
            return nullcontext()
        if mini_batch.number == self._numbers[0]:
            self._one_step.begin()
        return self._one_step.running(mini_batch)

    def _prepared(self, drawn: Drawn) -> Any:
        """The mini-batch as the step gets it; prepared once."""
        if not drawn.prepared:
            own: AbstractContextManager[None] = nullcontext()
            if self._transfers_its_own_way:
                own = seeded(derived_seed(drawn.seed, "transfer"))
            with own:
                drawn.prepared.append(prepare_batch(self._lightning_module, drawn.batch, self._device))
        return drawn.prepared[0]
