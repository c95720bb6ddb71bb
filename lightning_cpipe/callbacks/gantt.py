"""Draws what the stages did when, from their measured spans: the fill, a piece of the steady state, and the drain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_cpipe.engine.timeline import (
    BACKWARD,
    DATA,
    EVALUATION,
    FORWARD,
    IDLE,
    LEFT_OUT,
    OF_EVALUATION,
    UPDATE,
    WAIT_ACTIVATION,
    WAIT_DECISION,
    WAIT_EVALUATION,
    WAIT_GRADIENT,
    WAIT_REPLICAS,
    Span,
)
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.table import COLOURS

_COLOUR_OF = {
    FORWARD: COLOURS[Kind.FORWARD],
    BACKWARD: COLOURS[Kind.BACKWARD],
    UPDATE: COLOURS[Kind.UPDATE],
    DATA: "#b279a2",
    EVALUATION: "#9d755d",
    WAIT_ACTIVATION: "#eeeeee",
    WAIT_GRADIENT: "#dddddd",
    WAIT_DECISION: "#cccccc",
    WAIT_EVALUATION: "#e5dad3",
    WAIT_REPLICAS: "#bab0ac",
}

Spans = Mapping[int, Sequence[Span]]
"""Of each stage."""


def draw_gantt(spans: Spans, path: Path, title: str, steps_shown: int = 6) -> None:
    """Write a PNG with three panels: fill, steady state, drain.

    Args:
        spans: of each stage, in order of time.
        path: of the picture.
        title: above it.
        steps_shown: local steps of the last stage in a panel.
    """
    # The pyplot interface would choose a screen; this one draws into the file alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(14, 1.6 + 0.55 * 3 * max(2, len(spans))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1)
    for axes, (name, (begin, end)) in zip(panels, _windows(spans, steps_shown).items()):
        for stage, of_stage in spans.items():
            for span in _within(of_stage, begin, end):
                if span.kind == LEFT_OUT:
                    continue
                start, width = (span.start_ns - begin) / 1e6, (span.end_ns - span.start_ns) / 1e6
                idle = span.kind in (*IDLE, WAIT_EVALUATION)
                axes.barh(
                    stage,
                    width,
                    left=start,
                    height=0.8,
                    color=_COLOUR_OF[span.kind],
                    hatch="////" if idle else None,
                    edgecolor="#aaaaaa" if idle else "white",
                    linewidth=0.3,
                )
                if span.kind in (FORWARD, BACKWARD) and width > 0.012 * (end - begin) / 1e6:
                    axes.text(
                        start + width / 2, stage, str(span.batch), ha="center", va="center", fontsize=7, color="white"
                    )
        axes.set_xlim(0, max(1e-3, (end - begin) / 1e6))
        axes.set_yticks(sorted(spans), [f"stage {stage}" for stage in sorted(spans)])
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=9)
    panels[-1].set_xlabel("milliseconds")
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="#aaaaaa", label=kind.replace("_", " "))
            for kind, colour in _COLOUR_OF.items()
        ],
        loc="outside lower center",
        ncols=len(_COLOUR_OF),
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _windows(spans: Spans, steps_shown: int) -> dict[str, tuple[int, int]]:
    """Begin and end of each panel in nanoseconds, by the last stage's steps, which are in the middle of things."""
    last_stage = spans[max(spans)]
    ends = [span.end_ns for span in last_stage if span.kind == BACKWARD]
    training = [span for each in spans.values() for span in each if span.kind not in OF_EVALUATION]
    begin, end = min(span.start_ns for span in training), max(span.end_ns for span in training)
    shown = min(steps_shown, len(ends))
    evaluated = [span for span in last_stage if span.kind in OF_EVALUATION]
    # Each stage has its own: they have different numbers of spans in a step.
    left_out = [span for each in spans.values() for span in each if span.kind == LEFT_OUT]
    middle = _quiet_middle(ends, shown, evaluated, left_out)
    first_backward = min(span.start_ns for span in spans[min(spans)] if span.kind == BACKWARD)
    last_forward = max(span.end_ns for span in spans[min(spans)] if span.kind == FORWARD)
    fill_end = max(ends[shown - 1], first_backward)
    drain_begin = min(ends[-shown], last_forward)
    return {
        "fill": (begin, fill_end),
        "steady state": (ends[max(0, middle - 1)], ends[min(len(ends) - 1, middle + shown)]),
        "drain": (drain_begin, end),
    }


def _quiet_middle(ends: Sequence[int], shown: int, evaluated: Sequence[Span], left_out: Sequence[Span]) -> int:
    """The first of `shown` backwards nearest to the middle, where nothing is left out, nor evaluated if that can be."""
    middle = (len(ends) - shown) // 2

    def free_of(spans: Sequence[Span], place: int) -> bool:
        return not any(_within(spans, ends[place - 1], ends[place + shown]))

    places = sorted(range(1, len(ends) - shown), key=lambda place: abs(place - middle))
    whole = [place for place in places if free_of(left_out, place)]
    quiet = (place for place in whole if free_of(evaluated, place))
    return next(quiet, whole[0] if whole else middle)


def _within(spans: Iterable[Span], begin: int, end: int) -> Iterable[Span]:
    return (span for span in spans if span.end_ns > begin and span.start_ns < end)
