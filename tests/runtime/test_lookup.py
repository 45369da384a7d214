"""The n-gram index against a search through the whole sequence, and when a lookup drafts."""

import numpy as np
import pytest

from gemini.runtime.lookup import LookupDrafter, NgramIndex
from gemini.runtime.pace import MAX_DRAFT, StepCosts


def searched(tokens, longest=3, classes=8):
    """(position, length) by looking at every position, the latest first, the longest n-gram first."""
    for size in range(min(longest, len(tokens)), 0, -1):
        for position in range(len(tokens) - 1, size - 1, -1):
            if tokens[position - size : position] == tokens[-size:]:
                while size < min(classes, position) and tokens[position - size - 1] == tokens[-size - 1]:
                    size += 1
                return position, size
    return None


@pytest.mark.parametrize("vocab", [2, 3, 12])
def test_a_match_is_what_a_full_search_finds(vocab):
    index = NgramIndex()
    tokens = np.random.default_rng(vocab).integers(0, vocab, 300).tolist()
    found = 0
    for end, token in enumerate(tokens, 1):
        index.push(token)
        assert index.match() == searched(tokens[:end])
        found += index.match() is not None
    assert found > 250


def test_a_token_costs_the_same_however_long_the_sequence_is():
    index = NgramIndex()
    for end in range(5000):
        size = len(index._last)
        index.push(end % 700)
        assert len(index._last) - size <= 3


def test_what_follows_goes_on_in_circles_at_the_end():
    index = NgramIndex()
    for token in [9, 1, 2, 3, 1, 2, 3]:
        index.push(token)
    position, _ = index.match()
    assert index.following(position, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_copies_are_drafted_at_length_and_noise_is_not():
    text = list(range(100, 160))
    drafter = LookupDrafter([*text, 7, 8, 9], StepCosts())
    assert drafter.propose(10).tokens == []
    for token in text[:20]:
        drafter.push(token)
    draft = drafter.propose(MAX_DRAFT).tokens
    assert len(draft) >= 8 and draft == text[20 : 20 + len(draft)]
    assert len(drafter.propose(3).tokens) <= 3 and drafter.propose(0).tokens == []


def test_drafting_stops_where_it_fails_and_resumes_where_it_would_have_worked():
    rng = np.random.default_rng(0)
    drafter = LookupDrafter(rng.integers(0, 6, 40).tolist(), StepCosts())
    for token in rng.integers(0, 6, 400).tolist():  # every n-gram is known, and says nothing
        drafter.push(token)
    drafted = 0
    for token in rng.integers(0, 6, 100).tolist():
        drafted += len(drafter.propose(MAX_DRAFT).tokens)
        drafter.push(token)
    assert drafted < 10
    for token in [1, 2, 3, 4, 5] * 30:
        drafter.push(token)
    assert len(drafter.propose(MAX_DRAFT).tokens) > 4
