"""Who gets the engine when: cancelling, slots given evenly, and no utterance made twice.

A request's utterances are jobs. A job whose sound depends on nothing but its key is shared: whoever asks while it is
being made waits for the same one, and whoever asks later gets it from a cache of bounded size.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import cachetools

NICENESS = 5  # of threads that compute: a third of the time of one that answers, where both want it


class Ticket:
    """Between those who wait for an utterance and what makes it: that it is no longer wanted, and how long it waited.

    waited_s: seconds in the engine until its turn came there, where it makes fewer at a time than there are slots.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], Any]] = []
        self.cancelled = False
        self.waited_s = 0.0

    def cancel(self) -> None:
        """Stop what runs now and what would come."""
        with self._lock:
            self.cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], Any]) -> None:
        """Call back when cancelled, at once if that was before."""
        with self._lock:
            if not self.cancelled:
                self._callbacks.append(callback)
                return
        callback()


class Line:
    """One request's work that waits for a slot, and how much it was given so far."""

    def __init__(self) -> None:
        self.waiting: deque[Work] = deque()
        self.begun = False
        self.given = 0.0


class Work(NamedTuple):
    """What to do in a slot, its size in any unit, and where the result goes."""

    do: Callable[[], Any]
    size: float
    future: Future


class Slots:
    """The engine's slots, given per utterance and evenly between requests; one more is only for first utterances.

    The next slot goes to the request that was given least, a new one counting as level with the others: start-time
    fair queueing (Goyal, Vin and Cheng, 1996). The one more is used when the others are taken: a short text then
    waits for no more of a long one than the engine has in hand.
    """

    def __init__(self, count: int):
        self._lock = threading.Lock()
        self._for_slots, self._for_one_more = threading.Condition(self._lock), threading.Condition(self._lock)
        self._lines: list[Line] = []  # those with work waiting, the longest waiting first
        self._idle = 0  # slots with nothing to do, the one more aside
        self._level = 0.0  # what the one served last had been given
        self._open(extra=True)
        self.add(count)

    def add(self, count: int) -> None:
        """Have so many slots more."""
        for _ in range(count):
            self._open(extra=False)

    def _open(self, extra: bool) -> None:
        name = "one more slot" if extra else "slot"
        threading.Thread(target=self._serve, args=(extra,), name=name, daemon=True).start()

    def submit(self, line: Line, size: float, do: Callable[[], Any]) -> Future:
        """Put work at the end of a request's line; the future answers once a slot has done it."""
        work = Work(do, size, Future())
        with self._lock:
            if not line.waiting:
                line.given = max(line.given, self._level)
                self._lines.append(line)
            line.waiting.append(work)
            (self._for_slots if self._idle else self._for_one_more).notify()
        return work.future

    def waiting(self) -> int:
        """Return how many utterances wait for a slot; those given up wait no more."""
        with self._lock:
            return sum(not work.future.cancelled() for line in self._lines for work in line.waiting)

    def _choose(self, extra: bool) -> Line | None:
        """Return the line whose turn it is at a slot; at the one more only new requests have one."""
        if extra and self._idle:
            return None
        lines = (line for line in self._lines if not (extra and line.begun))
        return min(lines, key=lambda line: line.given, default=None)

    def _next(self, extra: bool) -> Work:
        with self._lock:
            self._idle += not extra
            while (line := self._choose(extra)) is None:
                (self._for_one_more if extra else self._for_slots).wait()
            self._idle -= not extra
            self._lines.remove(line)
            work = line.waiting.popleft()
            self._level = max(self._level, line.given)
            line.given, line.begun = line.given + work.size, True
            if line.waiting:
                self._lines.append(line)
            if self._lines and not self._idle:
                self._for_one_more.notify()
            return work

    def _serve(self, extra: bool) -> None:
        give_way()
        while True:
            work = self._next(extra)
            if work.future.set_running_or_notify_cancel():
                try:
                    work.future.set_result(work.do())
                except Exception as error:
                    work.future.set_exception(error)


class Claim(NamedTuple):
    """One request's claim on an utterance: its future, how it came (miss, shared or hit), and how to give it up."""

    future: Future
    origin: str
    leave: Callable[[], None]


@dataclass
class Job:
    """An utterance being made, for as many requests as wait for it."""

    future: Future
    ticket: Ticket
    waiting: int = 0


class Jobs:
    """The utterances being made, each once, and a cache of finished ones."""

    def __init__(self, slots: Slots, cache_bytes: int, size: Callable[[Any], int]):
        self._slots = slots
        self._lock = threading.RLock()
        self._under_way: dict[Hashable, Job] = {}
        self._cache: cachetools.LRUCache = cachetools.LRUCache(cache_bytes, getsizeof=size)

    @property
    def cached_bytes(self) -> int:
        """Bytes in the cache."""
        return int(self._cache.currsize)

    def holds(self, key: Hashable) -> bool:
        """Tell whether an utterance is in the cache."""
        with self._lock:
            return self._cache.get(key) is not None  # asked for, so that it stays until it is claimed

    def claim(self, key: Hashable, line: Line, size: float, make: Callable[[Ticket], Any]) -> Claim:
        """Have an utterance made in a slot, or share it; with a key of None it is made for this claim alone.

        line, size: the request's own line for the slots, and how much of them this takes. The work stops once everyone
        who waits for it has left.
        """
        with self._lock:
            if key is not None and (found := self._cache.get(key)) is not None:
                return Claim(done(found), "hit", lambda: None)
            job, origin = self._under_way.get(key), "shared"
            if job is None:
                job, origin = self._start(key, line, size, make), "miss"
            job.waiting += 1
        return Claim(job.future, origin, lambda: self._leave(key, job))

    def _start(self, key: Hashable, line: Line, size: float, make: Callable[[Ticket], Any]) -> Job:
        ticket = Ticket()
        job = Job(self._slots.submit(line, size, lambda: make(ticket)), ticket)
        if key is not None:
            self._under_way[key] = job
            job.future.add_done_callback(lambda future: self._finish(key, job, future))
        return job

    def _leave(self, key: Hashable, job: Job) -> None:
        with self._lock:
            job.waiting -= 1
            if job.waiting or job.future.done():
                return
            self._forget(key, job)
        job.future.cancel()  # one that no slot has begun
        job.ticket.cancel()

    def _finish(self, key: Hashable, job: Job, future: Future) -> None:
        with self._lock:
            self._forget(key, job)
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(ValueError):  # it is larger than the whole cache
                    self._cache[key] = future.result()

    def _forget(self, key: Hashable, job: Job) -> None:
        if self._under_way.get(key) is job:
            del self._under_way[key]


def give_way() -> None:
    """Have this thread, and those it starts, compute mostly where no other wants to: answers come before speech."""
    with contextlib.suppress(OSError):  # where a sandbox forbids it, all are equal
        os.nice(NICENESS)  # on Linux the thread's own


def done(result: Any) -> Future:
    """Return a future that has its result."""
    future: Future = Future()
    future.set_result(result)
    return future
