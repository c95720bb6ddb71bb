"""A mini-batch on its way, as the engine knows it, and what tells two of them apart."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_cpipe.errors import DataMismatchError
from lightning_cpipe.tree import Signature, TensorSpec, as_bytes, flatten, tensors_held_by

_SAMPLE = 1024
"""Tensors with more elements than this are fingerprinted by so many of them, evenly spread."""


Mark = tuple[int, int | None]
"""The number of a mini-batch, and its fingerprint; None where it was not loaded."""


@dataclass
class MiniBatch:
    """What every stage knows of a mini-batch.

    Attributes:
        number: in this run, from 0; the plan's number.
        seed: what the random numbers of its step follow from.
        batch: as the loader gave it.
        fingerprint: of `batch`; None where it was not loaded, until the stage before tells it.
        signature: of `batch`.
        updates_before: optimizer steps that come before its own; those that share one have the same.
        has_record: whether each stage tells the next one of it; not of the further slices of one mini-batch, where the
            first one's record tells all.
    """

    number: int
    seed: int
    batch: Any
    fingerprint: int | None
    signature: Signature
    updates_before: int = 0
    has_record: bool = True

    @property
    def mark(self) -> Mark:
        """What tells it apart from others."""
        return self.number, self.fingerprint


SAME_DATA = (
    "All stages of a pipeline must draw the same data in the same order: call `seed_everything` before the data is"
    " split, shuffled or augmented, and do not let it depend on the rank. Batches are drawn ahead, so a hook that"
    " changes the data when an epoch begins comes too late for some: set `cross_epoch=False`."
)


def agreed(stage: int, here: Mark, there: Mark, step: str) -> Mark:
    """The mark of a mini-batch: the same on `stage`, unless that did not load it, as on the stage before.

    Raises:
        DataMismatchError: if they differ.
    """
    if here != there and (here[0] != there[0] or here[1] is not None):
        raise DataMismatchError(
            f"stage {stage} and stage {stage - 1} drew different mini-batches in {step}: {_in_words(here)} here,"
            f" {_in_words(there)} there. {SAME_DATA}"
        )
    return there


def _in_words(mark: Mark) -> str:
    number, found = mark
    return f"number {number}" + ("" if found is None else f" with fingerprint {found:08x}")


class Source(Protocol):
    """Where the engine finds the mini-batches."""

    def mini_batch(self, number: int) -> MiniBatch | None:
        """Mini-batch `number`; None if the run will not train it, or it was not drawn yet."""


class Slices(Source, Protocol):
    """Where the engine finds the micro-batches of a flush schedule, which are its plan's mini-batches."""

    def begin(self, number: int) -> range:
        """Slice mini-batch `number`, at which the loop is.

        Returns:
            The numbers of its micro-batches, which no other of the run has.
        """


def fingerprint(batch: Any) -> int:
    """A cheap hash of a batch: equal batches have equal ones, and different ones hardly ever do.

    Two ranks whose loaders disagree would train on labels that belong to other activations.
    """
    found = 0
    for leaf in flatten(batch)[0]:
        if isinstance(leaf, (int, float, str, bytes, type(None))):
            content = repr(leaf).encode()
        else:
            content = type(leaf).__qualname__.encode()
            for tensor in tensors_held_by(leaf):
                content += repr(TensorSpec.of(tensor)).encode() + _sample(tensor).numpy().tobytes()
        found = zlib.crc32(content, found)
    return found


def _sample(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.numel() <= _SAMPLE:
        sample = tensor.reshape(-1)
    elif tensor.is_contiguous():
        sample = tensor.view(-1)[:: _stride(tensor)]
    else:
        # By index: making it contiguous would copy the whole of it.
        sample = tensor[torch.unravel_index(torch.arange(0, tensor.numel(), _stride(tensor)), tensor.shape)]
    return as_bytes(sample).cpu()


def _stride(tensor: Tensor) -> int:
    return -(-tensor.numel() // _SAMPLE)
