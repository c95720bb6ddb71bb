"""Replays one stage alone, with whatever is wanted in its stubs, to see what its results depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cpipe.equality import close, same_bits, same_leaf
from lightning_cpipe.probe.fills import FILLS, Fill, is_one_integer, random_like
from lightning_cpipe.probe.gradients import gradients
from lightning_cpipe.probe.step import Observed, RecordedStep, Step, StepBatch
from lightning_cpipe.probe.touched import TouchedParameters
from lightning_cpipe.probe.untouched import Place, Snapshot, untouched
from lightning_cpipe.stage.cut import Crossing, Passage, Value
from lightning_cpipe.stage.replay import Replay
from lightning_cpipe.tree import TemplateTable


@dataclass(frozen=True)
class Dependence:
    """What the results of a stage depend on through a gradient.

    Attributes:
        values: outputs of stubs.
        weights: names of parameters.
    """

    values: frozenset[Value]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Traces:
    """What a replay leaves.

    Attributes:
        parameters: ids of all parameters that code of the stage touched, with or without a gradient.
        left: buffers, metrics' states and attributes of the root that changed, and what hangs on them now.
    """

    parameters: frozenset[int]
    left: dict[Place, list[Any]]

    def has_more_than(self, other: Traces) -> bool:
        """Whether this replay left something that the other did not, or something else in the same place."""
        return any(
            place not in other.left or not same_bits(contents, other.left[place])
            for place, contents in self.left.items()
        )


NOTHING = Dependence(frozenset(), ())


class Trial:
    """One stage of one step.

    Args:
        root: the whole module; the weights of other stages may be absent.
        step: which.
        passage: the stage's stubs, its end and what it sends. Here it gets everything that its stubs return, whatever
            it receives.
        values: what stands in the stubs unless other numbers are given.
        rewritten: whether code after the module writes into a value.
        templates: the outputs of the stubs.
        device: where the module is.
    """

    def __init__(
        self,
        root: nn.Module,
        step: Step,
        passage: Passage,
        values: Mapping[Value, Tensor],
        rewritten: Callable[[Value], bool],
        templates: TemplateTable,
        device: torch.device,
    ) -> None:
        self._root = root
        self._step = step
        self._templates = templates
        self.values = values
        everything = tuple(Crossing(v, True, rewritten(v)) for v in self.values)
        self.passage = Passage(passage.stage, passage.end, passage.stubs, everything, passage.sends)
        self._generator = torch.Generator().manual_seed(passage.stage)
        self._replay = Replay(root, {self._step.name: self.passage}, device)

    def close(self) -> None:
        """Take the stubs away."""
        self._replay.remove()

    def traces(self) -> Traces:
        """What the stage touches and leaves behind."""
        touched: set[int] = set()
        watch = TouchedParameters(lambda parameter: touched.add(id(parameter)))
        left, again = self._left(watch), self._left()
        steady = {place: _without_times(contents, again.get(place, [])) for place, contents in left.items()}
        return Traces(frozenset(touched), steady)

    def dependence(self) -> Dependence:
        """What the results depend on through a gradient."""
        leaves = {v: _leaf(tensor) for v, tensor in self.values.items()}
        differentiable = [v for v, leaf in leaves.items() if leaf.requires_grad]
        weights = [(name, p) for name, p in self._root.named_parameters() if p.requires_grad]
        inputs = [*(leaves[v] for v in differentiable), *(p for _, p in weights)]
        # The backward runs before the module is put back: it may need what the forward wrote into buffers.
        with untouched(self._root):
            result = self._replayed(leaves)
            if isinstance(result, Observed):
                outputs = [] if result.loss is None else [result.loss]
            else:
                outputs = [out for out, sent in zip(result, self.passage.sends) if sent.gradient]
            outputs = [out for out in outputs if out.requires_grad]
            if not outputs or not inputs:
                return NOTHING
            # Which of them get a gradient is the question, not how much.
            ones = [torch.ones_like(out) for out in outputs]
            gets = [g is not None for g in gradients(outputs, ones, inputs)]
        return Dependence(
            frozenset(v for v, yes in zip(differentiable, gets) if yes),
            tuple(name for (name, _), yes in zip(weights, gets[len(differentiable) :]) if yes),
        )

    def is_right(self, recorded: RecordedStep) -> bool:
        """Whether the stage, given the recorded numbers, makes what the whole module made in its recorded run.

        The whole module runs before with other weights: what it leaves where no snapshot reaches, such as a global
        variable or a class, holds other numbers then than in the recorded run, and on a rank of its own would be
        missing.
        """
        if self._step.trains:
            with suppress(Exception), untouched(self._root), _turned(self._root):
                self._step.run()
        with untouched(self._root):
            made = self._replayed(self.values)
            if isinstance(made, Observed):
                return recorded.alike(made.facts, recorded.observed.facts)
            whole = recorded.recording.values({sent.value.module: None for sent in self.passage.sends})
            return close(made, [whole[sent.value] for sent in self.passage.sends])

    def depends_on_weights(self, names: Iterable[str]) -> bool:
        """Whether the results change when random numbers stand in these parameters."""
        return self._differs(_Baseline(partial(self._outcome, {})), {}, names)

    def reads(self, batch: StepBatch, fills: Sequence[Fill] = FILLS) -> list[Tensor] | None:
        """The tensors of the step's batch on which the results depend, whatever the stubs return; None if on nothing.

        Where only several tensors together make a difference, the list is empty.
        """
        baseline = _Baseline(partial(self._outcome, {}))

        def counts(places: Iterable[int]) -> bool:
            return any(self._differs(baseline, {}, step=self._on_other(batch, fill, places)) for fill in fills)

        tensors = batch.tensors
        return [tensors[place] for place in tensors if counts([place])] if counts(tensors) else None

    def depending_on(self, candidates: Sequence[Value]) -> list[Value]:
        """Those of `candidates` that the results depend on in any way, and those of which that can't be told."""
        untold = [v for v in candidates if is_one_integer(self.values[v])]
        fills = [partial(self._filled, fill) for fill in FILLS]
        return untold + self.culprits([v for v in candidates if v not in untold], fills)

    def culprits(self, values: list[Value], fills: Sequence[Callable[[Value], Tensor]]) -> list[Value]:
        """Those of `values` in whose place the numbers of any of `fills` make a difference to the results."""
        return self._culprits(values, fills, _Baseline(partial(self._outcome, {}))) if values else []

    def _replayed(
        self,
        received: Mapping[Value, Tensor],
        watch: AbstractContextManager[Any] | None = None,
        step: Step | None = None,
    ) -> Any:
        """One replay: what it returned or sent."""
        run = (step or self._step).run
        with watch or nullcontext():
            made = self._replay.run(self._step.name, run, list(received.values()), self._templates)
        return made.sent if made.returned is None else made.returned

    def _left(self, watch: AbstractContextManager[Any] | None = None) -> dict[Place, list[Any]]:
        """What one replay leaves."""
        with untouched(self._root) as before:
            self._replayed(self.values, watch)
            return _read_by_others(self._root, before)

    def _outcome(
        self, fills: Mapping[Value, Tensor], shaken: Iterable[str] = (), step: Step | None = None
    ) -> list[Any]:
        received = {v: fills.get(v, tensor).detach() for v, tensor in self.values.items()}
        with untouched(self._root) as before, _random_weights(self._root, shaken, self._generator):
            result = self._replayed(received, step=step)
            written = chain.from_iterable(_read_by_others(self._root, before).values())
        made = result.facts if isinstance(result, Observed) else [tensor.detach().clone() for tensor in result]
        return [*made, *(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in written)]

    def _on_other(self, batch: StepBatch, fill: Fill, places: Iterable[int]) -> Step:
        others = {place: fill(batch.tensors[place], self._generator) for place in places}
        return replace(self._step, call=partial(batch.call_with, others))

    def _filled(self, fill: Fill, value: Value) -> Tensor:
        return fill(self.values[value], self._generator)

    def _differs(
        self,
        baseline: _Baseline,
        fills: Mapping[Value, Tensor],
        shaken: Iterable[str] = (),
        step: Step | None = None,
    ) -> bool:
        try:
            return not baseline.equals(self._outcome(fills, shaken, step))
        except torch.OutOfMemoryError:
            # That says something of the machine, not of the step.
            raise
        except Exception:
            # The step objects to the numbers, or goes another way because of them: it looks at them.
            return True

    def _culprits(
        self, values: list[Value], fills: Sequence[Callable[[Value], Tensor]], baseline: _Baseline
    ) -> list[Value]:
        if not any(self._differs(baseline, {v: fill(v) for v in values}) for fill in fills):
            return []
        if len(values) == 1:
            return values
        half = len(values) // 2
        first, second = (self._culprits(each, fills, baseline) for each in (values[:half], values[half:]))
        return first + second or values


