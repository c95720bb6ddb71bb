"""The continuous schedule draws the rows of its docstring, and its closed forms say what walking the plan counts.

The walk is done for 1 to 8 stages, up to 2 times more in flight, accumulation over 1 to 5, epochs that these do not
divide, and every version policy; for some numbers of mini-batches, and for 1 to 16 in the full suite.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.check import delays, live_versions, most_in_flight, versions
from lightning_cpipe.schedules.clock import WHOLE_BACKWARD_TWICE, clock, span
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.policies import LATEST, POLICIES, STASH, TWO_BUFFERED, VERTICAL, VersionPolicy
from lightning_cpipe.schedules.table import Table

STAGES = range(1, 9)
BATCHES = range(1, 17)
SOME_BATCHES = (1, 3, 16)
EXTRA = range(3)
ACCUMULATE = range(1, 6)
EPOCH_LENGTHS = (None, 1, 3, 7)

Runs = list[tuple[Continuous, int, int, Plan]]

EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
EVERY_STAGE_COUNT = pytest.mark.parametrize("p", STAGES)

FOUR_STAGES = """
    0 | F0          | F1          | F2          | F3 B0 U0    | F4 B1 U1    | B2 U2       | B3 U3 | B4 U4
    1 | F0          | F1          | F2 B0 U0    | F3 B1 U1    | F4 B2 U2    | B3 U3       | B4 U4
    2 | F0          | F1 B0 U0    | F2 B1 U1    | F3 B2 U2    | F4 B3 U3    | B4 U4
    3 | F0 B0 U0    | F1 B1 U1    | F2 B2 U2    | F3 B3 U3    | F4 B4 U4
"""

BACKWARDS_IN_TWO_HALVES = """
    0 | F0          | F1          | F2 I0 W0 U0 | F3 I1 W1 U1 | I2 W2 U2    | I3 W3 U3
    1 | F0          | F1 I0 W0 U0 | F2 I1 W1 U1 | F3 I2 W2 U2 | I3 W3 U3
    2 | F0 I0 W0 U0 | F1 I1 W1 U1 | F2 I2 W2 U2 | F3 I3 W3 U3
"""

FEWER_BATCHES_THAN_STAGES = """
    0 | F0          | F1          |             | B0 U0       | B1 U1
    1 | F0          | F1          | B0 U0       | B1 U1
    2 | F0          | F1 B0 U0    | B1 U1
    3 | F0 B0 U0    | F1 B1 U1
"""

TWICE_AS_FAR_AHEAD = """
    0 | F0          | F1          | F2          | F3          | F4 B0 U0    | B1 U1       | B2 U2 | B3 U3 | B4 U4
    1 | F0          | F1          | F2 B0 U0    | F3 B1 U1    | F4 B2 U2    | B3 U3       | B4 U4
    2 | F0 B0 U0    | F1 B1 U1    | F2 B2 U2    | F3 B3 U3    | F4 B4 U4
"""

# Updates after every second mini-batch, and after the last one of each epoch of five.
TWO_PER_UPDATE_FIVE_PER_EPOCH = """
    0 | F0 | F1 B0 | F2 B1 U1 | F3 B2    | F4 B3 U3 | F5 B4 U4 | F6 B5 | B6 U6
    1 | F0 B0 | F1 B1 U1 | F2 B2 | F3 B3 U3 | F4 B4 U4 | F5 B5 | F6 B6 U6
