"""A module of which this process runs one stage, or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.own_state import OwnState
from lightning_cpipe.stage.randomness import SeededScope
from lightning_cpipe.stage.replay import Replay, Replayed
from lightning_cpipe.stage.weights import Substitutes, copies_for
from lightning_cpipe.tree import TemplateTable


class StageModule:
    """The stubs, hooks and random scopes of one stage on a module that nobody changed.

    Args:
        root: the whole module; the weights of other stages may be absent.
        cut: how it is cut.
        stage: which stage this is.
        device: where the stage computes.
        isolation: of the modules that draw, where several stages of this process share it; None for one of its own.
        copies: the stage's own copies of parameters that a later stage of this process trains, too, by name.
        state: what the step writes on the module, where several stages of this process share that.
    """

    def __init__(
        self,
        root: nn.Module,
        cut: Cut,
        stage: int,
        device: torch.device,
        isolation: Isolation | None = None,
        copies: Mapping[str, nn.Parameter] | None = None,
        state: OwnState | None = None,
    ) -> None:
        self.root = root
        self.cut = cut
        self.stage = stage
        self.device = device
        passages = {name: step.passages[stage] for name, step in cut.steps.items()}
        later = {stub for step in cut.steps.values() for p in step.passages[stage + 1 :] for stub in p.stubs}
        self._replay = Replay(root, passages, device, later)
        self._isolation = isolation or Isolation(root, cut.draws, cut.draws_repeatedly)
        self._scope = SeededScope()
        self._copies = copies or {}
        self._substitutes = Substitutes(root, self._copies)
        self._state = state or OwnState(root, cut, (stage,))
        self._differs = bool(cut.draws or self._copies or not self._state.is_of_one)
        """Whether the module ever stands otherwise inside `drawing`."""

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return self.cut.num_stages

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the loss."""
        return self.stage == self.num_stages - 1

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that the stage trains, by name."""
        homes = self.cut.homes
        own = {name: self._copies.get(name, each) for name, each in self.root.named_parameters()}
        return {n: each for n, each in own.items() if each.requires_grad and self.stage in homes.get(n, (self.stage,))}

    def follow(self) -> None:
        """The module's weights were changed from outside: take them over into the stage's own copies."""
        self._substitutes.follow()

    def follow_freezing(self) -> None:
        """Weights of the module may have been frozen or unfrozen: let the stage's own copies be so, too."""
        for name, each in self._copies.items():
            each.requires_grad_(self.root.get_parameter(name).requires_grad)

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
        with scope, self.drawing(seed):
            return self._replay.run(name, step, received, table, describe=describe)

    def drawing(self, seed: int) -> AbstractContextManager[None]:
        """The module stands inside as the stage alone would have it, and its modules draw from `seed`.

        A backward runs inside, too: activation checkpointing repeats there what the forward drew, and reads what the
        stage wrote on the module last.
        """
        return self._drawing(seed) if self._differs else nullcontext()

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        with self._isolation.of(seed), self._substitutes.hanging(), self._state.of(self.stage):
            yield

    @classmethod
    def of_rank(cls, root: nn.Module, cut: Cut, stages: Sequence[int], device: torch.device) -> list[StageModule]:
        """The stages that this process runs, all on one module; the last one must be removed first."""
        isolation = Isolation(root, cut.draws, cut.draws_repeatedly)
        state = OwnState(root, cut, stages)
        return [
            cls(root, cut, stage, device, isolation, copies_for(root, cut, stage, stages), state) for stage in stages
        ]

    def remove(self) -> None:
        """Leave the module as it was, weights excepted."""
        self._replay.remove()
        self._isolation.remove()
