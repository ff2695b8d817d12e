"""How long a deploy puts the embedded engine out of service, by polling /health; prints a table.

Run: make bench-deploy [REPEATS=3]
"""

import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from deploying import Box, copy_release, make_release  # noqa: E402

HEALTH_TIMEOUT_S = 20
REPEATS = int(os.environ.get("REPEATS", "3"))


class Watch:
    """Polls a box's /health, and tells the longest time between two healthy answers."""

    def __init__(self, box: Box):
        self.box, self.healthy, self.stopped = box, [], threading.Event()
        self.thread = threading.Thread(target=self.poll)

    def poll(self) -> None:
        """Ask every 20 ms."""
        while not self.stopped.wait(0.02):
            if self.box.release():
                self.healthy.append(time.monotonic())

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.box.wait_until(self.box.release)
        time.sleep(0.2)  # the last healthy answer may still be on its way to the list
        self.stopped.set()
        self.thread.join()

    def longest_gap(self) -> float:
        """Seconds."""
        return max(b - a for a, b in zip(self.healthy, self.healthy[1:], strict=False))


def measure(box: Box, status: int, *arguments: str, source: Path) -> tuple[float, float]:
    """Run the script; return seconds out of service and seconds in all."""
    with Watch(box) as watch:
        began = time.monotonic()
        got, said = box.run(*arguments, source=source)
        took = time.monotonic() - began
    if got != status:
        sys.exit(f"exit status {got}, not {status}:\n{said}")
    return watch.longest_gap(), took


def show(name: str, samples: list[float], limit: str) -> None:
    """Print a line of the table."""
    middle, least, most = statistics.median(samples), min(samples), max(samples)
    print(f"| {name} | {middle:.1f} s ({least:.1f} to {most:.1f}) | {limit} |", flush=True)


def main() -> None:
    """Deploy, redeploy, fail and roll back."""
    print(f"| median of {REPEATS} (least to most), load {os.getloadavg()[0]:.0f} | figure | wanted |")
    print("| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        good, other = (copy_release(Path(folder) / name, name) for name in ("good", "other"))
        never = make_release(Path(folder) / "never", "loading")
        with Box(Path(folder) / "box", HEALTH_TIMEOUT_S="120") as box:
            box.run(source=good)
            redeployed = [measure(box, 0, source=(other, good)[i % 2]) for i in range(REPEATS)]
            show("a redeploy: out of service", [down for down, _ in redeployed], "under 10 s")
            rolled_back = [measure(box, 0, "rollback", source=good) for _ in range(REPEATS)]
            show("rollback: the whole command", [took for _, took in rolled_back], "under 60 s")
            box.environment["HEALTH_TIMEOUT_S"] = str(HEALTH_TIMEOUT_S)
            failed = [measure(box, 4, source=never)[0] for _ in range(REPEATS)]
            show("a release that never gets healthy: out of service", failed, f"under {HEALTH_TIMEOUT_S} + 30 s")


if __name__ == "__main__":
    main()
