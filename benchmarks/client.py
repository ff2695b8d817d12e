"""One client of an OpenAI-compatible speech server, and many: what each request gave, and when it came.

Times are wall-clock seconds from the sending of a request; in an open loop from the moment it was due, so that a
server that holds up the next request does not hide it.
"""

from __future__ import annotations

import http.client
import io
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
from servers import cpu_s

PCM_BYTES_PER_S = 48_000  # s16 mono at 24 kHz, what OpenAI's clients assume of raw pcm
FIRST_AUDIO_S = 0.2
DEVICE_S = 0.02  # what a sound card holds in hand: a shorter gap is not heard
REQUEST_TIMEOUT_S = 1200

Arrivals = list[tuple[int, float]]  # bytes so far, and when


# Texts share clauses, and this server makes what several ask for at once only once: so no two requests are quite alike.
SPEED_STEP = 1e-7
NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Target:
    """A server and how to ask it.

    url: with or without /v1; extra: further fields of the body; pid: its process, where that is known.
    """

    name: str
    url: str
    voice: str = "alloy"
    model: str = "tts-1"
    response_format: str = "pcm"
    extra: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    key: str = ""  # none is sent


@dataclass(frozen=True)
class Sample:
    """One answered request; times in seconds."""

    target: str
    characters: int
    first_byte_s: float
    first_audio_s: float
    total_s: float
    audio_s: float
    bytes: int
    underruns: int
    starved_s: float

    @property
    def speed(self) -> float:
        """Audio seconds per second."""
        return self.audio_s / self.total_s


@dataclass(frozen=True)
class Run:
    """Requests sent together, the whole time in seconds, and the server's CPU seconds where its process is known."""

    samples: list[Sample]
    wall_s: float
    failures: list[str] = field(default_factory=list)
    cpu_s: float = math.nan

    @property
    def audio_s(self) -> float:
        """Seconds of audio that came."""
        return sum(sample.audio_s for sample in self.samples)

    @property
    def speed(self) -> float:
        """Audio seconds per second, of all together."""
        return self.audio_s / self.wall_s

    @property
    def cpu_s_per_minute(self) -> float:
        """CPU seconds of the server for a minute of audio; not a number where one is not known."""
        return self.cpu_s / self.audio_s * 60 if self.audio_s else math.nan

    def median(self, figure: str) -> float:
        """Return the median of a sample's figure; not a number where no request was answered."""
        return percentile([getattr(sample, figure) for sample in self.samples], 50)


def speak(target: Target, text: str, due: float | None = None) -> Sample:
    """Ask for one text and read the answer as it comes; raise RuntimeError on any status but 200.

    due: when the request should have been sent, by time.perf_counter(); None: now.
    """
    began = time.perf_counter() if due is None else due
    connection = connect(target)
    try:
        response = ask(connection, target, text)
        parts, arrivals, size = [], [], 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            arrivals.append((size, time.perf_counter() - began))
    finally:
        connection.close()
    data = b"".join(parts)
    if response.status != 200 or not data:
        raise RuntimeError(f"{target.name} answered {response.status}: {data[:300]!r}")
    return measured(target, text, arrivals, data)


