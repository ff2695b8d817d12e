"""The server's own cost: the real service under gunicorn, around an engine that answers at once.

    python benchmarks/cost.py [--seconds 1.5] [--rounds 10]

This process is the load: one thread and raw sockets, so that it takes a small share of one core (shown as well). Each
client sends its next request when the last one is answered, over one connection, as OpenAI's clients do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import selectors
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from client import percentile
from quiet import Taken, both_rows, take
from servers import cpu_s, leave_on_term, own_server
from tables import markdown, save, spread

BODY = json.dumps({"model": "tts-1", "input": "Good morning.", "voice": "alloy", "response_format": "pcm"})
REQUEST = (
    "POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()
LAST_CHUNK = b"\r\n0\r\n\r\n"
IDLE_S = 10  # without any byte from the server: it hangs


class Answer:
    """One client's connection and the chunked answer it is reading."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tail = b""

    def ask(self) -> None:
        """Send the next request."""
        self.began, self.tail = time.perf_counter(), b""
        self.socket.sendall(REQUEST)

    def read(self) -> bool:
        """Read what came; tell whether the answer is whole. Raise RuntimeError on any status but 200."""
        data = self.socket.recv(1 << 20)
        if not data or (not self.tail and not data.startswith(b"HTTP/1.1 200")):
            raise RuntimeError(f"the server answered {data[:300]!r}")
        self.tail = (self.tail + data)[-len(LAST_CHUNK) :]
        return self.tail == LAST_CHUNK


@dataclass(frozen=True)
class Cost:
    """What so many requests took."""

    clients: int
    seconds: list[float]  # of each request
    wall_s: float
    server_cpu_s: float
    load_cpu_s: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.wall_s


def drive(port: int, pid: int, clients: int, seconds: float) -> Cost:
    """Keep so many requests under way for so long."""
    answers, took = [Answer(port) for _ in range(clients)], []
    with selectors.DefaultSelector() as ready:
        for answer in answers:
            ready.register(answer.socket, selectors.EVENT_READ, answer)
        began, cpu_before, load_before = time.perf_counter(), cpu_s(pid), time.process_time()
        for answer in answers:
            answer.ask()
        while time.perf_counter() < began + seconds:
            if not (events := ready.select(IDLE_S)):
                raise RuntimeError(f"the server sent nothing for {IDLE_S} s")
            for key, _ in events:
                if key.data.read():
                    took.append(time.perf_counter() - key.data.began)
                    key.data.ask()
        cost = Cost(
            clients, took, time.perf_counter() - began, cpu_s(pid) - cpu_before, time.process_time() - load_before
        )
    for answer in answers:
        answer.socket.close()
    return cost


def cost_runs(rounds: int, seconds: float) -> dict[int, Taken[Cost]]:
    """Measure with 1 and with 16 clients in turns, so many runs of so many seconds each."""
    with own_server("benchmarks.instant_app:create_app()") as server:
        port = urlsplit(server.url).port
        drive(port, server.pid, 16, 1)  # not counted
        turns = itertools.cycle((1, 16))
        taken = take(lambda: drive(port, server.pid, next(turns), seconds), 2 * rounds)
    return {clients: [each for each in taken if each[1].clients == clients] for clients in (1, 16)}


def cost_figures(runs: dict[int, Taken[Cost]]) -> list[list[str]]:
    """Return the rows: what, figure, the figure to reach."""
    crowd = [cost for _, cost in runs[16]]
    return [
        *both_rows("own cost of a request, ms", runs[1], lambda run: percentile(run.seconds, 50) * 1000, "under 3"),
        *both_rows("own requests a second, 16 clients", runs[16], lambda run: run.rate, "over 400", digits=0),
        ["own CPU of a request, ms", spread(run.server_cpu_s / len(run.seconds) * 1000 for run in crowd), ""],
        ["share of a core taken by the load", spread(run.load_cpu_s / run.wall_s for run in crowd), ""],
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    leave_on_term()
    rows = cost_figures(cost_runs(args.rounds, args.seconds))
    print(markdown(["what", "figure", "to reach"], rows))
    print(f"\nMedian (least to most) of {args.rounds} runs. Figures: {save('cost', rows)}")


if __name__ == "__main__":
    main()
