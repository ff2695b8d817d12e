"""Who gets the engine when: cancelling, slots given round robin, and no utterance made twice.

A request's utterances are jobs. A job whose sound depends on nothing but its key is shared: whoever asks while it is
being made waits for the same one, and whoever asks later gets it from a cache of bounded size.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import cachetools


class Cancellation:
    """Says once that a request's work is no longer wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Stop what runs now and what would come."""
        with self._lock:
            self.cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call back when cancelled, at once if that was before."""
        with self._lock:
            if not self.cancelled:
                self._callbacks.append(callback)
                return
        callback()


class Slots:
    """The engine's slots, given per utterance, round robin between requests."""

    def __init__(self, count: int):
        self._ready = threading.Condition()
        self._lines: deque[deque] = deque()  # one line a request with an utterance waiting; the next request first
        for number in range(count):
            threading.Thread(target=self._serve, name=f"slot-{number}", daemon=True).start()

    def submit(self, line: deque, work: Callable[[], Any]) -> Future:
        """Put work at the end of a request's line; the future answers once a slot has done it."""
        future: Future = Future()
        with self._ready:
            line.append((future, work))
            if len(line) == 1:
                self._lines.append(line)
            self._ready.notify()
        return future

    def _next(self) -> tuple[Future, Callable[[], Any]]:
        with self._ready:
            self._ready.wait_for(lambda: self._lines)
            line = self._lines.popleft()
            job = line.popleft()
            if line:
                self._lines.append(line)
            return job

    def _serve(self) -> None:
        while True:
            future, work = self._next()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)


class Claim(NamedTuple):
    """One request's claim on an utterance: its future, how it came (miss, shared or hit), and how to give it up."""

    future: Future
    origin: str
    leave: Callable[[], None]


class Job:
    """An utterance being made, for as many requests as wait for it."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.future: Future = Future()
        self.waiting = 0


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

    def claim(self, key: Hashable, line: deque, make: Callable[[Cancellation], Any]) -> Claim:
        """Have an utterance made in a slot, or share it; with a key of None it is made for this claim alone.

        line: the request's own line for the slots. The work stops once everyone who waits for it has left.
        """
        with self._lock:
            if key is not None and (found := self._cache.get(key)) is not None:
                return Claim(done(found), "hit", lambda: None)
            job, origin = self._under_way.get(key), "shared"
            if job is None:
                job, origin = self._start(key, line, make), "miss"
            job.waiting += 1
        return Claim(job.future, origin, lambda: self._leave(key, job))

    def _start(self, key: Hashable, line: deque, make: Callable[[Cancellation], Any]) -> Job:
        job = Job()
        job.future = self._slots.submit(line, lambda: make(job.cancellation))
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
        job.cancellation.cancel()

    def _finish(self, key: Hashable, job: Job, future: Future) -> None:
        with self._lock:
            self._forget(key, job)
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(ValueError):  # it is larger than the whole cache
                    self._cache[key] = future.result()

    def _forget(self, key: Hashable, job: Job) -> None:
        if self._under_way.get(key) is job:
            del self._under_way[key]


def done(result: Any) -> Future:
    """Return a future that has its result."""
    future: Future = Future()
    future.set_result(result)
    return future
