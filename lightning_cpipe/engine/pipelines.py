"""What the last stages of pipelines side by side tell each other.

What the first pipeline's decides counts for all, so it says it down the row; nobody is waited for. What signals ask for
in a later pipeline goes up the row, when it happens.
"""

from __future__ import annotations

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.transport.counterparts import Counterparts


class Pipelines:
    """One last stage's place in the row.

    Args:
        counterparts: of its rank.
    """

    def __init__(self, counterparts: Counterparts) -> None:
        self.words = Decisions(*counterparts.words())
        """Where rank 0 speaks, and all others hear it."""
        self._from_next, self._to_previous = counterparts.requests()
        self._asked = self._told = 0
        self._is_over = False

    @property
    def leads(self) -> bool:
        """Whether this is the first pipeline."""
        return self.words.leads

    def pass_on(self, asked: int) -> int:
        """Let the pipelines before know what is asked for. Does not wait.

        Args:
            asked: in this pipeline; flags.

        Returns:
            What is asked for in this pipeline and in those after it.
        """
        while not self._is_over and self._from_next is not None and self._from_next.is_there():
            told = self._from_next.receive()
            self._is_over = not isinstance(told, int)
            self._asked |= 0 if self._is_over else told
        self._asked |= int(asked)
        if self._asked != self._told and self._to_previous is not None:
            self._to_previous.send(self._asked)
        self._told = self._asked
        return self._asked

    def tell_last(self) -> None:
        """Say nothing more."""
        self.words.tell_last()
        if self._to_previous is not None:
            self._to_previous.send_last()

    def discard(self) -> None:
        """Hear to the end."""
        self.words.discard()
        if self._from_next is not None and not self._is_over:
            self._from_next.discard()
