"""A stage's stream runs the plan's rows, and says what is wrong with a mini-batch that does not fit them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.engine.mini_batch import MiniBatch, fingerprint
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.stage_stream import STEP, InFlight, OfLoss, StageStream
from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, UPDATE, Timeline
from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.errors import DataMismatchError, PlanError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.flushed import GPipe
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.cut import Crossing, Cut, Passage, StepCut, Value
from lightning_cpipe.stage.replay import Replayed
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.tree import Template, signature
from tests.helpers.wire import Wire

CROSSING = Crossing(Value("half", 0, 0), gradient=True, rewritten=False)
TABLE = {("half", 0): Template.of(torch.zeros(2))}
CUT = Cut(
    starts=("other_half",),
    steps={
        STEP: StepCut(
            (Passage(0, "other_half", sends=(CROSSING,)), Passage(1, receives=(CROSSING,))),
            signature(torch.zeros(2)),
            TABLE,
        )
    },
)


class Half:
    """Stands for one stage's module, which multiplies by its weight."""

    num_stages = 2
    cut = CUT

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.ignores_input = False

    def forward(
        self, name: str, step: Any, seed: int, received: Sequence[Tensor], table: Any, *, describe: bool
    ) -> Replayed:
        x = step() if self.stage == 0 else received[0]
        y = self.weight * (torch.ones(2) if self.ignores_input else x)
        templates = {("half", 0): Template.of(y)} if describe else {}
        return Replayed(y.sum(), [], templates) if self.stage == 1 else Replayed(None, [y], templates)

    def drawing(self, seed: int) -> Any:
        return nullcontext()


class Batches:
    """Stands for the fetcher. What a stage draws can be changed."""

    def __init__(self, count: int) -> None:
        self.batches = [torch.tensor([float(number), 1.0]) for number in range(count)]
        self.without_record: set[int] = set()

    def mini_batch(self, number: int) -> MiniBatch | None:
        if number >= len(self.batches):
            return None
        batch = self.batches[number]
        has_record = number not in self.without_record
        return MiniBatch(number, number, batch, fingerprint(batch), signature(batch), has_record=has_record)

    def begin(self, number: int) -> range:
        """A flush schedule takes three of them for a mini-batch."""
        return range(3 * number, 3 * number + 3)


def of_loss(work: InFlight) -> OfLoss:
    return work.returned, torch.autograd.backward


class Stage:
    """One stage, stepped by hand."""

    schedule: Schedule = Continuous()

    def __init__(self, half: Half, to: Neighbours, count: int) -> None:
        self.half = half
        self.timeline = Timeline()
        self.data = Batches(count)
        self.stage = StageStream(
            half,  # type: ignore[arg-type]
            self.schedule,
            Versions([("weight", half.weight)]),
            to,
            self.timeline,
            self.data,
            lambda mini_batch: mini_batch.batch,
        )
        slices = None if isinstance(self.schedule, Continuous) else self.data
        self.stream = TrainingStream([self.stage], self.schedule, 2, self.timeline, slices=slices)

    def forwards(self, number: int) -> None:
        """The first half of local step `number`."""
        self.stream.forward_until(number)
        self.work = self.stage.in_flight[number]

    def finish(self) -> None:
        """The backward and the update of the local step."""
        number = self.work.mini_batch.number
        self.stage.of_loss = None if self.half.stage == 0 else of_loss
        self.stream.backward(number)
        self.update(number)

    def update(self, number: int) -> None:
        with self.stream.updating():
            self.stream.begin_update(number)
            with torch.no_grad():
                self.half.weight -= 0.25 * self.half.weight.grad
            self.half.weight.grad = None

    @property
    def trace(self) -> str:
        letters = {FORWARD: "F", BACKWARD: "B", UPDATE: "U"}
        return " ".join(f"{letters[span.kind]}{span.batch}" for span in self.timeline.spans if span.kind in letters)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, Stage]:
    """The first and the last of two, over three mini-batches."""
    return stages_on(Wire(monkeypatch), 3)


