"""What signals ask for, and how all ranks do it after the same step.

A signal reaches a process at a moment of its own, when others wait for its messages. So nothing happens at once: the
process asks, what it asks for travels to the last stage with the activations, and that one says in the word of a step
what all ranks do when they are done with the step: save and requeue the job (SLURM's signal), or end (SIGTERM, Ctrl-C).
Where all end after the same step, a checkpoint can still be saved, and nobody needs to be told of a failure.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntFlag
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_cpipe.engine.news import News
from lightning_cpipe.engine.pipelines import Pipelines
from lightning_cpipe.strategy.lightning_private import save_and_requeue, set_received_sigterm


class Request(IntFlag):
    """What a signal asks for."""

    NOTHING = 0
    REQUEUE = 1
    TERMINATE = 2
    INTERRUPT = 4


class InterruptedTogether(KeyboardInterrupt):
    """Ctrl-C was pressed, and all ranks have ended the same step."""


class Signals:
    """One process's requests, and what all ranks have agreed to do.

    Args:
        trainer: which runs.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.asked = Request.NOTHING
        """What this process's signals asked for."""
        self.heard: Callable[[], int] = lambda: self.asked
        """The same with what ranks before this one asked for."""
        self.ended_together = False
        """Whether a signal has ended the fit, on all ranks after the same step."""
        self._agreed = Request.NOTHING
        self._requeued = False

    def heard_through(self, news: News) -> None:
        """Let what is asked for here travel with the news, and be heard with what the ranks before ask for."""
        news.asks = lambda: self.asked
        self.heard = lambda: news.asked

    def heard_beyond(self, pipelines: Pipelines) -> None:
        """Let what is asked for in this pipeline reach the first one, and be heard with what those after it ask for."""
        heard = self.heard
        self.heard = lambda: pipelines.pass_on(heard())

    def ask(self, request: Request, *, at_once: bool) -> None:
        """A signal was received; `at_once` if there is nobody to agree with, or nothing that must come to rest."""
        self.asked |= request
        if request is Request.TERMINATE and at_once:
            set_received_sigterm(self._trainer, True)
        if request is Request.REQUEUE and self._trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn("SLURM's requeue signal is ignored: nothing is trained, so there is nothing to save.")

    def decide(self) -> Request:
        """What all ranks do after the step at hand; the last stage decides.

        A job is requeued once, and before an end: what is saved then is what it goes on with.
        """
        wanted = Request(self.heard())
        if self._requeued:
            wanted &= ~Request.REQUEUE
        decided = Request.REQUEUE if Request.REQUEUE in wanted else wanted
        self.learn(decided)
        return decided

    def learn(self, decided: Request) -> None:
        """What the last stage has decided."""
        self._requeued |= Request.REQUEUE in decided
        self._agreed |= decided
        # Lightning's loops look at it, and raise.
        set_received_sigterm(self._trainer, Request.TERMINATE in decided)

    def act(self) -> None:
        """The step is done on this rank: do what all have agreed to do.

        Raises:
            InterruptedTogether: if they end.
        """
        agreed, self._agreed = self._agreed, Request.NOTHING
        if Request.REQUEUE in agreed:
            save_and_requeue(self._trainer)
        if Request.INTERRUPT in agreed:
            raise InterruptedTogether

    @contextmanager
    def obeyed(self, *, several: bool) -> Iterator[None]:
        """A fit runs inside. The first Ctrl-C asks for its end after the step; the second one ends it at once.

        Args:
            several: whether there are several ranks; one alone is interrupted wherever it is.
        """
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        ours = several and in_main and before is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        except (SIGTERMException, InterruptedTogether):
            self.ended_together = True
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if Request.INTERRUPT in self.asked:
            signal.default_int_handler(signum, frame)
        self.ask(Request.INTERRUPT, at_once=False)
        rank_zero_info("\nCtrl-C: all ranks end after this step, or after the validation. Once more ends them at once.")
