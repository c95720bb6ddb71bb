"""The four steps of a LightningModule, and the names that Lightning makes of theirs."""

from __future__ import annotations

from typing import NamedTuple


class StepNames(NamedTuple):
    """What belongs to one step.

    Attributes:
        context: method of the precision plugin under which the step runs.
        starts: hooks that come before the first of them, in order.
        batch_start: hook that comes before each of them.
        batch_end: hook that gets the step's output.
        epoch_end: hook that may use what was collected of them.
    """

    context: str
    starts: tuple[str, ...]
    batch_start: str
    batch_end: str
    epoch_end: str


STEPS = {
    "training_step": StepNames(
        "train_step_context",
        ("on_fit_start", "on_train_start", "on_train_epoch_start"),
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
    ),
    "validation_step": StepNames(
        "val_step_context",
        ("on_validation_start", "on_validation_epoch_start"),
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
    ),
    "test_step": StepNames(
        "test_step_context",
        ("on_test_start", "on_test_epoch_start"),
        "on_test_batch_start",
        "on_test_batch_end",
        "on_test_epoch_end",
    ),
    "predict_step": StepNames(
        "predict_step_context",
        ("on_predict_start", "on_predict_epoch_start"),
        "on_predict_batch_start",
        "on_predict_batch_end",
        "on_predict_epoch_end",
    ),
}
