"""Where a run is in its data, as a checkpoint keeps it: what goes on from there loses no sample, and repeats none.

A loader that knows its place is given it. Any other epoch is begun as it was begun before, from the same random
numbers, and read once more up to the place. All stages draw the same, so what one of them knows holds for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_cpipe.stage.randomness import GeneratorState, Stream, state_from_plain, state_in_plain

State = dict[str, Any]


@dataclass(frozen=True)
class EpochStart:
    """What the order of an epoch follows from.

    Attributes:
        random: the stream's state before the epoch's iterators were made.
        generators: the states that the loaders' own generators had then; empty where the epoch has new loaders.
        places: of those loaders that know theirs, once the iterators were made; empty where they were not.
        seeds: of the loaders' distributed samplers, which shuffle by them; empty where the epoch has new loaders.
    """

    random: GeneratorState
    generators: list[Tensor]
    places: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    @classmethod
    def here(cls, stream: Stream, loader: CombinedLoader | None) -> EpochStart:
        """As if the epoch began now; without its loader, if that is not made yet."""
        if loader is None:
            return cls(stream.state, [])
        generators = [each.get_state() for each in generators_of(loader)]
        return cls(stream.state, generators, seeds=[each.seed for each in _distributed_samplers_of(loader)])

    def restore(self, stream: Stream, loader: CombinedLoader) -> None:
        """Let the epoch begin as it did then."""
        stream.state = self.random
        for generator, state in zip(generators_of(loader), self.generators):
            generator.set_state(state)
        self.restore_seeds(loader)

    def restore_seeds(self, loader: CombinedLoader) -> None:
        """Let the samplers shuffle by what they did then."""
        for sampler, seed in zip(_distributed_samplers_of(loader), self.seeds):
            sampler.seed = seed


@dataclass(frozen=True)
class DataPlace:
    """The place of the mini-batch that is trained next.

    Attributes:
        epoch: which it belongs to.
        index: its place in the epoch.
        number: how many mini-batches came before it, in all runs up to here.
        start: how its epoch begins.
        random: the stream's state before it was drawn, if a loader knew its place then.
    """

    epoch: int
    index: int
    number: int
    start: EpochStart
    random: GeneratorState | None = None

    def begins(self, epoch: int) -> bool:
        """Whether it is the start of an epoch."""
        return (self.epoch, self.index) == (epoch, 0)

    def in_plain(self) -> State:
        """What a file may hold: tensors and numbers."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "number": self.number,
            "start": state_in_plain(self.start.random),
            "generators": self.start.generators,
            "places": self.start.places,
            "seeds": self.start.seeds,
            "random": None if self.random is None else state_in_plain(self.random),
        }

    @classmethod
    def from_plain(cls, plain: State) -> DataPlace:
        """What `in_plain` made."""
        start = EpochStart(state_from_plain(plain["start"]), plain["generators"], plain["places"], plain["seeds"])
        random = None if plain["random"] is None else state_from_plain(plain["random"])
        return cls(plain["epoch"], plain["index"], plain["number"], start, random)


def generators_of(loader: CombinedLoader) -> list[torch.Generator]:
    """The generators that the user gave to loaders and samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for owner in _drawing_in(loader):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _distributed_samplers_of(loader: CombinedLoader) -> list[DistributedSampler[Any]]:
    """Those that give each pipeline its share, each once."""
    found = {id(owner): owner for owner in _drawing_in(loader) if isinstance(owner, DistributedSampler)}
    return list(found.values())


def _drawing_in(loader: CombinedLoader) -> Iterator[Any]:
    """The loaders, and their samplers."""
    for each in loader.flattened:
        batch_sampler = getattr(each, "batch_sampler", None)
        yield from (each, getattr(each, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
