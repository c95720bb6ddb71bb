"""The oracle: training with delayed gradients, in one process, without the engine.

Stage s runs the forward of mini-batch j with its weights after ``max(0, j - lag)`` mini-batches, where lag = p - 1 - s,
and updates with the gradient of mini-batch j when its own count of mini-batches is j. That is all a pipeline may do.
Other policies use older weights, of the same number of mini-batches on all stages, or newer ones in the backward.

A parameter under several names on several stages is updated by the last of them, the owner. It adds the gradient of
another stage some mini-batches later, and both have the new weights when their counts of mini-batches are the same.

Pipelines side by side accumulate gradients, each its own, and all update with the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def train_delayed(
    module: nn.Module,
    stages: Sequence[Sequence[str]],
    batches: Iterable[tuple[Any, bool]],
    loss_of: Callable[[Callable[..., Any], Any], torch.Tensor | list[torch.Tensor | None] | None],
    optimizer_of: Callable[[list[nn.Parameter]], tuple[torch.optim.Optimizer, Any]],
    accumulate: int = 1,
    extra_in_flight: int = 0,
    aliases: Mapping[str, str] | None = None,
    policy: str = "stash",
    clip: Callable[[list[list[torch.Tensor]]], None] = lambda gradients: None,
    scaled: Scaled | None = None,
) -> list[float]:
    """Train `module` in place.

    Args:
        module: whole.
        stages: the names of each stage's parameters; one that is tied by the name that the stage uses.
        batches: each with whether the optimizer steps after it.
        loss_of: the loss of a batch; None if it has none, so that it gives no gradient. Of pipelines side by side, a
            list with each one's: one that has none counts as a gradient of zero.
        optimizer_of: makes one stage's optimizer, and a scheduler that steps with it (or None).
        accumulate: divides the loss.
        extra_in_flight: multiplies the lag by one more than this.
        aliases: further names that a stage uses for a parameter, with the name in `stages`.
        policy: which weights a mini-batch uses: ``stash``, ``latest``, ``vertical`` or ``2bw``.
        clip: clips the gradients of each stage in place, before every update.
        scaled: scales the loss, and the gradients back; None for no scale.

    Returns:
        The loss of each mini-batch that has one; of pipelines side by side, one after the other.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    owner = {id(own[name]): s for s, names in enumerate(stages) for name in names}
    late: dict[tuple[int, str], list[torch.Tensor]] = {}
    lags = [(len(stages) - 1 - s) * (1 + extra_in_flight) for s in range(len(stages))]
    optimizers = [
        optimizer_of([own[name] for name in names if owner[id(own[name])] == s]) for s, names in enumerate(stages)
    ]
    history = [[{n: own[n].detach().clone().requires_grad_() for n in names}] for names in stages]
    losses = []
    window_start = 0
    accumulated: dict[int, dict[nn.Parameter, torch.Tensor]] = {}
    for j, (batch, updates) in enumerate(batches):
        places = {
            "stash": [j - lag for lag in lags],
            "latest": [j - lag for lag in lags],
            "vertical": [j - lags[0] for _ in lags],
            "2bw": [window_start - lags[0] for _ in lags],
        }[policy]
        used = [versions[max(0, place)] for versions, place in zip(history, places)]
        weights = {name: weight.detach().clone().requires_grad_() for at in used for name, weight in at.items()}
        named = weights | {alias: weights[name] for alias, name in (aliases or {}).items()}
        found = loss_of(partial(functional_call, module, named, tie_weights=False), batch)
        found = found if isinstance(found, list) else [found]
        losses += [loss.item() for loss in found if loss is not None]
        if policy == "latest":
            # Into the memory that the forward read, so that whatever the graph kept of it reads the newest.
            for name, weight in weights.items():
                weight.data.copy_(own[name].data)
        for pipeline, loss in enumerate(found):
            share = None if loss is None else loss / accumulate * (1.0 if scaled is None else scaled.scale)
            gradients = [] if share is None else torch.autograd.grad(share, list(weights.values()))
            made = dict(zip(weights, gradients))
            due = {}
            for s, names in enumerate(stages):
                for name in names:
                    if (to := owner[id(own[name])]) != s:
                        waiting = late.setdefault((pipeline, name), [])
                        waiting.append(made.pop(name, torch.zeros_like(own[name])))
                        if (place := j - _rows_late(to - s, extra_in_flight)) >= 0:
                            due[name] = waiting[place]
            sums = accumulated.setdefault(pipeline, {})
            for name, gradient in (*made.items(), *due.items()):
                sums[own[name]] = gradient if own[name] not in sums else sums[own[name]] + gradient
        if updates:
            window_start = j + 1
            for parameter in {each: None for sums in accumulated.values() for each in sums}:
                given = [sums[parameter] for sums in accumulated.values() if parameter in sums]
                parameter.grad = given[0] if len(found) == 1 else torch.stack(given).sum(0) / len(found)
            accumulated.clear()
            trained = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in optimizers]
            if scaled is not None:
                scaled(trained)
            clip([[p.grad for p in parameters if p.grad is not None] for parameters in trained])
            for optimizer, scheduler in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
        for names, versions in zip(stages, history):
            fresh = {n: own[n].detach().clone().requires_grad_() for n in names}
            versions.append(fresh if updates else versions[-1])
    return losses


