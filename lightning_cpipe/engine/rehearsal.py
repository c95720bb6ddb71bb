"""All stages of a module in one process, one after the other.

Each stage is a copy of the module of which only its own weights are left, as in a process of its own; what crosses
goes from copy to copy by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cpipe.engine.shapes import Shapes
from lightning_cpipe.engine.stage_stream import gradient_of
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.weights import keep_only
from lightning_cpipe.tree import Signature, TemplateTable


class Passed(NamedTuple):
    """What one stage made of one step.

    Attributes:
        received: what came from the stage before; leaves, those with a gradient collect it.
        sent: what goes to the stage after, attached to the graph.
        returned: what the step returned, on the last stage.
    """

    received: list[Tensor]
    sent: list[Tensor]
    returned: Any


class Rehearsal:
    """The stages, and what each knows of the shapes of each step.

    Args:
        root: the whole module; it is copied once for each stage.
        cut: how it is cut.
        device: where the stages compute.

    Attributes:
        modules: the copies.
    """

    def __init__(self, root: nn.Module, cut: Cut, device: torch.device) -> None:
        self.cut = cut
        self.modules: list[nn.Module] = []
        for stage in range(cut.num_stages):
            self.modules.append(copy.deepcopy(root))
            keep_only(self.modules[-1], cut, stage)
        self._stages = [StageModule(module, cut, stage, device) for stage, module in enumerate(self.modules)]
        self._shapes = [
            {name: Shapes(step, step.passages[stage]) for name, step in cut.steps.items()}
            for stage in range(cut.num_stages)
        ]

    def forward(self, name: str, call: Callable[[nn.Module], Any], kind: Signature, seed: int) -> list[Passed]:
        """The forwards of a step, from the first stage to the last.

        Args:
            name: the step's.
            call: runs the user's step on one of the copies.
            kind: the signature of the batch.
            seed: what all its random numbers follow from.
        """
        table: TemplateTable | None = None
        passed: list[Passed] = []
        for module, stage, known_shapes in zip(self.modules, self._stages, self._shapes):
            crossings = self.cut.steps[name].passages[stage.stage].receives
            arriving = [tensor.detach().clone() for tensor in passed[-1].sent] if passed else []
            received = [t.requires_grad_(crossing.gradient) for t, crossing in zip(arriving, crossings)]
            shapes = known_shapes[name]
            known = shapes.of(kind) if table is None else shapes.learn(kind, table)
            # The shapes of a new kind of batch are described by the first stage, and each stage adds its own.
            new = table is not None or known is None
            told = None if known is None else known.table
            made = stage.forward(name, partial(call, module), seed, received, told, describe=new)
            if new:
                table = {**(told or {}), **made.templates}
                shapes.learn(kind, table)
            passed.append(Passed(received, made.sent, made.returned))
        return passed

    def backward(self, passed: Sequence[Passed], loss: Tensor, seed: int) -> list[dict[str, Tensor]]:
        """The backwards of a training step, from the last stage to the first.

        Returns:
            For each stage, the gradients of its parameters, which are taken away from them.
        """
        found: list[dict[str, Tensor]] = []
        coming: list[Tensor | None] = [torch.ones_like(loss)]
        for stage, each in zip(reversed(self._stages), reversed(passed)):
            outputs = [loss] if stage.is_last else each.sent
            pairs = [(out, g) for out, g in zip(outputs, coming) if g is not None and out.requires_grad]
            if pairs:
                with stage.drawing(seed):
                    torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])
            coming = [gradient_of(leaf) if leaf.requires_grad else None for leaf in each.received]
            named = list(self.modules[stage.stage].named_parameters())
            found.append({name: parameter.grad for name, parameter in named if parameter.grad is not None})
            for _, parameter in named:
                parameter.grad = None
        return found[::-1]

    def buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers, each from the stage that has the true one."""
        homes = self.cut.buffer_homes
        return {
            name: buffer.clone()
            for stage, module in enumerate(self.modules)
            for name, buffer in module.named_buffers()
            if homes[name] == stage
        }


def added(by_stage: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all stages; a parameter that is tied gets the sum of its, the last stage's first."""
    total: dict[str, Tensor] = {}
    for gradients in reversed(by_stage):
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total
