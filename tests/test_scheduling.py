"""Slots, shared jobs and the cache."""

import threading
import time
from collections import deque

import pytest

from scheduling import Cancellation, Jobs, Slots


@pytest.fixture
def jobs():
    """Two slots and a cache of ten bytes, a character a byte."""
    return Jobs(Slots(2), 10, len)


def test_what_was_made_is_not_made_again(jobs):
    made = []
    claims = []
    for _ in range(3):
        claims.append(jobs.claim("key", deque(), lambda _: made.append(1) or "sound"))
        assert claims[-1].future.result(5) == "sound"
    assert [claim.origin for claim in claims] == ["miss", "hit", "hit"] and len(made) == 1


def test_who_asks_together_shares_one_job(jobs):
    gate, made = threading.Event(), []

    def make(_):
        made.append(1)
        gate.wait(5)
        return "sound"

    claims = [jobs.claim("key", deque(), make) for _ in range(5)]
    gate.set()
    assert {claim.future.result(5) for claim in claims} == {"sound"}
    assert [claim.origin for claim in claims] == ["miss", *["shared"] * 4] and len(made) == 1


def test_without_a_key_each_is_made(jobs):
    made = []
    for _ in range(2):
        jobs.claim(None, deque(), lambda _: made.append(1) or "sound").future.result(5)
    assert len(made) == 2


def test_a_shared_job_goes_on_while_one_waits_and_stops_with_the_last(jobs):
    stopped = threading.Event()

    def make(cancellation):
        cancellation.on_cancel(stopped.set)
        stopped.wait(5)
        return "sound"

    one, other = (jobs.claim("key", deque(), make) for _ in range(2))
    one.leave()
    time.sleep(0.05)
    assert not stopped.is_set()
    other.leave()
    assert stopped.wait(1)


def test_a_job_that_was_given_up_is_made_anew(jobs):
    gate = threading.Event()
    left = jobs.claim("key", deque(), lambda _: gate.wait(5) or "left")
    left.leave()
    again = jobs.claim("key", deque(), lambda _: "again")
    gate.set()
    assert (again.origin, again.future.result(5)) == ("miss", "again")


def test_a_failure_is_told_to_all_who_wait_and_not_kept(jobs):
    gate = threading.Event()

    def fail(_):
        gate.wait(5)
        raise ValueError("no")

    claims = [jobs.claim("key", deque(), fail) for _ in range(2)]
    gate.set()
    for claim in claims:
        with pytest.raises(ValueError, match="no"):
            claim.future.result(5)
    assert jobs.claim("key", deque(), lambda _: "sound").future.result(5) == "sound"


def test_the_cache_keeps_to_its_size_and_drops_what_was_asked_for_least_lately(jobs):
    for key in ("a", "b", "a", "c"):  # four bytes each: two fit
        jobs.claim(key, deque(), lambda _: "four").future.result(5)
    assert jobs.cached_bytes <= 10
    assert [jobs.claim(key, deque(), lambda _: "four").origin for key in ("a", "c", "b")] == ["hit", "hit", "miss"]


@pytest.mark.parametrize("capacity", [0, 3])
def test_what_is_larger_than_the_cache_is_not_kept(capacity):
    jobs = Jobs(Slots(1), capacity, len)
    for _ in range(2):
        claim = jobs.claim("key", deque(), lambda _: "four")
        assert claim.future.result(5) == "four" and claim.origin == "miss"
        time.sleep(0.02)
    assert jobs.cached_bytes == 0


def test_a_late_listener_of_a_cancellation_is_called_at_once():
    cancellation, heard = Cancellation(), []
    cancellation.on_cancel(lambda: heard.append("early"))
    cancellation.cancel()
    cancellation.on_cancel(lambda: heard.append("late"))
    assert heard == ["early", "late"]
