"""The small GPT: text that ships with Python, windows that meet but do not overlap, and no look at the future."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_cpipe.demos.char_gpt import VOCABULARY, CharData, CharGPT, TextWindows, read_text, text_fingerprint
from tests.helpers.fits import quiet_trainer

LENGTH = 16


def gpt(**options: float) -> CharGPT:
    return CharGPT(**{"layers": 3, "width": 32, "length": LENGTH, **options}).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> CharData:
    made = CharData(batch_size=4, length=LENGTH)
    made.setup("fit")
    return made


def test_the_text_is_pythons_own_documentation(data: CharData) -> None:
    from pydoc_data.topics import topics

    text = read_text()
    assert len(text) > 400_000
    assert all(topics[name] in text for name in ("for", "lambda", "operator-summary"))
    assert data.fingerprint == text_fingerprint(text)


def test_a_fingerprint_tells_texts_apart() -> None:
    assert text_fingerprint("a") == text_fingerprint("a")
    assert text_fingerprint("a") != text_fingerprint("b")
    assert len(text_fingerprint("")) == 12


def test_windows_cover_the_text_and_meet_in_one_character() -> None:
    text = torch.arange(3 * LENGTH + 5)
    windows = TextWindows(text, LENGTH)
    assert len(windows) == 3
    for number in range(3):
        begin = number * LENGTH
        assert windows[number].tolist() == list(range(begin, begin + LENGTH + 1))


@pytest.mark.parametrize(
    ("characters", "windows"), [(LENGTH, 0), (LENGTH + 1, 1), (2 * LENGTH, 1), (2 * LENGTH + 1, 2)]
)
def test_the_last_window_is_a_whole_one(characters: int, windows: int) -> None:
    made = TextWindows(torch.zeros(characters), LENGTH)
    assert len(made) == windows
    assert all(len(made[number]) == LENGTH + 1 for number in range(windows))


def test_the_sets_are_the_text_cut_in_two(data: CharData) -> None:
    codes = torch.cat([data.train.codes, data.val.codes])
    text = read_text()
    assert bytes(codes.tolist()).decode("ascii") == text.encode("ascii", "replace").decode("ascii")
    assert len(data.train.codes) == len(text) * 9 // 10
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < VOCABULARY


def test_batches_are_windows_shuffled_for_training_only(data: CharData) -> None:
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert train.shape == val.shape == (4, LENGTH + 1)
    assert torch.equal(val, torch.stack([data.val[number] for number in range(4)]))
    assert not torch.equal(train, torch.stack([data.train[number] for number in range(4)]))


@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_logits_for_the_character_after_each(length: int) -> None:
    assert gpt()(torch.zeros(2, length, dtype=torch.int64)).shape == (2, length, VOCABULARY)


@pytest.mark.parametrize("place", [1, 7, LENGTH - 1])
def test_future_characters_change_no_logit(place: int) -> None:
    module = gpt()
    text = torch.randint(VOCABULARY, (2, LENGTH))
    other = text.clone()
    other[:, place:] = (other[:, place:] + 1) % VOCABULARY
    before, after = module(text), module(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place:], after[:, place:]).all(dim=-1).any(), "those that see it do change"


def test_an_untrained_module_knows_nothing(data: CharData) -> None:
    module = gpt()
    loss = module._loss(next(iter(data.val_dataloader())))
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.5)


def test_the_loss_is_about_the_next_character(data: CharData) -> None:
    module = gpt()
    batch = next(iter(data.val_dataloader()))
    logits = module(batch[:, :-1])
    by_hand = torch.stack(
        [-logits[row, place].log_softmax(-1)[batch[row, place + 1]] for row in range(4) for place in range(LENGTH)]
    )
    assert module._loss(batch).item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_it_learns_in_plain_lightning() -> None:
    module = gpt(learning_rate=1e-2, warmup_steps=5)
    trainer = quiet_trainer(devices=1, max_steps=60, limit_val_batches=8, val_check_interval=60)
    trainer.fit(module, datamodule=CharData(batch_size=16, length=LENGTH))
    assert trainer.callback_metrics["val_loss"] < 3.5
    assert trainer.callback_metrics["val_loss"] > 1.0


def test_the_rate_warms_up_in_a_line() -> None:
    module = gpt(learning_rate=0.5, warmup_steps=4)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]  # type: ignore[index, call-overload]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert configured["lr_scheduler"]["interval"] == "step"  # type: ignore[index, call-overload]


def test_blocks_are_the_children_of_one_list() -> None:
    """So that stages can begin at each."""
    module = gpt(layers=5)
    assert isinstance(module.blocks, nn.ModuleList)
    assert len(module.blocks) == 5
