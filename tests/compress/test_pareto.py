"""The front against all pairs compared, and what is picked under limits."""

import random

import pytest

from gemini.compress.pareto import Candidate, Limits, closest, front, near_front, pick


def dominated(candidate, others):
    """Compares with every other one, from the definition."""
    mine = (candidate.latency_ms, candidate.loss_percent, candidate.bytes)
    for other in others:
        theirs = (other.latency_ms, other.loss_percent, other.bytes)
        no_worse = all(b <= a for a, b in zip(mine, theirs, strict=True))
        if no_worse and theirs != mine:
            return True
    return False


def cloud(seed, count, values):
    """Few distinct values give ties and equal candidates; many give neither."""
    draw = random.Random(seed)
    return [
        Candidate(str(i), draw.randrange(values) + 1.0, draw.randrange(values) - 1.0, draw.randrange(values))
        for i in range(count)
    ]


@pytest.mark.parametrize("values", [2, 3, 6, 1000])
def test_the_front_is_what_comparing_all_pairs_leaves(values):
    for seed in range(60):
        candidates = cloud(seed, seed % 40, values)
        expected = {c.name for c in candidates if not dominated(c, candidates)}
        found = front(candidates)
        assert {c.name for c in found} == expected
        assert [c.latency_ms for c in found] == sorted(c.latency_ms for c in found)


def test_near_the_front_is_what_a_shorter_time_would_put_there():
    for seed in range(40):
        candidates = cloud(seed, 15, 8)
        for slack in (0.0, 0.2, 0.6):
            expected = set()
            for c in candidates:
                hurried = Candidate(c.name, (1 - slack) * c.latency_ms, c.loss_percent, c.bytes)
                if not dominated(hurried, [other for other in candidates if other is not c]):
                    expected.add(c.name)
            assert {c.name for c in near_front(candidates, slack)} == expected
        assert near_front(candidates, 0.0) == [c for c in candidates if not dominated(c, candidates)]


FOUR = [
    Candidate("int8", 2.0, 0.5, 100),
    Candidate("int4", 1.5, 4.0, 60),
    Candidate("int4, pruned", 1.4, 9.0, 50),
    Candidate("fp32", 6.0, 0.0, 400),
]


@pytest.mark.parametrize(
    ("limits", "winner"),
    [
        (Limits(loss_percent=5.0), "int4"),  # the fastest
        (Limits(loss_percent=4.0), "int4"),  # a limit may be reached
        (Limits(latency_ms=2.0), "int8"),  # the most accurate
        (Limits(latency_ms=7.0, loss_percent=10.0), "int4, pruned"),  # the smallest
        (Limits(latency_ms=1.45, loss_percent=5.0), None),
        (Limits(loss_percent=-1.0), None),
    ],
)
def test_what_is_not_limited_decides(limits, winner):
    best = pick(FOUR, limits)
    assert (best and best.name) == winner


def test_the_closest_miss_by_the_least_share():
    limits = Limits(latency_ms=1.0, loss_percent=2.0)
    # int8 misses the time by 100 %, int4 the loss by 100 %, the pruned one by 350 %, fp32 the time by 500 %
    assert [c.name for c in closest(FOUR, limits, 3)] == ["int8", "int4", "int4, pruned"]
    assert closest(FOUR, Limits(loss_percent=0.0), 2)[0].name == "fp32"
