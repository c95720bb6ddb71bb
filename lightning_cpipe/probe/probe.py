"""Finds out what crosses the cuts, by trying.

The whole module runs the first batch once, watched. Then each stage is replayed alone, from the last to the first,
with the recorded numbers in place of what comes before it:

1. What gets a gradient from the stage's own results must be received; and so must what later stages need and this
   stage does not make. Its gradient travels back the same way.
2. Some values cross without a gradient: an argmax, a mask. So the stage is run again with random numbers in all that
   is not received. Whatever it sends, its loss, what it logs and returns and the buffers it writes must be the same
   bits. What makes a difference is received too.
3. The stages are run one after the other, two steps in a row, and compared with the whole module: loss, what is logged
   and returned and, with ``check="full"``, all gradients. It catches what no random numbers can, such as a count that
   the end of a step keeps for the beginning of the next, or a hook on a tensor. Where gradients are not compared, the
   loss must at least not depend on an earlier stage's weights past what crosses, as through a hook on a module.

The probe changes nothing: not the module, not the generators.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.fills import range_of
from lightning_cpipe.probe.homes import Homes
from lightning_cpipe.probe.step import RecordedStep, Step, find_draws
from lightning_cpipe.probe.survey import Survey
from lightning_cpipe.probe.trial import NOTHING, Traces, Trial
from lightning_cpipe.probe.uncut import compare_with_uncut, refusal, weights_behind
from lightning_cpipe.stage.cut import Crossing, Cut, Passage, StepCut, Value
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.tree import TemplateTable, TensorSpec

Check = Literal["auto", "full", "fills"]

FULL_CHECK_BELOW = 50_000_000
"""With ``check="auto"``, gradients of modules with fewer parameters than this are compared with the uncut module's."""


def probe(
    root: nn.Module,
    steps: Sequence[Step],
    survey: Survey,
    starts: Sequence[str],
    device: torch.device,
    check: Check | None = "auto",
    unread: Collection[int] = (),
) -> Cut:
    """Find the cut of `root` into stages that begin at `starts`; those in `unread` will have no batch.

    With `check` None, nothing is compared with the uncut module: who asks does that.

    Raises:
        CutError: if it can't be cut there; the message names the module and the cut.
    """
    watched = survey.watched(root, starts)
    draws = reduce(or_, (find_draws(root, step, watched) for step in steps))
    recorded = [RecordedStep(root, step, watched, draws) for step in steps]
    writes_buffers = {name for each in recorded for name in each.writes_buffers}
    trains = any(step.trains for step in steps)
    writers = {name for name in watched if _around_any(name, writes_buffers)}
    owners = [name for name in watched if _owns_weights(root, name) or name in writers]
    if trains and starts:
        _require_memory_of_their_own(root)
    unchanging = {name for name in owners if not (trains and _owns_trainable(root, name)) and name not in writers}
    isolation = Isolation(root, draws.modules, draws.repeated)
    try:
        cutters = [_Cutter(root, each, owners, unchanging, writers, starts, device) for each in recorded]
        homes = Homes(root, len(starts) + 1, _called_on(cutters), trains)
        for cutter in cutters:
            with _naming_the_cut(starts), isolation.of(cutter.seed):
                cutter.follow_gradients(homes)
        homes.require_few_ties()
        for cutter in cutters:
            with _naming_the_cut(starts), isolation.of(cutter.seed):
                cutter.follow_numbers(homes, unread, compare=check is not None)
                if starts and check is not None:
                    full = compares_gradients(root, check)
                    cutter.compare_all(with_gradients=full)
                    if not full:
                        cutter.require_nothing_behind(homes)
    finally:
        isolation.remove()
    return Cut(
        starts=tuple(starts),
        steps={cutter.name: cutter.cut() for cutter in cutters},
        homes=homes.parameters(),
        trained_on=homes.trained_on,
        buffer_homes=homes.buffers(),
        stand_ins=tuple(homes.stand_ins(stage) for stage in range(len(starts) + 1)),
        draws=draws.modules,
        draws_repeatedly=draws.repeated,
        forward_flops=survey.forward_flops,
    )


def compares_gradients(root: nn.Module, check: Check) -> bool:
    """Whether gradients are compared with the uncut module's, which needs all weights at once."""
    return check == "full" or (check == "auto" and sum(p.numel() for p in root.parameters()) < FULL_CHECK_BELOW)


