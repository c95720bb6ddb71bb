"""Keeps the weights that the mini-batches in flight were forwarded with.

A version is one flat buffer per dtype that holds all trainable parameters of the stage. A forward uses the parameters
as they are. Before an update, the newest version is copied into a free buffer and the parameters are pointed there,
so that the update does not touch what mini-batches in flight still need. During the backward of mini-batch i the
parameters point at the version that forward i used, then back.

Pointing at the version is what makes every way right in which a module can keep its weights between forward and
backward. Saved tensors would be right without it for some modules, but `nn.LayerNorm` saves the parameter object,
a custom function may keep it on `ctx`, and activation checkpointing reads the weights again.

What the user knows stays: the parameter objects, their hooks, their `.grad`, the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_cpipe.errors import WeightWrittenError
from lightning_cpipe.torch_private import set_version_counters

_ALIGNMENT = 512
"""Bytes. Each parameter starts where torch's own allocators would let it start, so kernels take the same path."""


class Version:
    """One version's storage.

    Attributes:
        data: what each parameter points at.
        flats: the buffers that `data` lies in; none for the memory that the parameters came with.
    """

    def __init__(self, data: Sequence[Tensor], flats: Sequence[Tensor] = ()) -> None:
        self.data = data
        self.flats = flats

    @classmethod
    def flat_like(cls, parameters: Sequence[nn.Parameter]) -> Version:
        """Room for another version, in one buffer per dtype and device."""
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        places = []
        for parameter in parameters:
            kind = parameter.dtype, parameter.device
            step = max(1, _ALIGNMENT // parameter.element_size())
            places.append((kind, sizes.setdefault(kind, 0)))
            sizes[kind] += -(-parameter.numel() // step) * step
        flats = {kind: torch.zeros(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
        data = [
            torch.as_strided(flats[kind], parameter.size(), _dense_strides(parameter), offset)
            for parameter, (kind, offset) in zip(parameters, places)
        ]
        return cls(data, list(flats.values()))

    def copy_from(self, other: Version) -> None:
        """Take over another version's numbers."""
        pairs = zip(self.flats, other.flats) if other.flats else zip(self.data, other.data)
        for mine, theirs in pairs:
            mine.copy_(theirs)


class Versions:
    """The versions of one stage's trainable parameters.

    Where nothing is in flight at an update (on the last stage) nothing is copied: the update is in place.

    Args:
        named: trainable parameters, each once, with their names.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.named = dict(named)
        """The parameters by name."""
        self._parameters = list(self.named.values())
        self._counters = [parameter._version for parameter in self._parameters]
        self._newest = Version([parameter.data for parameter in self._parameters])
        self._used_by: dict[int, tuple[Version, int]] = {}
        self._free: list[Version] = []
        self.count = 0
        """Updates so far: the number of the newest version."""

    @property
    def alive(self) -> int:
        """How many versions hold memory, the newest included."""
        return len({id(version) for version, _ in self._used_by.values()} | {id(self._newest)}) + len(self._free)

    def use(self, batch: int) -> None:
        """The forward of `batch` uses the newest version.

        Raises:
            WeightWrittenError: if a parameter was written to since the last update although batches in flight need it.
        """
        self._accept_writes()
        self._used_by[batch] = self._newest, self.count

    def number_of(self, batch: int) -> int:
        """The number of the version that the forward of `batch` used."""
        return self._used_by[batch][1]

    @contextmanager
    def of(self, batch: int) -> Iterator[None]:
        """The parameters are what the forward of `batch` used.

        Raises:
            WeightWrittenError: see `use`.
        """
        self._accept_writes()
        used, _ = self._used_by[batch]
        if used is self._newest:
            yield
            return
        self._point_at(used)
        try:
            yield
        finally:
            self._point_at(self._newest)

    def release(self, batch: int) -> None:
        """The backward of `batch` is done; its version is free once no other batch needs it."""
        used, _ = self._used_by.pop(batch)
        if used is not self._newest and used.flats and not self._in_use(used):
            self._free.append(used)

    def advance(self) -> None:
        """Make room for an update: the next one writes into memory that no batch in flight needs."""
        self.count += 1
        if not self._in_use(self._newest):
            return
        following = self._free.pop() if self._free else Version.flat_like(self._parameters)
        following.copy_from(self._newest)
        self._newest = following
        self._point_at(following)

    def _in_use(self, version: Version) -> bool:
        return any(used is version for used, _ in self._used_by.values())

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Writes into the parameters inside are updates, which autograd need not know of.

        The graphs in flight saved other versions' storage; the counters that would tell them otherwise are put back.
        """
        try:
            yield
        finally:
            set_version_counters(self._parameters, self._counters)
        # An optimizer may bind the parameters to other memory (`p.data = ...`) instead of writing into theirs.
        if any(p.data_ptr() != data.data_ptr() for p, data in zip(self._parameters, self._newest.data)):
            self._newest = Version([parameter.data for parameter in self._parameters])

    def _accept_writes(self) -> None:
        """A hook after an update may write into the newest version, which nothing in flight has used yet."""
        now = [parameter._version for parameter in self._parameters]
        if now == self._counters:
            return
        if self._in_use(self._newest):
            written = [name for name, was, is_ in zip(self.named, self._counters, now) if was != is_]
            raise WeightWrittenError(
                f"{', '.join(written)} changed outside the optimizer's step, while mini-batches in flight had been"
                " forwarded with the version that was written into. Change weights right after an update (with"
                " `accumulate_grad_batches`, only after the last mini-batch of one), or in the optimizer."
            )
        set_version_counters(self._parameters, self._counters)

    def _point_at(self, version: Version) -> None:
        for parameter, data in zip(self._parameters, version.data):
            parameter.data = data


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's own strides if it fills its memory without gaps, else those of a contiguous one."""
    return torch.empty_like(parameter, device="meta").stride()
