"""The figures of this server: start, first audio, cost, load, fairness, memory; and what the plots are drawn from.

    python benchmarks/figures.py [--growth 2000]       about an hour on two idle cores
"""

from __future__ import annotations

import argparse
import http.client
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from bench import CASE_HEADER, CASE_NOTE, Case, Result, case_row, growth, machine, run_case
from client import Run, Target, ask, closed_loop, connect, speak
from cost import cost_figures, cost_runs
from quiet import both_rows, take
from servers import RESULTS, ROOT, Server, leave_on_term, own_server
from tables import markdown, save, spread
from texts import LANGUAGES, PARAGRAPH, STORY, Texts

sys.path.insert(0, str(ROOT))

from embedded_voice import EmbeddedVoice
from engines import EmbeddedEngine
from settings import Settings
from utterances import split_utterances
from voices import Voices

LOADS = [Case(clients=clients) for clients in (1, 2, 4, 8, 16)]
LENGTHS = [Case(language, length, clients=1) for language in LANGUAGES for length in (10, 100, 1000, 4000)]
PAIRS = [Case(language, 1000, clients=2) for language in LANGUAGES]
FORMATS = [Case(response_format=name, clients=1) for name in ("wav", "mp3")]
OPEN = [Case(rate=0.25), Case("zh", 10, rate=1.0)]
Row = list[str]  # what, figure, the figure to reach


def start_figures(starts: int = 3) -> list[Row]:
    """Return the seconds from starting gunicorn to a /health that answers 200, of a first start and of those after it.

    A first start finds nothing kept from one before, and speaks on onnxruntime until OpenVINO's decoder is built.
    """
    first, settled, later = [], [], []
    for _ in range(starts):
        with TemporaryDirectory() as folder:
            cache = f"{folder}/first_start"
            with own_server(TTS_CACHE_DIR=cache) as server:
                first.append(server.ready_s)
                settled.append(server.settled_s)
            with own_server(TTS_CACHE_DIR=cache) as server:
                later.append(server.ready_s)
    return [
        ["start to ready, s", spread(later), "under 5"],
        ["the first start to ready, s", spread(first), "under 60"],
        ["the first start to full speed, s", spread(settled), "under 60"],
    ]


def memory_figures(resident: dict[int, float]) -> list[Row]:
    """Return the rows of the resident memory after so many requests.

    It is compared with that after a quarter of them: by then most lengths were met, whose kernels OpenVINO keeps.
    """
    rows = [[f"memory after {number} requests, MB", f"{mb:.0f}", "under 900"] for number, mb in resident.items()]
    last = max(resident)
    first = max((number for number in resident if number <= last / 4), default=min(resident))
    return [*rows, [f"memory, request {last} against {first}", f"{resident[last] / resident[first] - 1:+.1%}", "flat"]]


@contextmanager
def long_request(target: Target, text: str) -> Iterator[None]:
    """Have a long text spoken meanwhile, its first bytes there already; then hang up."""
    connection = connect(target)
    connection.connect()
    line = connection.sock
    response = ask(connection, target, text)
    response.read1(1)
    reading = threading.Thread(target=drain, args=(response,))
    reading.start()
    try:
        yield
        if not reading.is_alive():
            raise RuntimeError("the long text ended before the short ones")
    finally:
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        reading.join()
        connection.close()


def drain(response: http.client.HTTPResponse) -> None:
    """Read until the answer ends or somebody hangs up."""
    with suppress(OSError, http.client.HTTPException):
        while response.read1(65536):
            pass


def fairness(target: Target, texts: Texts, count: int = 3) -> tuple[Run, Run]:
    """Have 10-character texts spoken alone, then beside a 4,000-character text; return both runs."""
    speak(target, PARAGRAPH)  # at its end nothing is left of the answer that the last round gave up
    alone = closed_loop(target, texts.take_many("zh", 10, count), 1)
    with long_request(target, texts.take("zh", 4000)):
        return alone, closed_loop(target, texts.take_many("zh", 10, count), 1)


def fairness_figures(target: Target, texts: Texts, rounds: int = 3) -> list[Row]:
    """Return how many times as long a short text takes beside a long one."""
    pairs = [fairness(target, texts) for _ in range(rounds)]
    named = {"first 200 ms": "first_audio_s", "whole": "total_s"}
    return [
        [
            f"10 characters beside 4,000: {name}, times alone",
            spread(beside.median(figure) / alone.median(figure) for alone, beside in pairs),
            "under 3",
        ]
        for name, figure in named.items()
    ]


