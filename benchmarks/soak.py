"""Soak: mixed traffic with faults injected, and what became of it: sent, answered, refused, cut, lost; and the drift.

    python benchmarks/soak.py [--minutes 30]        this repository's server on the embedded engine, started for it

Four clients send what a dubbing worker sends; others leave early, send nonsense, half a request, and read slowly. Every
minute the voices are reloaded (HUP). In the first half the server's worker is killed now and then: what this cuts is
sent again, up to four tries as the dubbing worker has. On the OpenAI route a client may be refused to the end, as it is
while the engine loads; all else that brings no answer is lost. The last worker lives on to the end, and the drift is
told of its time alone. The exit status is 1 where something was lost or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import av
from client import timeline
from servers import ROOT, Server, healthy, leave_on_term, own_server, resident_mb, with_children
from tables import markdown, save
from texts import PARAGRAPH

sys.path.insert(0, str(ROOT))

from audio import FORMATS
from settings import Settings
from voices import Voices

TRIES, PAUSE_S = 4, 2.0  # the dubbing worker's, which heeds no Retry-After; OpenAI's clients do
KILL_EVERY_S, RELOAD_EVERY_S, SAMPLE_EVERY_S = 300, 60, 10
SENTENCES = [
    "你好世界。", "请把窗户关上，外面风很大。", "The boats lay still.", "这个 bug 修好以后，请告诉我一声。", PARAGRAPH,
    "第3章：2024年营收增长12.5%，达到¥1,234万元。", "Dr. Smith paid $3.50 at 10:30.", "🙂", "好" * 300,
]  # fmt: skip
NONSENSE = [b"", b"{", b'{"model":"m"}', b'{"model":"m","input":"x","voice":"nobody"}', b"\xff" * 100]


@dataclass
class Tally:
    """What became of the traffic."""

    counts: Counter = field(default_factory=Counter)
    latency_s: list[tuple[float, float]] = field(default_factory=list)  # when, how long
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """Count one."""
        with self.lock:
            self.counts[what] += 1


class Traffic:
    """The clients of one server."""

    def __init__(self, server: Server, until: float):
        self.address = urlsplit(server.url)
        self.until, self.tally = until, Tally()
        self.voices = [voice.id for voice in Voices.load(Settings().voices_file).voices]

    def send(self, path: str, body: bytes) -> tuple[int, bytes, float]:
        """Send once; return status, body and the pause asked for; raise OSError or HTTPException where it is cut."""
        connection = http.client.HTTPConnection(self.address.hostname or "", self.address.port, timeout=600)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(), float(response.headers.get("Retry-After", PAUSE_S))
        finally:
            connection.close()

    def speech(self, dice: random.Random) -> tuple[str, bytes, str]:
        """Return a path, a body and the format that is to come back."""
        text = dice.choice(SENTENCES) + (f" {dice.randrange(1000)}." if dice.random() < 0.8 else "")
        if dice.random() < 0.3:
            number = dice.randrange(1, 12)
            body = {"text": text, "spk_audio_path": f"/x/examples/voice_{number:02}.wav"}
            return "/tts_url", json.dumps(body).encode(), "wav"
        name = dice.choice(list(FORMATS))
        body = {"model": "tts-1", "input": text, "voice": dice.choice(self.voices), "response_format": name,
                "speed": dice.choice([1, 1, 1, 0.8, 1.5])}  # fmt: skip
        return "/v1/audio/speech", json.dumps(body).encode(), name

    def worker(self, seed: int) -> None:
        """Speak line after line."""
        dice = random.Random(seed)
        while time.monotonic() < self.until:
            path, body, name = self.speech(dice)
            self.tally.add("sent")
            began = time.monotonic()
            outcome = self.deliver(path, body, name)
            self.tally.add(outcome)
            if outcome == "answered":
                with self.tally.lock:
                    self.tally.latency_s.append((began, time.monotonic() - began))

    def deliver(self, path: str, body: bytes, name: str) -> str:
        """Try as often as the client would; return answered, refused or lost: to the dubbing worker the two are one."""
        for _ in range(TRIES):
            if (outcome := self.attempt(path, body, name)) == "answered":
                return outcome
        return "refused" if outcome == "refused" and path != "/tts_url" else "lost"

    def attempt(self, path: str, body: bytes, name: str) -> str:
        """Try once; return answered, refused, cut or wrong, and wait after what is to be tried again."""
        try:
            status, data, pause_s = self.send(path, body)
        except (OSError, http.client.HTTPException):
            self.tally.add("tries cut")
            time.sleep(PAUSE_S)
            return "cut"
        if status == 200 and is_audio(data, name):
            return "answered"
        outcome = "refused" if status in (429, 503) else "wrong"
        self.tally.add("tries refused" if outcome == "refused" else f"wrong: {status}")
        time.sleep(PAUSE_S if path == "/tts_url" else pause_s)
        return outcome

    def nuisance(self, seed: int) -> None:
        """Send nonsense, leave early, read slowly."""
        dice = random.Random(seed)
        while time.monotonic() < self.until:
            try:
                self.disturb(dice)
            except (OSError, http.client.HTTPException):
                self.tally.add("nuisance cut")
            time.sleep(dice.uniform(0.2, 2))

    def disturb(self, dice: random.Random) -> None:
        """One nuisance."""
        self.tally.add("nuisances")
        if dice.random() < 0.4:
            status, *_ = self.send("/v1/audio/speech", dice.choice(NONSENSE))
            self.tally.add("nonsense refused" if 400 <= status < 500 or status == 503 else f"wrong: {status}")
            return
        path, body, _ = self.speech(dice)
        told = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        head = f"POST {path} HTTP/1.1\r\n{told}"
        whole = head.encode() + body
        with socket.create_connection((self.address.hostname, self.address.port), timeout=60) as client:
            client.sendall(whole[: dice.choice([20, len(head), len(whole) - 5, len(whole), len(whole), len(whole)])])
            if dice.random() < 0.5:
                time.sleep(dice.uniform(0, 1.5))  # and leave
                return
            client.settimeout(3)
            with contextlib.suppress(TimeoutError):
                while client.recv(2000):
                    time.sleep(0.1)


def is_audio(data: bytes, name: str) -> bool:
    """Tell whether bytes of a format are sound of more than a tenth of a second."""
    try:
        return timeline(data, name)[1][-1] > 0.1
    except (ValueError, IndexError, av.error.FFmpegError):
        return False


def worker_pid(server: Server) -> int:
    """Return the id of the server's worker."""
    return with_children(server.pid)[1]


