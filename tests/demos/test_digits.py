"""The digits: real images, split once and for all, and a module that learns them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

# Changes the environment when it is imported.
from sklearn.datasets import load_digits
from torch import Tensor

import lightning_cpipe.demos.digits as demo
from lightning_cpipe.demos.digits import CLASSES, PIXELS, DigitsClassifier, DigitsData
from tests.helpers.fits import quiet_trainer

IMAGES = 1_797


def data(seed: int = 0) -> DigitsData:
    made = DigitsData(batch_size=32, seed=seed)
    made.setup("fit")
    return made


def test_every_image_is_in_one_of_the_two_sets() -> None:
    made = data()
    (train, train_labels), (val, val_labels) = made.train.tensors, made.val.tensors
    assert (len(train), len(val)) == (IMAGES - IMAGES // 5, IMAGES // 5)
    everything = torch.cat([train, val]).unique(dim=0)
    assert len(everything) == IMAGES, "no image twice, none in both"
    for images, labels in ((train, train_labels), (val, val_labels)):
        assert (images.dtype, images.shape[1]) == (torch.float32, PIXELS)
        assert (images.min(), images.max()) == (0, 1)
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(CLASSES))


def test_labels_stay_with_their_images() -> None:
    pixels, labels = load_digits(return_X_y=True)
    label_of = {tuple(row): label for row, label in zip(pixels.tolist(), labels.tolist())}
    for split in (data().train, data().val):
        assert all(label_of[tuple((image * 16).tolist())] == label for image, label in zip(*split.tensors))


def test_the_split_follows_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = data()
    torch.manual_seed(2)
    second, other = data(), data(seed=1)
    assert torch.equal(first.val.tensors[0], second.val.tensors[0])
    assert not torch.equal(first.val.tensors[0], other.val.tensors[0])


def test_the_split_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    data()
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_shuffled_for_training_only() -> None:
    made = data()
    (train, _), (val, _) = next(iter(made.train_dataloader())), next(iter(made.val_dataloader()))
    assert train.shape == val.shape == (32, PIXELS)
    assert not torch.equal(train, made.train.tensors[0][:32])
    assert torch.equal(val, made.val.tensors[0][:32])
    for loader in (made.test_dataloader(), made.predict_dataloader()):
        assert torch.equal(next(iter(loader))[0], val)


@pytest.mark.parametrize("depth", [1, 3])
def test_shapes(depth: int) -> None:
    module = DigitsClassifier(depth=depth, width=16)
    assert module(torch.zeros(5, PIXELS)).shape == (5, CLASSES)
    assert len(module.model) == depth + 3


def test_an_untrained_module_knows_nothing() -> None:
    module = DigitsClassifier(depth=2, width=16)
    images, labels = next(iter(data().train_dataloader()))
    loss = torch.nn.functional.cross_entropy(module(images), labels)
    assert loss.item() == pytest.approx(math.log(CLASSES), abs=0.5)


def test_it_learns_in_plain_lightning() -> None:
    module = DigitsClassifier(depth=2, width=32, learning_rate=3e-3)
    trainer = quiet_trainer(devices=1, max_epochs=4)
    trainer.fit(module, datamodule=DigitsData())
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    assert accuracy > 0.9
    (metrics,) = trainer.test(module, datamodule=DigitsData(), verbose=False)
    assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    predicted = trainer.predict(module, datamodule=DigitsData())
    assert predicted is not None
    digits = torch.cat([each for each in predicted if isinstance(each, Tensor)])
    labels = data().val.tensors[1]
    assert (digits == labels).float().mean() == pytest.approx(metrics["test_accuracy"], abs=1e-3)
    # The rate has fallen along its cosine.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_the_demo_knows_nothing_of_pipelines() -> None:
    assert "lightning_cpipe" not in inspect.getsource(demo)