def crowd_figure(target: Target, texts: Texts, rounds: int = 5, requests: int = 48) -> Row:
    """Return the audio per second of so many requests from 16 clients over that of as many from 4, in turns."""
    speeds = [
        [closed_loop(target, texts.take_many("en", 100, requests), clients).speed for clients in (4, 16)]
        for _ in range(rounds)
    ]
    return ["throughput at 16 clients, times that at 4", spread(many / few for few, many in speeds), "at least 1"]


def underruns_figure(results: list[Result]) -> Row:
    """Return how often a player of one or two clients had nothing left to play."""
    runs = [result.run for result in results if result.case.clients in (1, 2)]
    return ["underruns at 1 and 2 clients", str(sum(each.underruns for run in runs for each in run.samples)), "none"]


class Recorder:
    """Stands in for a half of the network and writes down each call of it."""

    def __init__(self, half: Any, calls: list[Callable[[], Any]]):
        self._half, self._calls = half, calls

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run, and remember the call."""
        call = partial(self._half.run, *arguments, **options)
        self._calls.append(call)
        return call()


def overhead_figure(target: Target, rounds: int = 15) -> Row:
    """Return a minute's request against the bare engine calls for the same utterances, taken in turns.

    With a seed the text is cut the same way on every machine, as it is here.
    """
    settings = Settings.from_env()
    voice, served = Voices.load(settings.voices_file).resolve(target.voice), EmbeddedEngine(settings)
    engine = EmbeddedVoice(threads=served._threads, runtime=served._runtime)
    network, calls = engine._network, []
    network._encoder, network._decoder = Recorder(network._encoder, calls), Recorder(network._decoder, calls)
    for utterance in split_utterances(STORY, usual=EmbeddedEngine.usual_syllables):
        engine.speak(utterance.text, voice.embedded.en)
    ratios, audio_s = [], 0.0
    for _ in range(rounds):
        sample = speak(replace(target, extra={"seed": 1}), STORY)
        audio_s = sample.audio_s
        began = time.perf_counter()
        for call in calls:
            call()
        ratios.append(sample.total_s / (time.perf_counter() - began))
    return [f"{audio_s:.0f} s of speech over HTTP, against the bare engine calls", spread(ratios), "at most 1.03"]


def first_audio_figures(target: Target, rounds: int = 40) -> list[Row]:
    """Return when the first sound of a three-sentence paragraph comes, and its share of the whole request."""
    taken = take(lambda: speak(target, PARAGRAPH), rounds)
    shares = [sample.first_audio_s / sample.total_s for _, sample in taken]
    return [
        *both_rows("first 200 ms of a paragraph, s", taken, lambda sample: sample.first_audio_s, "under 0.3"),
        ["its share of the request", spread(shares), ""],
    ]


def told(row: Row) -> Row:
    """Show a row as soon as it is known, and return it."""
    print("  " + "  ".join(row), file=sys.stderr, flush=True)
    return row


def server_figures(server: Server, before: dict[str, float]) -> tuple[list[Row], list[Result]]:
    """Return the rows of a running server, and the results of its loads, which are kept with what `machine` told."""
    target, texts = Target("this server", server.url, pid=server.pid), Texts()
    speak(target, PARAGRAPH)  # a first request that is not counted
    rows = [*map(told, first_audio_figures(target)), told(overhead_figure(target))]
    rows += map(told, fairness_figures(target, texts))
    results = [run_case(target, case, texts) for case in (*LOADS, *PAIRS, *FORMATS, *LENGTHS, *OPEN)]
    save("loads", {"machine": before, "results": results})  # before what takes longest
    return [*rows, told(crowd_figure(target, texts)), told(underruns_figure(results))], results


def growth_figures(requests: int) -> list[Row]:
    """Return the memory rows of a server that has answered nothing yet."""
    with own_server() as server:
        return memory_figures(growth(Target("this server", server.url, pid=server.pid), requests, Texts()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", type=int, default=2000, help="requests over which memory is watched")
    args = parser.parse_args()
    leave_on_term()
    before = machine()
    rows = [*map(told, start_figures()), *map(told, cost_figures(cost_runs(10, 1.5)))]
    with own_server() as server:
        more, results = server_figures(server, before)
    rows += [*more, *growth_figures(args.growth)]
    print(markdown(["what", "figure", "to reach"], rows))
    print(f"\nMedian (least to most). Figures: {save('figures', rows)}\n")
    print(markdown(CASE_HEADER, map(case_row, results)))
    print(f"\n{CASE_NOTE} Samples: {RESULTS / 'loads.json'}")


if __name__ == "__main__":
    main()
