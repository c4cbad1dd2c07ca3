"""Learning-rate schedules against their closed formulas and at their borders."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.training.schedules import SCHEDULES

WARMUP, DECAY, FLOOR = 10, 110, 0.1


def after_warmup(name, step):
    t = (step - WARMUP) / (DECAY - WARMUP)
    return {
        "constant": 1.0,
        "linear": FLOOR + (1 - FLOOR) * (1 - t),
        "cosine": FLOOR + 0.5 * (1 - FLOOR) * (1 + math.cos(math.pi * t)),
        "inverse_sqrt": max(FLOOR, WARMUP**0.5 * step**-0.5),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [10, 11, 35, 60, 109, 110])
def test_formula_after_warmup(name, step):
    assert SCHEDULES[name](step, WARMUP, DECAY, FLOOR) == pytest.approx(after_warmup(name, step), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_from_above_zero_to_the_peak(name):
    values = [SCHEDULES[name](step, WARMUP, DECAY, FLOOR) for step in range(WARMUP + 1)]
    assert values == pytest.approx([(step + 1) / (WARMUP + 1) for step in range(WARMUP + 1)], rel=1e-12)
    assert values[-1] == 1


@pytest.mark.parametrize(("name", "end"), [("constant", 1.0), ("linear", FLOOR), ("cosine", FLOOR)])
def test_stays_at_its_end(name, end):
    for step in (DECAY, DECAY + 1, 10**9):
        assert SCHEDULES[name](step, WARMUP, DECAY, FLOOR) == pytest.approx(end, abs=1e-15)


def test_inverse_sqrt_stops_at_the_floor():
    assert SCHEDULES["inverse_sqrt"](WARMUP * 100, WARMUP, DECAY, FLOOR) == FLOOR
    assert SCHEDULES["inverse_sqrt"](10**9, WARMUP, DECAY, FLOOR) == FLOOR


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warmup_starts_at_the_peak(name):
    assert SCHEDULES[name](0, 0, 100, 0.0) == 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("decay", [0, 5, 10])
def test_a_decay_that_ends_in_the_warmup_is_over_after_it(name, decay):
    assert SCHEDULES[name](9, 10, decay, 0.25) == pytest.approx(10 / 11)
    assert SCHEDULES[name](10, 10, decay, 0.25) == 0.25


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    step=st.floats(0, 1e6),
    warmup=st.integers(0, 1000),
    decay=st.integers(0, 10**6),
    floor=st.floats(0, 1),
)
def test_always_between_zero_and_the_peak_and_above_the_floor_after_warmup(name, step, warmup, decay, floor):
    value = SCHEDULES[name](step, warmup, decay, floor)
    # One rounding of 1 - (1 - floor) may fall below the floor by an eps.
    assert (0 if step < warmup else floor - 2e-16) <= value <= 1
