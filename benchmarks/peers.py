"""Race this server against kokoro-cli and fastkokoro: same weights, same styles, same text, interleaved in one run.

Each peer gets a virtual environment of its own under ${XDG_CACHE_HOME:-~/.cache}/indextts-openai-server/peers, made
once. Both read the weights from the parts that this repository installs, and a voices file whose tables are the
English styles of voices.json under the ids of voices.json: `alloy` is the same voice in all three.

    python benchmarks/peers.py [--rounds 5] [--long-rounds 2] [--crowd-rounds 3]

How each is asked: this server for pcm, which it sends as it is made; fastkokoro for pcm with its field
"stream": true, by sentences, as it does unless told otherwise, and by its strategy that sounds soonest, "adaptive",
which on a CPU speaks four words at a time; kokoro-cli, which has no pcm and answers whole, for wav.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from client import Run, Target, race, speak
from servers import RESULTS, ROOT, Server, free_port, leave_on_term, own_server
from tables import markdown, save, spread
from texts import PARAGRAPH, STORY, Texts

sys.path.insert(0, str(ROOT))

from embedded_voice import Styles, read_weights
from settings import Settings
from voices import Voices

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "indextts-openai-server" / "peers"
MODEL = CACHE / "models" / "kokoro-v1.0.int8.onnx"
VOICES = CACHE / "models" / "voices-v1.0.bin"
OURS = "this server"
CROWD, CROWD_CHARACTERS = 8, 250  # clients at once, each with a text of its own

# fastkokoro asks for misaki-ja-lightning too, for Japanese: it compiles for twenty minutes, so it is left out.
FASTKOKORO_NEEDS = (
    "espeakng-loader>=0.2.0", "fastapi>=0.115.0", "huggingface-hub>=0.36.0", "misaki[zh]>=0.9.4,<1", "numba>=0.65.0",
    "numpy>=1.26,<3", "onnx>=1.16.0", "onnx-ir>=0.1.0", "onnxsim>=0.4.36", "orjson>=3.10.0", "phonemizer-fork>=3.3.2",
    "pydantic>=2", "soundfile>=0.13.0", "sympy>=1.13.0", "uvicorn>=0.32.0", "uvloop>=0.21.0", "onnxruntime==1.32.0",
)  # fmt: skip
INSTALLS = {
    "kokoro-cli": [["kokoro-cli==0.4.0", "onnxruntime==1.32.0"]],
    "fastkokoro": [["--no-deps", "fastkokoro==0.7.0"], FASTKOKORO_NEEDS],
}
# kokoro-cli starts only with the very voices file of its download: the one thing switched off is that checksum.
KOKORO_CLI = """\
import sys, kokoro_cli.models
kokoro_cli.models.models_ready = lambda variant: True
from kokoro_cli.cli import main
sys.exit(main(sys.argv[1:]))
"""


def install(peer: str) -> Path:
    """Make a peer's virtual environment unless it is there; return its Python."""
    venv = CACHE / peer
    python, done = venv / "bin" / "python", venv / ".installed"
    if not done.exists():
        print(f"installing {peer} in {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        for packages in INSTALLS[peer]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def write_models() -> None:
    """Write the weights and the voices file where both peers read them."""
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    if not MODEL.exists():
        MODEL.write_bytes(read_weights())
    styles, voices = Styles(), Voices.load(Settings().voices_file).voices
    tables = {voice.id: styles.blend(voice.embedded.en).reshape(510, 1, 256).astype(np.float32) for voice in voices}
    with VOICES.open("wb") as file:
        np.savez(file, **tables)


def kokoro_cli() -> tuple[Server, Target]:
    """Return kokoro-cli's server, not started yet, and how to ask it."""
    port, python = free_port(), install("kokoro-cli")
    argv = [str(python), "-c", KOKORO_CLI, "serve", "--port", str(port), "--model", "int8"]
    env = {"KOKORO_HOME": str(CACHE / "kokoro-home"), "KOKORO_MODEL_DIR": str(MODEL.parent)}
    server = Server(argv, port, env, RESULTS / "kokoro-cli.log")
    return server, Target("kokoro-cli 0.4.0", server.url, response_format="wav")


def fastkokoro(strategy: str = "sentence") -> tuple[Server, Target]:
    """Return fastkokoro's server, not started yet, and how to ask it."""
    port, python = free_port(), install("fastkokoro")
    env = {
        "HF_HUB_OFFLINE": "1",
        "FASTKOKORO_MODEL_PATH": str(MODEL),
        "FASTKOKORO_VOICES_PATH": str(VOICES),
        "FASTKOKORO_CACHE_DIR": str(CACHE / "fastkokoro-cache"),
        "FASTKOKORO_HOST": "127.0.0.1",
        "FASTKOKORO_PORT": str(port),
        "FASTKOKORO_WARMUP": "0",
        "FASTKOKORO_STREAM_STRATEGY": strategy,
    }
    server = Server([str(python.with_name("fastkokoro"))], port, env, RESULTS / f"fastkokoro-{strategy}.log")
    return server, Target(f"fastkokoro 0.7.0 by {strategy}", server.url, extra={"stream": True})


COLUMNS: dict[str, Callable[[Run], float]] = {
    "audio s per s": lambda run: run.speed,
    "first byte s": lambda run: run.median("first_byte_s"),
    "first 200 ms s": lambda run: run.median("first_audio_s"),
    "whole s": lambda run: run.median("total_s"),
    "CPU s per audio min": lambda run: run.cpu_s_per_minute,
    "audio s": lambda run: run.audio_s,
}
RATIOS: dict[str, Callable[[Run, Run], float]] = {
    "audio per second": lambda ours, peer: ours.speed / peer.speed,
    "first byte sooner": lambda ours, peer: peer.median("first_byte_s") / ours.median("first_byte_s"),
    "first 200 ms sooner": lambda ours, peer: peer.median("first_audio_s") / ours.median("first_audio_s"),
    "whole answer sooner": lambda ours, peer: peer.median("total_s") / ours.median("total_s"),
    "CPU, of the peer's": lambda ours, peer: ours.cpu_s_per_minute / peer.cpu_s_per_minute,
}


def ratio_rows(runs: dict[str, list[Run]]) -> list[list[str]]:
    """Return, of the ratios of each round, by how much this server beats each peer (above 1: it does; CPU: below)."""
    return [
        [peer, *(spread(map(ratio, runs[OURS], runs[peer])) for ratio in RATIOS.values())]
        for peer in runs
        if peer != OURS
    ]


def report(title: str, characters: int, runs: dict[str, list[Run]]) -> None:
    """Print one race's two tables: each server's figures, and this server's lead."""
    rows = [[name, *(spread(map(of, each)) for of in COLUMNS.values())] for name, each in runs.items()]
    print(f"\n{title}: {characters} characters, {len(runs[OURS])} rounds, median (least to most)\n")
    print(markdown(["server", *COLUMNS], rows))
    print(f"\n{OURS} against\n")
    print(markdown(["peer", *RATIOS], ratio_rows(runs)), flush=True)
    for figure in ("audio per second", "first 200 ms sooner"):
        lead, peer = least_lead(runs, RATIOS[figure])
        print(f"\n{figure}: {lead:.2f} times, against the best peer in this, {peer}.", flush=True)


def least_lead(runs: dict[str, list[Run]], ratio: Callable[[Run, Run], float]) -> tuple[float, str]:
    """Return by how much this server beats the peer that it beats by the least, the median of the rounds, and which."""
    return min((statistics.median(map(ratio, runs[OURS], runs[peer])), peer) for peer in runs if peer != OURS)


def races(args: argparse.Namespace) -> list[tuple[str, list[list[str]], int]]:
    """Return what is raced: title, the texts of each round, clients."""
    texts = Texts()
    return [
        ("A paragraph", [[PARAGRAPH]] * args.rounds, 1),
        ("A minute", [[STORY]] * args.long_rounds, 1),
        ("Eight at once", [texts.take_many("en", CROWD_CHARACTERS, CROWD) for _ in range(args.crowd_rounds)], CROWD),
    ]


def main() -> None:
    """Install, start, race, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="for the paragraph")
    parser.add_argument("--long-rounds", type=int, default=2, help="for the minute of speech")
    parser.add_argument("--crowd-rounds", type=int, default=3, help="for eight clients at once")
    args = parser.parse_args()
    leave_on_term()
    write_models()
    ours = own_server()
    entrants = [(ours, Target(OURS, ours.url)), kokoro_cli(), fastkokoro(), fastkokoro("adaptive")]
    with ExitStack() as running:
        targets = [replace(target, pid=running.enter_context(server).pid) for server, target in entrants]
        for target in targets:
            speak(target, "One sentence that is not counted.")
        results = {}
        for title, rounds, clients in races(args):
            if rounds:
                results[title] = race(targets, rounds, clients)
                report(title, len(rounds[0][0]), results[title])
    print(f"\nSamples: {save('peers', results)}")


if __name__ == "__main__":
    main()
