"""What driving an index-tts-vllm checkout stage by stage is worth, against its own infer(), on random weights.

    python benchmarks/indextts.py CHECKOUT WEIGHTS [--rounds 3]

WEIGHTS is a folder that tests/indextts/make_checkpoint.py made. Both sides sample the same codes, from the same seed,
and take turns. Random weights say nothing of speed: the figures are shares and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import sys
import time
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

from servers import ROOT
from tables import markdown, save

sys.path.insert(0, str(ROOT))

from app import create_app
from indextts_voice import IndexTTSVoice
from reference_audio import load_reference
from settings import Settings
from vllm_engine import Emotion, Reference

SPEAKER = ROOT / "examples" / "voice_01.wav"
SENTENCES = (
    "大家好，欢迎收看本期节目。",
    "今天的天气真好，我们去散步吧。",
    "人工智能正在改变我们的世界。",
    "请问这个东西一共要多少钱。",
)
STAGES = ("tokenize", "condition", "write", "sound")
SEED = 5
Row = list[str]


class Meter:
    """When each stage of the voice ran, and how long each turn of ours in the loop was."""

    def __init__(self, voice: IndexTTSVoice):
        self.spans: list[tuple[str, float, float]] = []
        self.turns: list[tuple[float, float]] = []  # seconds on the clock and of this thread's computing
        for name in STAGES:
            setattr(voice._stages, name, self._timed(name, getattr(voice._stages, name)))
        voice._generate = self._awaited("generate", voice._generate)

    def _timed(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.spans.append((name, began, time.perf_counter()))

        return timed

    def _awaited(self, name: str, function: Callable) -> Callable:
        async def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return await function(*args)
            finally:
                self.spans.append((name, began, time.perf_counter()))

        return timed

    @types.coroutine
    def stepped(self, work: Coroutine) -> Generator[Any, Any, Any]:
        """Run a coroutine and time each of its turns in the loop, vLLM's part of them included."""
        while True:
            clock, computing = time.perf_counter(), time.thread_time()
            try:
                awaited = work.send(None)
            except StopIteration as done:
                return done.value
            finally:
                self.turns.append((time.perf_counter() - clock, time.thread_time() - computing))
            yield awaited

    def busy(self, *names: str) -> float:
        """Return the seconds in which at least one of these stages ran."""
        total, until = 0.0, 0.0
        for began, ended in sorted((began, ended) for name, began, ended in self.spans if name in names):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

    def clear(self) -> None:
        """Forget what was measured."""
        self.spans.clear()
        self.turns.clear()


class Bench:
    """One loaded checkout, spoken with in both ways."""

    def __init__(self, checkout: Path, weights: Path):
        settings = Settings(engine="indextts", indextts_dir=checkout, model_dir=weights, cache_bytes=0)
        app = create_app(settings)
        app.extensions["speech"].load()
        self.client, self.owner, self.heard = app.test_client(), app.extensions["speech"].engine._owner, 0
        self.voice: Any = self.owner.voice
        self.tts, self.meter = self.voice._stages._tts, Meter(self.voice)
        self.tts.gpt.sampling_params.seed = SEED
        self.codes: list[tuple[int, ...]] = []
        self.voice._stages.engine.generate = self._noting(self.voice._stages.engine.generate)

    def _noting(self, generate: Callable) -> Callable:
        """Note the audio codes that vLLM's GPT writes, for whoever asked."""

        async def noting(*args: Any, **options: Any) -> AsyncIterator[Any]:
            async for output in generate(*args, **options):
                yield output
            self.codes.append(tuple(output.outputs[0].token_ids))

        return noting

    def run(self, work: Coroutine) -> tuple[Any, float]:
        """Run a coroutine in the loop; return what it gives and the seconds it took."""
        began = time.perf_counter()
        given = asyncio.run_coroutine_threadsafe(work, self.owner._loop).result()
        return given, time.perf_counter() - began

    def post(self, text: str) -> float:
        """Ask the service for a text as a client does; return the seconds it took."""
        began = time.perf_counter()
        answer = self.client.post("/v1/audio/speech", json={"model": "m", "input": text, "seed": SEED})
        if answer.status_code != 200:
            raise ValueError(answer.get_data(as_text=True))
        return time.perf_counter() - began

    def reference(self, seen: bool) -> Reference:
        """Return the speaker's audio, as one never heard before unless `seen`."""
        self.heard += not seen
        return load_reference(SPEAKER)._replace(digest=str(self.heard))

    async def speak(self, texts: tuple[str, ...], reference: Reference) -> list[Any]:
        """Speak sentences side by side, as a request's utterances are."""
        work = [self.voice.speak(text, reference, emotion=Emotion(), speed=1.0, seed=SEED) for text in texts]
        return await asyncio.gather(*map(self._step, work))

    async def _step(self, work: Coroutine) -> Any:
        return await self.meter.stepped(work)

    async def infer(self, texts: tuple[str, ...]) -> Any:
        """Speak the same with the checkout's infer(); raise ValueError where it would cut the text elsewhere."""
        text, longest = "".join(texts), max(map(self.voice.count_tokens, texts))
        tokenizer = self.tts.tokenizer
        if (pieces := len(tokenizer.split_sentences(tokenizer.tokenize(text), longest))) != len(texts):
            raise ValueError(f"infer() would speak {len(texts)} sentences in {pieces} pieces")
        return await self.tts.infer(str(SPEAKER), text, None, max_text_tokens_per_sentence=longest)


