"""Seeded randomness: the same numbers on every rank, however many stages there are.

A step of mini-batch j starts from a generator state that follows from the seed and j alone, on every rank. A module
that draws random numbers and may lie on another stage (the probe finds out which do) gets its own state, from the
seed, j and its name, and leaves the outer one as it was. So noise and masks in `training_step` agree on all ranks,
and dropout does not depend on the cuts.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

TorchState = tuple[torch.Tensor, list[torch.Tensor]]
"""The states of torch's CPU generator, and of its CUDA generators that are in use."""

GeneratorState = tuple[TorchState, dict[str, Any], Any]
"""The states of torch's generators, of NumPy's and of Python's."""


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that follows from `parts` alone, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def get_state() -> GeneratorState:
    """The state of every generator that a step may draw from."""
    return get_torch_state(), np.random.get_state(legacy=False), random.getstate()


def set_state(state: GeneratorState) -> None:
    """Put every generator back into `state`."""
    of_torch, of_numpy, of_python = state
    set_torch_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def state_in_plain(state: GeneratorState) -> dict[str, Any]:
    """A state as a checkpoint may hold it, of which nothing is code: tensors, numbers and strings."""
    (cpu, cuda), numpy, (version, words, spare) = state
    inner = numpy["state"]
    return {
        "torch": cpu,
        "cuda": list(cuda),
        "numpy": {**numpy, "state": {**inner, "key": torch.from_numpy(inner["key"].astype(np.int64))}},
        "python": [version, torch.tensor(words), spare],
    }


def state_from_plain(plain: dict[str, Any]) -> GeneratorState:
    """What `state_in_plain` made a plain state of."""
    numpy = plain["numpy"]
    inner = numpy["state"]
    version, words, spare = plain["python"]
    return (
        (plain["torch"], plain["cuda"]),
        {**numpy, "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}},
        (version, tuple(words.tolist()), spare),
    )


def same_state(a: GeneratorState, b: GeneratorState) -> bool:
    """Whether nothing was drawn between two states."""
    # Two pickles of one tensor need not be alike.
    return same_torch_state(a[0], b[0]) and pickle.dumps(a[1:]) == pickle.dumps(b[1:])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; outside, nothing was drawn."""
    outer = get_state()
    seed_torch(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    try:
        yield
    finally:
        set_state(outer)


@contextmanager
def unchanged() -> Iterator[None]:
    """Whatever is drawn inside, outside nothing was drawn."""
    outer = get_state()
    try:
        yield
    finally:
        set_state(outer)


def get_torch_state() -> TorchState:
    """The state of torch's generators alone, which costs far less than `get_state`."""
    return torch.get_rng_state(), [generator.get_state() for generator in _cuda_generators()]


def set_torch_state(state: TorchState) -> None:
    """Put torch's generators back into `state`."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for generator, saved in zip(_cuda_generators(), cuda):
        generator.set_state(saved)


def same_torch_state(a: TorchState, b: TorchState) -> bool:
    """Whether nothing was drawn from torch's generators between two states."""
    return all(map(torch.equal, (a[0], *a[1]), (b[0], *b[1])))


def seed_torch(seed: int) -> None:
    """Seed torch's generators.

    `torch.manual_seed` also queues the seed for every accelerator that is not there, which costs too much in a step.
    """
    torch.default_generator.manual_seed(seed)
    for generator in _cuda_generators():
        generator.manual_seed(seed)


def next_number() -> int:
    """A number drawn from torch's CPU generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


class SeededScope:
    """`seeded`, cheap enough for every step.

    NumPy's global generator is not read and written, which costs most, but replaced for a while by one of the
    scope's own. What NumPy loses by that is the second of a pair of normal numbers, if one was left over.
    """

    def __init__(self) -> None:
        self._spare = [np.random.MT19937(0)]

    @contextmanager
    def __call__(self, seed: int) -> Iterator[None]:
        """Draw from `seed` inside; outside, nothing was drawn. Scopes may be nested."""
        numpy = self._spare.pop() if self._spare else np.random.MT19937(0)
        with _in_place_of_global(numpy):
            seed_torch(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            random.seed(seed)
            yield
        self._spare.append(numpy)


class Stream:
    """Generators that live on between uses: what one rank draws from them, every rank draws.

    Loaders are iterated in one, so that all ranks see the same shuffles and augmentations, whatever else each of
    them draws.

    Args:
        state: the first one.
    """

    def __init__(self, state: GeneratorState) -> None:
        self._numpy = np.random.MT19937(0)
        self.state = state

    @property
    def state(self) -> GeneratorState:
        """Where the generators are; what is drawn next follows from it."""
        return self._torch, dict(self._numpy.state), self._python

    @state.setter
    def state(self, state: GeneratorState) -> None:
        self._torch, numpy, self._python = state
        self._numpy.state = numpy  # type: ignore[assignment]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from the stream inside."""
        with _in_place_of_global(self._numpy):
            set_torch_state(self._torch)
            random.setstate(self._python)
            try:
                yield
            finally:
                self._torch, self._python = get_torch_state(), random.getstate()


@contextmanager
def _in_place_of_global(numpy: np.random.MT19937) -> Iterator[None]:
    """NumPy's global generator is `numpy` inside; all generators are put back afterwards."""
    outer = np.random.get_bit_generator()  # type: ignore[attr-defined]
    of_torch, of_python = get_torch_state(), random.getstate()
    np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        np.random.set_bit_generator(outer)  # type: ignore[attr-defined]
        set_torch_state(of_torch)
        random.setstate(of_python)


def _cuda_generators() -> Sequence[torch.Generator]:
    """Those of the rank's own device, if it is a GPU."""
    # `default_generators` is empty until CUDA is initialised; nothing can have been drawn from them before.
    everyones = torch.cuda.default_generators
    return [everyones[torch.cuda.current_device()]] if everyones else []
