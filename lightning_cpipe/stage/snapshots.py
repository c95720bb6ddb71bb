"""A module's buffers as they were before each mini-batch in flight.

BatchNorm's statistics and codebooks have seen the mini-batches in flight. So to forward those once more, after a
resume, each needs what was there before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_cpipe.equality import same_leaf
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.own_state import between_blocks

SMALL = 2**16
"""Elements. BatchNorm writes its statistics without telling, so buffers up to this size are copied each time; larger
ones if they tell of a write."""

Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class _Copy:
    """Of a buffer, as it was at one of its own versions."""

    source: Tensor
    version: int
    numbers: Tensor


class Snapshots:
    """Those of one stage.

    Args:
        root: the module; what hangs in it must be the stage's own whenever it is looked at.
        cut: how it is cut.
        stage: which.
    """

    def __init__(self, root: nn.Module, cut: Cut, stage: int) -> None:
        everyones = set(between_blocks(root, cut))
        self._buffers = {
            name: (module._buffers, key)
            for prefix, module in root.named_modules()
            for key in module._buffers
            if cut.buffer_homes.get(name := f"{prefix}.{key}".removeprefix(".")) == stage or module in everyones
        }
        self._copies: dict[str, _Copy] = {}
        self._first: Numbers | None = None
        self._before: dict[int, Numbers] = {}
        self._to_put: dict[int, Mapping[str, Tensor]] = {}

    def before(self, number: int) -> None:
        """Mini-batch `number` is forwarded next."""
        self._put(self._to_put.pop(number, {}))
        self._before[number] = self._now()
        self._first = self._first or self._before[number]

    def forget(self, number: int) -> None:
        """Mini-batch `number` is not in flight any more."""
        del self._before[number]

    def forget_all(self) -> None:
        """Nothing is in flight any more."""
        self._before.clear()

    def in_flight(self) -> list[Numbers]:
        """For each mini-batch in flight what was there before it, and at the end what is there now.

        Only of what has changed since training began. Copies.
        """
        if 0 in self._to_put:
            # Nothing was forwarded since. (The last entry stays for as long as no new mini-batch comes.)
            return [dict(each) for each in self._to_put.values()]
        *before, now = moments = [*self._before.values(), self._now()]
        first = self._first or now
        changed = [name for name in now if not all(same_leaf(each[name], now[name]) for each in (first, *before))]
        return [{name: each[name].cpu() for name in changed} for each in moments]

    def put_back(self, moments: Iterable[Mapping[str, Tensor]]) -> None:
        """The next mini-batches find what `in_flight` has returned: each what was there before it."""
        self._to_put = dict(enumerate(moments))
        # As the checkpoint has them: what is put in their place has changed.
        self._first = self._now()

    def _now(self) -> Numbers:
        hanging = {name: held.get(key) for name, (held, key) in self._buffers.items()}
        return {name: self._copy(name, buffer) for name, buffer in hanging.items() if buffer is not None}

    def _copy(self, name: str, buffer: Tensor) -> Tensor:
        known = self._copies.get(name)
        version = 0 if buffer.is_inference() else buffer._version
        if known is None or known.source is not buffer or known.version != version or buffer.numel() <= SMALL:
            known = self._copies[name] = _Copy(buffer, version, buffer.detach().clone())
        return known.numbers

    def _put(self, numbers: Mapping[str, Tensor]) -> None:
        for name, value in numbers.items():
            holder, key = self._buffers[name]
            buffer = holder[key]
            assert buffer is not None
            if same_leaf(buffer.detach(), value.to(buffer.device)):
                continue
            if self._before:
                # What is in flight may have kept the buffer for its backward.
                holder[key] = value.to(buffer.device, copy=True)
            else:
                buffer.detach().copy_(value)
