"""A step of the whole module on the first batch, as the probe runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.equality import close, same_leaf
from lightning_cpipe.probe.recording import Recording, record
from lightning_cpipe.probe.untouched import Place, untouched
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import get_state, same_state, seeded
from lightning_cpipe.tree import Signature, flatten


@dataclass(frozen=True)
class Observed:
    """What a step gave to those who called it.

    Attributes:
        loss: the loss, attached to the graph; None if the step does not train.
        output: everything else that it returned.
        logged: each value that was logged.
    """

    loss: Tensor | None
    output: Any = None
    logged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> list[Any]:
        """Everything that must not depend on the cut, as a flat list without graphs."""
        leaves, _ = flatten([self.loss, self.output, self.logged])
        return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


class StepBatch:
    """The batch of a step, for which others can stand.

    Args:
        batch: as the step gets it.
        call: runs the step on a batch.
    """

    def __init__(self, batch: Any, call: Callable[[Any], Observed]) -> None:
        self._leaves, self._structure = flatten(batch)
        self._call = call
        self.tensors = {place: leaf for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)}
        """Its tensors, by their places among its leaves."""

    def whole(self) -> Any:
        """The batch."""
        return self._structure.build(self._leaves)

    def call_with(self, others: Mapping[int, Tensor]) -> Observed:
        """Run the step with other tensors in these places."""
        return self._call(self._structure.build(others.get(place, leaf) for place, leaf in enumerate(self._leaves)))


@dataclass(frozen=True)
class Step:
    """One step of the whole module.

    Attributes:
        name: ``training_step``, …
        call: runs it on the first batch.
        trains: whether gradients are wanted.
        seed: what its random numbers follow from.
        signature: of its batch.
        precision: what it computes in, as the trainer names it.
        batch: what it runs on, where it matters whether a stage depends on that.
    """

    name: str
    call: Callable[[], Observed]
    trains: bool
    seed: int
    signature: Signature
    precision: str = ""
    batch: StepBatch | None = None

    def run(self) -> Observed:
        """Call it, from the same random state each time, and with a graph only if it trains."""
        with seeded(self.seed), torch.set_grad_enabled(self.trains):
            return self.call()

    def draws(self) -> bool:
        """Whether it draws any random number; runs it to see."""
        with seeded(self.seed), torch.set_grad_enabled(self.trains):
            before = get_state()
            self.call()
            return not same_state(before, get_state())


@dataclass(frozen=True)
class Draws:
    """The modules that draw random numbers.

    Attributes:
        modules: all of them.
        repeated: those that are called more than once in a step.
    """

    modules: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()

    def __or__(self, other: Draws) -> Draws:
        return Draws(self.modules | other.modules, self.repeated | other.repeated)


def find_draws(root: nn.Module, step: Step, watched: Sequence[str]) -> Draws:
    """Those of the watched modules that draw random numbers in the step.

    What calls a repeated one counts too: as a stub it takes no number from the outer state on behalf of the other.
    """
    isolation = Isolation(root, watched)
    try:
        with untouched(root), isolation.of(step.seed):
            recording, _ = record(root, step.run, watched)
    finally:
        isolation.remove()
    times = Counter(call.module for call in recording.calls)
    drew = [call for call in recording.calls if call.drew]
    again = [call for call in drew if times[call.module] > 1]
    around = {call.module for call in recording.calls if any(call.surrounds(each) for each in again)}
    modules = around | {call.module for call in drew}
    return Draws(frozenset(modules), frozenset(name for name in modules if times[name] > 1))


class RecordedStep:
    """One watched run of the whole module's step.

    Args:
        root: the whole module.
        step: its step.
        watched: the modules to watch.
        draws: those of them that have random numbers of their own.

    Attributes:
        step: which.
        recording: the calls of the watched modules.
        observed: what the step gave.
        changes: the attributes and buffers that it changed.
        draws: whether it draws random numbers, or calls modules that do in another step.
    """

    def __init__(self, root: nn.Module, step: Step, watched: Sequence[str], draws: Draws) -> None:
        self.step = step
        self._root = root
        isolation = Isolation(root, draws.modules, draws.repeated)
        try:
            with untouched(root) as before, isolation.of(step.seed):
                recording, observed = record(root, step.run, watched)
                self.changes: list[Place] = list(before.changes())
        finally:
            isolation.remove()
        with untouched(root):
            self.draws = bool(draws.modules) or step.draws()
        with untouched(root):
            again = step.run().facts
        self.recording: Recording = recording
        self.observed: Observed = observed
        self._clocks = {
            place
            for place, (a, b) in enumerate(zip(observed.facts, again))
            if not isinstance(a, Tensor) and not same_leaf(a, b)
        }

    def alike(self, made: list[Any], whole: list[Any]) -> bool:
        """Whether these facts of the step are the same up to rounding.

        A plain number that another run makes differently was read off a clock, and says nothing.
        """
        return len(made) == len(whole) and all(
            place in self._clocks or close([a], [b]) for place, (a, b) in enumerate(zip(made, whole))
        )

    @cached_property
    def writes_buffers(self) -> set[str]:
        """The modules whose own buffers changed."""
        return {module for module, key in self.changes if key in self._root.get_submodule(module)._buffers}