def stages_on(wire: Wire, count: int) -> tuple[Stage, Stage]:
    activations, gradients, records = wire.ends("activations"), wire.ends("gradients"), wire.records("records")
    up = Neighbours(activations_out=activations[0], records_out=records[0], gradients_in=gradients[1])
    down = Neighbours(activations_in=activations[1], records_in=records[1], gradients_out=gradients[0])
    return Stage(Half(0), up, count), Stage(Half(1), down, count)


def run_on(stages: tuple[Stage, Stage], numbers: Sequence[int]) -> None:
    """Both stages' local steps. Activations come before the last stage needs them, and gradients before the first."""
    first, last = stages
    for number in numbers:
        first.forwards(number)
        last.forwards(number)
        last.finish()
        first.finish()


def test_two_stages_run_their_rows_and_the_numbers_are_those_of_delayed_gradients(stages: tuple[Stage, Stage]) -> None:
    run_on(stages, [0, 1, 2])
    first, last = stages
    assert first.trace == "F0 F1 B0 U0 F2 B1 U1 B2 U2"
    assert last.trace == "F0 B0 U0 F1 B1 U1 F2 B2 U2"
    # By hand: the loss is w1 w0 (j + 1). The first stage forwards j with its weight after j - 1 updates.
    w0, w1 = [2.0], [2.0]
    for j in range(3):
        used = w0[max(0, j - 1)]
        w0.append(w0[-1] - 0.25 * w1[j] * (j + 1))
        w1.append(w1[-1] - 0.25 * used * (j + 1))
    assert first.half.weight.item() == w0[-1]
    assert last.half.weight.item() == w1[-1]
    assert [each.stage.news.books.figures().most_delay for each in stages] == [1, 0]


def test_nothing_is_in_flight_when_the_data_has_ended(stages: tuple[Stage, Stage]) -> None:
    run_on(stages, [0, 1, 2])
    assert not stages[0].stage.in_flight
    assert not stages[1].stage.in_flight


def test_after_the_data_ran_dry_the_pipeline_is_filled_anew(stages: tuple[Stage, Stage]) -> None:
    """So it is with `cross_epoch=False`."""
    run_on(stages, [0, 1, 2])
    for each in stages:
        each.data.batches += Batches(3).batches
    run_on(stages, [3, 4, 5])
    assert stages[0].trace.endswith("B2 U2 F3 F4 B3 U3 F5 B4 U4 B5 U5")


@pytest.mark.parametrize("asked", [1, 7])
def test_a_loop_that_leaves_a_mini_batch_out_is_told_so(stages: tuple[Stage, Stage], asked: int) -> None:
    with pytest.raises(PlanError, match=f"asks for mini-batch {asked} where the plan has 0"):
        stages[0].stream.forward_until(asked)


def test_a_loop_that_asks_twice_for_one_step_is_told_so(stages: tuple[Stage, Stage]) -> None:
    """As an optimizer does that calls its closure twice."""
    first, last = stages
    run_on((first, last), [0])
    for stage in stages:
        with pytest.raises(PlanError, match="asks for mini-batch 0 where the plan has 1: every mini-batch must be"):
            stage.stream.forward_until(0)


def test_two_loaders_that_disagree_stop_training_with_both_fingerprints(stages: tuple[Stage, Stage]) -> None:
    first, last = stages
    last.data.batches[1] = torch.tensor([5.0, 5.0])
    run_on(stages, [0])
    first.forwards(1)
    here, there = (fingerprint(each.data.batches[1]) for each in (last, first))
    with pytest.raises(DataMismatchError) as caught:
        last.forwards(1)
    said = str(caught.value)
    assert "stage 1 and stage 0 drew different mini-batches in training_step" in said
    assert f"number 1 with fingerprint {here:08x} here, number 1 with fingerprint {there:08x} there" in said
    assert "seed_everything" in said


