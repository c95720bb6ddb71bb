"""Runs one stage of a step that nobody changed.

The rank runs the user's own `training_step`, and two things make it one stage of it. Modules that own weights and are
finished before the stage begins are *stubs*: they compute nothing and return what was received for them, or, where
nobody downstream needs it, zeros of the right structure and shape. And when the step reaches the block that begins
the next stage, what that stage needs is taken, and the step is left. The code between modules runs for real on every
stage; so does what owns no weights. The last stage runs through to the loss.

What crosses is not known here; the probe finds it out and writes it into a `Passage`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from lightning_cpipe.errors import CutError, DataMismatchError
from lightning_cpipe.stage.cut import Crossing, Passage, Value
from lightning_cpipe.stage.describing import described, difference
from lightning_cpipe.torch_private import has_gradient_hooks
from lightning_cpipe.tree import TemplateTable, TensorSpec


class _EndOfStage(BaseException):
    """Unwinds the user's step. Not an `Exception`, so that a step which catches those does not catch this."""


class Replayed:
    """What one stage made of one step.

    Attributes:
        returned: what the step returned; None where the stage ends at a cut.
        sent: the tensors for the next stage, attached to the graph, in the order of ``passage.sends``.
        templates: the outputs of this stage's modules that are stubs later; filled if they were asked for.
        ended_early: whether training's step returned None before it came to the cut.
    """

    def __init__(
        self, returned: Any, sent: list[Tensor], templates: TemplateTable, *, ended_early: bool = False
    ) -> None:
        self.returned = returned
        self.sent = sent
        self.templates = templates
        self.ended_early = ended_early


