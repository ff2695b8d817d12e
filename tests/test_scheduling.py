"""Slots, shared jobs and the cache."""

import os
import random
import threading
import time
from concurrent.futures import wait
from functools import partial

import pytest

from scheduling import NICENESS, Jobs, Line, Slots, Ticket


@pytest.fixture
def jobs():
    """Two slots and a cache of ten bytes, a character a byte."""
    return Jobs(Slots(2), 10, len)


def test_what_computes_gives_way_to_what_answers():
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert Slots(1).submit(Line(), 1, niceness).result(5) == min(19, niceness() + NICENESS)


class Held:
    """One slot that is taken until it is let go, and the order of what was done in it after that."""

    def __init__(self):
        self.slots, self.done, self.gate, self.jobs = Slots(1), [], threading.Event(), []
        self.line, taken = Line(), threading.Event()
        self.slots.submit(self.line, 1, lambda: taken.set() or self.gate.wait(5))
        assert taken.wait(5)

    def submit(self, line, size, name):
        self.jobs.append(self.slots.submit(line, size, lambda: self.done.append(name)))
        return self.jobs[-1]

    def let_go(self):
        self.gate.set()
        for job in self.jobs:
            job.result(5)
        return self.done


@pytest.fixture
def held():
    held = Held()
    yield held
    held.let_go()


def submit_all(held, given=0, **sizes):
    """Work of these sizes for each request, which has begun: the slot for first utterances does not take it."""
    for name, each in sizes.items():
        line = Line()
        line.begun, line.given = True, given
        for size in each:
            held.submit(line, size, name)


@pytest.mark.parametrize("size, turns", [(1, "ABABBB"), (3, "ABBBAB")], ids=["round robin", "fewer for long ones"])
def test_slots_are_shared_by_the_size_of_what_is_done(held, size, turns):
    submit_all(held, A=[size] * 2, B=[1] * 4)
    assert held.let_go() == list(turns)


def test_a_request_that_comes_late_does_not_make_up_for_it(held):
    held.slots._level = 100
    submit_all(held, given=100, A=[1] * 2)
    submit_all(held, B=[1] * 2)
    assert held.let_go() == list("ABAB")


def test_a_new_request_does_not_wait_for_an_utterance_of_another(held):
    second = held.submit(held.line, 1, "second")
    held.submit(Line(), 1, "new").result(5)
    assert not second.done()


def test_the_slot_for_new_requests_is_left_alone_while_another_is_free():
    slots, names = Slots(1), []
    for _ in range(20):
        slots.submit(Line(), 1, lambda: names.append(threading.current_thread().name)).result(5)
        wait_until(lambda: slots._idle)
    assert set(names) == {"slot"}


def test_what_was_given_up_waits_no_more(held):
    first, second = (held.slots.submit(held.line, 1, lambda: None) for _ in range(2))
    first.cancel()
    assert held.slots.waiting() == 1
    second.cancel()
    assert held.slots.waiting() == 0


def wait_until(condition, deadline_s=5):
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_work_is_left_lying_when_many_ask_and_leave(count):
    slots, undone = Slots(count), []

    def ask_often(dice):
        for _ in range(50):
            line = Line()
            jobs = [slots.submit(line, 1, partial(time.sleep, dice.random() / 5000)) for _ in range(dice.randint(1, 4))]
            undone.extend(wait(jobs, timeout=5).not_done)

    threads = [threading.Thread(target=ask_often, args=(random.Random(seed),)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not undone and slots.waiting() == 0


def test_what_was_made_is_not_made_again(jobs):
    made = []
    claims = []
    for _ in range(3):
        claims.append(jobs.claim("key", Line(), 1, lambda _: made.append(1) or "sound"))
        assert claims[-1].future.result(5) == "sound"
    assert [claim.origin for claim in claims] == ["miss", "hit", "hit"] and len(made) == 1


def test_who_asks_together_shares_one_job(jobs):
    gate, made = threading.Event(), []

    def make(_):
        made.append(1)
        gate.wait(5)
        return "sound"

    claims = [jobs.claim("key", Line(), 1, make) for _ in range(5)]
    gate.set()
    assert {claim.future.result(5) for claim in claims} == {"sound"}
    assert [claim.origin for claim in claims] == ["miss", *["shared"] * 4] and len(made) == 1


def test_without_a_key_each_is_made(jobs):
    made = []
    for _ in range(2):
        jobs.claim(None, Line(), 1, lambda _: made.append(1) or "sound").future.result(5)
    assert len(made) == 2


def test_a_shared_job_goes_on_while_one_waits_and_stops_with_the_last(jobs):
    stopped = threading.Event()

    def make(ticket):
        ticket.on_cancel(stopped.set)
        stopped.wait(5)
        return "sound"

    one, other = (jobs.claim("key", Line(), 1, make) for _ in range(2))
    one.leave()
    time.sleep(0.05)
    assert not stopped.is_set()
    other.leave()
    assert stopped.wait(1)


def test_a_job_that_was_given_up_before_its_turn_takes_no_slot():
    slots, gate, made, line = Slots(1), threading.Event(), [], Line()
    jobs = Jobs(slots, 0, len)
    first, given_up, last = (
        jobs.claim(name, line, 1, lambda _, name=name: gate.wait(5) and made.append(name) or "sound") for name in "abc"
    )
    given_up.leave()
    gate.set()
    last.future.result(5)
    assert made == ["a", "c"] and first.future.done()


def test_a_job_that_was_given_up_is_made_anew(jobs):
    gate = threading.Event()
    left = jobs.claim("key", Line(), 1, lambda _: gate.wait(5) or "left")
    left.leave()
    again = jobs.claim("key", Line(), 1, lambda _: "again")
    gate.set()
    assert (again.origin, again.future.result(5)) == ("miss", "again")


def test_a_failure_is_told_to_all_who_wait_and_not_kept(jobs):
    gate = threading.Event()

    def fail(_):
        gate.wait(5)
        raise ValueError("no")

    claims = [jobs.claim("key", Line(), 1, fail) for _ in range(2)]
    gate.set()
    for claim in claims:
        with pytest.raises(ValueError, match="no"):
            claim.future.result(5)
    assert jobs.claim("key", Line(), 1, lambda _: "sound").future.result(5) == "sound"


def test_the_cache_keeps_to_its_size_and_drops_what_was_asked_for_least_lately(jobs):
    for key in ("a", "b", "a", "c"):  # four bytes each: two fit
        jobs.claim(key, Line(), 1, lambda _: "four").future.result(5)
    assert jobs.cached_bytes <= 10
    assert [jobs.claim(key, Line(), 1, lambda _: "four").origin for key in ("a", "c", "b")] == ["hit", "hit", "miss"]


@pytest.mark.parametrize("capacity", [0, 3])
def test_what_is_larger_than_the_cache_is_not_kept(capacity):
    jobs = Jobs(Slots(1), capacity, len)
    for _ in range(2):
        claim = jobs.claim("key", Line(), 1, lambda _: "four")
        assert claim.future.result(5) == "four" and claim.origin == "miss"
        time.sleep(0.02)
    assert jobs.cached_bytes == 0


def test_a_late_listener_of_a_ticket_is_called_at_once():
    ticket, heard = Ticket(), []
    ticket.on_cancel(lambda: heard.append("early"))
    ticket.cancel()
    ticket.on_cancel(lambda: heard.append("late"))
    assert heard == ["early", "late"]
