"""Everything of one rank that lives from the strategy's set-up to its teardown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_cpipe.stage.view import View
from lightning_cpipe.strategy.checkpoints.exact_resume import ExactResume
from lightning_cpipe.strategy.checkpoints.optimizer_states import State
from lightning_cpipe.strategy.checkpoints.saves import Saves
from lightning_cpipe.strategy.checkpoints.whole import Whole
from lightning_cpipe.strategy.checkpoints.writer import Writer
from lightning_cpipe.strategy.sharing.sharing import Sharing
from lightning_cpipe.strategy.steps.stage_run import StageRun
from lightning_cpipe.strategy.steps.steps import Steps


@dataclass(frozen=True)
class RunAtHand:
    """One rank's part of a fit or of an evaluation.

    Attributes:
        stage_run: its stages, lanes and streams.
        steps: its steps.
        sharing: its share in the talk of what the last stage logs and decides.
        whole: its share in the whole module; None where there is one stage.
        view: what the module shows of its parameters.
        writer: writes its share of checkpoints.
        undo: leaves Lightning's objects as they were; called in reverse, each once.
        exact: its share in what a checkpoint keeps to be resumed exactly; None where that is not asked for.
    """

    stage_run: StageRun
    steps: Steps
    sharing: Sharing
    whole: Whole | None
    view: View
    writer: Writer
    undo: list[Callable[[], None]]
    exact: ExactResume | None = None

    @property
    def saves(self) -> Saves:
        """The checkpoints that this rank still has to write."""
        return self.writer.saves

    def end(self) -> list[State] | None:
        """All went well: take what is under way to its end, and make the module whole again.

        Returns:
            After a fit, on rank 0, the states of the whole module's optimizers.
        """
        self.stop()
        states = [] if self.whole is None else self.whole.put_together()
        return states if self.stage_run.trains else None

    def stop(self) -> None:
        """A signal ended it, on all ranks after the same step: take what is under way to its end."""
        self._let_go()
        self.stage_run.close()

    def break_off(self) -> None:
        """The pipeline is broken: leave the module as it is, cut."""
        self._let_go()
        self.stage_run.remove()

    def _let_go(self) -> None:
        # Where `end` fails, `break_off` follows.
        while self.undo:
            self.undo.pop()()
