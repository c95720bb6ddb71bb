"""The picture of a run: three panels, a bar for each span where and as long as it was, the number of its mini-batch."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_cpipe import IdleMonitor
from lightning_cpipe.callbacks.gantt import draw_gantt
from lightning_cpipe.engine.timeline import BACKWARD, DATA, EVALUATION, FORWARD, WAIT_GRADIENT, Span, Timeline
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.clock import clock
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.table import COLOURS
from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

MS = 1_000_000
PANELS = ["fill", "steady state", "drain"]


def spans_of(p: int, batches: int, evaluated_at: int | None = None) -> dict[int, list[Span]]:
    """A run by the clock of the plan, a slot a millisecond; an evaluation of 50 may come after a mini-batch."""
    spans: dict[int, list[Span]] = {stage: [] for stage in range(p)}
    for action, slot in sorted(clock(Continuous().plan(p, batches)).items(), key=lambda item: item[1]):
        assert action.stage is not None
        late = 50 if evaluated_at is not None and action.batch > evaluated_at else 0
        kind = FORWARD if action.kind is Kind.FORWARD else BACKWARD
        spans[action.stage].append(Span(kind, action.batch, (slot + late) * MS, (slot + late + 1) * MS))
    if evaluated_at is not None:
        for of_stage in spans.values():
            end = max(span.end_ns for span in of_stage if span.batch <= evaluated_at)
            of_stage.append(Span(EVALUATION, 0, end, end + 45 * MS))
            of_stage.sort(key=lambda span: span.start_ns)
    return spans


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def bars_of(axes: Any) -> list[tuple[float, float, float]]:
    """Stage, begin and length of each bar that is inside of the panel."""
    begin, end = axes.get_xlim()
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    return sorted((round(s), round(x, 6), round(w, 6)) for s, x, w in bars if x + w > begin and x < end)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_bars_lie_where_the_spans_were(p: int, drawn: list[Figure], tmp_path: Path) -> None:
    batches, shown = 40, 6
    spans = spans_of(p, batches)
    draw_gantt(spans, tmp_path / "folder" / "run.png", "the title", shown)
    (figure,) = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == PANELS
    assert figure.get_suptitle() == "the title"
    fill, steady, drain = figure.axes
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"stage {stage}" for stage in range(p)]
        assert axes.yaxis_inverted()
    # The fill begins at slot 0 and reaches the first backward of the first stage, in slot 2p - 1.
    begin, end = fill.get_xlim()
    assert begin == 0
    assert end >= 2 * p
    assert bars_of(fill) == sorted(
        (stage, span.start_ns / MS, 1.0) for stage in spans for span in spans[stage] if span.start_ns / MS < end
    )
    # In the steady state no stage is idle.
    begin, end = steady.get_xlim()
    lengths = [sum(min(x + w, end) - max(x, begin) for s, x, w in bars_of(steady) if s == stage) for stage in spans]
    assert lengths == pytest.approx([end] * p)
    assert end >= 2 * shown
    # The drain ends with the last backward of the first stage.
    assert max(x + w for _, x, w in bars_of(drain)) == pytest.approx(drain.get_xlim()[1])
    numbers = {text.get_text() for text in drain.texts}
    assert str(batches - 1) in numbers
    assert str(batches // 2) in {text.get_text() for text in steady.texts}
    assert {"0", "1"} <= {text.get_text() for text in fill.texts}


def test_the_steady_state_is_shown_where_no_evaluation_was(drawn: list[Figure], tmp_path: Path) -> None:
    draw_gantt(spans_of(3, 40, evaluated_at=20), tmp_path / "run.png", "", 6)
    steady = drawn[0].axes[1]
    assert steady.get_xlim()[1] < 40
    assert {width for _, _, width in bars_of(steady)} == {1.0}


def kept(spans: list[Span], keep: int) -> list[Span]:
    """What a timeline keeps of these spans."""
    timeline = Timeline(keep)
    with pytest.MonkeyPatch.context() as patch:
        for span in spans:
            patch.setattr(time, "perf_counter_ns", iter((span.start_ns, span.end_ns)).__next__)
            with timeline.measure(span.kind, span.batch):
                pass
    return timeline.spans


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_steady_state_of_a_long_run_is_one_that_every_stage_kept(
    evaluates: bool, drawn: list[Figure], tmp_path: Path
) -> None:
    """Of 3,000 steps each stage keeps the first and the last; the panel once showed the gap between, seconds wide."""
    p, shown = 3, 6
    spans = spans_of(p, 3000)
    # One stage has more spans in a step than the others, so its gap is longer.
    spans[0] = [each for span in spans[0] for each in (span, Span(DATA, span.batch, span.end_ns, span.end_ns))]
    if evaluates:
        # So often that no panel is free of it; that must not lead back into the gap.
        spans[p - 1] = [
            each for span in spans[p - 1] for each in (span, Span(EVALUATION, 0, span.end_ns, span.end_ns + 1))
        ]
    draw_gantt({stage: kept(of_stage, keep=400) for stage, of_stage in spans.items()}, tmp_path / "run.png", "", shown)
    steady = drawn[0].axes[1]
    end = steady.get_xlim()[1]
    assert end == 2 * (shown + 1)
    for stage in spans:
        # The evaluations of this test take no time.
        assert sum(min(x + w, end) - max(x, 0) for s, x, w in bars_of(steady) if s == stage) == pytest.approx(end)
    # Neither in the fill nor in the drain.
    assert 50 < min(int(text.get_text()) for text in steady.texts) < 2950


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_short_run_is_drawn_too(batches: int, drawn: list[Figure], tmp_path: Path) -> None:
    draw_gantt(spans_of(3, batches), tmp_path / "run.png", "", 6)
    for axes in drawn[0].axes:
        assert axes.get_xlim()[1] > 0
        # One mini-batch has no steady state.
        assert bars_of(axes) or batches == 1


def test_waiting_is_hatched(drawn: list[Figure], tmp_path: Path) -> None:
    spans = spans_of(2, 4)
    spans[0].append(Span(WAIT_GRADIENT, 1, 2 * MS, 3 * MS))
    draw_gantt(spans, tmp_path / "run.png", "", 6)
    hatched = {bar.get_hatch() for bar in drawn[0].axes[0].patches if bar.get_x() == 2 and bar.get_y() < 0.5}
    assert "////" in hatched


def share_of(colour: str, pixels: np.ndarray[Any, Any]) -> float:
    return float((np.abs(pixels[..., :3] - to_rgb(colour)) < 0.02).all(axis=-1).mean())


def path(trainer: pl.Trainer, _: pl.LightningModule) -> str | None:
    return next(each.path for each in trainer.callbacks if isinstance(each, IdleMonitor))


@pytest.mark.parametrize("p", [1, 3])
def test_a_run_leaves_a_picture_of_itself(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tick each time somebody looks: on a busy machine one wait may be longer than all else, which is then not seen.
    monkeypatch.setattr(time, "perf_counter_ns", itertools.count(0, MS).__next__)
    options = {"callbacks": lambda: [IdleMonitor()], "look": path, "max_epochs": 3}
    first, *others = fit_in_pipeline(p, Chain, noise_loader, partial(noise_loader, samples=6), **options)
    assert all(of_rank.found is None for of_rank in others)
    found = Path(first.found)
    assert found.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(found)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    for panel in np.array_split(pixels, 3):
        assert share_of(COLOURS[Kind.FORWARD], panel) > 0.001
        assert share_of(COLOURS[Kind.BACKWARD], panel) > 0.001


def test_no_picture_is_drawn_where_none_is_wanted(tmp_path: Path) -> None:
    fit_in_pipeline(2, Chain, noise_loader, max_epochs=1, callbacks=lambda: [IdleMonitor(picture=False)])
    assert not list(tmp_path.rglob("*.png"))
