"""`assert_pipeline_parity` passes what is right in stages, says where a difference lies, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cpipe import assert_pipeline_parity
from lightning_cpipe.engine.rehearsal import Rehearsal
from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.randomness import get_state, same_state
from lightning_cpipe.stage.replay import Replay
from tests.helpers.modules import WIDTH, Block, Chain, noise_loader

BATCH = torch.randn(3, WIDTH), torch.randn(3, WIDTH)


def message_of(module: pl.LightningModule, *, stages: int = 2, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_pipeline_parity(module, BATCH, stages, **options)
    return str(caught.value)


# ---- what is right ----


class Everything(Chain):
    """Dropout, noise, buffers, numbers of all generators; it uses its trainer, logs and returns more than the loss."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2, noise=True)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.net.append(self.batch_norm)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        assert self.trainer.training
        assert self.trainer.global_step == self.current_epoch == 0
        loss = self.loss(batch) * random.uniform(1, 2) * float(np.random.uniform(1, 2))
        self.log("loss", loss)
        self.log_dict({"half": loss / 2, "index": float(batch_idx)})
        return {"loss": loss, "twice": 2 * loss.detach()}


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_module_that_can_be_cut_passes(p: int) -> None:
    assert_pipeline_parity(Everything(), BATCH, p)


def test_batches_of_other_shapes_may_be_given() -> None:
    shorter = BATCH[0][:2], BATCH[1][:2]
    assert_pipeline_parity(Everything(), BATCH, 3, split_points=["net.1", "net.4"], more_batches=[shorter, BATCH])


class MadeLate(Chain):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        self.net = nn.Sequential(Block(), Block())


def test_layers_may_be_made_in_configure_model() -> None:
    module = MadeLate()
    assert_pipeline_parity(module, BATCH, 2)
    assert not list(module.parameters())


def test_batches_are_prepared_as_lightning_does() -> None:
    class Names(Chain):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["x"], batch["y"]

    assert_pipeline_parity(Names(), dict(zip("xy", BATCH)), 2)


# ---- nothing is left ----


def test_the_module_is_as_it_was() -> None:
    module = Everything()
    module.net[0].linear.weight.grad = kept = torch.ones(WIDTH, WIDTH)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attributes = dict(vars(module))
    generators = get_state()
    assert_pipeline_parity(module, BATCH, 2)
    assert same_state(generators, get_state())
    assert vars(module).keys() == attributes.keys()
    assert all(vars(module)[name] is attributes[name] for name in attributes)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert gradients == {"net.0.linear.weight": kept}
    assert bool((kept == 1).all())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert module._trainer is None


