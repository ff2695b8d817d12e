"""Load generator for any OpenAI-compatible speech server: first byte, first 200 ms, whole time, underruns, throughput.

    python benchmarks/bench.py                                          this repository's server, started for it
    python benchmarks/bench.py --url http://127.0.0.1:8880 --voice af_heart --concurrency 1 4 8
    python benchmarks/bench.py --language zh en mixed --characters 10 1000 --format pcm mp3 --concurrency 1
    python benchmarks/bench.py --rate 0.5 2                             open loop: so many requests a second

Every combination of what is given is one row. `--concurrency N` is a closed loop: N clients, each sending its next
request when the last one is answered; `--rate R` sends requests as strangers would, R a second on average, answered
or not. No text is sent twice. `--growth N` sends N requests in a row and prints the server's resident memory.
An underrun is a moment at which a player that started with the first audio has nothing left to play.
Loopback only, unless --allow-remote is given.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import math
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from client import Run, Target, closed_loop, open_loop, percentile, speak
from servers import leave_on_term, own_server, resident_mb
from tables import markdown, save
from texts import LANGUAGES, Texts

OPEN_LOOP_S = 30  # how long requests keep coming
CHECKPOINTS = (50, 100, 250, 500, 1000, 2000, 5000)  # requests after which memory is read
GROWTH_CHARACTERS = (10, 200)


@dataclass(frozen=True)
class Case:
    """One row: what is asked for, and by how many clients; or, without clients, how often a second."""

    language: str = "en"
    characters: int = 100
    response_format: str = "pcm"
    clients: int = 0
    rate: float = 0.0

    @property
    def requests(self) -> int:
        """Enough short texts for a median, and no more long ones than needed."""
        if not self.clients:
            return max(1, round(self.rate * OPEN_LOOP_S))
        each, least = min(4, max(1, 400 // self.characters)), min(8, max(1, 2000 // self.characters))
        return max(each * self.clients, least)


@dataclass(frozen=True)
class Result:
    """What a case gave, and the server's memory in MB afterwards."""

    case: Case
    run: Run
    resident_mb: float = math.nan


def run_case(target: Target, case: Case, texts: Texts, requests: int = 0) -> Result:
    """Run one case; `requests` overrides how many."""
    target = replace(target, response_format=case.response_format)
    sent = texts.take_many(case.language, case.characters, requests or case.requests)
    run = closed_loop(target, sent, case.clients) if case.clients else open_loop(target, sent, case.rate)
    result = Result(case, run, resident_mb(target.pid)) if target.pid else Result(case, run)
    print("  " + "  ".join(case_row(result)), file=sys.stderr, flush=True)
    for failure in run.failures[:1]:
        print(f"  failed: {failure}", file=sys.stderr)
    return result


CASE_HEADER = [
    "text", "format", "load", "audio s per s", "first byte s", "first 200 ms s", "whole s", "underruns",
    "CPU s per audio min", "resident MB", "requests", "failed",
]  # fmt: skip
CASE_NOTE = "Times: median / 95th percentile. Underruns: how many, and the seconds a player stood still."


def case_row(result: Result) -> list[str]:
    """Return a result's row of the table."""
    case, run = result.case, result.run
    return [
        f"{case.language} {case.characters}",
        case.response_format,
        f"{case.clients} at once" if case.clients else f"{case.rate:g} a second",
        f"{run.speed:.2f}",
        *(times(run, figure) for figure in ("first_byte_s", "first_audio_s", "total_s")),
        underruns(run),
        known(run.cpu_s_per_minute, 1),
        known(result.resident_mb, 0),
        str(len(run.samples)),
        str(len(run.failures)),
    ]


def known(value: float, digits: int) -> str:
    """Return a figure as text, or a dash where it is not known."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def times(run: Run, figure: str) -> str:
    """Return a figure's `median / 95th percentile` over a run's samples."""
    values = [getattr(sample, figure) for sample in run.samples]
    return f"{percentile(values, 50):.2f} / {percentile(values, 95):.2f}"


def underruns(run: Run) -> str:
    """Return a run's underruns: how many in all, and for how long."""
    count = sum(sample.underruns for sample in run.samples)
    return f"{count} ({sum(sample.starved_s for sample in run.samples):.1f} s)" if count else "0"


