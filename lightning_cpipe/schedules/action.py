"""The alphabet of a plan: what a stage can do, and how that is written.

An action is one word such as ``2F3``: stage 2 runs the forward of mini-batch 3. The stage is left out where it is
clear (``F3``). The same words stand in plans, errors, logs, tests and docs, and `Action.parse` reads them back.
`torch.distributed.pipelining` writes its actions in the same form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from lightning_cpipe.errors import PlanError


class Kind(str, Enum):
    """What an action does. "Roughly" lines are pseudo-code for stage s and mini-batch j."""

    FORWARD = "F"
    """Roughly: ``y[j] = stage(x[j])``, with the weights that the version policy says."""
    BACKWARD = "B"
    """Roughly: ``gx[j] = d stage(x[j]) . gy[j]``, with the weights of the forward, as a rule."""
    INPUT_GRADIENT = "I"
    """Roughly: ``gx[j] = d stage(x[j]) . gy[j]``: the half of a backward that the stage before waits for."""
    WEIGHT_GRADIENT = "W"
    """Roughly: ``gradients += d stage(weights) . gy[j]``: the other half, for which nobody waits."""
    UPDATE = "U"
    """Roughly: ``weights = optimizer(weights, gradients)``; one version more."""
    POST_FORWARD = "POST_F"
    """Roughly: ``x[j] = irecv(s - 1)``. Returns at once."""
    RECV_FORWARD = "RECV_F"
    """Roughly: ``wait(x[j])``."""
    SEND_FORWARD = "SEND_F"
    """Roughly: ``isend(y[j], s + 1)``. Returns at once."""
    POST_BACKWARD = "POST_B"
    """Roughly: ``gy[j] = irecv(s + 1)``. Returns at once."""
    RECV_BACKWARD = "RECV_B"
    """Roughly: ``wait(gy[j])``."""
    SEND_BACKWARD = "SEND_B"
    """Roughly: ``isend(gx[j], s - 1)``. Returns at once."""

    def __str__(self) -> str:
        return self.value

    @property
    def computes(self) -> bool:
        """Whether the action takes a slot of the stage's time: forwards and backwards do, and each half of one."""
        return self in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)

    @property
    def frees(self) -> bool:
        """Whether the action ends a batch's time in flight: what the forward kept is needed no longer."""
        return self in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)


_WORD = re.compile(r"(?P<stage>\d+)?(?P<kind>[A-Z](?:[A-Z_]*[A-Z])?)(?P<batch>\d+)")


@dataclass(frozen=True)
class Action:
    """One thing that one stage does for one mini-batch (in flush schedules: for one micro-batch).

    Attributes:
        kind: what is done.
        batch: number of the mini-batch or micro-batch, from 0. An update carries the number of the batch whose
            backward it follows.
        stage: who does it, from 0 in the order that data flows; None where the context says it.
    """

    kind: Kind
    batch: int
    stage: int | None = None

    def __str__(self) -> str:
        return f"{'' if self.stage is None else self.stage}{self.kind}{self.batch}"

    def at(self, stage: int) -> Action:
        """The same action with its stage written out."""
        return Action(self.kind, self.batch, stage)

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read one action, the inverse of `str`.

        Raises:
            PlanError: if `text` is not an action.
        """
        match = _WORD.fullmatch(text.strip())
        if match is None or match["kind"] not in _KINDS:
            raise PlanError(
                f"{text!r} is not an action: write a stage (or leave it out), one of {', '.join(_KINDS)},"
                " and the number of a mini-batch, for example 2F3 or B0."
            )
        stage = match["stage"]
        return cls(Kind(match["kind"]), int(match["batch"]), None if stage is None else int(stage))


_KINDS = tuple(kind.value for kind in Kind)

GRADIENT_LEAVES = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
"""What needs the gradient from the stage after, and makes the one for the stage before."""

Row = tuple[Action, ...]
"""What one stage does in one of its local steps, in order."""


def forward(batch: int) -> Action:
    """``F`` of `batch`."""
    return Action(Kind.FORWARD, batch)


def backward(batch: int) -> Action:
    """``B`` of `batch`."""
    return Action(Kind.BACKWARD, batch)


def input_gradient(batch: int) -> Action:
    """``I`` of `batch`."""
    return Action(Kind.INPUT_GRADIENT, batch)


def weight_gradient(batch: int) -> Action:
    """``W`` of `batch`."""
    return Action(Kind.WEIGHT_GRADIENT, batch)


def update(batch: int) -> Action:
    """``U`` that follows the backward of `batch`."""
    return Action(Kind.UPDATE, batch)


def parse_row(text: str) -> Row:
    """Read a row such as ``F3 B0 U0``, the inverse of `format_row`."""
    return tuple(Action.parse(word) for word in text.split())


def format_row(row: Iterable[Action]) -> str:
    """Write a row: ``F3 B0 U0``."""
    return " ".join(map(str, row))