def test_a_module_keeps_its_own_trainer() -> None:
    module, trainer = Chain(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer = trainer
    assert_pipeline_parity(module, BATCH, 2)
    assert module.trainer is trainer


# ---- what is wrong ----


def test_a_value_that_is_damaged_on_its_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Replay.run

    def damaged(self: Replay, *args: Any, **kwargs: Any) -> Any:
        made = run(self, *args, **kwargs)
        if made.sent and next(iter(self._roles.values())).passage.stage == 1:
            made.sent[0].data[1, 4] += 0.5
        return made

    monkeypatch.setattr(Rehearsal, "forward", _with(damaged, Rehearsal.forward, monkeypatch))
    found = message_of(Chain(), stages=3, split_points=["net.1", "net.3"])
    assert "The first difference lies in the output of 'net.2', as stage 2 receives it at the cut before" in found
    assert "'net.3'" in found
    assert "at [1, 4] of float32[3, 8], where it differs most: by 0.5," in found
    assert "1 of 24 elements differ" in found


def _with(run: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`forward` of a rehearsal, whose replays run so; the probe's do not."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as inside:
            inside.setattr(Replay, "run", run)
            return forward(*args, **kwargs)

    return changed


class Damaged(Block):
    """Wrong in a copy of its own: as if another device computed something else."""

    damaged = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1e-3 if self.damaged else 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Damaged:
        made = Damaged()
        made.load_state_dict(self.state_dict())
        made.damaged = True
        return made


def test_the_module_that_differs_first_is_named_and_what_it_reaches() -> None:
    module = Chain(depth=6)
    module.net[1] = Damaged()
    found = message_of(module, split_points=["net.3"])
    assert "The first difference lies in the output of 'net.1', as stage 0 makes it: " in found
    assert "It reaches the output of 'net.2', as stage 1 receives it at the cut before 'net.3': " in found
    module = Chain(depth=6)
    module.net[4] = Damaged()
    found = message_of(module, split_points=["net.3"])
    assert "The first difference lies in the output of 'net.4', as stage 1 makes it: " in found
    assert "It reaches the loss on stage 1: " in found


def test_a_gradient_that_gets_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Replay.run

    def detached(*args: Any, **kwargs: Any) -> Any:
        made = run(*args, **kwargs)
        made.sent[:] = [tensor.detach() for tensor in made.sent]
        return made

    monkeypatch.setattr(Rehearsal, "forward", _with(detached, Rehearsal.forward, monkeypatch))
    found = message_of(Chain(), split_points=["net.2"])
    assert (
        "The first difference lies in the gradient of 'net.1.linear.bias' (trained on stage 0): None instead of"
        in found
    )
    assert "(8 of 16 gradients differ)" in found


def test_a_gradient_on_a_second_stage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Rehearsal.backward

    def doubled(*args: Any) -> list[dict[str, Tensor]]:
        first, last = backward(*args)
        return [{**first, "net.3.linear.bias": torch.zeros(WIDTH)}, last]

    monkeypatch.setattr(Rehearsal, "backward", doubled)
    found = message_of(Chain())
    assert "the gradient of 'net.3.linear.bias' (trained on stage 1): it comes from stage 0, too" in found


def test_what_is_logged_otherwise_is_named() -> None:
    class Logs(Chain):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("trained", sum(p.requires_grad for p in self.parameters()))
            return loss

    found = message_of(Logs())
    assert "The first difference lies in what is logged as 'trained' on stage 1: 8 instead of 16" in found


class Hands(Block):
    """Leaves a tensor on an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept + 0


class Takes(Block):
    """Uses what another block left there."""

    def __init__(self, other: Hands) -> None:
        super().__init__()
        self.other = [other]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + getattr(self.other[0], "kept", 0)


def test_a_module_with_hidden_state_is_named() -> None:
    module = Chain()
    module.net[0] = Hands()
    module.net[3] = Takes(module.net[0])
    found = message_of(module, split_points=["net.2"])
    assert "The first difference lies in the output of 'net.3', as stage 1 makes it: " in found
    assert "Attributes that the step changes: net.0.kept." in found


def test_what_is_kept_for_the_next_step_is_seen_there() -> None:
    class Keeps(Chain):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            scale = getattr(self, "last", 1.0)
            out = self.net[:2](batch[0] * scale)
            out = self.net[2:](out)
            self.last = 0.5
            return nn.functional.mse_loss(out, batch[1])

    found = message_of(Keeps(), split_points=["net.2"])
    assert "in step 1. The first difference lies in the output of 'net.0', as stage 0 makes it" in found
    assert "It reaches the output of 'net.1', as stage 1 receives it" in found


def test_the_tolerance_may_be_given() -> None:
    module = Chain(depth=6)
    module.net[1] = Damaged()
    assert_pipeline_parity(module, BATCH, 2, rtol=1.0)


_SHARED: dict[str, Any] = {}


class Leaves(Block):
    """Leaves what it makes in a global variable, which all stages share in one process."""

    def forward(self, x: Tensor) -> Tensor:
        _SHARED["made"] = super().forward(x)
        return _SHARED["made"]


class ByGlobal(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = Leaves()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + float(_SHARED["made"].detach().abs().mean()))


class ByGlobalWithGradient(ByGlobal):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * _SHARED["made"]


@pytest.mark.parametrize("kind", [ByGlobal, ByGlobalWithGradient])
def test_what_a_fit_refuses_is_refused(kind: type[Chain]) -> None:
    """The stages of a rehearsal share what those of a pipeline do not."""
    with pytest.raises(CutError, match=r"handed on other than through what net\.0 returns"):
        assert_pipeline_parity(kind(), next(iter(noise_loader())), 2)


class Experts(Chain):
    """The first batch needs one of two layers, the next one the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].other = nn.Linear(WIDTH, WIDTH)
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        layer = self.net[3].linear if x[0, 0] > 0 else self.net[3].other
        return self.net[3].norm(layer(self.net[3](self.net[:3](x))))


def test_a_parameter_that_the_first_batch_does_not_use_may_be_trained_by_a_later_one() -> None:
    x, y = next(iter(noise_loader()))
    batches = [(x.abs(), y), (-x.abs(), y)]
    assert_pipeline_parity(Experts(), batches[0], 2, more_batches=batches)


def test_what_can_not_be_cut_is_refused() -> None:
    with pytest.raises(CutError, match="no_such"):
        assert_pipeline_parity(Chain(), BATCH, 2, split_points=["no_such"])
    with pytest.raises(CutError, match="5 stages need as many blocks"):
        assert_pipeline_parity(Chain(), BATCH, 5)
    module = Chain()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization"):
        assert_pipeline_parity(module, BATCH, 2)
