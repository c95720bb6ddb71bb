"""A module of which this process runs one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import SeededScope
from lightning_cpipe.stage.replay import Replay, Replayed
from lightning_cpipe.tree import TemplateTable


class StageModule:
    """The stubs, hooks and random scopes of one stage on a module that nobody changed.

    Args:
        root: the whole module; the weights of other stages may be absent.
        cut: how it is cut.
        stage: which stage this process runs.
        device: where the stage computes.
    """

    def __init__(self, root: nn.Module, cut: Cut, stage: int, device: torch.device) -> None:
        self.cut = cut
        self.stage = stage
        passages = {name: step.passages[stage] for name, step in cut.steps.items()}
        later = {stub for step in cut.steps.values() for p in step.passages[stage + 1 :] for stub in p.stubs}
        self._replay = Replay(root, passages, device, later)
        self._isolation = Isolation(root, cut.draws, cut.draws_repeatedly)
        self._scope = SeededScope()

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return self.cut.num_stages

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the loss."""
        return self.stage == self.num_stages - 1

    def forward(
        self,
        name: str,
        step: Callable[[], Any],
        seed: int,
        received: Sequence[Tensor] = (),
        table: TemplateTable | None = None,
        *,
        describe: bool = False,
    ) -> Replayed:
        """Run this stage's part of a step; see `Replay.run`. All its random numbers follow from `seed`."""
        # With one stage there is nothing to agree on; a step without randomness runs as it does without a pipeline.
        scope = self._scope(seed) if self.num_stages > 1 or self.cut.steps[name].draws else nullcontext()
        with scope, self._isolation.of(seed):
            return self._replay.run(name, step, received, table, describe=describe)

    @contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """Inside, modules draw what they drew in the forward: where activation checkpointing repeats it, say."""
        with self._isolation.of(seed):
            yield

    def remove(self) -> None:
        """Leave the module as it was, weights excepted."""
        self._replay.remove()
        self._isolation.remove()
