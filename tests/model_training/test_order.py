"""Order and schedule: pure functions of the step."""

import math

import numpy as np
import pytest

from gemini.model.training.order import Order, step_seed
from gemini.model.training.schedule import learning_rate_factor, progress


def test_batches_depend_on_the_step_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    one, other = Order(lengths, 8, 5, "task"), Order(lengths, 8, 5, "task")
    forward = [one.indices(step) for step in range(90)]
    for step in reversed(range(90)):
        np.testing.assert_array_equal(other.indices(step), forward[step])


def test_an_epoch_visits_everything_once_and_the_next_in_another_order():
    order = Order([1] * 60, 6, 0, "task")
    epochs = [np.concatenate([order.indices(10 * epoch + step) for step in range(10)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
    assert list(epochs[0]) != list(epochs[1])


def test_a_batch_holds_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 512)
    order = Order(lengths, 8, 0, "task")
    spans = [np.ptp(lengths[order.indices(step)]) for step in range(64)]
    assert np.mean(spans) < 150  # unsorted batches of 8 span about 780


def test_a_small_set_fills_a_batch():
    indices = Order([3, 3, 3], 7, 0, "task").indices(4)
    assert sorted(np.bincount(indices)) == [2, 2, 3]


def test_seeds_of_steps_and_tasks_differ():
    seeds = {step_seed(seed, name, step) for seed in range(3) for name in "ab" for step in range(50)}
    assert len(seeds) == 300


def test_the_rate_rises_then_falls_along_a_cosine():
    factors = [learning_rate_factor(step, 10, progress(step, 100, 0.0, 0.0)) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[50] == pytest.approx(0.5)
    assert factors[75] == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    assert factors[100] == pytest.approx(0.0)


def test_time_ends_a_run_before_its_steps():
    assert progress(10, 100, 30.0, 1.0) == 0.5
    assert progress(10, 100, 90.0, 1.0) == 1.0
    assert progress(60, 100, 30.0, 1.0) == 0.6
