"""Runtimes, threads and slots: which serves one client, four and eight best, and a short text best.

    python benchmarks/threads.py [--rounds 3] [--characters 100]

All the servers run at once and take turns: one that is not asked takes no CPU.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from client import Run, Target, race, speak
from figures import fairness
from servers import leave_on_term, own_server
from tables import markdown, save, spread
from texts import Texts

WAYS = [("openvino", 2, 1), ("openvino", 2, 2), ("onnxruntime", 2, 1), ("onnxruntime", 2, 2)]  # threads, slots
CLIENTS = (1, 4, 8)
HEADER = [
    "runtime, threads x slots", "clients", "audio s per s", "first 200 ms s", "whole s", "audio per s, of the first's",
    "CPU s per audio min",
]  # fmt: skip
FAIR_HEADER = ["runtime, threads x slots", "10 characters beside 4,000: whole s", "times alone"]


def rows(clients: int, runs: dict[str, list[Run]]) -> list[list[str]]:
    """Return one row a way."""
    first = next(iter(runs.values()))
    return [
        [
            name,
            str(clients),
            spread(run.speed for run in each),
            spread(run.median("first_audio_s") for run in each),
            spread(run.median("total_s") for run in each),
            spread(run.speed / base.speed for run, base in zip(each, first, strict=True)),
            spread((run.cpu_s_per_minute for run in each), 1),
        ]
        for name, each in runs.items()
    ]


def fairness_rows(targets: list[Target], texts: Texts, rounds: int) -> list[list[str]]:
    """Return how a short text fares beside a long one, the ways in turns."""
    pairs: dict[str, list[tuple[float, float]]] = {target.name: [] for target in targets}
    for _ in range(rounds):
        for target in targets:
            alone, beside = (run.median("total_s") for run in fairness(target, texts))
            pairs[target.name].append((alone, beside))
    return [
        [name, spread(beside for _, beside in each), spread(beside / alone for alone, beside in each)]
        for name, each in pairs.items()
    ]


def main() -> None:
    """Start one server a way, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the loads")
    parser.add_argument("--characters", type=int, default=100, help="of a text of the loads")
    parser.add_argument("--fair-rounds", type=int, default=2, help="of a short text beside a long one")
    args = parser.parse_args()
    leave_on_term()
    texts, targets = Texts(), []
    with ExitStack() as running:
        for runtime, threads, slots in WAYS:
            way = {"TTS_EMBEDDED_RUNTIME": runtime, "TTS_THREADS": str(threads), "TTS_SLOTS": str(slots)}
            server = running.enter_context(own_server(**way))
            targets.append(Target(f"{runtime}, {threads} x {slots}", server.url, pid=server.pid))
            speak(targets[-1], "One sentence that is not counted.")
        runs = {}
        for clients in CLIENTS:
            rounds = [texts.take_many("en", args.characters, clients) for _ in range(args.rounds)]
            runs[clients] = race(targets, rounds, clients)
            print(f"\n{markdown(HEADER, rows(clients, runs[clients]))}", flush=True)
        fair = fairness_rows(targets, texts, args.fair_rounds)
    print(f"\n{markdown(FAIR_HEADER, fair)}")
    print(f"\nMedian (least to most) of {args.rounds} rounds. Samples: "
          f"{save('threads', {'runs': runs, 'fairness': fair})}")  # fmt: skip


if __name__ == "__main__":
    main()