class _Baseline:
    """The outcome without other numbers; compared to the bit where the hardware repeats itself to the bit.

    Where it does, a plain number that another run makes differently was read off a clock, and says nothing.

    Args:
        run: makes an outcome; again, with the same numbers, if something differs from the first.
    """

    def __init__(self, run: Callable[[], list[Any]]) -> None:
        self._run = run
        self._outcome = run()

    def equals(self, other: list[Any]) -> bool:
        """Whether the numbers that were other ones this time made no difference."""
        if same_bits(self._outcome, other):
            return True
        exact, times = self._repeats
        same = same_leaf if exact else lambda a, b: close([a], [b])
        pairs = enumerate(zip(self._outcome, other))
        return len(self._outcome) == len(other) and all(i in times or same(a, b) for i, (a, b) in pairs)

    @cached_property
    def _repeats(self) -> tuple[bool, set[int]]:
        """Whether tensors are the same bits in each run, and the places of what is no tensor and is not the same."""
        first, again = self._outcome, self._run()
        differing = {i for i, (a, b) in enumerate(zip(first, again)) if not same_leaf(a, b)}
        exact = len(first) == len(again) and not any(isinstance(first[i], Tensor) for i in differing)
        return exact, differing if exact else set()


@contextmanager
def _random_weights(root: nn.Module, names: Iterable[str], generator: torch.Generator) -> Iterator[None]:
    saved = [(parameter, parameter.data) for parameter in map(root.get_parameter, names)]
    for parameter, data in saved:
        parameter.data = random_like(data, generator)
    try:
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


@contextmanager
def _turned(root: nn.Module) -> Iterator[None]:
    """The numbers in each trainable weight are in other places and negative, without memory for a second copy."""
    with ExitStack() as undo:
        for parameter in root.parameters():
            if parameter.requires_grad:
                undo.callback(_turn, parameter.data, -1)
                _turn(parameter.data, 1)
        yield


def _turn(numbers: Tensor, places: int) -> None:
    numbers.copy_(-numbers.roll(places))


def _read_by_others(root: nn.Module, before: Snapshot) -> dict[Place, list[Any]]:
    """What changed and is read outside the step: buffers, the states of metrics, and the root's own attributes."""
    return {
        (name, key): contents
        for (name, key), contents in before.changes().items()
        if not name or key in (module := root.get_submodule(name))._buffers or isinstance(module, Metric)
    }


def _without_times(contents: list[Any], again: list[Any]) -> list[Any]:
    """The class stands for a plain number that another replay made differently: it was read off a clock."""
    if len(contents) != len(again):
        return contents
    return [a if isinstance(a, Tensor) or same_leaf(a, b) else type(a) for a, b in zip(contents, again)]


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone()
    return leaf.requires_grad_(tensor.requires_grad)
