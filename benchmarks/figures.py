"""The figures of this server: start, memory, cost over the bare engine, first byte, load.

    python benchmarks/figures.py [--requests 500]        about a quarter of an hour with 500 requests

Memory is measured over requests of 1 to 500 characters, short ones more often (the logarithm of the length is
uniform), the same ones in the same order every time; the first of them has 500 characters.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import numpy as np
from bench import LOAD_HEADER, PARAGRAPH, STORY, Target, load_row, markdown, save, speak, spread
from servers import ROOT, Server, leave_on_term, own_server

sys.path.insert(0, str(ROOT))

from app import Settings, Voices, split_utterances
from embedded_voice import EmbeddedVoice

MAX_CHARACTERS = 500
CHECKPOINTS = (50, 100, 500)  # requests after which memory is read
Row = list[str]  # what, figure, the figure to reach


def start_figure(starts: int = 3) -> Row:
    """Return the seconds from starting gunicorn to a /health that answers 200."""
    seconds = []
    for _ in range(starts):
        with own_server() as server:
            seconds.append(server.ready_s)
    return ["start to ready, s", spread(seconds), "under 5"]


def texts_of_all_lengths(count: int) -> list[str]:
    """Return texts of 1 to MAX_CHARACTERS characters cut from the story, the longest first."""
    dice = random.Random(20)
    lengths = [MAX_CHARACTERS] + [round(MAX_CHARACTERS ** dice.random()) for _ in range(count - 1)]
    return [STORY[offset : offset + length] for length in lengths for offset in [dice.randrange(len(STORY) - length)]]


def memory_figures(server: Server, target: Target, requests: int) -> list[Row]:
    """Return the resident memory at the checkpoints, while one client sends one request after another."""
    resident = {}
    for number, text in enumerate(texts_of_all_lengths(requests), 1):
        speak(target, text if any(map(str.isalnum, text)) else "a")
        if number in CHECKPOINTS:
            resident[number] = server.resident_mb()
    rows = [[f"memory after {number} requests, MB", f"{mb:.0f}", "under 900"] for number, mb in resident.items()]
    if {50, 500} <= resident.keys():
        rows.append(["memory, 500th against 50th request", f"{resident[500] / resident[50] - 1:+.1%}", "flat"])
    return rows


class Recorder:
    """Stands in for an onnxruntime session and keeps what it was run with."""

    def __init__(self, session: Any):
        self.session, self.inputs = session, []

    def run(self, outputs: list[str] | None, inputs: dict[str, np.ndarray], *options: object) -> list[np.ndarray]:
        """Run, and remember the inputs."""
        self.inputs.append(inputs)
        return self.session.run(outputs, inputs, *options)


def overhead_figure(target: Target, rounds: int = 3) -> Row:
    """Return a minute's request against the bare session calls for the same utterances, taken in turns."""
    settings = Settings()
    voice = Voices.load(settings.voices_file).resolve(target.voice)
    engine = EmbeddedVoice(threads=2)
    recorder = engine._session = Recorder(engine._session)
    for utterance in split_utterances(STORY):
        engine.speak(utterance.text, voice.embedded.en)
    ratios, audio_s = [], 0.0
    for _ in range(rounds):
        sample = speak(target, STORY)
        audio_s = sample.audio_s
        began = time.perf_counter()
        for inputs in recorder.inputs:
            recorder.session.run(None, inputs)
        ratios.append(sample.total_s / (time.perf_counter() - began))
    return [f"{audio_s:.0f} s of speech over HTTP, against bare onnxruntime", spread(ratios), "at most 1.05"]


def first_byte_figures(target: Target, rounds: int = 5) -> list[Row]:
    """Return when the first byte of a three-sentence paragraph comes, and its share of the whole request."""
    samples = [speak(target, PARAGRAPH) for _ in range(rounds)]
    return [
        ["first byte of a paragraph, s", spread(sample.first_byte_s for sample in samples), ""],
        ["its share of the request", spread(s.first_byte_s / s.total_s for s in samples), "under 0.40"],
    ]


def told(row: Row) -> Row:
    """Show a row as soon as it is known, and return it."""
    print("  " + "  ".join(row), file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="for the memory figures")
    args = parser.parse_args()
    leave_on_term()
    rows = [told(start_figure())]
    with own_server() as server:
        target = Target("this server", server.url)
        speak(target, PARAGRAPH)  # a first request that is not counted
        rows += map(told, first_byte_figures(target))
        rows.append(told(overhead_figure(target)))
        loads = [told(load_row(target, PARAGRAPH, clients, 2 * clients)[0]) for clients in (1, 4, 8)]
        rows += map(told, memory_figures(server, target, args.requests))
    print(markdown(["what", "figure", "to reach"], rows))
    print("\nA paragraph as pcm, asked for by that many clients at once:\n")
    print(markdown(LOAD_HEADER, loads))
    print(f"\nMedian (least to most). Figures: {save('figures', {'figures': rows, 'load': loads})}")


if __name__ == "__main__":
    main()