class Scaled:
    """Scales a loss, as `16-mixed` may in the continuous schedule.

    Args:
        scale: at first.
        interval: after so many updates without an overflow it doubles.
        late: by how many updates the last stage hears later of an overflow, for each stage on the way.
    """

    def __init__(self, scale: float, interval: int, late: int = 1) -> None:
        self.scale = scale
        self._interval = interval
        self._late = late
        self.scales: list[float] = []
        """In every update, before it is lowered or raised."""
        self._good = 0
        self.overflows: list[list[bool]] = []
        """Whether the gradient of each stage is not finite, in every update."""
        self._began: list[list[bool]] = []

    def __call__(self, trained: list[list[nn.Parameter]]) -> None:
        inverse = torch.tensor(self.scale, dtype=torch.float64).reciprocal().float()
        overflows = [any(not bool(p.grad.isfinite().all()) for p in own if p.grad is not None) for own in trained]
        self.overflows.append(overflows)
        self._began.append([here and not any(overflows[s + 1 :]) for s, here in enumerate(overflows)])
        for stage, own in enumerate(trained):
            for parameter in own:
                if any(overflows[stage:]):
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = parameter.grad * inverse
        self.scales.append(self.scale)
        last, update = len(trained) - 1, len(self.overflows) - 1
        heard = [
            self._began[known][s] and self.scales[known] <= self.scale
            for s in range(last + 1)
            if (known := update - self._late * (last - s)) >= 0
        ]
        self._good = 0 if any(heard) else self._good + 1
        if any(heard):
            self.scale /= 2
        elif self._good == self._interval:
            self.scale, self._good = self.scale * 2, 0


class ByNorm:
    """Clips by norm, as the continuous schedule may.

    Args:
        how: ``stage``, ``suffix`` or ``lagged``.
        largest: norm.
        late: by how many updates the norm of a stage counts later on the next one.
    """

    def __init__(self, how: str, largest: float, late: int = 1) -> None:
        self.how = how
        self.largest = largest
        self._late = late
        self.squares: list[list[torch.Tensor]] = []
        """Of the norm of each stage, in every update."""

    def __call__(self, gradients: list[list[torch.Tensor]]) -> None:
        none = torch.zeros(1)
        totals = [
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in own or [none]]))
            for own in gradients
        ]
        self.squares.append([total.double() ** 2 for total in totals])
        for stage, own in enumerate(gradients):
            total = {
                "stage": totals[stage],
                "suffix": self._onward(stage).sqrt().to(totals[stage].dtype),
                "lagged": self.full(stage).to(totals[stage].dtype),
            }[self.how]
            for each in own:
                each.mul_(torch.clamp(self.largest / (total + 1e-6), max=1.0))

    def full(self, stage: int) -> torch.Tensor:
        """The norm of all gradients, as a stage knows it in the newest update."""
        return (self._onward(stage) + self._before(stage, len(self.squares) - 1)).sqrt()

    def _onward(self, stage: int) -> torch.Tensor:
        own, *others = self.squares[-1][stage:]
        return own + self._onward(stage + 1) if others else own

    def _before(self, stage: int, update: int) -> torch.Tensor:
        known = update - self._late
        if stage == 0 or known < 0:
            return torch.zeros((), dtype=torch.float64)
        return self._before(stage - 1, known) + self.squares[known][stage - 1]


def _rows_late(stages_apart: int, extra_in_flight: int) -> int:
    """A stage is as many slots behind as it is apart; two slots make a row, and one is left for the message."""
    return stages_apart * max(1, extra_in_flight) // 2 + 1


def train_in_slices(
    module: nn.Module,
    batches: Iterable[tuple[Any, bool]],
    loss_of: Callable[[Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    most: int,
    *,
    backwards: bool,
    accumulate: int = 1,
) -> list[float]:
    """Train `module` in place, as a flush schedule may: the gradients of a mini-batch's slices, then one update.

    Args:
        module: whole.
        batches: of tensors, each with whether the optimizer steps after it.
        loss_of: the loss of a batch, or a slice of one.
        optimizer: of the module.
        scheduler: that steps with it, or None.
        most: slices of a batch.
        backwards: whether the last slice's backward comes first.
        accumulate: divides the loss.

    Returns:
        The loss of each mini-batch.
    """
    losses = []
    for batch, updates in batches:
        samples = len(batch[0])
        slices = list(zip(*(tensor.tensor_split(min(most, samples)) for tensor in batch)))
        shares = [loss_of(each) * (len(each[0]) / samples) for each in slices]
        for share in reversed(shares) if backwards else shares:
            (share / accumulate).backward()
        losses.append(float(sum(share.detach() for share in shares) / accumulate) * accumulate)
        if updates:
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return losses
