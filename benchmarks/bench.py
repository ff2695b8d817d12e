"""Load generator for any OpenAI-compatible speech server: first byte, first 200 ms of audio, audio per second.

    python benchmarks/bench.py                                          this repository's server, started for it
    python benchmarks/bench.py --url http://127.0.0.1:8880 --voice af_heart --concurrency 1 4 8

Each concurrency N is a closed loop: N clients, each sending its next request when the last one is answered.
Times are wall-clock seconds from the sending of the request. Loopback only, unless --allow-remote is given.
"""

from __future__ import annotations

import argparse
import http.client
import io
import ipaddress
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
from servers import RESULTS, leave_on_term, own_server

PCM_BYTES_PER_S = 48_000  # s16 mono at 24 kHz, what OpenAI's clients assume of raw pcm
FIRST_AUDIO_S = 0.2
HEADER_BYTES = {"pcm": 0, "wav": 44}  # formats whose first 200 ms can be told by counting bytes
REQUEST_TIMEOUT_S = 600

PARAGRAPH = (
    "The harbour was quiet that morning, and only a few gulls circled above the boats. "
    "An old man in a blue coat untied his rope, looked up at the sky, and shook his head. "
    "By noon the wind had turned, and nobody who knew the coast went out to sea."
)
STORY = PARAGRAPH + (
    " His daughter kept the lamp in the tower, as her mother had done before her. "
    "Every evening she climbed the ninety steps with a can of oil, counting them under her breath. "
    "When the first ships passed the point she wrote their names into a thick grey book. "
    "Most of them carried timber from the north, some carried salt, and one brought letters twice a month. "
    "She liked the letters best, although few of them were meant for her. "
    "In winter the road to the village was closed for weeks, and the two of them read aloud to each other. "
    "They had eleven books, and they knew the endings of all of them by heart. "
    "Still, there was something in the sound of a story that made the long nights shorter."
)  # about a minute of speech


@dataclass(frozen=True)
class Target:
    """A server and how to ask it: `extra` holds further fields of the request's body."""

    name: str
    url: str
    voice: str = "alloy"
    model: str = "tts-1"
    response_format: str = "pcm"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One answered request; times in seconds, `first_audio_s` None where the format does not tell."""

    target: str
    characters: int
    first_byte_s: float
    first_audio_s: float | None
    total_s: float
    audio_s: float
    bytes: int

    @property
    def speed(self) -> float:
        """Audio seconds per second."""
        return self.audio_s / self.total_s


def speak(target: Target, text: str) -> Sample:
    """Ask for one text and read the answer as it comes; raise RuntimeError on any status but 200."""
    address = urlsplit(target.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=REQUEST_TIMEOUT_S)
    body = {"model": target.model, "input": text, "voice": target.voice, "response_format": target.response_format}
    began = time.perf_counter()
    try:
        connection.request(
            "POST",
            f"{address.path.rstrip('/')}/v1/audio/speech",
            json.dumps(body | target.extra),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
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
    return Sample(
        target=target.name,
        characters=len(text),
        first_byte_s=arrivals[0][1],
        first_audio_s=first_audio(arrivals, target.response_format),
        total_s=arrivals[-1][1],
        audio_s=audio_seconds(data, target.response_format),
        bytes=size,
    )


def first_audio(arrivals: list[tuple[int, float]], response_format: str) -> float | None:
    """Return when the first 200 ms of audio were there; the last arrival for audio shorter than that."""
    if response_format not in HEADER_BYTES:
        return None
    needed = HEADER_BYTES[response_format] + FIRST_AUDIO_S * PCM_BYTES_PER_S
    return next((at for size, at in arrivals if size >= needed), arrivals[-1][1])


def audio_seconds(data: bytes, response_format: str) -> float:
    """Return the audio's duration in seconds: counted for pcm, decoded for the others."""
    if response_format == "pcm":
        return len(data) / PCM_BYTES_PER_S
    with av.open(io.BytesIO(data)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def closed_loop(target: Target, texts: list[str], concurrency: int) -> tuple[list[Sample], float]:
    """Send every text with `concurrency` clients; return the samples and the whole time in seconds."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        samples = list(clients.map(lambda text: speak(target, text), texts))
    return samples, time.perf_counter() - began


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Return `median (least to most)`, or a dash where there is nothing to tell."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def save(name: str, content: object) -> Path:
    """Write results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    return path


LOAD_HEADER = ["clients", "audio s per s", "first byte s", "first 200 ms s", "whole s", "requests", "audio s"]


def load_row(target: Target, text: str, concurrency: int, requests: int) -> tuple[list[str], list[Sample]]:
    """Run one closed loop; return its table row and its samples."""
    samples, wall_s = closed_loop(target, [text] * requests, concurrency)
    times: list[Callable[[Sample], float | None]] = [
        lambda s: s.first_byte_s, lambda s: s.first_audio_s, lambda s: s.total_s
    ]  # fmt: skip
    audio_s = sum(sample.audio_s for sample in samples)
    row = [str(concurrency), f"{audio_s / wall_s:.2f}", *(spread(map(time_of, samples)) for time_of in times)]
    return [*row, str(requests), f"{audio_s:.0f}"], samples


def check_loopback(url: str) -> None:
    """Exit unless the URL's host is a loopback address."""
    host = urlsplit(url).hostname or ""
    if host != "localhost" and not (host.replace(".", "").isdigit() and ipaddress.ip_address(host).is_loopback):
        sys.exit(f"{host} is not on this machine; --allow-remote sends it load all the same")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it this repository's is started")
    parser.add_argument("--voice", default="alloy")
    parser.add_argument("--model", default="tts-1")
    parser.add_argument("--format", default="pcm")
    parser.add_argument("--text", type=Path, help="a text file; default: a paragraph of three sentences")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, help="for each concurrency; default: 4 a client")
    parser.add_argument("--allow-remote", action="store_true")
    return parser.parse_args()


def measure(args: argparse.Namespace, url: str) -> None:
    """Print the table of one server and write its samples."""
    target = Target("server", url, args.voice, args.model, args.format)
    text = args.text.read_text(encoding="utf-8").strip() if args.text else PARAGRAPH
    speak(target, text)  # a first request that is not counted
    runs = [load_row(target, text, count, args.requests or 4 * count) for count in args.concurrency]
    print(markdown(LOAD_HEADER, [row for row, _ in runs]))
    print(f"\nMedian (least to most); {len(text)} characters as {args.format}. Samples: "
          f"{save('load', [samples for _, samples in runs])}")  # fmt: skip


def main() -> None:
    """Measure the server that --url names, or this repository's."""
    leave_on_term()
    args = options()
    if args.url:
        if not args.allow_remote:
            check_loopback(args.url)
        measure(args, args.url)
        return
    with own_server() as server:
        measure(args, server.url)


if __name__ == "__main__":
    main()
