"""Does a module give the same in stages as it does whole? Answered in one process, before there is a cluster.

The stages are rehearsed one after the other, each on a copy of the module with its own weights only, and held against
the uncut module: what crosses each cut, the loss, what is logged and returned, every gradient, every buffer. What is
said in the end is where the first difference lies.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_cpipe.engine.rehearsal import Passed, Rehearsal, added
from lightning_cpipe.engine.stage_stream import STEP
from lightning_cpipe.equality import difference
from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.recording import Call, Recorder, Recording
from lightning_cpipe.probe.step import Observed, Step
from lightning_cpipe.probe.survey import survey
from lightning_cpipe.probe.uncut import reasons
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.stage.cut import Cut, Value
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import derived_seed, seeded
from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.lightning_private import attach_for_training, prepare_batch, training_arguments
from lightning_cpipe.strategy.setup.as_if_begun import tried
from lightning_cpipe.strategy.setup.probing import find_cut, observe, training_probe_step
from lightning_cpipe.strategy.setup.refusals import reasons_in_trainer, refuse
from lightning_cpipe.tree import flatten, signature


def assert_pipeline_parity(
    module: pl.LightningModule,
    batch: Any,
    num_stages: int,
    *,
    split_points: str | Sequence[str] = "auto",
    more_batches: Sequence[Any] = (),
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Assert that `training_step`, cut into stages, gives what it gives uncut.

    No processes are started, and no Trainer is needed. Compared are, in this order: what each stage receives, the
    loss, what is logged and returned, the gradient of every parameter, which must come from the stage that owns it
    (and from those to which it is tied), and every buffer. The first batch is run twice if there are no more, since a
    step may keep something for the next one. In the end the cut is checked as the set-up of a fit does. Random numbers
    are those of a pipeline: a module that draws has a state of its own.

    The module, its gradients and the random generators are afterwards as they were. For a while there are about three
    copies of the weights, on the module's own device. `configure_model` is called, on a copy; what `setup` makes must
    be there already.

    Args:
        module: any LightningModule; nothing in it needs to be prepared.
        batch: as the DataLoader yields it.
        num_stages: p.
        split_points: names of the modules that begin stages 1 … p − 1; ``auto`` balances what they cost.
        more_batches: further batches, of other shapes perhaps, for further steps.
        rtol: relative tolerance, measured against the largest element of each tensor; 1e-6·√depth unless given, where
            depth is the number of blocks.
        seed: what all random numbers follow from.

    Raises:
        AssertionError: if something differs; the message says where first, and by how much.
        CutError: if the module can't be cut there.
        MisconfigurationException: if no module of its kind runs in a pipeline, such as one that optimizes manually.
    """
    if is_overridden("configure_model", module):
        module = copy.deepcopy(module)
        module.configure_model()
    with untouched(module):
        _attach_trainer(module)
        refuse(reasons_in_trainer(module.trainer, module, None, num_stages))
        # What the user has in `.grad` is put back; nothing is to be added to it.
        _take_gradients(module)
        first = Drawn(0, seed, batch, 0, signature(batch))
        step = training_probe_step(module, first, module.device, seed)
        batches = [batch, *(more_batches or [batch])]
        tried(module, [step], lambda: _compare(module, step, batches, num_stages, split_points, rtol, seed))


def _compare(
    module: pl.LightningModule,
    step: Step,
    batches: Sequence[Any],
    num_stages: int,
    split_points: str | Sequence[str],
    rtol: float | None,
    seed: int,
) -> None:
    cut = find_cut(module, [step], num_stages, split_points, module.device, check=None)
    try:
        comparison = _Comparison(module, step, cut, rtol)
        for number, each in enumerate(batches):
            comparison.step(number, each, derived_seed(seed, "mini-batch", number))
    except (AssertionError, CutError):
        raise
    except Exception:
        # What goes wrong in stages alone has a reason, which the set-up of a pipeline names.
        _find_cut_of_a_fit(module, step, num_stages, split_points)
        raise
    # All stages shared the memory of one process here: a global variable would be seen by all of them.
    _find_cut_of_a_fit(module, step, num_stages, split_points)


