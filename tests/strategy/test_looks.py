"""What a training step begins to use late, though it was not sent, is refused by name; looking changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_cpipe.engine.stage_stream import STEP
from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.cut import Value
from lightning_cpipe.strategy.setup import looks
from lightning_cpipe.strategy.setup.looks import Looks, is_due
from lightning_cpipe.strategy.steps import steps
from tests.helpers.causes import cause
from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import Notes, Seen, fit_in_pipeline, require_same_bits
from tests.helpers.modules import WIDTH, Chain, Codebook, make_optimizer, noise_loader

EVEN = partial(noise_loader, samples=21)


def argmax(first: Tensor) -> Tensor:
    return first.argmax(-1, keepdim=True).float()


class BeginsLater(Chain):
    """From its fourth step on, a value of the first block counts after the second, without a gradient."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        first = self.net[0](x)
        h = self.net[1](first)
        if batch_idx >= 3:
            h = h + self.use(first)
        return F.mse_loss(self.net[3](self.net[2](h)), y)


@pytest.mark.parametrize(
    ("starts", "stage", "use"),
    [
        # Used by the last stage, by the middle one, and by the last one past another.
        (["net.2"], 1, lambda first: (first > 0).float()),
        (["net.2", "net.3"], 1, argmax),
        (["net.1", "net.2"], 2, Tensor.detach),
    ],
    ids=["mask", "argmax", "detach"],
)
def test_what_is_used_later_without_a_gradient_is_refused_by_name(
    starts: list[str], stage: int, use: Callable[[Tensor], Tensor]
) -> None:
    """It trained on with zeros in place of what was not sent, and nobody was told."""
    module = BeginsLater(use)
    said = cause(len(starts) + 1, module, where=f"at mini-batch 4, in {stage}F4", split_points=starts)
    parts = [
        f"CutError: stage {stage}, which begins at '{starts[stage - 1]}', does not receive the output of 'net.0'",
        "For mini-batch 4 its results depend on it.",
        "They did not for mini-batch 2",
    ]
    assert not [part for part in parts if part not in said], said


def test_who_trusts_the_first_mini_batch_can_do_without() -> None:
    make = partial(BeginsLater, Tensor.detach)
    with_looks_off = {"split_points": ["net.2"], "looks": False}
    fit_in_pipeline(2, make, EVEN, strategy=with_looks_off, max_epochs=1)


class LogsLater(Chain):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        first = self.net[0](x)
        if batch_idx == 2:
            self.log("first", first.mean())
        return F.mse_loss(self.net[1:](first), y)


def test_what_is_logged_later_is_refused_by_name() -> None:
    said = cause(2, LogsLater(), where="at mini-batch 2", split_points=["net.2"])
    assert "does not receive the output of 'net.0'" in said


class Irrelevant(Chain):
    """Computes much with what was not sent, of which nothing counts; with noise, dropout and statistics."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)) for _ in range(3)]
        self.net = nn.Sequential(*blocks, nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        first = self.net[0](x + 0.1 * torch.randn_like(x))
        h = self.net[2](self.net[1](first))
        if batch_idx > 0:
            first.argmax(-1)[first.sum(-1) > 0].sort()
        return F.mse_loss(self.net[3](h) * len(first) + torch.rand_like(y), y)


@pytest.mark.parametrize(("p", "starts"), [(2, ["net.2"]), (3, ["net.1", "net.2"])])
def test_where_it_makes_no_difference_training_goes_on_as_the_reference(p: int, starts: list[str]) -> None:
    """Past looks at mini-batches 0, 1, 2, 4 and 8."""
    loader = partial(noise_loader, samples=20, batch_size=4)
    require_equal_to_reference(p, Irrelevant, loader, make_optimizer("sgd", None), epochs=2, split_points=starts)


class Remembers(Irrelevant):
    """Changes whatever a step may change, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].append(Codebook())
        self.count, self.history = 0, [torch.zeros(())]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.count += 1
        x, _ = batch
        x.mul_(1 + random.random() + np.random.rand())
        loss = super().training_step(batch, batch_idx)
        self.history[0] += 1
        self.history.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.logger.log_metrics({"count": float(self.count)})
        return loss


def remembered(trainer: Any, module: Remembers) -> Any:
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    rows = trainer.logger.of("") if trainer.is_global_zero else []
    return buffers, [float(each) for each in module.history], module.count, torch.rand(3), rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nobody_can_tell_that_a_stage_looked(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(due: bool) -> list[Seen]:
        monkeypatch.setattr(steps, "is_due", lambda number: due)
        starts = ["net.1", "net.2"]
        options = {"logger": Notes(), "log_every_n_steps": 1, "look": remembered, "strategy": {"split_points": starts}}
        return fit_in_pipeline(3, Remembers, EVEN, max_epochs=1, accumulate_grad_batches=accumulate, **options)

    for looked, unlooked in zip(fit(due=True), fit(due=False)):
        assert looked.losses == unlooked.losses
        assert looked.metrics == unlooked.metrics
        assert looked.spans == unlooked.spans
        require_same_bits(looked.weights, unlooked.weights)
        require_same_bits(looked.found[0], unlooked.found[0])
        assert looked.found[1:3] == unlooked.found[1:3]
        assert torch.equal(looked.found[3], unlooked.found[3])
        assert looked.found[4] == unlooked.found[4]
    assert looked.found[2] == 7


def test_looks_are_at_powers_of_two() -> None:
    assert [number for number in range(40) if is_due(number)] == [0, 1, 2, 4, 8, 16, 32]


def test_the_last_look_that_is_told_of_is_one_that_came_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Any = iter([[], MemoryError("no room"), [Value("net.0", 0, 0)]])

    def answer(*_: Any) -> Any:
        if isinstance(found := next(answers), Exception):
            raise found
        return found

    monkeypatch.setattr(looks, "used_unreceived", answer)
    cut = SimpleNamespace(steps={STEP: SimpleNamespace(passages=[None, None])}, starts=("net.2",))
    stage: Any = SimpleNamespace(cut=cut, stage=1, drawing=lambda seed: nullcontext())
    own = Looks(Chain(), stage, torch.device("cpu"))

    def look(number: int) -> None:
        mini_batch: Any = SimpleNamespace(number=number, seed=0, signature=())
        own.look(mini_batch, (), (), {})

    look(1)
    with pytest.warns(UserWarning, match="stage 1 could not look .* mini-batch 2 .*no room"):
        look(2)
    with pytest.raises(CutError, match="They did not for mini-batch 1, when it looked last"):
        look(4)
