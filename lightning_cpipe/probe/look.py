"""Looks again, in a later step, whether anything depends on what a stage does not receive.

The probe sees the first batch only. What a step begins to use later is not sent, and the stage computes with zeros in
its place. Here a stage that is alone with its own weights runs the step with other numbers there, and compares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_cpipe.probe.fills import Scattered, is_integer, unlike_zeros
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.trial import Trial
from lightning_cpipe.stage.cut import Passage, Value
from lightning_cpipe.tree import TemplateTable


def used_unreceived(
    root: nn.Module,
    step: Step,
    passage: Passage,
    templates: TemplateTable,
    received: Sequence[Tensor],
    device: torch.device,
) -> list[Value]:
    """The values on which a stage's results depend in a step although it does not receive them.

    The step runs once with zeros in their place and twice with other numbers. What the stage sends or, on the last
    one, what the step returns and logs must be the same bits each time, and so must what it leaves on the root module,
    in buffers and in metrics. `root`, the random generators and autograd's counts of writes are afterwards as before.

    Args:
        root: the whole module; the weights of other stages may be absent.
        step: the step on its batch.
        passage: the stage's part of it.
        templates: the outputs of the stubs.
        received: what came for ``passage.receives``.
        device: where the module is.

    Returns:
        The values.

    Raises:
        CutError: if the step writes a weight in place.
        Exception: whatever the step raises with zeros, which it will raise by itself, too; or what the machine says
            that has no memory for a look.
    """
    known = {crossing.value: tensor.detach() for crossing, tensor in zip(passage.receives, received)}
    specs = {
        value: spec
        for (name, call), template in templates.items()
        if name in passage.stubs and ((calls := passage.stubs[name]) is None or call < calls)
        for leaf, spec in enumerate(template.specs)
        if (value := Value(name, call, leaf)) not in known and spec.num_bytes
    }
    # An integer of which no range is known may be an index, and other numbers out of its bounds.
    specs = {v: spec for v, spec in specs.items() if v in passage.ranges or not is_integer(spec.dtype)}
    if not specs:
        return []
    zeros = {v: torch.zeros((), dtype=spec.dtype, device=device).expand(spec.shape) for v, spec in specs.items()}
    trial = Trial(root, step, passage, {**known, **zeros}, lambda value: True, templates, device)
    others = Scattered(specs, passage.ranges, step.seed, device)
    try:
        return trial.culprits(list(specs), [others.above, others.below])
    finally:
        trial.close()


def read_unloaded(
    root: nn.Module,
    step: Step,
    passage: Passage,
    templates: TemplateTable,
    received: Sequence[Tensor],
    device: torch.device,
) -> list[Tensor] | None:
    """The tensors of its batch on which a stage depends that has zeros in their place; see `used_unreceived`."""
    if step.batch is None:
        return None
    known = {crossing.value: tensor.detach() for crossing, tensor in zip(passage.receives, received)}
    trial = Trial(root, step, passage, known, lambda value: True, templates, device)
    try:
        return trial.reads(step.batch, (unlike_zeros, unlike_zeros))
    finally:
        trial.close()
