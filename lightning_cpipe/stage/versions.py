"""Keeps the weights that mini-batches in flight, or to come, use.

A version is one flat buffer per dtype that holds all trainable parameters of the stage. The parameters are the newest
one. Before an update, it is copied into a free buffer and the parameters are pointed there, so that the update does not
touch what is still needed. During the forward and the backward of mini-batch i the parameters point at the version
that i uses, then back.

Pointing at the version is what makes every way right in which a module can keep its weights between forward and
backward. Saved tensors would be right without it for some modules, but `nn.LayerNorm` saves the parameter object,
a custom function may keep it on `ctx`, and activation checkpointing reads the weights again.

Where older versions are not kept, every update is in place, and autograd is not told: what a module kept of its weights
in the forward lies in the same memory, so its backward uses the newest ones. What it computed from them, such as the
product of `weight_norm` or a cast of autocast, stays what it was.

What the user knows stays: the parameter objects, their hooks, their `.grad`, the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    Where nothing that is still needed would be written into (on the last stage, as a rule) nothing is copied: the
    update is in place.

    Args:
        named: trainable parameters, each once, with their names.
        keeps: whether a backward uses what its forward used; if not, no older version is kept.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], keeps: bool = True) -> None:
        self.named = dict(named)
        """The parameters by name."""
        self._keeps = keeps
        self._parameters = list(self.named.values())
        self._counters = [parameter._version for parameter in self._parameters]
        self._newest = Version([parameter.data for parameter in self._parameters])
        self._older: dict[int, Version] = {}
        self._used_by: dict[int, int] = {}
        self._oldest_to_come = 0
        self._free: list[Version] = []
        self.count = 0
        """Updates so far: the number of the newest version."""

    @property
    def alive(self) -> int:
        """How many versions hold memory, the newest included."""
        return 1 + len(self._older) + len(self._free)

    def use(self, batch: int, number: int | None = None) -> None:
        """From its forward to its backward, `batch` uses this version: the newest, or an older one that was kept.

        Raises:
            WeightWrittenError: if a parameter was written to since the last update although batches in flight need it.
        """
        self._accept_writes()
        self._used_by[batch] = self.count if number is None else number

    def number_of(self, batch: int) -> int:
        """The number of the version that the forward of `batch` used."""
        return self._used_by[batch]

    def older(self) -> dict[int, dict[str, Tensor]]:
        """The older versions that are still needed, by name; the newest is number 0, the one before it -1."""
        return {
            number - self.count: {name: data.detach() for name, data in zip(self.named, version.data)}
            for number, version in self._older.items()
        }

    def put_back(self, older: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Keep older versions of another run, which `older` returned there; nothing is in flight yet."""
        for number, numbers in older.items():
            self._older[self.count + number] = version = Version.flat_like(self._parameters)
            for name, data in zip(self.named, version.data):
                data.copy_(numbers[name])
        self._oldest_to_come = min(self._older, default=self.count)

    @contextmanager
    def of(self, batch: int) -> Iterator[None]:
        """The parameters are what `batch` uses.

        Raises:
            WeightWrittenError: see `use`.
        """
        self._accept_writes()
        number = self._used_by[batch]
        if number == self.count or not self._keeps:
            yield
            return
        self._point_at(self._older[number])
        try:
            yield
        finally:
            self._point_at(self._newest)

    def release(self, batch: int) -> None:
        """The backward of `batch` is done; its version is free once nothing else needs it."""
        del self._used_by[batch]
        self._free_unneeded()

    def release_all(self) -> None:
        """No mini-batch is in flight any more, nor will one to come use an older version."""
        self._used_by.clear()
        self._oldest_to_come = self.count
        self._free_unneeded()

    def advance(self, oldest_to_come: int | None = None) -> None:
        """Make room for an update: the next one writes into memory that nothing else needs.

        Args:
            oldest_to_come: the oldest version that a forward after the update will use; None for the new one.
        """
        before = self.count
        self.count += 1
        self._oldest_to_come = self.count if oldest_to_come is None else oldest_to_come
        self._free_unneeded()
        if not self._keeps or not self._is_needed(before):
            return
        following = self._free.pop() if self._free else Version.flat_like(self._parameters)
        following.copy_from(self._newest)
        self._older[before] = self._newest
        self._newest = following
        self._point_at(following)

    def _is_needed(self, number: int) -> bool:
        return number >= self._oldest_to_come or number in self._used_by.values()

    def _free_unneeded(self) -> None:
        for number in [number for number in self._older if not self._is_needed(number)]:
            # The memory that the parameters came with is not flat; nothing is copied into it.
            if (version := self._older.pop(number)).flats:
                self._free.append(version)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Writes into the parameters inside are updates, which autograd need not know of.

        The graphs in flight saved other versions' storage, or shall see the update; the counters that would tell them
        otherwise are put back.
        """
        try:
            yield
        finally:
            set_version_counters(self._parameters, self._counters)
        # An optimizer may bind the parameters to other memory (`p.data = ...`) instead of writing into theirs.
        if any(p.data_ptr() != data.data_ptr() for p, data in zip(self._parameters, self._newest.data)):
            bound = Version([parameter.data for parameter in self._parameters])
            if self._keeps:
                self._newest = bound
            else:
                self._newest.copy_from(bound)
                self._point_at(self._newest)

    def _accept_writes(self) -> None:
        """A hook after an update may write into the newest version, unless something in flight used it as it was."""
        now = [parameter._version for parameter in self._parameters]
        if now == self._counters:
            return
        if self._keeps and self.count in self._used_by.values():
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