def connect(target: Target) -> http.client.HTTPConnection:
    """Return a connection to a target, not opened yet."""
    address = urlsplit(target.url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    return kind(address.hostname or "", address.port, timeout=REQUEST_TIMEOUT_S)


def ask(connection: http.client.HTTPConnection, target: Target, text: str) -> http.client.HTTPResponse:
    """Send one request; return the response, whose body is not read yet."""
    body = {"model": target.model, "input": text, "voice": target.voice, "response_format": target.response_format}
    body["speed"] = 1 + next(NUMBERS) * SPEED_STEP
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {target.key}"} if target.key else {})}
    base = urlsplit(target.url).path.rstrip("/").removesuffix("/v1")
    connection.request("POST", f"{base}/v1/audio/speech", json.dumps(body | target.extra), headers)
    return connection.getresponse()


def measured(target: Target, text: str, arrivals: Arrivals, data: bytes) -> Sample:
    """Return an answer's figures."""
    sizes, seconds = timeline(data, target.response_format)
    heard = [(float(np.interp(size, sizes, seconds)), at) for size, at in arrivals]
    underruns, starved_s = starve(heard)
    return Sample(
        target=target.name,
        characters=len(text),
        first_byte_s=arrivals[0][1],
        first_audio_s=next((at for audio_s, at in heard if audio_s > FIRST_AUDIO_S - 1e-6), arrivals[-1][1]),
        total_s=arrivals[-1][1],
        audio_s=seconds[-1],
        bytes=len(data),
        underruns=underruns,
        starved_s=starved_s,
    )


def timeline(data: bytes, response_format: str) -> tuple[list[int], list[float]]:
    """Return sizes in bytes and how many seconds of audio so many bytes are; in between it grows evenly."""
    if response_format == "pcm":
        return [0, len(data)], [0.0, len(data) / PCM_BYTES_PER_S]
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        sizes, seconds = [packets[0].pos], [0.0]
        for packet in packets:
            sizes.append(packet.pos + packet.size)
            seconds.append(seconds[-1] + float(packet.duration * packet.time_base))
    return sizes, seconds


def starve(heard: list[tuple[float, float]]) -> tuple[int, float]:
    """Return how often and how long a player stood still that started with the first audio.

    heard: how many seconds of audio had come, and when; a gap up to DEVICE_S is bridged by the sound card.
    """
    gaps, audio_s, runs_dry = [], 0.0, -math.inf
    for came_s, at in heard:
        if came_s > audio_s:
            gaps.append(at - runs_dry)
            runs_dry = max(at, runs_dry) + came_s - audio_s
            audio_s = came_s
    starved = [gap for gap in gaps[1:] if gap > DEVICE_S]  # the first one is the wait for the first audio
    return len(starved), sum(starved)


def gather(target: Target, clients: int, jobs: Iterable[Callable[[], Sample]]) -> Run:
    """Run jobs on a thread a client; what fails is noted, not raised."""
    samples, failures = [], []

    def run(job: Callable[[], Sample]) -> None:
        try:
            samples.append(job())
        except (RuntimeError, OSError, http.client.HTTPException, av.error.FFmpegError) as error:
            failures.append(f"{type(error).__name__}: {error}")

    before, began = spent(target), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(run, jobs))
    return Run(samples, time.perf_counter() - began, failures, spent(target) - before)


def spent(target: Target) -> float:
    """Return the CPU seconds of a target's process so far; not a number where it is not known."""
    return cpu_s(target.pid) if target.pid else math.nan


def closed_loop(target: Target, texts: list[str], clients: int) -> Run:
    """Send every text with so many clients, each of which sends its next one when the last is answered."""
    return gather(target, clients, [lambda text=text: speak(target, text) for text in texts])


def open_loop(target: Target, texts: list[str], rate: float, seed: int = 20) -> Run:
    """Send every text when it is due, whether others are answered or not: `rate` a second, like strangers come."""
    dice, due, dues = random.Random(seed), time.perf_counter(), []
    for _ in texts:
        due += dice.expovariate(rate)
        dues.append(due)

    def send(text: str, due: float) -> Sample:
        time.sleep(max(0.0, due - time.perf_counter()))
        return speak(target, text, due)

    jobs = [lambda text=text, due=due: send(text, due) for text, due in zip(texts, dues, strict=True)]
    return gather(target, len(texts), jobs)


def race(targets: list[Target], rounds: list[list[str]], clients: int) -> dict[str, list[Run]]:
    """Send each round's texts to A, B, C, then the next round's, so that what else the machine does strikes all alike.

    Return each target's runs, a round each; raise RuntimeError where a request failed.
    """
    runs: dict[str, list[Run]] = {target.name: [] for target in targets}
    for number, texts in enumerate(rounds, 1):
        for target in targets:
            run = closed_loop(target, texts, clients)
            if run.failures:
                raise RuntimeError(run.failures[0])
            runs[target.name].append(run)
        print(f"  {clients} clients, round {number} of {len(rounds)}", file=sys.stderr, flush=True)
    return runs


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which `share` (0 to 100) of the values are; not a number where there are none."""
    known = list(values)
    return float(np.percentile(known, share)) if known else math.nan