def growth(target: Target, requests: int, texts: Texts) -> dict[int, float]:
    """Return the resident memory in MB at the checkpoints, while one client sends one request after another.

    The lengths are uniform in their logarithm, the longest first; the languages take turns.
    """
    dice, (least, most) = random.Random(20), GROWTH_CHARACTERS
    lengths = [most, *(round(least * math.exp(dice.random() * math.log(most / least))) for _ in range(requests - 1))]
    resident = {}
    for number, (characters, language) in enumerate(zip(lengths, itertools.cycle(LANGUAGES), strict=False), 1):
        speak(target, texts.take(language, characters))
        if number in CHECKPOINTS or number == requests:
            resident[number] = resident_mb(target.pid)
            print(f"  {number} requests: {resident[number]:.0f} MB", file=sys.stderr, flush=True)
    return resident


def machine() -> dict[str, float]:
    """Return what the figures depend on: cores, and how many processes wanted them before the bench."""
    return {"cores": os.cpu_count() or 1, "load_average": os.getloadavg()[0]}


def check_loopback(url: str) -> None:
    """Exit unless the URL's host is a loopback address."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):  # a name
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    sys.exit(f"{host} is not on this machine; --allow-remote sends it load all the same")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, its key in API_KEY; without it this repository's is started")
    parser.add_argument("--pid", type=int, help="its process id, where it is on this machine: for CPU and memory")
    parser.add_argument("--voice", default="alloy")
    parser.add_argument("--model", default="tts-1")
    parser.add_argument("--language", nargs="+", choices=LANGUAGES, default=["en"])
    parser.add_argument("--characters", type=int, nargs="+", default=[100], help="of a text, about")
    parser.add_argument("--format", nargs="+", choices=["pcm", "wav", "mp3"], default=["pcm"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rate", type=float, nargs="+", help="open loop instead: requests a second")
    parser.add_argument("--requests", type=int, default=0, help="of each row; default: by its length and clients")
    parser.add_argument("--growth", type=int, metavar="N", help="instead: memory over N requests in a row")
    parser.add_argument("--allow-remote", action="store_true")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterable[Case]:
    """Return every combination of what was asked for."""
    loads = [(0, rate) for rate in args.rate] if args.rate else [(clients, 0.0) for clients in args.concurrency]
    for language, characters, name, load in itertools.product(args.language, args.characters, args.format, loads):
        yield Case(language, characters, name, *load)


def measure(args: argparse.Namespace, url: str, pid: int | None) -> None:
    """Print the table of one server and write its samples."""
    before = machine()
    target = Target("server", url, args.voice, args.model, pid=pid, key=os.environ.get("API_KEY", ""))
    texts = Texts()
    speak(target, texts.take("en", 100))  # a first request that is not counted
    if args.growth:
        if not target.pid:
            sys.exit("--growth reads the server's memory: give its --pid, or leave out --url")
        resident = growth(target, args.growth, texts)
        print(markdown(["requests", "resident MB"], [[str(n), f"{mb:.0f}"] for n, mb in resident.items()]))
        print(f"\n{save('growth', resident)}")
        return
    results = [run_case(target, case, texts, args.requests) for case in cases(args)]
    print(markdown(CASE_HEADER, map(case_row, results)))
    print(f"\n{CASE_NOTE} Samples: {save('bench', {'machine': before, 'results': results})}")


def main() -> None:
    """Measure the server that --url names, or this repository's."""
    leave_on_term()
    args = options()
    if args.url:
        if not args.allow_remote:
            check_loopback(args.url)
        measure(args, args.url, args.pid)
        return
    with own_server() as server:
        measure(args, server.url, server.pid)


if __name__ == "__main__":
    main()