class _Cutter:
    """Finds the passages of one step."""

    def __init__(
        self,
        root: nn.Module,
        recorded: RecordedStep,
        owners: Sequence[str],
        unchanging: set[str],
        writers: set[str],
        starts: Sequence[str],
        device: torch.device,
    ) -> None:
        self._root = root
        self._recorded = recorded
        self._starts = starts
        self._device = device
        recording = recorded.recording
        self.moments = [recording.beginning(start, self.name) for start in starts]
        if self.moments != sorted(self.moments):
            raise CutError(
                f"{self.name} reaches the modules at which the stages begin in another order than"
                f" {', '.join(starts)}. Reorder `split_points`."
            )
        self._stubs: list[dict[str, int | None]] = [{}]
        self._stubs += [recording.called_before(moment, owners, unchanging, writers) for moment in self.moments]
        self._templates: TemplateTable = {
            (call.module, call.number): call.template
            for call in recording.calls
            if call.template is not None and any(call.module in stubs for stubs in self._stubs)
        }
        self._needed_by_gradient: list[frozenset[Value]] = []
        self._passages: list[Passage] = []
        self._traces: list[Traces] = []

    @property
    def name(self) -> str:
        return self._recorded.step.name

    @property
    def seed(self) -> int:
        return self._recorded.step.seed

    def called_on(self) -> dict[str, tuple[int, ...]]:
        """The stages that call each watched module."""
        stages: dict[str, set[int]] = {}
        for call in self._recorded.recording.calls:
            stages.setdefault(call.module, set()).add(sum(call.enter >= moment for moment in self.moments))
        return {module: tuple(sorted(found)) for module, found in stages.items()}

    def follow_gradients(self, homes: Homes) -> None:
        """From the last stage to the first: what gets a gradient, values and weights."""
        found: list[frozenset[Value]] = []
        sends: tuple[Crossing, ...] = ()
        for stage in reversed(range(len(self._stubs))):
            with self._trial(stage, sends) as trial:
                dependence = trial.dependence() if self._recorded.step.trains else NOTHING
                traces = trial.traces()
                homes.note_trained(stage, dependence.weights)
                homes.note_touched(stage, traces.parameters)
                self._traces.append(traces)
            found.append(dependence.values)
            sends = tuple(Crossing(v, True, self._rewritten(v)) for v in trial.values if v in dependence.values)
        self._needed_by_gradient = found[::-1]

    def follow_numbers(self, homes: Homes, unread: Collection[int], *, compare: bool) -> None:
        """From the last stage to the first: what the results depend on in any way; of those `unread`, not on the batch.

        With `compare`, each stage must make what the whole module made.
        """
        sends: tuple[Crossing, ...] = ()
        for stage in reversed(range(len(self._stubs))):
            with self._trial(stage, sends) as trial:
                if self._starts and compare:
                    self._require_right(trial)
                if stage in unread:
                    self._require_unread(trial)
                sends = self._settle(trial, homes.stand_ins(stage))
                received = {crossing.value for crossing in sends}
                other = {v: tensor for v, tensor in trial.values.items() if v not in received}
                guarded = frozenset(v for v, tensor in other.items() if tensor.requires_grad)
                ranges = {v: each for v, tensor in other.items() if (each := range_of(tensor)) is not None}
                self._passages.insert(0, replace(trial.passage, receives=sends, guarded=guarded, ranges=ranges))

    def compare_all(self, with_gradients: bool) -> None:
        """Compare the stages with the uncut module."""
        with self._explained():
            difference = compare_with_uncut(
                self._root,
                self._recorded,
                self._passages,
                self._templates,
                self._device,
                with_gradients=with_gradients,
            )
        if difference is not None:
            raise self._refusal(f"{difference} of {self.name} differs from the uncut module's")

    def require_nothing_behind(self, homes: Homes) -> None:
        """The loss depends on earlier stages' weights through what modules return, and through nothing else."""
        if not self._recorded.step.trains:
            return
        for passage in self._passages[1:]:
            before = [name for name, stages in homes.trained_on.items() if max(stages) < passage.stage]
            with self._explained():
                behind = weights_behind(self._root, self._recorded.step, passage, before)
            if behind:
                what = f"the loss of {self.name} depends on {behind[0]!r} past what crosses to stage {passage.stage}"
                raise self._refusal(what)

    def cut(self) -> StepCut:
        """What was found."""
        on_last, *elsewhere = self._traces
        return StepCut(
            tuple(self._passages),
            self._recorded.step.signature,
            self._templates,
            draws=self._recorded.draws,
            leaves_behind=any(on_last.has_more_than(each) for each in elsewhere),
            returns_more=self._recorded.step.trains and bool(self._recorded.observed.output),
        )

    @contextmanager
    def _trial(self, stage: int, sends: tuple[Crossing, ...]) -> Iterator[Trial]:
        end = self._starts[stage] if stage < len(self._starts) else None
        passage = Passage(stage, end, self._stubs[stage], sends=sends)
        with self._opened(passage) as trial, self._explained(passage):
            yield trial

    @contextmanager
    def _opened(self, passage: Passage) -> Iterator[Trial]:
        recording = self._recorded.recording
        values = recording.values(passage.stubs)
        step, rewritten = self._recorded.step, recording.rewritten
        trial = Trial(self._root, step, passage, values, rewritten, self._templates, self._device)
        try:
            yield trial
        finally:
            trial.close()

    @contextmanager
    def _explained(self, passage: Passage | None = None) -> Iterator[None]:
        """The step ran as a whole; if it fails in stages, the cut is the reason."""
        try:
            yield
        except CutError:
            raise
        except Exception as error:
            what = f"a stage of {self.name} fails where the uncut module does not ({type(error).__name__}: {error})"
            raise self._refusal(what, passage) from error

    def _settle(self, trial: Trial, stand_ins: frozenset[str]) -> tuple[Crossing, ...]:
        """What a stage receives."""
        if stand_ins and trial.depends_on_weights(stand_ins):
            raise CutError(
                f"stage {trial.passage.stage} uses the numbers of {', '.join(sorted(stand_ins))}, trained on another"
                " stage, without giving it a gradient; its copy there would never be updated. Use it inside the"
                " module that owns it, or move the cut with `split_points`. (An activation checkpoint must not reach"
                " across a cut: checkpoint inside the blocks, with `use_reentrant=False` around a whole block.)"
            )
        gradient = set(self._needed_by_gradient[trial.passage.stage])
        gradient |= {sent.value for sent in trial.passage.sends if sent.gradient}
        needed = gradient | {sent.value for sent in trial.passage.sends}
        while culprits := trial.depending_on([v for v in trial.values if v not in needed]):
            needed |= set(culprits)
        return tuple(Crossing(v, v in gradient, self._rewritten(v)) for v in trial.values if v in needed)

    def _require_right(self, trial: Trial) -> None:
        if not trial.is_right(self._recorded):
            last = trial.passage.end is None
            what = "the loss, a logged value or the output" if last else f"what stage {trial.passage.stage} sends"
            raise self._refusal(f"{what} of {self.name} differs from the uncut module's", trial.passage)

    def _require_unread(self, trial: Trial) -> None:
        batch = self._recorded.step.batch
        if batch is not None and (read := trial.reads(batch)) is not None:
            raise reads_batch(trial.passage.stage, self.name, read)

    def _refusal(self, what: str, passage: Passage | None = None) -> CutError:
        return refusal(what, [] if passage is None else self._origins(passage), self._suspects())

    def _origins(self, passage: Passage) -> list[str]:
        """The stubs without which the stage would be right: those that do more than to return something.

        First all of them run for real; then each that may be a stub all the same becomes one again.
        """
        origins = list(passage.stubs)
        for name in ("", *passage.stubs):
            fewer = [origin for origin in origins if origin != name]
            stubs = {stub: calls for stub, calls in passage.stubs.items() if stub not in fewer}
            try:
                with self._opened(replace(passage, stubs=stubs)) as trial:
                    right = trial.is_right(self._recorded)
            except Exception:
                # Without what these stubs do, it does not even run: they are among the origins.
                right = False
            if right:
                origins = fewer
            elif not name:
                return []
        return origins

    def _rewritten(self, value: Value) -> bool:
        return self._recorded.recording.rewritten(value)

    def _suspects(self) -> list[str]:
        """The attributes that the step changes; buffers of stubs are where they belong."""
        changes = [(self._root.get_submodule(module), module, key) for module, key in self._recorded.changes]
        return [f"{name}.{key}" if name else key for module, name, key in changes if key not in module._buffers]


