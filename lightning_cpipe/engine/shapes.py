"""The shapes of what crosses, told once for each new shape of batch and trusted from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_cpipe.stage.cut import Crossing, Passage, StepCut
from lightning_cpipe.tree import Signature, TemplateTable, TensorSpec


@dataclass(frozen=True)
class Known:
    """What one stage knows of the batches of one signature.

    Attributes:
        table: the outputs of its stubs, and those of its own modules that are stubs later, without the numbers.
        received: the specs of what comes from the stage before.
        sent: the specs of what goes to the stage after.
        gradients: the specs of what comes back from there.
    """

    table: TemplateTable
    received: Sequence[TensorSpec]
    sent: Sequence[TensorSpec]
    gradients: Sequence[TensorSpec]


class Shapes:
    """What is known of one step's shapes on one stage, by the signature of the batch.

    All ranks see the same batches, so sender and receiver know without a word whether a signature is new. For a new
    one, the first stage runs and describes its outputs, and each stage adds its own and tells the next. Where shapes
    never stop changing, the one that came first is forgotten first, by all ranks before the same mini-batch.

    Args:
        cut: of the step.
        passage: this stage's.
        keep: how many signatures are remembered.
    """

    def __init__(self, cut: StepCut, passage: Passage, keep: int = 1024) -> None:
        self._passage = passage
        self._keep = keep
        self._known: dict[Signature, Known] = {}
        self.learn(cut.signature, cut.templates)

    def of(self, signature: Signature) -> Known | None:
        """What is known of batches of this signature; None if it is new."""
        return self._known.get(signature)

    def learn(self, signature: Signature, table: TemplateTable) -> Known:
        """Remember the templates. Until this stage has run, those of its own modules are not among them."""
        sends = self._passage.sends if all(_key(each) in table for each in self._passage.sends) else ()
        known = self._known[signature] = Known(
            table,
            _specs(self._passage.receives, table),
            _specs(sends, table),
            _specs([crossing for crossing in sends if crossing.gradient], table),
        )
        while len(self._known) > self._keep:
            del self._known[next(iter(self._known))]
        return known


def _key(crossing: Crossing) -> tuple[str, int]:
    return crossing.value.module, crossing.value.call


def _specs(crossings: Sequence[Crossing], table: TemplateTable) -> list[TensorSpec]:
    """In the order of the message."""
    return [table[_key(crossing)].specs[crossing.value.leaf] for crossing in crossings]
