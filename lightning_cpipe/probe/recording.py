"""One run of a step of the whole module, watched from outside: which modules were called when, and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.cut import Value
from lightning_cpipe.stage.describing import described
from lightning_cpipe.stage.randomness import TorchState, get_torch_state, same_torch_state
from lightning_cpipe.tree import Template


@dataclass
class Call:
    """One call of a module.

    Attributes:
        module: its name.
        number: which call of it, counted from 0.
        enter: the moment it began; moments count the beginnings and ends of all watched calls.
        exit: the moment it ended.
        template: its output without the numbers.
        tensors: copies of its output's tensors, with their `requires_grad`.
        rewritten: for each tensor, whether code after the module wrote into it.
        drew: whether it drew random numbers outside the watched modules inside it.
    """

    module: str
    number: int
    enter: int
    exit: int = -1
    template: Template | None = None
    tensors: tuple[Tensor, ...] = ()
    rewritten: tuple[bool, ...] = ()
    drew: bool = False

    def surrounds(self, other: Call) -> bool:
        """Whether `other` was made inside this call, or is this one."""
        return self.enter <= other.enter and other.exit <= self.exit


@dataclass(frozen=True)
class Recording:
    """All calls of the watched modules, in the order in which they began."""

    calls: tuple[Call, ...]

    def of(self, module: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.module == module]

    def beginning(self, block: str, step: str = "the step") -> int:
        """The moment a block is entered, which must happen exactly once.

        Raises:
            CutError: if the block is called never, or more than once.
        """
        calls = self.of(block)
        if len(calls) != 1:
            times = "is not called" if not calls else f"is called {len(calls)} times"
            raise CutError(
                f"a stage can't begin at {block!r}: the module {times} in {step}. A cut must lie where every step"
                " passes exactly once; choose other modules with `split_points`, or let the step call the whole model."
            )
        return calls[0].enter

    def called_before(
        self, moment: int, owners: Iterable[str], shared: Collection[str], writers: Collection[str]
    ) -> dict[str, int | None]:
        """The outermost of `owners` that are called before `moment`, with how many calls end there; None for all.

        Args:
            moment: the beginning of a stage.
            owners: modules that hold weights or write buffers.
            shared: those of them that may run on several stages, since nothing in them ever changes. They are left
                out where they are called afterwards, too.
            writers: those of them that write buffers, which must all run on one stage.

        Raises:
            CutError: if a writer is called on both sides, or a call of what is also called before is cut in two.
        """
        found: dict[str, int | None] = {}
        for name in owners:
            calls = self.of(name)
            before = sum(call.exit < moment for call in calls)
            if before and before == len(calls):
                found[name] = None
            elif before and name not in shared:
                if name in writers:
                    raise CutError(
                        f"{name!r} is called on both sides of a cut and writes buffers, which can't be true on two"
                        " stages: move the cut with `split_points` so that every call of it falls into one stage."
                    )
                if calls[before].enter < moment:
                    raise CutError(
                        f"a cut lies inside call {before + 1} of {name!r}, which is called before it, too: move the cut"
                        " with `split_points` so that it lies outside the module."
                    )
                found[name] = before
        return {name: calls for name, calls in found.items() if not any(name.startswith(f"{o}.") for o in found)}

    def values(self, stubs: Mapping[str, int | None]) -> dict[Value, Tensor]:
        """Every tensor that these modules returned, each in so many calls; None for all."""
        return {
            Value(call.module, call.number, leaf): tensor
            for module, calls in stubs.items()
            for call in self.of(module)[:calls]
            for leaf, tensor in enumerate(call.tensors)
        }

    def rewritten(self, value: Value) -> bool:
        """Whether code after the module wrote into the tensor."""
        return self.of(value.module)[value.call].rewritten[value.leaf]


def record(root: nn.Module, step: Callable[[], Any], watched: Iterable[str]) -> tuple[Recording, Any]:
    """Run `step` and watch these modules.

    Returns:
        The recording, and what `step` returned.
    """
    recorder = Recorder()
    with recorder.watching(root, watched):
        result = step()
    return recorder.finish(), result


class Recorder:
    """Watches modules while a step runs inside `watching`, even if the step is left before its end."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._open: list[tuple[Call, TorchState]] = []
        self._outputs: list[tuple[Call, list[Tensor], list[int]]] = []
        self._moment = 0

    def watching(self, root: nn.Module, watched: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, the calls of these modules are noted."""
        return _Hooks(self._hooks(root, watched))

    def _hooks(self, root: nn.Module, watched: Iterable[str]) -> Iterator[Any]:
        for name in watched:
            module = root.get_submodule(name)
            yield module.register_forward_pre_hook(self._enter(name))
            # Before any other forward hook: an isolation that ends there would put the generator back.
            yield module.register_forward_hook(self._exit, prepend=True)

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            number = sum(call.module == name for call in self._calls)
            call = Call(name, number, self._tick())
            self._calls.append(call)
            self._open.append((call, get_torch_state()))

        return enter

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        call, generator = self._open.pop()
        call.exit = self._tick()
        call.template, live = described(output, call.module)
        call.drew = not same_torch_state(generator, get_torch_state())
        call.tensors = tuple(leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in live)
        self._outputs.append((call, live, [leaf._version for leaf in live]))

    def finish(self) -> Recording:
        """What was noted."""
        for call, live, versions in self._outputs:
            call.rewritten = tuple(leaf._version != version for leaf, version in zip(live, versions))
        return Recording(tuple(self._calls))

    def _tick(self) -> int:
        self._moment += 1
        return self._moment


class _Hooks:
    """Hooks that are there inside a `with` and gone after it."""

    def __init__(self, handles: Iterator[Any]) -> None:
        self._handles = list(handles)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
