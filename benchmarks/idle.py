"""Tell idle cores from those that a neighbour on a shared host slows, up to twice, without a trace on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tables import spread

CORES = os.cpu_count() or 1
MARGIN = 1.1  # times the loop's least time that still count as idle

T = TypeVar("T")
Taken = list[tuple[float, T]]  # how long the slowest core took for the loop just before, and what was measured


def loop_s(_: int = 0) -> float:
    """Return the seconds that a fixed piece of work takes, some 20 ms of a core."""
    began = time.perf_counter()
    sum(range(1_000_000))
    return time.perf_counter() - began


def take(measure: Callable[[], T], rounds: int) -> Taken[T]:
    """Measure so many times, each after a loop on every core."""
    with ProcessPoolExecutor(CORES) as pool:
        return [(max(pool.map(loop_s, range(CORES))), measure()) for _ in range(rounds)]


def idle(taken: Taken[T]) -> list[T]:
    """Return what was measured while no core was slow."""
    best = min(seconds for seconds, _ in taken)
    return [measured for seconds, measured in taken if seconds <= MARGIN * best]


def both_rows(what: str, taken: Taken[T], figure: Callable[[T], float], goal: str, digits: int = 2) -> list[list[str]]:
    """Return the rows of a figure: of all that was measured, and of what was while no core was slow, with the goal."""
    quiet = idle(taken)
    return [
        [what, spread((figure(measured) for _, measured in taken), digits), ""],
        [f"{what}: the {len(quiet)} of {len(taken)} on idle cores", spread(map(figure, quiet), digits), goal],
    ]
