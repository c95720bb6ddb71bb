"""What the last stage decides, everyone learns: a chain from the last stage to the first.

The last stage is the first to finish a local step, so what it says after its hooks is there before the same local
step ends elsewhere, unless those hooks take longer than the others are behind. Each stage hands on what it hears when
it listens itself.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from lightning_cpipe.transport.records import Records

_TO_NEIGHBOUR = "to the neighbour alone"


class Decisions:
    """One stage's place in the chain.

    Args:
        from_next: where the stage after this one tells what it heard; None on the last stage.
        to_previous: where this stage tells the one before; None on the first.
        hands_on: whether the stage before learns from here what the last one decides; not where its rank, which holds a
            later stage, too, knows it already.
    """

    def __init__(self, from_next: Records | None, to_previous: Records | None, *, hands_on: bool = True) -> None:
        self._from_next = from_next
        self._to_previous = to_previous
        self._hands_on = hands_on
        self._early: defaultdict[str, deque[Any]] = defaultdict(deque)

    @property
    def leads(self) -> bool:
        """Whether this is the last stage."""
        return self._from_next is None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other stage."""
        return self._from_next is None and self._to_previous is None

    def tell(self, topic: str, content: Any) -> None:
        """The last stage says something to all. Returns at once."""
        if self._to_previous is not None:
            self._to_previous.send((topic, content))

    def hear(self, topic: str) -> Any:
        """The next thing said on a topic; waits until it is there. What is said on others is kept for later."""
        assert self._from_next is not None
        while not self._early[topic]:
            found, content = self._from_next.receive()
            if self._to_previous is not None and self._hands_on and found != _TO_NEIGHBOUR:
                self._to_previous.send((found, content))
            self._early[found].append(content)
        return self._early[topic].popleft()

    def agree(self, topic: str, content: Any) -> Any:
        """What the last stage has to say on a topic, on every stage."""
        if not self.leads:
            return self.hear(topic)
        self.tell(topic, content)
        return content

    def tell_previous(self, content: Any) -> None:
        """Say something to the stage before alone. Returns at once."""
        self.tell(_TO_NEIGHBOUR, content)

    def hear_next(self, otherwise: Any = None) -> Any:
        """What the stage after says to this one alone; `otherwise` if there is none."""
        return otherwise if self.leads else self.hear(_TO_NEIGHBOUR)

    def tell_last(self) -> None:
        """Say nothing more."""
        if self._to_previous is not None:
            self._to_previous.send_last()

    def discard(self) -> None:
        """Hear to the end."""
        if self._from_next is not None:
            self._from_next.discard()
