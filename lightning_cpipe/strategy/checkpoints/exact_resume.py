"""Keeps in a checkpoint what a run needs to go on as if it had not been stopped, to the bit.

What is in flight is not saved, but what it was made of: the older weights, the buffers and the random numbers that each
mini-batch found. A run that goes on fills its pipeline with the same mini-batches, each with what it had, and so comes
to the very place where the other run was: what differs from any other resume is which weights the fill uses. Beside
that, numbers follow from half an accumulation's gradients, from gradients of tied weights on their way, from the
generators, and logged ones from the values of the epoch so far.

Pipelines side by side have the same weights and older weights; all the rest is each one's own, and kept of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cpipe.engine.training import Kept
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.randomness import Stream, set_state, state_from_plain, state_in_plain
from lightning_cpipe.strategy.checkpoints.optimizer_states import IN_FLIGHT, State, on_cpu
from lightning_cpipe.strategy.lightning_private import (
    known_metrics,
    learn_metrics,
    put_back_epoch_so_far,
    states_of_epoch_so_far,
)
from lightning_cpipe.strategy.loops import fetcher_of
from lightning_cpipe.strategy.steps.stage_run import StageRun
from lightning_cpipe.strategy.steps.steps import Steps

_BESIDE = "beside"
"""What the pipelines beside the first one keep, in their order."""

_OLDER = "older"
"""What `StageStream.keep` calls older weights."""


class ExactResume:
    """One rank's share.

    Args:
        trainer: of the run.
        run: the stages.
        steps: of the run.
        schedule: who does what, when.
        evaluations: what their loaders draw from; None with one stage.
        replica: the pipeline that the rank belongs to.
        num_replicas: pipelines side by side.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        run: StageRun,
        steps: Steps,
        schedule: Schedule,
        evaluations: Stream | None,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._trainer = trainer
        self._run = run
        self._steps = steps
        self._schedule = schedule
        self._evaluations = evaluations
        self._replica = replica
        self._num_replicas = num_replicas
        self._saved: State | None = None

    # ---- saving ----

    def part(self) -> State:
        """What this rank keeps; copies on the CPU. Called between two local steps, the same on every rank."""
        kept = self._run.training.keep(self._in_window)
        stages = kept.stages
        if self._replica:
            # The first pipeline has the same.
            stages = {stage: {**each, _OLDER: {}} for stage, each in stages.items()}
        part = {
            "stages": stages,
            "ties": kept.ties,
            "sums": kept.sums,
            "random": {self._run.stages[-1]: state_in_plain(self._steps.random_state)},
        }
        if self._run.has_last:
            if self._evaluations is not None:
                part["random_of_evaluations"] = state_in_plain(self._evaluations.state)
            callback, logged = known_metrics(self._trainer)
            part |= {
                "plan": self.plan,
                "seed": self._steps.seed,
                "evaluations": self._steps.evaluations,
                "epoch_so_far": states_of_epoch_so_far(self._trainer),
                "metrics": {"callback": dict(callback), "logged": dict(logged)},
            }
        return on_cpu(part)

    @staticmethod
    def whole(parts: list[State], num_replicas: int = 1) -> State:
        """What a checkpoint holds under `IN_FLIGHT`, from what the ranks of all pipelines keep, in their order."""
        size = len(parts) // num_replicas
        first, *beside = [_joined(parts[at : at + size]) for at in range(0, len(parts), size)]
        return {**first, _BESIDE: beside}

    @property
    def _in_window(self) -> int:
        """How many mini-batches of the next update were backwarded."""
        place = fetcher_of(self._trainer).place()
        return 0 if place is None else place.index % self._trainer.accumulate_grad_batches

    @property
    def plan(self) -> State:
        """What must be the same, for what is in flight to be forwarded once more."""
        extra = self._schedule.extra_in_flight if isinstance(self._schedule, Continuous) else 0
        return {
            "data_parallel_size": self._num_replicas,
            "num_stages": self._run.cut.num_stages,
            "split_points": list(self._run.cut.starts),
            "schedule": self._schedule.name,
            "versions": self._schedule.versions.name,
            "extra_in_flight": extra,
        }

    # ---- resuming ----

    @property
    def is_going_on(self) -> bool:
        """Whether there is something to go on from, and it has not begun."""
        return self._saved is not None

    def hear(self, checkpoint: Mapping[str, Any]) -> None:
        """A checkpoint was loaded: go on exactly, if it is of a run like this one."""
        if self._run.training.backwarded:
            # A callback tried something out, and restores what was there before.
            return
        saved = checkpoint.get(IN_FLIGHT)
        if saved is None:
            rank_zero_warn(
                "exact_resume=True: the checkpoint does not hold what was in flight, since it was not saved with"
                " exact_resume=True. The pipeline is filled anew: the first mini-batches use the newest weights."
            )
            return
        different = [f"{name}={saved['plan'][name]!r}, now {now!r}" for name, now in self.plan.items()
                     if saved["plan"][name] != now]  # fmt: skip
        if different:
            rank_zero_warn(
                f"exact_resume=True: the checkpoint is of another pipeline ({'; '.join(different)}), which had other"
                " mini-batches in flight. The pipeline is filled anew: the first mini-batches use the newest weights."
                " Set these options as they were to go on exactly."
            )
            return
        # Where the file is mapped into memory, other stages' numbers stay there.
        first, beside = saved, saved[_BESIDE]
        own = [first, *beside][self._replica]
        stages = {stage: {**own["stages"][stage], _OLDER: first["stages"][stage][_OLDER]} for stage in self._run.stages}
        self._saved = on_cpu({**own, "stages": stages, _BESIDE: []})

    def begin_stream(self) -> None:
        """The stream begins: let it begin with what was in flight."""
        if (saved := self._saved) is None:
            return
        self._run.training.put_back(Kept(saved["stages"], saved["ties"], saved["sums"]))
        self._steps.seed = fetcher_of(self._trainer).seed = saved["seed"]
        self._steps.evaluations = saved["evaluations"]
        if self._evaluations is not None:
            self._evaluations.state = state_from_plain(saved["random_of_evaluations"])
        learn_metrics(self._trainer, saved["metrics"]["callback"], saved["metrics"]["logged"])

    def begin_epoch(self, resumed_at: int) -> None:
        """The loop goes on at batch `resumed_at` of its epoch, and no hook stands before it."""
        if (saved := self._saved) is None:
            return
        self._saved = None
        if resumed_at and self._run.has_last:
            put_back_epoch_so_far(self._trainer, saved["epoch_so_far"])
        if (random := saved["random"].get(self._run.stages[-1])) is not None:
            set_state(state_from_plain(random))


def _joined(parts: list[State]) -> State:
    """What one pipeline keeps, from what its ranks keep."""
    whole: State = {}
    for part in parts:
        for name, content in part.items():
            whole[name] = {**whole.get(name, {}), **content} if isinstance(content, dict) else content
    return whole
