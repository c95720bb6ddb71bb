"""Brings the lanes of a run to rest at its end: what is still on its way is discarded, message by message.

A run that ends early leaves activations that nobody will backward, and receives that were posted for messages which
will never be sent. Each end tells the other how far it got; the sender then sends what was posted for, and the
receiver takes what was sent. After that nothing is on its way, and the lanes can be used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.tree import TensorSpec


@dataclass(frozen=True)
class Account:
    """How far one end of a lane got.

    Attributes:
        messages: sent, or posted for.
        specs: of the latest ones, by their number.
    """

    messages: int
    specs: dict[int, list[TensorSpec]]


def account_of(edge: Edge | None) -> Account | None:
    """This end's account."""
    return None if edge is None else Account(edge.messages, dict(edge.latest))


def send_what_was_posted_for(edge: Edge | None, theirs: Account | None) -> None:
    """As the sender: satisfy the receives that wait for nothing."""
    if edge is not None and theirs is not None:
        for number in range(edge.messages, theirs.messages):
            edge.send_filler(theirs.specs[number])


def take_what_was_sent(edge: Edge | None, theirs: Account | None) -> int:
    """As the receiver: take what nobody needs any more.

    Returns:
        How many messages were discarded.
    """
    if edge is None or theirs is None:
        return 0
    for number in range(edge.messages, theirs.messages):
        edge.post(theirs.specs[number])
    discarded = edge.posted
    while edge.posted:
        edge.receive()
    return discarded
