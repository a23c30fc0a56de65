"""Confidence intervals: known values, and how often they contain the truth."""

import random

import pytest

from mikv_vllm.evaluation.served_tasks.intervals import mean_of, paired, wilson


def test_wilson_has_known_values():
    assert wilson([1.0] * 8 + [0.0] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson([1.0] * 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert wilson([0.0]) == pytest.approx((0.0, 0.0, 0.7935), abs=1e-4)


def test_pairs_that_never_differ_leave_an_interval():
    few, many = paired([0.0] * 10), paired([0.0] * 1000)
    assert few.mean == many.mean == 0.0
    assert -0.2 < few.low < -0.1 < 0.1 < few.high < 0.2
    assert many.high < 0.01


def test_a_constant_difference_is_in_its_interval():
    found = paired([1.0] * 50)
    assert found.mean == 1.0
    assert 0.8 < found.low < 1.0 == found.high


def test_the_interval_of_a_difference_contains_the_truth_as_often_as_it_says():
    rng, contained = random.Random(0), 0
    for _ in range(1000):
        pairs = [rng.choices((-1.0, 0.0, 1.0), (0.05, 0.85, 0.10))[0] for _ in range(24)]
        found = paired(pairs)
        contained += found.low <= 0.05 <= found.high
    assert 0.93 <= contained / 1000 <= 0.99


def test_a_mean_of_means_is_in_its_interval():
    one = wilson([1.0] * 10)
    found = mean_of([one, one, one, one])
    assert found.mean == found.high == 1.0
    assert found.low == pytest.approx(1 - (1 - one.low) / 2)
