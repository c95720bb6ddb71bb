"""The shapes of what crosses, told once for each new shape of batch and trusted from then on."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cpipe.stage.cut import Crossing, StepCut
from lightning_cpipe.tree import Signature, TemplateTable, TensorSpec


class Shapes:
    """What is known of one step's shapes, by the signature of the batch.

    All ranks see the same batches, so sender and receiver know without a word whether a signature is new. For a new
    one, the first stage runs and describes its outputs, and each stage adds its own and tells the next. Where shapes
    never stop changing, the one that came first is forgotten first, by all ranks before the same mini-batch.

    Args:
        cut: of the step.
        keep: how many signatures are remembered.
    """

    def __init__(self, cut: StepCut, keep: int = 1024) -> None:
        self._keep = keep
        self._tables: dict[Signature, TemplateTable] = {cut.signature: cut.templates}

    def of(self, signature: Signature) -> TemplateTable | None:
        """The templates for batches of this signature; None if it is new."""
        return self._tables.get(signature)

    def learn(self, signature: Signature, table: TemplateTable) -> None:
        """Remember the templates."""
        self._tables[signature] = table
        while len(self._tables) > self._keep:
            del self._tables[next(iter(self._tables))]


def specs_of(crossings: Sequence[Crossing], table: TemplateTable) -> list[TensorSpec]:
    """The specs of the tensors of a message."""
    return [table[c.value.module, c.value.call].specs[c.value.leaf] for c in crossings]


def gradient_specs_of(crossings: Sequence[Crossing], table: TemplateTable) -> list[TensorSpec]:
    """The specs of the gradients that come back for a message."""
    return specs_of([crossing for crossing in crossings if crossing.gradient], table)
