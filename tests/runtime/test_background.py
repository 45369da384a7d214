import threading

import pytest

from gemini.runtime.background import Background


def test_what_a_call_returns_comes_back_as_often_as_asked():
    with Background(lambda: [1, 2]) as call:
        assert call.result() is call.result()


def test_what_a_call_raises_is_raised_where_its_result_is_asked_for():
    def fail():
        raise KeyError("no")

    with Background(fail) as call:
        for _ in range(2):
            with pytest.raises(KeyError, match="no"):
                call.result()


def test_a_block_that_fails_waits_for_the_call_and_keeps_its_own_error():
    ended, go_on = [], threading.Event()

    def call():
        go_on.wait(10)
        ended.append(True)

    with pytest.raises(ValueError, match="mine"), Background(call):
        go_on.set()
        raise ValueError("mine")
    assert ended


def test_a_call_runs_beside_the_block():
    here, there = threading.Event(), threading.Event()

    def call():
        there.set()
        return here.wait(10)

    with Background(call) as other:
        assert there.wait(10)
        here.set()
        assert other.result()
