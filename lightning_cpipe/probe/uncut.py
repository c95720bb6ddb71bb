"""Runs the stages of a step one after the other in this process, and compares them with the whole module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.equality import close
from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.gradients import gradients
from lightning_cpipe.probe.step import RecordedStep, Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.stage.cut import Passage
from lightning_cpipe.stage.replay import Replay, Replayed
from lightning_cpipe.tree import TemplateTable, map_tensors


def compare_with_uncut(
    root: nn.Module,
    recorded: RecordedStep,
    passages: Sequence[Passage],
    templates: TemplateTable,
    device: torch.device,
    *,
    with_gradients: bool,
) -> str | None:
    """What differs between the stages' results and the whole module's; None if nothing does.

    Loss, logged values and output are compared, up to rounding, of two steps in a row, since a step may keep something
    for the next one. So is every gradient of the first, if asked for: one that comes together from several stages is
    summed in another order.
    """
    step = recorded.step
    weights = [(name, parameter) for name, parameter in root.named_parameters() if parameter.requires_grad]
    expected: list[Tensor | None] = []
    with untouched(root):
        whole = step.run()
        if with_gradients:
            expected = _gradients([whole.loss], [_one(whole.loss)], [p for _, p in weights])
        first = whole.facts
        del whole
        second = step.run().facts
    chain = _Chain(root, step, passages, templates, device)
    made_first, made_second = chain.forward()
    if not recorded.alike(made_first, first):
        return "the loss, a logged value or the output"
    if not recorded.alike(made_second, second):
        return "in a second step, the loss, a logged value or the output"
    if with_gradients:
        for (name, _), here, there in zip(weights, chain.backward([p for _, p in weights]), expected):
            if (here is None) != (there is None) or (here is not None and not close([here], [there])):
                return f"the gradient of {name!r}"
    return None


def weights_behind(root: nn.Module, step: Step, passage: Passage, names: Sequence[str]) -> list[str]:
    """Those of these weights that the uncut module's loss depends on past what the stage's stubs return.

    Nothing of the kind can cross: what a hook inside a block took for the loss, such as the choices of a router. Runs
    the uncut module once, with the stubs' outputs cut off from the graph.

    Args:
        root: the whole module.
        step: its step.
        passage: the stage.
        names: of parameters that only stages before this one train.
    """
    calls: Counter[str] = Counter()

    def cut_off(name: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            calls[name] += 1
            stubbed = passage.stubs[name]
            return output if stubbed is not None and calls[name] > stubbed else map_tensors(_apart, output)

        return after

    with untouched(root), ExitStack() as hooks:
        for name in passage.stubs:
            # Before any other hook, so that these see what is cut off.
            handle = root.get_submodule(name).register_forward_hook(cut_off(name), prepend=True)
            hooks.callback(handle.remove)
        loss = step.run().loss
        if loss is None or not loss.requires_grad or not names:
            return []
        found = gradients([loss], [torch.ones_like(loss)], [root.get_parameter(name) for name in names])
        return [name for name, gradient in zip(names, found) if gradient is not None]


def _apart(tensor: Tensor) -> Tensor:
    """The same numbers without their graph; no leaf, so that it may be written into."""
    return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def refusal(what: str, origins: Sequence[str], changed: Sequence[str]) -> CutError:
    """The error for a cut that changes results.

    Args:
        what: differs.
        origins: see `reasons`.
        changed: see `reasons`.
    """
    return CutError(f"{what}. {reasons(origins, changed)}")


def reasons(origins: Sequence[str], changed: Sequence[str]) -> str:
    """Why a cut may change results, and what to do.

    Args:
        origins: modules that hand on something besides what they return, where they could be found.
        changed: the attributes that the step changes.
    """
    hint = f" Attributes that the step changes: {', '.join(changed)}." if changed else ""
    return (
        f"Something is handed on other than through what {', '.join(origins) or 'a module'} returns: on an"
        " attribute or a global variable, within a step or from one step to the next; by writing into an input; by a"
        " `self.log` inside a module; by Python's or NumPy's random numbers, drawn inside a module; by a hook on a"
        f" tensor; or by an activation checkpoint that reaches across the cut.{hint} Return the value from the module"
        " instead, keep what outlives a step inside the block that uses it, or move the cut with `split_points` so"
        " that both ends lie on one stage."
    )


class _Chain:
    """The stages of a step, each fed with what the one before it sent."""

    def __init__(
        self,
        root: nn.Module,
        step: Step,
        passages: Sequence[Passage],
        templates: TemplateTable,
        device: torch.device,
    ) -> None:
        self._root = root
        self._step = step
        self._passages = passages
        self._templates = templates
        self._device = device
        self._arrived: list[list[Tensor]] = []

    def forward(self) -> tuple[list[Any], list[Any]]:
        """What the last stage makes, and what it makes in a second step."""
        first: list[Any] = []
        second: list[Any] = []
        for passage in self._passages:
            self._arrived.append(first)
            with untouched(self._root):
                first, second = (
                    _made(self._run(passage, [tensor.clone() for tensor in arrived])) for arrived in (first, second)
                )
        return first, second

    def backward(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of each weight, summed over the stages, from the last to the first.

        Each stage runs once more: what its forward wrote into buffers must stand until its backward is done.
        """
        total: list[Tensor | None] = [None] * len(weights)
        arriving: list[Tensor | None] = []
        for passage, arrived in zip(reversed(self._passages), reversed(self._arrived)):
            received = [
                tensor.clone().requires_grad_(self._step.trains and crossing.gradient)
                for tensor, crossing in zip(arrived, passage.receives)
            ]
            leaves = [leaf for leaf in received if leaf.requires_grad]
            with untouched(self._root):
                made = self._run(passage, received)
                if made.returned is None:
                    grads = _gradients(made.sent, arriving, [*leaves, *weights])
                else:
                    grads = _gradients([made.returned.loss], [_one(made.returned.loss)], [*leaves, *weights])
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, grads[len(leaves) :])]
            each = iter(grads)
            arriving = [next(each) if leaf.requires_grad else None for leaf in received]
        return total

    def _run(self, passage: Passage, received: Sequence[Tensor]) -> Replayed:
        replay = Replay(self._root, {self._step.name: passage}, self._device)
        try:
            return replay.run(self._step.name, self._step.run, received, self._templates)
        finally:
            replay.remove()


def _made(replayed: Replayed) -> list[Any]:
    """What a stage sent, or what the last one returned, without graphs."""
    if replayed.returned is None:
        return [tensor.detach() for tensor in replayed.sent]
    facts: list[Any] = replayed.returned.facts
    return facts


def _one(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else torch.ones_like(loss)


def _gradients(
    outputs: Sequence[Tensor | None], arriving: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    pairs = [(out, g) for out, g in zip(outputs, arriving) if out is not None and out.requires_grad and g is not None]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return gradients([o for o, _ in pairs], [g for _, g in pairs], inputs)
