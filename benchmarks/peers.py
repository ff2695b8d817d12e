"""Race this server against kokoro-cli and fastkokoro: same weights, same styles, same text, interleaved in one run.

Each peer gets a virtual environment of its own under ${XDG_CACHE_HOME:-~/.cache}/indextts-openai-server/peers, made
once. Both read the weights from the parts that this repository installs, and a voices file whose tables are the
English styles of voices.json under the ids of voices.json: `alloy` is the same voice in all three.

    python benchmarks/peers.py [--rounds 5] [--long-rounds 2]

How each is asked: this server for pcm, which it sends as it is made; fastkokoro for pcm with its field
"stream": true, its fastest way to sound; kokoro-cli, which has no pcm and answers whole, for wav.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from bench import PARAGRAPH, STORY, Sample, Target, markdown, save, speak, spread
from servers import RESULTS, ROOT, Server, free_port, leave_on_term, own_server

sys.path.insert(0, str(ROOT))

from app import Settings, Voices
from embedded_voice import Styles, read_weights

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "indextts-openai-server" / "peers"
MODEL = CACHE / "models" / "kokoro-v1.0.int8.onnx"
VOICES = CACHE / "models" / "voices-v1.0.bin"
OURS = "this server"

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


def fastkokoro() -> tuple[Server, Target]:
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
    }
    server = Server([str(python.with_name("fastkokoro"))], port, env, RESULTS / "fastkokoro.log")
    return server, Target("fastkokoro 0.7.0", server.url, extra={"stream": True})


def race(targets: list[Target], text: str, rounds: int) -> dict[str, list[Sample]]:
    """Ask A B C, then A B C again, so that what else the machine does strikes all alike."""
    samples: dict[str, list[Sample]] = {target.name: [] for target in targets}
    for number in range(rounds):
        for target in targets:
            samples[target.name].append(speak(target, text))
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


COLUMNS: dict[str, Callable[[Sample], float | None]] = {
    "audio s per s": lambda sample: sample.speed,
    "first byte s": lambda sample: sample.first_byte_s,
    "first 200 ms s": lambda sample: sample.first_audio_s,
    "whole s": lambda sample: sample.total_s,
    "audio s": lambda sample: sample.audio_s,
}
RATIOS = {
    "audio per second": (lambda ours, peer: ours.speed / peer.speed),
    "first byte sooner": (lambda ours, peer: peer.first_byte_s / ours.first_byte_s),
    "first 200 ms sooner": (lambda ours, peer: peer.first_audio_s / ours.first_audio_s),
    "whole answer sooner": (lambda ours, peer: peer.total_s / ours.total_s),
}


def ratio_rows(samples: dict[str, list[Sample]]) -> list[list[str]]:
    """Return, round by round and then as medians, by how much this server beats each peer (above 1: it does)."""
    return [
        [peer, *(spread(map(ratio, samples[OURS], samples[peer])) for ratio in RATIOS.values())]
        for peer in samples
        if peer != OURS
    ]


def report(title: str, text: str, samples: dict[str, list[Sample]]) -> None:
    """Print one text's two tables: each server's figures, and this server's lead."""
    rows = [[name, *(spread(map(of, runs)) for of in COLUMNS.values())] for name, runs in samples.items()]
    rounds = len(samples[OURS])
    print(f"\n{title}: {len(text)} characters, {rounds} rounds, median (least to most)\n")
    print(markdown(["server", *COLUMNS], rows))
    print(f"\n{OURS} against\n")
    print(markdown(["peer", *RATIOS], ratio_rows(samples)), flush=True)
    best = max((runs for name, runs in samples.items() if name != OURS), key=median_speed)
    print(f"\n{median_speed(samples[OURS]) / median_speed(best):.2f} times the audio per second of the faster peer, "
          f"{best[0].target}.")  # fmt: skip


def median_speed(samples: list[Sample]) -> float:
    """Return the median of audio seconds per second."""
    return statistics.median(sample.speed for sample in samples)


def main() -> None:
    """Install, start, race, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="for the paragraph")
    parser.add_argument("--long-rounds", type=int, default=2, help="for the minute of speech")
    args = parser.parse_args()
    leave_on_term()
    write_models()
    ours = own_server()
    entrants = [(ours, Target(OURS, ours.url)), kokoro_cli(), fastkokoro()]
    with ExitStack() as running:
        for server, target in entrants:
            running.enter_context(server)
            speak(target, "One sentence that is not counted.")
        targets = [target for _, target in entrants]
        results = {}
        for title, text, rounds in [("A paragraph", PARAGRAPH, args.rounds), ("A minute", STORY, args.long_rounds)]:
            if rounds:
                results[title] = race(targets, text, rounds)
                report(title, text, results[title])
    print(f"\nSamples: {save('peers', results)}")


if __name__ == "__main__":
    main()
