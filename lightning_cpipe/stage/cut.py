"""What a cut is, as data: who stubs what, what crosses, and where each weight lives.

The probe writes it on rank 0, every rank reads it. Names are those of the whole module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_cpipe.tree import Signature, TemplateTable


class Value(NamedTuple):
    """A tensor that a module returned.

    Attributes:
        module: the module's name.
        call: which call of it in the step, counted from 0.
        leaf: which tensor of its output, counted from 0.
    """

    module: str
    call: int
    leaf: int

    def __str__(self) -> str:
        more = [f"call {self.call}"] * (self.call > 0) + [f"tensor {self.leaf}"] * (self.leaf > 0)
        return f"the output of {self.module!r}" + (f" ({', '.join(more)})" if more else "")


class Crossing(NamedTuple):
    """A value that crosses a cut.

    Attributes:
        value: which.
        gradient: whether its gradient travels back.
        rewritten: whether code after the module writes into it, so that each user needs a copy of its own.
    """

    value: Value
    gradient: bool
    rewritten: bool


@dataclass(frozen=True)
class Passage:
    """One stage's part of one step (`training_step`, `validation_step`, …).

    Attributes:
        stage: whose.
        end: the block where the next stage begins and this one ends; None on the last stage.
        stubs: the outermost modules that own weights or write buffers and that are called before this stage begins;
            with how many of their calls that are, or None where it is all of them.
        receives: what comes from the stage before, in the order of the message.
        sends: what goes to the stage after, in the order of the message.
        guarded: what stubs return with a gradient in the uncut module and this stage does not receive, since nothing
            depended on it in the first batch. If a later step gives it a gradient, that is an error.
        ranges: the least and the greatest number, in the first batch, of the integers that stubs return and this
            stage does not receive.
    """

    stage: int
    end: str | None = None
    stubs: Mapping[str, int | None] = field(default_factory=dict)
    receives: tuple[Crossing, ...] = ()
    sends: tuple[Crossing, ...] = ()
    guarded: frozenset[Value] = frozenset()
    ranges: Mapping[Value, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepCut:
    """How one step is cut.

    Attributes:
        passages: each stage's part, in order.
        signature: of the batch that the probe ran.
        templates: of every stub, for batches of that signature.
        draws: whether the step draws random numbers.
        leaves_behind: whether the last stage's part leaves something on the root module or in a metric (such as a
            list of outputs) that the other stages' parts do not.
        returns_more: whether training's step returns more than the loss; the other stages know the loss alone.
    """

    passages: tuple[Passage, ...]
    signature: Signature
    templates: TemplateTable
    draws: bool = True
    leaves_behind: bool = False
    returns_more: bool = False


class Tie(NamedTuple):
    """Parameters that two stages train.

    Attributes:
        user: the stage that holds copies.
        owner: the stage, after it, whose optimizer updates them.
        names: of the parameters, in the order of the messages.
    """

    user: int
    owner: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """How a module is cut into stages.

    Attributes:
        starts: for each stage but the first, the block that begins it.
        steps: by the step's name.
        homes: the stages that hold each parameter's weights, the one that has the true numbers first: of those that
            give it a gradient the last. Frozen ones, and those that are tied, lie on several.
        trained_on: the stages that give each parameter a gradient, in order; more than one where it is tied.
        buffer_homes: the stage whose copy of a buffer is the true one.
        stand_ins: for each stage, the parameters of other stages that code between modules touches there without any
            effect on what the stage makes. Their first values stay.
        draws: the modules that draw random numbers and may be stubs.
        draws_repeatedly: those of them that are called more than once in a step.
        forward_flops: floating-point operations of the first step's forward, on the first batch, all stages together.
    """

    starts: tuple[str, ...]
    steps: dict[str, StepCut]
    homes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    trained_on: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffer_homes: dict[str, int] = field(default_factory=dict)
    stand_ins: tuple[frozenset[str], ...] = ()
    draws: frozenset[str] = frozenset()
    draws_repeatedly: frozenset[str] = frozenset()
    forward_flops: int = 0

    @property
    def num_stages(self) -> int:
        """How many stages."""
        return len(self.starts) + 1

    @property
    def ties(self) -> list[Tie]:
        """The ties between each two stages, in an order that is the same everywhere."""
        names: dict[tuple[int, int], list[str]] = {}
        for name, (*users, owner) in sorted(self.trained_on.items()):
            for user in users:
                names.setdefault((user, owner), []).append(name)
        return [Tie(*pair, tuple(found)) for pair, found in sorted(names.items())]
