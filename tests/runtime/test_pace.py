"""Draft lengths against simulated calls, and costs that are learnt."""

import numpy as np
import pytest

from gemini.runtime.pace import Chance, StepCosts, best_length


def simulated_speed(length, chance, costs, drafting, rng, rounds=10000):
    """Tokens per plain step when ``length`` tokens are drafted and each is right with ``chance``."""
    hits = (rng.random((rounds, length)) < chance).cumprod(axis=1).sum()
    return (hits + rounds) / (rounds * (costs.steps(length + 1) + drafting * length))


@pytest.mark.parametrize("drafting", [0.0, 0.2])
@pytest.mark.parametrize("chance", [0.2, 0.5, 0.8, 0.95])
def test_the_best_length_is_the_one_a_simulation_finds(chance, drafting):
    costs, rng = StepCosts(slope=0.15), np.random.default_rng(0)
    speeds = [simulated_speed(n, chance, costs, drafting, rng) for n in range(16)]
    best = best_length([chance] * 15, costs, drafting)
    if best == 0:
        assert max(speeds) < 1.07  # the gain asked for, and 1 % for the simulation
    else:
        assert speeds[best] > max(speeds) * 0.99 and speeds[best] > 1.03


def test_nothing_is_drafted_where_rows_are_as_dear_as_steps():
    assert best_length([1.0] * 15, StepCosts(slope=1.0)) == 0
    assert best_length([1.0] * 15, StepCosts(slope=0.01)) == 15
    assert best_length([], StepCosts()) == 0


def test_costs_converge_to_what_calls_take_despite_outliers():
    costs, rng = StepCosts(), np.random.default_rng(1)
    for _ in range(400):
        costs.observe(1, 0.010 * (1 + 0.05 * rng.random()) * (30 if rng.random() < 0.02 else 1))
        tokens = int(rng.integers(2, 17))
        costs.observe(tokens, 0.010 * (1 + 0.08 * (tokens - 1)))
    assert costs.seconds == pytest.approx(0.0105, rel=0.2)
    assert costs.steps(11) == pytest.approx(1.7, rel=0.2)


def test_a_chance_follows_what_happens():
    chance, rng = Chance(0.9), np.random.default_rng(2)
    for _ in range(200):
        chance.observe(bool(rng.random() < 0.3))
    assert 0.1 < chance.value < 0.55