class Replay:
    """The stubs and hooks of one stage on a module.

    Args:
        root: the whole module; its weights of other stages may be absent.
        passages: this stage's part of each step, by the step's name.
        device: where fillers are made.
        stubbed_later: the modules that are stubs on later stages, whose outputs are described to them.
    """

    def __init__(
        self,
        root: nn.Module,
        passages: Mapping[str, Passage],
        device: torch.device,
        stubbed_later: Iterable[str] = (),
    ) -> None:
        self._roles = {name: _Role(passage) for name, passage in passages.items()}
        self._device = device
        self._running: _Run | None = None
        self._zeros: dict[torch.dtype, Tensor] = {}
        self._guards: dict[Value, tuple[Tensor, Node | None]] = {}
        """The latest filler that stood for each guarded value, with its node in autograd's graph."""
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._stubs: list[_Stub] = []
        self._handles: list[RemovableHandle] = []

        stubs = {name for passage in passages.values() for name in passage.stubs}
        # What never runs here makes nothing to look at.
        never = {name for name in stubs if all(each.stubs.get(name, 0) is None for each in passages.values())}
        watched = {sent.value.module for passage in passages.values() for sent in passage.sends}
        for name in sorted(stubs):
            self._stubs.append(_Stub(root.get_submodule(name), name, self))
        for name in sorted((watched | set(stubbed_later)) - never):
            # Before any other hook: the user's own run on the next stage too, after the stub.
            hook = root.get_submodule(name).register_forward_hook(self._capture(name), prepend=True)
            self._handles.append(hook)
        for end in sorted({passage.end for passage in passages.values() if passage.end is not None}):
            # In front of every other hook: the block belongs to the next stage, hooks and all.
            self._handles.append(root.get_submodule(end).register_forward_pre_hook(self._leave(end), prepend=True))

    def run(
        self,
        name: str,
        step: Callable[[], Any],
        received: Sequence[Tensor] = (),
        templates: TemplateTable | None = None,
        *,
        describe: bool = False,
    ) -> Replayed:
        """Run this stage's part of `step`.

        Args:
            name: the step's name.
            step: calls the user's step of the whole module.
            received: one tensor for each of ``passage.receives``. Those that need a gradient are leaves with
                ``requires_grad``.
            templates: the outputs of the stubs, for this batch's shapes.
            describe: whether to note the templates of this stage's own modules.

        Raises:
            CutError: if the step does not pass the cuts as it did in the probe.
        """
        run = _Run(self._roles[name], received, templates or {}, describe)
        outer, self._running = self._running, run
        graded = torch.is_grad_enabled()
        try:
            returned = step()
        except _EndOfStage:
            # A step that switched it off for what comes next was left before it switched it on again.
            torch.set_grad_enabled(graded)
            return Replayed(None, run.sent(), run.described)
        finally:
            self._running = outer
        if run.passage.end is not None and graded and returned is None and not describe:
            return Replayed(None, [], {}, ended_early=True)
        if run.passage.end is not None:
            skipped = (
                " It returned None before the shapes of this mini-batch are known to all stages: return it after the"
                " model has run, or zero times a loss of the model."
            )
            raise CutError(
                f"stage {run.passage.stage} ran {name} to its end and never reached {run.passage.end!r}, where stage"
                f" {run.passage.stage + 1} begins. Every step must call it exactly once, as the first batch did."
                f"{skipped if graded and returned is None else ''}"
            )
        return Replayed(returned, [], run.described)

    def remove(self) -> None:
        """Take the stubs and hooks away."""
        for stub in reversed(self._stubs):
            stub.remove()
        for handle in self._handles:
            handle.remove()

    def stub_output(self, name: str) -> tuple[bool, Any]:
        """Whether module `name` is a stub right now, and what it returns then."""
        run = self._running
        if run is None or not run.is_stubbed(name):
            return False, None
        return True, run.stub_output(name, self._filler)

    def _filler(self, spec: TensorSpec, guarded: Value | None) -> Tensor:
        """Zeros that nobody's result depends on, cut out of the same memory each time.

        Written into, they are as good as before.

        Args:
            spec: of the zeros.
            guarded: the value that they stand for, if a gradient that reaches them is an error.
        """
        if guarded is None or not torch.is_grad_enabled():
            return self._zeros_of(spec)
        known, node = self._guards.get(guarded, (None, None))
        if known is not None and spec.fits(known) and _is_as_made(known, node):
            return known
        zeros = self._zeros_of(spec)
        # No view: a step may write into it, which is forbidden for views that a function returned.
        unrelated = torch.empty(0, dtype=spec.dtype, device=self._device)
        unrelated.set_(zeros.untyped_storage(), 0, zeros.shape, zeros.stride())
        made = _guarded(self._anchor, guarded, unrelated)
        self._guards[guarded] = made, made.grad_fn
        return made

    def _zeros_of(self, spec: TensorSpec) -> Tensor:
        size = math.prod(spec.shape)
        zeros = self._zeros.get(spec.dtype)
        if zeros is None or zeros.numel() < size:
            # The others would keep the smaller memory.
            self._guards.clear()
            # A tensor that is made in inference mode could not be used outside.
            with torch.inference_mode(False):
                zeros = self._zeros[spec.dtype] = torch.zeros(size, dtype=spec.dtype, device=self._device)
        return zeros[:size].view(spec.shape)

    def _capture(self, name: str) -> Callable[..., None]:
        def capture(module: nn.Module, args: Any, output: Any) -> None:
            if self._running is not None:
                self._running.capture(name, output)

        return capture

    def _leave(self, end: str) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            if self._running is not None and self._running.passage.end == end:
                raise _EndOfStage

        return leave


class _Role:
    """What follows from a passage alone, for every run of it.

    Attributes:
        passage: which.
        received: the values that come from the stage before, in the order of the message.
        rewritten: those of which each user needs a copy of its own.
        wanted: the values that this stage makes and sends.
    """

    def __init__(self, passage: Passage) -> None:
        self.passage = passage
        self.received = [crossing.value for crossing in passage.receives]
        self.rewritten = {crossing.value for crossing in (*passage.receives, *passage.sends) if crossing.rewritten}
        self.wanted = {crossing.value for crossing in passage.sends} - set(self.received)


