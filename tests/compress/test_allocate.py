"""Allocation against every combination there is."""

import itertools

import numpy as np
import pytest

from gemini.compress.allocate import Choice, allocate, lower_hull


def some_choices(generator, layers=5, formats=4):
    """Layers whose formats cost more and lose less, not always convexly."""
    return {
        f"layer {layer}": [
            Choice(str(number), int(size), float(loss))
            for number, (size, loss) in enumerate(
                zip(
                    generator.permutation(50)[:formats] + 1,
                    generator.uniform(0, 10, formats),
                    strict=True,
                )
            )
        ]
        for layer in range(layers)
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_of_at_most_these_bytes_loses_less(seed):
    generator = np.random.default_rng(seed)
    choices = some_choices(generator)
    least = sum(min(each.bytes for each in options) for options in choices.values())
    budget = least + int(generator.integers(0, 100))
    chosen = allocate(choices, budget)
    assert set(chosen) == set(choices) and all(chosen[name] in choices[name] for name in choices)
    used, loss = (sum(getattr(each, key) for each in chosen.values()) for key in ("bytes", "loss"))
    assert used <= budget
    combinations = [
        (sum(each.bytes for each in one), sum(each.loss for each in one))
        for one in itertools.product(*choices.values())
    ]
    best = min(loss for size, loss in combinations if size <= budget)
    # The bound of the linear relaxation: the best that one more step could bring.
    largest = max(
        more.loss_saved
        for more in (
            type("Step", (), {"loss_saved": a.loss - b.loss})
            for options in choices.values()
            for a, b in itertools.pairwise(lower_hull(options))
        )
    )
    assert best <= loss + 1e-12 <= best + largest + 1e-9


def test_with_enough_bytes_every_layer_loses_least():
    choices = some_choices(np.random.default_rng(0))
    chosen = allocate(choices, 10**9)
    assert all(chosen[name].loss == min(each.loss for each in options) for name, options in choices.items())


def test_the_first_byte_goes_where_it_saves_most():
    choices = {
        "a": [Choice(4, 10, 3.0), Choice(8, 20, 1.0)],
        "b": [Choice(4, 10, 9.0), Choice(8, 20, 1.0)],
    }
    assert {name: each.format for name, each in allocate(choices, 30).items()} == {"a": 4, "b": 8}


def test_a_hull_leaves_out_what_a_mixture_beats():
    cheap, poor, dear, worse = Choice(0, 1, 10.0), Choice(1, 2, 9.5), Choice(2, 3, 1.0), Choice(3, 4, 2.0)
    assert lower_hull([worse, dear, poor, cheap]) == [cheap, dear]


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="need 10 bytes, 3 more"):
        allocate({"a": [Choice(4, 10, 1.0)]}, 7)


def test_spending_ends_when_the_loss_is_low_enough():
    choices = {
        "a": [Choice("few", 10, 4.0), Choice("more", 12, 1.0), Choice("most", 20, 0.0)],
        "b": [Choice("few", 10, 3.0), Choice("more", 15, 0.5)],
    }
    chosen = {loss: allocate(choices, loss=loss) for loss in (7.0, 4.0, 3.9, 0.5)}
    names = {loss: [each[name].format for name in "ab"] for loss, each in chosen.items()}
    assert names == {7.0: ["few", "few"], 4.0: ["more", "few"], 3.9: ["more", "more"], 0.5: ["most", "more"]}