def _find_cut_of_a_fit(
    module: pl.LightningModule, step: Step, num_stages: int, split_points: str | Sequence[str]
) -> None:
    """Check the cut as the set-up of a pipeline does.

    Raises:
        CutError: if it is refused.
    """
    find_cut(module, [step], num_stages, split_points, module.device, check="full")


class _Finding(NamedTuple):
    """A difference.

    Attributes:
        of: what differs, and on which stage.
        numbers: by how much.
    """

    of: str
    numbers: str


@dataclass
class _Whole:
    """What the uncut module made of a step."""

    recording: Recording
    observed: Observed
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def call(self, value: Value) -> Call:
        """The call that returned a value."""
        return self.recording.of(value.module)[value.call]

    def used(self, parameter: str) -> int:
        """The moment of the last call that may have used a parameter."""
        around = [call.enter for call in self.recording.calls if parameter.startswith(f"{call.module}.")]
        return max(around, default=0)


class _Comparison:
    """The uncut module beside its stages.

    Args:
        module: uncut, attached to a Trainer.
        step: its step on the first batch.
        cut: into stages.
        rtol: relative tolerance; None for the default.
    """

    def __init__(self, module: pl.LightningModule, step: Step, cut: Cut, rtol: float | None) -> None:
        with untouched(module) as before:
            seen = survey(module, step.run)
            changes = before.changes()
        self._module = module
        self._cut = cut
        self._rtol = 1e-6 * math.sqrt(max(1, len(seen.blocks))) if rtol is None else rtol
        self._watched = seen.watched(module, cut.starts)
        self._suspects = [f"{name}.{key}" if name else key for name, key in changes]
        self._rehearsal = Rehearsal(module, cut, module.device)
        for each in self._rehearsal.modules:
            assert isinstance(each, pl.LightningModule)
            each.trainer = module.trainer
        self._number = 0

    def step(self, number: int, batch: Any, seed: int) -> None:
        """Compare step `number`.

        Raises:
            AssertionError: if something differs.
        """
        self._number = number
        with seeded(derived_seed(seed, "transfer")):
            prepared = prepare_batch(self._module, batch, self._module.device)
        arguments = training_arguments(self._module.trainer, prepared, number)
        whole = self._uncut(arguments, seed)
        recorders = {id(module): Recorder() for module in self._rehearsal.modules}

        def call(module: Any) -> Observed:
            with recorders[id(module)].watching(module, self._watched):
                return observe(module, STEP, arguments)

        passed = self._rehearsal.forward(STEP, call, signature(batch), seed)
        recordings = [recorder.finish() for recorder in recorders.values()]
        self._compare_forwards(passed, recordings, whole)
        self._compare_gradients(self._rehearsal.backward(passed, passed[-1].returned.loss, seed), whole)
        buffers = self._rehearsal.buffers()
        for name, buffer in whole.buffers.items():
            home = self._cut.buffer_homes[name]
            self._require_same(buffers[name], buffer, f"the buffer {name!r}, whose home is stage {home}", [], whole)

    def _uncut(self, arguments: tuple[Any, ...], seed: int) -> _Whole:
        module, recorder = self._module, Recorder()
        isolation = Isolation(module, self._cut.draws, self._cut.draws_repeatedly)
        try:
            with seeded(seed), isolation.of(seed), recorder.watching(module, self._watched):
                observed = observe(module, STEP, arguments)
            assert observed.loss is not None
            with isolation.of(seed):
                observed.loss.backward()  # type: ignore[no-untyped-call]
        finally:
            isolation.remove()
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return _Whole(recorder.finish(), observed, _take_gradients(module), buffers)

    def _compare_forwards(self, passed: Sequence[Passed], recordings: Sequence[Recording], whole: _Whole) -> None:
        """What each stage receives, in the order in which it was made, and what the last one gives."""
        for passage in self._cut.steps[STEP].passages:
            before = recordings[: passage.stage]
            arrived = {each.value: tensor for each, tensor in zip(passage.receives, passed[passage.stage].received)}
            for value in sorted(arrived, key=lambda value: whole.call(value).exit):
                cut = self._cut.starts[passage.stage - 1]
                of = f"{value}, as stage {passage.stage} receives it at the cut before {cut!r}"
                self._require_same(arrived[value], whole.call(value).tensors[value.leaf], of, before, whole)
        made, expected = (_named(each) for each in (passed[-1].returned, whole.observed))
        for name in [*expected, *(made.keys() - expected.keys())]:
            of = f"{name} on stage {len(passed) - 1}"
            self._require_same(made.get(name), expected.get(name), of, recordings, whole)

    def _require_same(self, here: Any, there: Any, of: str, recordings: Sequence[Recording], whole: _Whole) -> None:
        """Fail if a value differs, and look in what the stages before it did for what differed first."""
        if (numbers := difference(here, there, self._rtol)) is None:
            return
        at_the_end = _Finding(of, numbers)
        first = self._first_call(recordings, whole)
        self._fail(first or at_the_end, at_the_end if first else None)

    def _first_call(self, recordings: Sequence[Recording], whole: _Whole) -> _Finding | None:
        """The first module, in the order of the forward, that returns something else on its stage."""
        for stage, recording in enumerate(recordings):
            # What runs before the stage begins may have got zeros.
            begins = recording.beginning(self._cut.starts[stage - 1]) if stage else 0
            for call in sorted(recording.calls, key=lambda call: call.exit):
                if call.enter < begins or call.template is None:
                    continue
                for leaf, tensor in enumerate(call.tensors):
                    value = Value(call.module, call.number, leaf)
                    numbers = difference(tensor, whole.call(value).tensors[leaf], self._rtol)
                    if numbers is not None:
                        return _Finding(f"{value}, as stage {stage} makes it", numbers)
        return None

    def _compare_gradients(self, by_stage: Sequence[dict[str, Tensor]], whole: _Whole) -> None:
        """Every gradient, from the stages that train its parameter, in the order of the backward."""
        total = added(by_stage)
        wrong = []
        places = {name: place for place, (name, _) in enumerate(self._module.named_parameters())}
        for name in sorted(places, key=lambda name: (whole.used(name), places[name]), reverse=True):
            # One that got no gradient in the first step is trained where it lives.
            trained_on = self._cut.trained_on.get(name, self._cut.homes[name][:1])
            elsewhere = [stage for stage, found in enumerate(by_stage) if name in found and stage not in trained_on]
            numbers = difference(total.get(name), whole.gradients.get(name), self._rtol)
            if elsewhere:
                numbers = f"it comes from stage {elsewhere[0]}, too, where nothing would update it"
            if numbers is not None:
                on = ", ".join(map(str, trained_on))
                wrong.append(_Finding(f"the gradient of {name!r} (trained on stage {on})", numbers))
        if wrong:
            count = f"{len(wrong)} of {len(whole.gradients)} gradients differ"
            self._fail(_Finding(wrong[0].of, f"{wrong[0].numbers} ({count})"))

    def _fail(self, first: _Finding, reached: _Finding | None = None) -> NoReturn:
        further = "" if reached is None else f" It reaches {reached.of}: {reached.numbers}."
        raise AssertionError(
            f"{type(self._module).__name__}, cut at {', '.join(self._cut.starts)}, differs from the uncut module in"
            f" step {self._number}. The first difference lies in {first.of}: {first.numbers}.{further}"
            f" {reasons([], self._suspects)}"
        )


def _named(observed: Observed) -> dict[str, Any]:
    """What a step gave, by names for a message."""
    returned = {f"leaf {number} of what it returns": leaf for number, leaf in enumerate(flatten(observed.output)[0])}
    logged = {f"what is logged as {name!r}": value for name, value in observed.logged.items()}
    return {"the loss": observed.loss, **logged, **returned}


def _attach_trainer(module: pl.LightningModule) -> None:
    """Give the module a quiet Trainer, as it has one at the first step of a fit."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator=module.device.type,
                devices=1 if module.device.index is None else [module.device.index],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    finally:
        log.setLevel(level)
    attach_for_training(trainer, module)


def _take_gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module's parameters, which are taken away from them."""
    named = [(name, parameter, parameter.grad) for name, parameter in module.named_parameters()]
    for _, parameter, _ in named:
        parameter.grad = None
    return {name: gradient for name, _, gradient in named if gradient is not None}