class _Run:
    """What is known while a step is replayed."""

    def __init__(self, role: _Role, received: Sequence[Tensor], templates: TemplateTable, describe: bool) -> None:
        self.passage = role.passage
        self.described: TemplateTable = {}
        self._role = role
        self._describe = describe
        self._received = dict(zip(role.received, received))
        self._templates = templates
        self._captured: dict[Value, tuple[Tensor, int]] = {}
        self._calls: Counter[str] = Counter()
        self._just_stubbed = ""

    def is_stubbed(self, name: str) -> bool:
        """Whether the next call of a module is for another stage."""
        stubs = self.passage.stubs
        # A stub of one step may run for real in another, and so may later calls of it.
        return name in stubs and ((calls := stubs[name]) is None or self._calls[name] < calls)

    def stub_output(self, name: str, filler: Callable[[TensorSpec, Value | None], Tensor]) -> Any:
        call = self._calls[name]
        self._calls[name] += 1
        self._just_stubbed = name
        template = self._templates.get((name, call))
        if template is None:
            raise CutError(
                f"{name!r} was called {call + 1} times on stage {self.passage.stage}, more often than for the first"
                " batch of these shapes. A module before a cut must be called as often in every step."
            )
        return template.build(
            self._given(Value(name, call, leaf), spec, filler) for leaf, spec in enumerate(template.specs)
        )

    def _given(self, value: Value, spec: TensorSpec, filler: Callable[[TensorSpec, Value | None], Tensor]) -> Tensor:
        tensor = self._received.get(value)
        if tensor is None:
            return filler(spec, value if value in self.passage.guarded else None)
        # A leaf that needs a gradient may not be written in place, and what is handed on must stay as it came.
        return tensor.clone() if value in self._role.rewritten else tensor

    def capture(self, name: str, output: Any) -> None:
        if self._just_stubbed == name:
            self._just_stubbed = ""
            return
        call = self._calls[name]
        self._calls[name] += 1
        template, tensors = described(output, name)
        told = self._templates.get((name, call))
        if self._describe:
            self.described[name, call] = template
        elif told is not None and (news := difference(told, template)) is not None:
            raise DataMismatchError(
                f"{name!r} returned something else than for the first batch of these shapes: {news}. The stages after"
                " it count on that: only the numbers in tensors travel. Return a tensor of a fixed shape instead of a"
                " Python number, or move the cut with `split_points`."
            )
        for number, leaf in enumerate(tensors):
            value = Value(name, call, number)
            if value in self._role.wanted:
                kept = leaf.clone() if value in self._role.rewritten else leaf
                self._captured[value] = kept, _version(kept)

    def sent(self) -> list[Tensor]:
        return [self._sent(crossing) for crossing in self.passage.sends]

    def _sent(self, crossing: Crossing) -> Tensor:
        value = crossing.value
        if value in self._received:
            return self._received[value]
        if value not in self._captured:
            raise CutError(
                f"stage {self.passage.stage} reached {self.passage.end!r} without having made {value}, which the next"
                " stage needs. Every step must call the same modules as the first batch did."
            )
        tensor, version = self._captured[value]
        if _version(tensor) != version:
            raise DataMismatchError(
                f"{value} was written in place between the module and the cut at {self.passage.end!r}; it was not for"
                " the first batch. Write out of place there (`x = x + y` for `x += y`)."
            )
        return tensor


class _Guard(torch.autograd.Function):
    """A filler whose gradient nobody expects.

    Where one arrives, the step depends on what this stage did not receive, and computed with zeros.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Value, filler: list[Tensor]) -> Tensor:
        ctx.value = value
        return filler[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise CutError(
            f"{ctx.value} gets a gradient on a later stage, which it did not in the first step; so it was not sent"
            " there, and zeros stood for it. Every step must use what crosses a cut as the first one did: let a term"
            " that comes later count from the beginning, multiplied by a weight that is 0 at first, or move the cut"
            " with `split_points` so that module and use lie on one stage."
        )


def _guarded(anchor: Tensor, value: Value, filler: Tensor) -> Tensor:
    # In a list it is not an input, which a function would have to copy.
    made: Tensor = _Guard.apply(anchor, value, [filler])  # type: ignore[no-untyped-call]
    return made


def _is_as_made(filler: Tensor, node: Node | None) -> bool:
    """Whether no step did to a filler what the next one would see."""
    return filler.grad_fn is node and not has_gradient_hooks(filler)


class _Stub:
    """Replaces a module's forward, while a replay that stubs it runs."""

    def __init__(self, module: nn.Module, name: str, replay: Replay) -> None:
        self._module = module
        self._saved: dict[str, Any] = {
            key: module.__dict__[key] for key in ("forward", "_compiled_call_impl") if key in module.__dict__
        }
        real = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            stubbed, output = replay.stub_output(name)
            return output if stubbed else real(*args, **kwargs)

        module.__dict__["forward"] = forward
        # A module compiled in place would trace the stub; there is nothing to compile in it.
        module.__dict__["_compiled_call_impl"] = None

    def remove(self) -> None:
        for key in ("forward", "_compiled_call_impl"):
            self._module.__dict__.pop(key, None)
        vars(self._module).update(self._saved)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