def reads_batch(stage: int, step: str, read: Sequence[Tensor], when: str = "") -> CutError:
    """A stage that has no batch depends on some tensors of it."""
    told = ", ".join(str(TensorSpec.of(tensor)) for tensor in read) or "several tensors together"
    return CutError(
        f"load_on='ends': what stage {stage} makes in {step}{when} depends on the batch ({told}), which its rank would"
        " not load: code between the modules reads it, as for a mask. Compute that inside the first block, let the"
        " blocks hand it on, or set load_on='all'."
    )


@contextmanager
def _naming_the_cut(starts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except CutError as error:
        raise CutError(f"cut at {', '.join(starts)}: {error}" if starts else str(error)) from error


def _called_on(cutters: Sequence[_Cutter]) -> dict[str, tuple[int, ...]]:
    """The stages that call each watched module, in any step."""
    stages: dict[str, set[int]] = {}
    for cutter in cutters:
        for module, found in cutter.called_on().items():
            stages.setdefault(module, set()).update(found)
    return {module: tuple(sorted(found)) for module, found in stages.items()}


def _require_memory_of_their_own(root: nn.Module) -> None:
    """Versions, and stages, give each parameter memory of its own."""
    seen: dict[int, str] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and parameter.data_ptr():
            other = seen.setdefault(parameter.data_ptr(), name)
            if other != name:
                raise CutError(
                    f"the parameters {other!r} and {name!r} share memory, which would part in a pipeline. Tie them by"
                    " assigning one `nn.Parameter` to both modules, or give each a copy of its own."
                )


def _owns_weights(root: nn.Module, name: str) -> bool:
    return next(root.get_submodule(name).parameters(), None) is not None


def _owns_trainable(root: nn.Module, name: str) -> bool:
    return any(parameter.requires_grad for parameter in root.get_submodule(name).parameters())


def _around_any(name: str, inner: set[str]) -> bool:
    return any(f"{each}.".startswith(f"{name}.") for each in inner)