def test_a_shape_that_follows_from_numbers_is_stopped_before_it_is_sent(
    stages: tuple[Stage, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Half, "forward", lambda *_, **__: Replayed(None, [torch.ones(3)], {}))
    with pytest.raises(DataMismatchError) as caught:
        stages[0].forwards(0)
    said = str(caught.value)
    assert "the output of 'half' is float32[3] for mini-batch 0" in said
    assert "float32[2]" in said
    assert "`split_points`" in said


def test_new_shapes_are_told_with_the_mini_batch_that_has_them(stages: tuple[Stage, Stage]) -> None:
    for each in stages:
        each.data.batches[1] = torch.tensor([1.0, 2.0, 3.0])
    run_on(stages, [0, 1, 2])
    assert stages[1].trace == "F0 B0 U0 F1 B1 U1 F2 B2 U2"


def test_further_slices_have_a_record_for_new_shapes_alone(
    stages: tuple[Stage, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    news, told = stages[0].stage.news, []
    record = news.record
    monkeypatch.setattr(news, "record", lambda one, table: told.append(one.number) or record(one, table))
    for each in stages:
        each.data.without_record = {1, 2}
        each.data.batches[2] = torch.tensor([1.0, 2.0, 3.0])
    run_on(stages, [0, 1, 2])
    assert told == [0, 2]
    assert stages[1].trace == "F0 B0 U0 F1 B1 U1 F2 B2 U2"


def test_an_input_that_a_stage_did_not_use_has_a_gradient_of_zeros(stages: tuple[Stage, Stage]) -> None:
    first, last = stages
    last.half.ignores_input = True
    run_on(stages, [0, 1, 2])
    assert first.half.weight.item() == 2.0
    assert last.half.weight.item() != 2.0


def test_a_raised_hand_travels_with_the_next_activation(stages: tuple[Stage, Stage]) -> None:
    first, last = stages
    run_on(stages, [0])
    assert last.stage.news.asked == 0
    first.stage.news.asks = lambda: 2
    run_on(stages, [1])
    # The forward of mini-batch 2 took it along.
    assert first.stage.news.asked == 2
    last.forwards(2)
    assert last.stage.news.asked == 2


def test_figures_of_the_stages_before_come_with_the_activations(stages: tuple[Stage, Stage]) -> None:
    first, last = stages
    first.stage.news.tells_figures = lambda number: number != 1
    seen = []
    for number in range(3):
        run_on(stages, [number])
        seen.append(last.stage.news.figures[0].backwards)
    # When it forwarded mini-batch 2, the first stage had done its first backward; with mini-batch 1 it told nothing.
    assert seen == [0, 0, 1]
    assert set(last.stage.news.figures) == {0}
    assert not first.stage.news.figures


def test_nobody_tells_figures_that_nobody_asked_for(stages: tuple[Stage, Stage]) -> None:
    run_on(stages, [0, 1, 2])
    assert not stages[1].stage.news.figures


def test_a_skipped_mini_batch_is_forgotten(stages: tuple[Stage, Stage]) -> None:
    stages[0].forwards(0)
    stages[0].stream.skip(0)
    assert set(stages[0].stage.in_flight) == {1}


def test_the_plan_of_a_flush_schedule_begins_anew_with_each_mini_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "schedule", GPipe())
    first, last = stages_on(Wire(monkeypatch), 6)
    for number in (0, 1):
        for stage in (first, last):
            stage.stream.forward_until(number)
        for stage in (last, first):
            stage.stage.of_loss = None if stage is first else of_loss
            stage.stream.backward(number)
            stage.update(number)
    assert first.trace == last.trace == "F0 F1 F2 B2 B1 B0 U0 F3 F4 F5 B5 B4 B3 U3"
    for asked in (0, 1):
        with pytest.raises(PlanError, match=f"asks for mini-batch {asked} where the plan has 2"):
            first.stream.forward_until(asked)