"""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((p, SOME_BATCHES), id=f"{p} stages") for p in STAGES),
        *(pytest.param((p, BATCHES), id=f"{p} stages, 1 to 16", marks=pytest.mark.full) for p in STAGES),
    ],
)
def runs(request: pytest.FixtureRequest) -> Runs:
    """Schedule, stages, mini-batches and plan of every run that is walked."""
    p, batches = request.param
    schedules = itertools.starmap(Continuous, itertools.product(EXTRA, ACCUMULATE, EPOCH_LENGTHS))
    return [(schedule, p, n, schedule.plan(p, n)) for schedule, n in itertools.product(schedules, batches)]


@pytest.mark.parametrize(
    ("schedule", "drawn", "p", "n"),
    [
        (Continuous(), FOUR_STAGES, 4, 5),
        (Continuous(), FEWER_BATCHES_THAN_STAGES, 4, 2),
        (Continuous(), "0 | F0 B0 U0 | F1 B1 U1", 1, 2),
        (Continuous(extra_in_flight=1), TWICE_AS_FAR_AHEAD, 3, 5),
        (Continuous(early_input_gradient=True), BACKWARDS_IN_TWO_HALVES, 3, 4),
        (Continuous(accumulate=2, epoch_length=5), TWO_PER_UPDATE_FIVE_PER_EPOCH, 2, 7),
        (Continuous(accumulate=2), "0 | F0 B0 | F1 B1 U1 | F2 B2 | F3 B3 U3 | F4 B4", 1, 5),
    ],
)
def test_the_rows_are_as_drawn(schedule: Continuous, drawn: str, p: int, n: int) -> None:
    assert schedule.plan(p, n) == Plan.parse(drawn)


@EVERY_STAGE_COUNT
def test_stage_s_runs_forward_j_in_slot_s_plus_2j_and_backward_j_in_slot_2p_minus_1_minus_s_plus_2j(p: int) -> None:
    for n in BATCHES:
        expected = {}
        for s, j in itertools.product(range(p), range(n)):
            expected[Action(Kind.FORWARD, j, s)] = s + 2 * j
            expected[Action(Kind.BACKWARD, j, s)] = 2 * p - 1 - s + 2 * j
        assert clock(Continuous().plan(p, n)) == expected


@EVERY_STAGE_COUNT
def test_backwards_in_two_halves_change_no_number_and_shorten_the_fill_and_the_drain(p: int) -> None:
    for extra, n in itertools.product(EXTRA, BATCHES):
        whole, halves = Continuous(extra), Continuous(extra, early_input_gradient=True)
        plan, plain = halves.plan(p, n), whole.plan(p, n)
        for s in range(p):
            assert versions(plan, s) == versions(plain, s)
            assert delays(plan, s) == delays(plain, s)
            assert most_in_flight(plan, s) == most_in_flight(plain, s)
            assert live_versions(plan, s) == live_versions(plain, s)
        assert span(plan) == halves.slots(p, n) == 3 * n + 2 * (p - 1)
        assert span(plain, WHOLE_BACKWARD_TWICE) == 3 * n + 3 * (p - 1)


@EVERY_STAGE_COUNT
def test_a_run_takes_2n_slots_and_2_p_minus_1_idle_ones_on_each_stage(p: int) -> None:
    for extra, n in itertools.product(EXTRA, BATCHES):
        schedule = Continuous(extra)
        slots = clock(schedule.plan(p, n))
        assert min(slots.values()) == 0
        taken = 1 + max(slots.values())
        assert schedule.slots(p, n) == taken == 2 * n + 2 * (p - 1)
        for s in range(p):
            busy = {slot for action, slot in slots.items() if action.stage == s}
            assert schedule.idle_slots(p, n) == taken - len(busy) == 2 * (p - 1)


def test_no_more_is_in_flight_than_lag_plus_one(runs: Runs) -> None:
    for schedule, p, n, plan in runs:
        for s in range(p):
            assert most_in_flight(plan, s) == schedule.in_flight(s, p, n), (schedule, n, s)


@EVERY_POLICY
def test_every_mini_batch_uses_the_version_that_is_promised_which_is_there(runs: Runs, policy: VersionPolicy) -> None:
    for schedule, p, n, plan in under(policy, runs):
        for s in range(p):
            expected = {j: schedule.version(s, p, j) for j in range(n)}
            used = versions(plan, s, policy)
            assert used == expected, (schedule, n, s)
            if policy != STASH:
                newest = versions(plan, s)
                assert all(used[j] <= newest[j] for j in range(n)), (schedule, n, s)


@EVERY_POLICY
def test_every_backward_comes_as_late_as_is_promised(runs: Runs, policy: VersionPolicy) -> None:
    for schedule, p, n, plan in under(policy, runs):
        for s in range(p):
            expected = {j: schedule.delay(s, p, j) for j in range(n)}
            assert delays(plan, s, policy) == expected, (schedule, n, s)


@EVERY_POLICY
def test_short_runs_never_need_more_versions_nor_come_later_than_promised(runs: Runs, policy: VersionPolicy) -> None:
    for schedule, p, n, plan in under(policy, runs):
        for s in range(p):
            live, delay = promised(schedule, s, p)
            assert live_versions(plan, s, policy) <= live, (schedule, n, s)
            assert max(delays(plan, s, policy).values()) <= delay, (schedule, n, s)


@EVERY_POLICY
@pytest.mark.parametrize("extra", EXTRA)
def test_long_runs_need_exactly_the_versions_that_are_promised(extra: int, policy: VersionPolicy) -> None:
    p = max(STAGES)
    for accumulate, length in itertools.product(ACCUMULATE, (*EPOCH_LENGTHS, 2, 11)):
        schedule = Continuous(extra, accumulate, length, versions=policy)
        plan = schedule.plan(p, 2 * (schedule.lag(0, p) + accumulate) + (length or accumulate))
        for s in range(p):
            assert live_versions(plan, s, policy) == schedule.live_versions(s, p), (schedule, s)
            assert max(delays(plan, s, policy).values()) == schedule.most_delay(s, p), (schedule, s)


@cache
def promised(schedule: Continuous, stage: int, p: int) -> tuple[int, int]:
    """Versions that live at once, and the largest delay."""
    return schedule.live_versions(stage, p), schedule.most_delay(stage, p)


def under(policy: VersionPolicy, runs: Runs) -> Iterator[tuple[Continuous, int, int, Plan]]:
    """The same runs, whose rows no policy changes; fewer of them under those that are not the default."""
    for schedule, p, n, plan in runs if policy == STASH else runs[::11]:
        yield replace(schedule, versions=policy), p, n, plan


def test_the_policies_differ_in_who_chooses() -> None:
    p, seen = 4, range(8)
    assert [Continuous(versions=VERTICAL).version(s, p, 7) for s in range(p)] == [4] * p
    assert [Continuous(versions=STASH).version(s, p, 7) for s in range(p)] == [4, 5, 6, 7]
    assert [Continuous(versions=LATEST).version(s, p, 7) for s in range(p)] == [4, 5, 6, 7]
    two = Continuous(accumulate=4, versions=TWO_BUFFERED)
    assert [[two.version(s, p, j) for j in (*seen, 8)] for s in range(p)] == [[0] * 8 + [1]] * p
    stash = Continuous(accumulate=4)
    assert [[stash.version(s, p, j) for j in seen] for s in (0, 3)] == [[0] * 7 + [1], [0] * 4 + [1] * 4]
    live = [[Continuous(versions=each).live_versions(s, p) for s in range(p)] for each in POLICIES.values()]
    assert dict(zip(POLICIES, live)) == {
        "stash": [4, 3, 2, 1],
        "latest": [1, 1, 1, 1],
        "vertical": [4, 4, 4, 4],
        "2bw": [4, 4, 4, 4],
    }


@pytest.mark.parametrize("extra", EXTRA)
@EVERY_STAGE_COUNT
def test_2bw_is_one_update_late_everywhere_from_an_accumulation_over_the_lag_of_stage_0_on(p: int, extra: int) -> None:
    lag = Continuous(extra).lag(0, p)
    for accumulate in range(max(1, lag), lag + 5):
        schedule = Continuous(extra, accumulate, versions=TWO_BUFFERED)
        for s in range(p):
            expected = [min(1, j // accumulate, lag) for j in range(4 * accumulate)]
            assert [schedule.delay(s, p, j) for j in range(4 * accumulate)] == expected
            assert schedule.live_versions(s, p) == 1 + min(1, lag)
    if lag > 1:
        assert Continuous(extra, lag - 1, versions=TWO_BUFFERED).most_delay(0, p) == 2


def test_2bw_is_two_updates_late_after_an_accumulation_that_an_epoch_s_end_cut_short() -> None:
    schedule, p = Continuous(accumulate=3, epoch_length=4, versions=TWO_BUFFERED), 4
    #                                                     updates:     1  2        3  4        5  6
    assert [schedule.version(0, p, j) for j in range(13)] == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 4, 4]
    assert [schedule.delay(3, p, j) for j in range(13)] == [0, 0, 0, 1, 2, 2, 2, 1, 2, 2, 2, 1, 2]
    # Version 1 is passed over: stage 0, which is the furthest ahead, never keeps it.
    assert [schedule.live_versions(s, p) for s in range(p)] == [2, 3, 3, 3]
    long_enough = replace(schedule, epoch_length=6)
    assert [long_enough.live_versions(s, p) for s in range(p)] == [2] * p


def test_with_one_update_per_mini_batch_the_version_is_the_mini_batch_minus_the_lag() -> None:
    schedule, p = Continuous(), 4
    assert [schedule.lag(s, p) for s in range(p)] == [3, 2, 1, 0]
    assert [schedule.in_flight(s, p, 100) for s in range(p)] == [4, 3, 2, 1]
    assert [schedule.live_versions(s, p) for s in range(p)] == [4, 3, 2, 1]
    assert [schedule.version(0, p, j) for j in range(6)] == [0, 0, 0, 0, 1, 2]
    assert [schedule.delay(0, p, j) for j in range(6)] == [0, 1, 2, 3, 3, 3]
    assert [schedule.delay(3, p, j) for j in range(6)] == [0] * 6


def test_extra_in_flight_multiplies_the_lag() -> None:
    assert [Continuous(extra).lag(1, 4) for extra in range(3)] == [2, 4, 6]
    assert Continuous(extra_in_flight=1).delay(0, 4, 50) == 6


@pytest.mark.parametrize("extra", EXTRA)
@EVERY_STAGE_COUNT
def test_a_tied_gradient_has_a_slot_to_travel_and_not_two_rows(p: int, extra: int) -> None:
    """In the steady state, from the end of the backward that made it to the end of the one after which it is added."""
    schedule = Continuous(extra)
    slots = clock(schedule.plan(p, 60))
    for user, owner in itertools.combinations(range(p), 2):
        late = schedule.rows_late(user, owner)
        sent = slots[Action(Kind.BACKWARD, 30, user)]
        added = slots[Action(Kind.BACKWARD, 30 + late, owner)]
        assert 1 <= added - sent <= 2


def test_accumulation_over_the_whole_lag_brings_the_delay_to_one_and_a_cut_one_to_two() -> None:
    p = 8
    whole = Continuous(accumulate=8)
    assert {whole.delay(s, p, j) for s in range(p - 1) for j in range(8, 64)} == {0, 1}
    assert {whole.live_versions(s, p) for s in range(p - 1)} == {2}
    cut = Continuous(accumulate=8, epoch_length=11)
    assert max(cut.delay(0, p, j) for j in range(64)) == 2
    assert cut.live_versions(0, p) == 3


@pytest.mark.parametrize(
    ("p", "n", "paper", "exact"),
    [(4, 13, 6 / 19, 3 / 16), (2, 2, 2 / 4, 1 / 3), (8, 100, 14 / 114, 7 / 107), (1, 5, 0, 0)],
)
def test_both_bubble_ratios_are_those_counted_by_hand(p: int, n: int, paper: float, exact: float) -> None:
    assert Continuous().paper_ratio(p, n) == pytest.approx(paper)
    assert Continuous().slot_exact_ratio(p, n) == pytest.approx(exact)


@EVERY_STAGE_COUNT
def test_both_bubble_ratios_follow_their_formulas(p: int) -> None:
    for n in BATCHES:
        assert Continuous().slot_exact_ratio(p, n) == pytest.approx((p - 1) / (n + p - 1))
        if p > 1:
            assert Continuous().paper_ratio(p, n) == pytest.approx(1 / (n / (2 * (p - 1)) + 1))


def test_the_bubbles_vanish_as_training_goes_on() -> None:
    assert Continuous().paper_ratio(4, 10**6) < 1e-5
    assert Continuous().slot_exact_ratio(4, 10**6) < 1e-5


@EVERY_STAGE_COUNT
@pytest.mark.parametrize("extra", EXTRA)
def test_the_prediction_at_the_end_counts_the_slots_of_the_plan(p: int, extra: int) -> None:
    schedule = Continuous(extra)
    for n in BATCHES:
        table = Table(schedule, p, n)
        predicted = schedule.idle_ratio(p, n, drained=True)
        assert predicted == pytest.approx(table.in_run.slot_exact)
        assert predicted == pytest.approx(table.in_window.slot_exact)


@EVERY_STAGE_COUNT
@pytest.mark.parametrize("extra", EXTRA)
def test_the_prediction_on_the_way_is_the_mean_of_the_stages_idle_slots(p: int, extra: int) -> None:
    """With extra in flight the stages pause less in the fill; it once said p - 1 slots for each."""
    schedule = Continuous(extra)
    assert schedule.idle_ratio(p, 0, drained=False) == 0
    # A plan that goes on for long, until the last stage has backwarded so many.
    plan = schedule.plan(p, max(BATCHES) + schedule.lag(0, p) + p)
    slots = clock(plan)
    for n in BATCHES:
        passed = slots[Action(Kind.BACKWARD, n - 1, p - 1)] + 1
        busy = Counter(action.stage for action, slot in slots.items() if slot < passed)
        idle = [passed - busy[s] for s in range(p)]
        assert [schedule.idle_slots_so_far(s, p, n) for s in range(p)] == idle
        assert schedule.idle_ratio(p, n, drained=False) == pytest.approx(sum(idle) / (p * passed))


@pytest.mark.parametrize(("extra", "idle"), [(0, 3), (1, 3 / 2), (2, 3 / 2)])
def test_after_the_fill_extra_in_flight_leaves_half_of_the_idle_slots(extra: int, idle: float) -> None:
    assert Continuous(extra).idle_ratio(4, 10, drained=False) == pytest.approx(idle / (2 * 10 + 3))
