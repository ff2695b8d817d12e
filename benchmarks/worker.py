"""The figures of a dubbing task: how busy the engine is, how even the four segments at once, how flat the memory.

    python benchmarks/worker.py [--segments 500]        about ten minutes with 500 segments on 2 idle cores

The client is the tests' clean-room worker: four segments at once, each asked for when one before it is answered.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from servers import ROOT, Server, leave_on_term, own_server
from tables import markdown, save, spread
from texts import PARAGRAPH, STORY

sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from dubbing_worker import AT_ONCE, OlderWorker, Segment

CHECKPOINTS = (100, 200, 300, 400, 500)  # segments after which memory is read
WARM_UP = 8
Row = list[str]  # what, figure, the figure to reach


def segments(count: int) -> list[Segment]:
    """Return a task of lines that all differ, in the eleven voices in turn."""
    lines = re.findall(r"[^.]+\.", STORY)
    return [Segment(n, f"Number {n}. {lines[n % len(lines)].strip()}", n % 11 + 1) for n in range(count)]


def told(server: Server, name: str) -> float:
    """Return one of the server's figures."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return float(re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)[1])


class WatchedWorker(OlderWorker):
    """A worker that notes the server's CPU seconds when a segment is there, and its memory at the checkpoints."""

    def __init__(self, server: Server):
        super().__init__(server.url)
        self.server, self.cpu_s, self.resident_mb = server, [], {}

    def speak(self, segment: Segment) -> bytes:
        """Speak a segment."""
        audio = super().speak(segment)
        self.cpu_s.append(told(self.server, "process_cpu_seconds_total"))
        if (spoken := len(self.cpu_s)) in CHECKPOINTS:
            self.resident_mb[spoken] = told(self.server, "process_resident_memory_bytes") / 1e6
        return audio


class BusyWatch:
    """Asks ten times a second how many utterances are being made, for as long as it is entered."""

    def __init__(self, server: Server):
        self.server, self.seen, self.over = server, [], threading.Event()
        self.pool = ThreadPoolExecutor(1)

    def watch(self) -> None:
        """Note each answer."""
        while not self.over.wait(0.1):
            self.seen.append(told(self.server, "speech_slots_busy"))

    def __enter__(self) -> list[float]:
        self.watching = self.pool.submit(self.watch)
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watching.result()


def task_figures(server: Server, count: int) -> list[Row]:
    """Return how much of the task's time the engine spoke, the segments' seconds, and the memory at the checkpoints."""
    OlderWorker(server.url).speak_task(segments(WARM_UP))
    worker = WatchedWorker(server)
    with BusyWatch(server) as busy:
        worker.speak_task(segments(count))
    low, *_, high = statistics.quantiles(worker.seconds.values(), n=20)
    middle = statistics.median(worker.seconds.values())
    rows = [["of the task's time, with an utterance in the making", f"{np.mean(np.array(busy) > 0):.1%}", "95 %"]]
    rows.append([f"a segment of {count}, s: median (5 % to 95 %)", f"{middle:.2f} ({low:.2f} to {high:.2f})", ""])
    resident = sorted(worker.resident_mb.items())
    return rows + [[f"memory after {number} segments, MB", f"{mb:.0f}", "flat"] for number, mb in resident]


def evenness_figures(server: Server, rounds: int = 3) -> list[Row]:
    """Return how far apart four equal texts end that begin at once: in seconds, and in the server's CPU seconds.

    The latter does not move with what else the machine does.
    """
    ratios, cpu_ratios = [], []
    for _ in range(rounds):
        worker, before = WatchedWorker(server), told(server, "process_cpu_seconds_total")
        worker.speak_task([Segment(n, PARAGRAPH, n + 1) for n in range(AT_ONCE)])
        ratios.append(max(worker.seconds.values()) / min(worker.seconds.values()))
        cpu_ratios.append((max(worker.cpu_s) - before) / (min(worker.cpu_s) - before))
    name = "four equal texts at once, slowest over fastest"
    return [[name, spread(ratios), "1.3"], [f"{name}, by CPU time", spread(cpu_ratios), "1.3"]]


def main() -> None:
    """Print the figures and keep them below benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=CHECKPOINTS[-1])
    arguments = parser.parse_args()
    leave_on_term()
    with own_server() as server:
        rows = [*evenness_figures(server), *task_figures(server, arguments.segments)]
    print(markdown(["figure", "measured", "to reach"], rows))
    save("worker", rows)


if __name__ == "__main__":
    main()