def vitals(server: Server) -> dict[str, float]:
    """Return the server's resident memory in MB, its threads and its descriptors."""
    pid = worker_pid(server)
    threads, descriptors = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("task", "fd"))
    return {"resident MB": resident_mb(server.pid), "threads": threads, "descriptors": descriptors}


def inject(server: Server, until: float, kill_every_s: float, seen: list) -> list[float]:
    """Reload and kill by the clock, and note the last worker's vitals; return how long each killed one was missed."""
    outages, began = [], time.monotonic()
    next_kill, next_reload = began + kill_every_s, began + RELOAD_EVERY_S
    while time.monotonic() < until:
        now = time.monotonic()
        if now > next_reload:
            os.kill(server.pid, signal.SIGHUP)
            next_reload += RELOAD_EVERY_S
        if now > next_kill and now < (began + until) / 2:
            os.kill(worker_pid(server), signal.SIGKILL)
            while healthy(server.url) is None:
                time.sleep(0.05)
            outages.append(time.monotonic() - now)
            next_kill += kill_every_s
            seen.clear()
        seen.append((time.monotonic(), vitals(server)))
        time.sleep(min(SAMPLE_EVERY_S, max(0, until - time.monotonic())))
    return outages


def drift(seen: list[tuple[float, dict[str, float]]], latency_s: list[tuple[float, float]]) -> list[list[str]]:
    """Return each figure's median in the second and in the last quarter of the last worker's time, and their ratio."""
    series = {name: [(at, values[name]) for at, values in seen] for name in seen[0][1]}
    series["latency s"] = [(at, value) for at, value in latency_s if at >= seen[0][0]]
    first, last = seen[0][0], seen[-1][0]
    rows = []
    for name, points in series.items():
        quarters: list[list[float]] = [[], [], [], []]
        for at, value in points:
            quarters[min(3, max(0, int(4 * (at - first) / (last - first + 1))))].append(value)
        early, late = (statistics.median(quarters[quarter] or [math.nan]) for quarter in (1, 3))
        rows.append([name, f"{early:.1f}", f"{late:.1f}", f"{late / early:.2f}"])
    return rows


def main() -> int:
    """Start, soak, print, stop; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every", type=float, default=KILL_EVERY_S, help="seconds")
    args = parser.parse_args()
    leave_on_term()
    with own_server(TTS_CACHE_BYTES=str(64 << 20)) as server:
        until = time.monotonic() + 60 * args.minutes
        traffic, seen = Traffic(server, until), []
        clients = [threading.Thread(target=traffic.worker, args=(seed,)) for seed in range(4)]
        clients += [threading.Thread(target=traffic.nuisance, args=(seed,)) for seed in range(100, 103)]
        for client in clients:
            client.start()
        outages = inject(server, until, args.kill_every, seen)
        for client in clients:
            client.join()
    counts = traffic.tally.counts
    counts.update({"sent": 0, "answered": 0, "refused": 0, "lost": 0})  # shown where there were none, too
    print(markdown(["what", "requests"], [[name, str(count)] for name, count in sorted(counts.items())]))
    print(f"\nWorkers killed: {len(outages)}; to ready again: {', '.join(f'{s:.1f} s' for s in outages) or '-'}\n")
    print(markdown(["figure", "second quarter", "last quarter", "ratio"], drift(seen, traffic.tally.latency_s)))
    log = server.log.read_text(errors="replace")
    wrong = sum(count for name, count in counts.items() if name.startswith("wrong")) + log.count("Traceback")
    print(f"\nTracebacks in the log: {log.count('Traceback')}. {save('soak', {'counts': counts})}")
    unaccounted = counts["sent"] - counts["answered"] - counts["refused"]
    return 1 if wrong or unaccounted else 0


if __name__ == "__main__":
    sys.exit(main())