def conditioning_rows(bench: Bench, rounds: int) -> list[Row]:
    """Return the conditioning's share of a voice's first request and of its second."""
    shares: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for seen in shares:
            bench.meter.clear()
            _, seconds = bench.run(bench.speak(SENTENCES[:1], bench.reference(seen)))
            shares[seen].append(bench.meter.busy("condition") / seconds)
    first, second = (f"{statistics.median(found):.1%}" for found in shares.values())
    return [["conditioning, share of a voice's first request", first, "-"],
            ["conditioning, share of its second request", second, "0.0%"]]  # fmt: skip


def overhead_row(bench: Bench, rounds: int) -> Row:
    """Return the share of a request alone, from its JSON to its WAV, in which no stage ran."""
    shares = []
    for _ in range(rounds):
        bench.meter.clear()
        seconds = bench.post(SENTENCES[0])
        shares.append(1 - bench.meter.busy(*STAGES, "generate") / seconds)
    return ["our time outside the stages, share of a request", f"{statistics.median(shares):.2%}", "at most 3%"]


def sentences_rows(bench: Bench, rounds: int) -> list[Row]:
    """Return the time of four sentences against infer()'s, for a voice seen and for a new one; the sides take turns.

    infer() listens to the voice every time. How many of the sentences had the same codes on both sides comes last.
    """
    ratios: dict[bool, list[float]] = {True: [], False: []}
    equal = total = 0
    for _ in range(rounds):
        bench.codes.clear()
        _, theirs = bench.run(bench.infer(SENTENCES))
        expected = Counter(bench.codes)
        for seen, found in ratios.items():
            bench.codes.clear()
            _, ours = bench.run(bench.speak(SENTENCES, bench.reference(seen)))
            found.append(ours / theirs)
            equal, total = equal + (Counter(bench.codes) & expected).total(), total + len(SENTENCES)
    told = (f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in ratios.values())
    names = (f"four sentences against infer(), voice {kind}" for kind in ("already heard", "new"))
    rows = [[name, figure, "at most 0.85"] for name, figure in zip(names, told, strict=True)]
    return [*rows, ["sentences with the same codes on both sides", f"{equal} of {total}", "all"]]


def blocking_rows(bench: Bench) -> list[Row]:
    """Return the longest turn in the loop since the last clear()."""
    clock, computing = (max(turn[part] for turn in bench.meter.turns) * 1000 for part in (0, 1))
    told = "longest turn in the loop, vLLM's own part included, ms"
    return [
        [f"{told}: computing", f"{computing:.1f}", "under 50"],
        [f"{told}: by the clock", f"{clock:.1f}", "under 50"],
    ]


def measure(bench: Bench, rounds: int) -> list[Row]:
    """Return all rows."""
    bench.run(bench.speak(SENTENCES, bench.reference(seen=False)))  # the first time of everything is slower
    bench.run(bench.infer(SENTENCES[:1]))
    bench.post(SENTENCES[0])
    rows = [*conditioning_rows(bench, rounds), overhead_row(bench, rounds)]
    bench.meter.clear()
    return [*rows, *sentences_rows(bench, rounds), *blocking_rows(bench)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    bench = Bench(given.checkout.resolve(), given.weights.resolve())
    try:
        rows = [["weights", given.weights.name, "-"], *measure(bench, given.rounds)]
    finally:
        bench.owner.close()
    print(markdown(["figure", "measured", "to reach"], rows))
    print(f"rows saved in {save('indextts', rows)}")


if __name__ == "__main__":
    main()
