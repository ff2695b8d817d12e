"""Tell what was measured on quiet cores from what a neighbour on a shared host slowed, without a trace here.

A fixed loop runs on each core before and after; quiet is where it took little more than its least time in that run. A
run that is disturbed from its beginning to its end has no quiet cores to tell the others from.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import TypeVar

from tables import spread

MARGIN = 1.1  # times the loop's least time that still count as quiet
SETTLE_S = 0.2  # before the loop: what was measured last may still be putting things away

T = TypeVar("T")
Taken = list[tuple[float, T]]  # how long the slowest core took for the loop just before or after, and what was measured


def loop_s(core: int) -> float:
    """Return the seconds that a fixed piece of work takes on a core, some 20 ms."""
    os.sched_setaffinity(0, {core})
    began = time.perf_counter()
    sum(range(1_000_000))
    return time.perf_counter() - began


def slowest_core_s() -> float:
    """Return the loop's seconds on the slowest of this thread's cores, one after the other."""
    time.sleep(SETTLE_S)
    cores = os.sched_getaffinity(0)
    try:
        return max(map(loop_s, cores))
    finally:
        os.sched_setaffinity(0, cores)


def take(measure: Callable[[], T], rounds: int, probe: Callable[[], float] = slowest_core_s) -> Taken[T]:
    """Measure so many times, with the loop before the first and after each."""
    loops, measured = [probe()], []
    for _ in range(rounds):
        measured.append(measure())
        loops.append(probe())
    return list(zip(map(max, itertools.pairwise(loops)), measured, strict=True))


def both_rows(what: str, taken: Taken[T], figure: Callable[[T], float], goal: str, digits: int = 2) -> list[list[str]]:
    """Return the rows of a figure: over all rounds, and over those on quiet cores.

    The loop's least time stands beside it: where another run's is less, this one was disturbed all along.
    """
    least = min(seconds for seconds, _ in taken)
    calm = [measured for seconds, measured in taken if seconds <= MARGIN * least]
    name = f"{what}: the {len(calm)} of {len(taken)} on quiet cores, loop {least * 1000:.1f} ms"
    return [
        [what, spread((figure(measured) for _, measured in taken), digits), goal],
        [name, spread(map(figure, calm), digits), goal],
    ]
