"""Runs the stages of a step one after the other in this process, and compares them with the whole module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_cpipe.equality import close
from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.gradients import gradients
from lightning_cpipe.probe.step import Observed, Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.stage.cut import Passage
from lightning_cpipe.stage.replay import Replay, Replayed
from lightning_cpipe.tree import TemplateTable, flatten


def compare_with_uncut(
    root: nn.Module,
    step: Step,
    passages: Sequence[Passage],
    templates: TemplateTable,
    device: torch.device,
) -> str | None:
    """What differs between the stages' results and the whole module's; None if nothing does.

    Loss, logged values, output and every gradient are compared, up to rounding: a gradient that comes together from
    several stages is summed in another order. The step is run twice in a row, since it may keep something for the
    next one.
    """
    weights = [(name, parameter) for name, parameter in root.named_parameters() if parameter.requires_grad]
    with untouched(root):
        whole = step.run()
        expected = _gradients([whole.loss], [_one(whole.loss)], [p for _, p in weights])
        whole_again = step.run()
    chain = _Chain(root, step, passages, templates, device)
    last, last_again = chain.forward()
    if not _alike(last, whole):
        return "the loss, a logged value or the output"
    if not _alike(last_again, whole_again):
        return "in a second step, the loss, a logged value or the output"
    for (name, _), here, there in zip(weights, chain.backward([p for _, p in weights]), expected):
        if (here is None) != (there is None) or (here is not None and not close([here], [there])):
            return f"the gradient of {name!r}"
    return None


def refusal(what: str, starts: Sequence[str], suspects: Sequence[str]) -> CutError:
    """The error for a cut that changes results; it names the attributes that the step changes."""
    hint = f" Attributes that the step changes: {', '.join(suspects)}." if suspects else ""
    return CutError(
        f"cut at {', '.join(starts)}, {what}. Something is handed on other than through what a module returns: on an"
        " attribute, within a step or from one step to the next; by Python's or NumPy's random numbers, drawn inside a"
        f" module; by a hook on a tensor; or by an activation checkpoint that reaches across the cut.{hint} Return the"
        " value from the module instead, keep what outlives a step inside the block that uses it, or move the cut with"
        " `split_points` so that both ends lie on one stage."
    )


def _alike(a: Observed, b: Observed) -> bool:
    return close(*(flatten(each.facts)[0] for each in (a, b)))


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

    def forward(self) -> tuple[Observed, Observed]:
        """What the last stage makes, and what it makes in a second step."""
        first, second = Replayed(None, [], {}), Replayed(None, [], {})
        for passage in self._passages:
            self._arrived.append([tensor.detach() for tensor in first.sent])
            with untouched(self._root):
                first = self._run(passage, [tensor.clone() for tensor in self._arrived[-1]])
                second = self._run(passage, [tensor.detach().clone() for tensor in second.sent])
        return first.returned, second.returned

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


def _one(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else torch.ones_like(loss)


def _gradients(
    outputs: Sequence[Tensor | None], arriving: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    pairs = [(out, g) for out, g in zip(outputs, arriving) if out is not None and out.requires_grad and g is not None]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return gradients([o for o, _ in pairs], [g for _, g in pairs], inputs)
