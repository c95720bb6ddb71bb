"""A first run of a step, to see which modules it calls, in which order, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.utils.flop_counter import flop_registry

from lightning_cpipe.probe.blocks import find_blocks
from lightning_cpipe.torch_private import TorchDispatchMode


@dataclass(frozen=True)
class Survey:
    """What one run of a step showed.

    Attributes:
        calls: how often each module was called.
        blocks: the places where a stage may begin: the blocks that were called once, in the order of their calls.
        repeated: places that would do, but were called more than once.
        forward_flops: floating-point operations of the whole step's forward.
        begun: the operations of the forward that came before the first call of each module, in the order of the calls.
    """

    calls: Counter[str]
    blocks: tuple[str, ...]
    repeated: tuple[str, ...]
    forward_flops: int
    begun: dict[str, int]

    def operations(self, root: nn.Module, modules: Sequence[str]) -> list[float]:
        """Of each of these modules, floating-point operations of a forward, up to where the next one begins.

        What comes before the first one counts to the first. Weights count once more, for their update.

        Args:
            root: the whole module.
            modules: in the order of their calls.
        """
        begins = [0, *(self.begun[name] for name in modules[1:]), self.forward_flops]
        weights = [sum(p.numel() for p in root.get_submodule(name).parameters()) for name in modules]
        return [float(end - begin + weight) for (begin, end), weight in zip(pairwise(begins), weights)]

    def watched(self, root: nn.Module, starts: Sequence[str] = ()) -> list[str]:
        """The modules that a cut has to know of: everything called that is not inside a block, and the blocks.

        A block inside which a stage begins is not taken as a whole.
        """
        return [name for name in self._outside(root, "", starts) if self.calls[name]]

    def _outside(self, module: nn.Module, name: str, starts: Sequence[str]) -> list[str]:
        inside_or_root = [name] if name else []
        if name in self.blocks and not any(start.startswith(f"{name}.") for start in starts):
            return inside_or_root
        for child_name, child in module.named_children():
            inside_or_root += self._outside(child, f"{name}.{child_name}" if name else child_name, starts)
        return inside_or_root


def survey(root: nn.Module, step: Callable[[], Any]) -> Survey:
    """Run `step` once and look. It leaves traces in the module; run it inside `untouched`."""
    calls: Counter[str] = Counter()
    begun: dict[str, int] = {}
    with ExitStack() as hooks, _Flops() as flops:

        def note(name: str) -> Callable[..., None]:
            def enter(*_: Any) -> None:
                calls[name] += 1
                begun.setdefault(name, flops.total)

            return enter

        for name, module in root.named_modules():
            hooks.callback(module.register_forward_pre_hook(note(name)).remove)
        step()
        total = flops.total

    candidates = {each for name in find_blocks(root) for each in _entered(root, name, calls)}
    called = [name for name in begun if name in candidates]
    once = tuple(name for name in called if calls[name] == 1)
    repeated = tuple(sorted(name for name in called if calls[name] > 1))
    return Survey(calls, once, repeated, total, begun)


def _entered(root: nn.Module, block: str, calls: Mapping[str, int]) -> list[str]:
    """The block; or the links of one that the step goes through link by link, without calling the chain."""
    module = root.get_submodule(block)
    if calls[block] or not isinstance(module, nn.Sequential):
        return [block]
    return [f"{block}.{link}" for link, _ in module.named_children()]


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations.

    torch's own `FlopCounterMode` also tells modules apart, with hooks that fail in a step that calls
    `torch.autograd.grad` itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made
