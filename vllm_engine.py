"""What the two vLLM engines share: what they are asked and answer, and the owner in whose thread they live.

A vLLM engine belongs to one asyncio loop. EngineLoop is that loop's thread: the engine is built inside it, other
threads hand coroutines over and wait with a deadline, and the engine's processes are watched, so that a dead one is
told within a second and none is left behind. omni_voice.py and indextts_voice.py are what it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

HERE = Path(__file__).resolve().parent
PLUGIN = "speech_server"  # the name of vllm_plugin.py's entry point in speech_server.dist-info
WATCH_S = 0.5  # between two looks at the engine's processes
NO_GPU = "torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or set TTS_ENGINE=embedded"
OUT_OF_MEMORY = re.compile("out of memory|free memory|ALLOC_FAILED", re.I)
IN_THE_LOG = "See root cause above"  # all that vLLM hands on of what went wrong in a process of its own
SHORT_MEMORY = {  # what is said where an engine does not start, and what to do
    re.compile("no available memory|kv cache", re.I): "Raise {0}",
    OUT_OF_MEMORY: "Lower {0}, or free some",
    re.compile(IN_THE_LOG): (
        "Where the log above says 'No available memory', raise {0}; where 'out of memory' or 'Free memory', lower {0}"
    ),
}
BECOMING_S = 0.1  # between fork and exec
CLOSE_TIMEOUT_S = 10  # for the engine to let go of its processes before they are killed
PASSING = (b"resource_tracker", b"audio_decoder.py")  # processes that are not the engine's: Python's bookkeeper, ours

log = logging.getLogger("speech.vllm")


class Reference(NamedTuple):
    """Reference audio, decoded and checked: float32 mono samples (-1 to 1), rate in Hz, sha256 of both."""

    samples: np.ndarray
    sample_rate: int
    digest: str


@dataclass(frozen=True)
class Emotion:
    """How to speak; nothing given: as the reference audio of the voice does.

    weight: share of the emotion audio or text, 0 to 1.6. vector: happy, angry, sad, fear, hate, low, surprise, neutral.
    """

    audio: Reference | None = None
    weight: float = 1.0
    vector: tuple[float, ...] | None = None
    text: str | None = None
    random: bool = False


class Spoken(NamedTuple):
    """An utterance: float32 samples (-1 to 1) at the voice's rate, and whether it ran into the length limit."""

    samples: np.ndarray
    truncated: bool


class VoiceModel(Protocol):
    """IndexTTS in a loop: OmniVoice and IndexTTSVoice, made by awaiting their `create`."""

    sample_rate: int  # Hz
    max_utterance_tokens: int
    speed_range: tuple[float, float]  # speeds it speaks by itself
    emotes_by_text: bool  # the model that reads an emotion out of words is there
    seeded: bool  # the same seed gives the same samples

    def count_tokens(self, text: str) -> int:
        """Return how many text tokens an utterance has; any thread may ask."""

    async def speak(
        self, text: str, reference: Reference, *, emotion: Emotion, speed: float, seed: int | None
    ) -> Spoken:
        """Speak one utterance; cancelling it aborts it in the engine."""

    def ailment(self) -> str | None:
        """Return None, or why the engine is of no more use."""

    def report(self) -> dict[str, Any]:
        """Return what /health should show beside the rest."""

    def close(self) -> None:
        """Let go of the engine's processes."""


class LoadError(RuntimeError):
    """The engine did not load; the message is for the operator and names the setting to look at."""


class EngineDead(RuntimeError):
    """The engine is gone; the message says why."""


class DeadlinePassed(RuntimeError):
    """An utterance took longer than its deadline; its work was cancelled."""


class GivenUp(RuntimeError):
    """An utterance was cancelled because nobody wants it any more."""


class EngineLoop:
    """The thread that owns a vLLM engine and its asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._running: set[Future] = set()
        self._processes: dict[int, str] = {}
        self._ailment: str | None = None
        self._closing = threading.Event()
        self.voice: VoiceModel | None = None

    @property
    def in_flight(self) -> int:
        """Utterances in the engine."""
        return len(self._running)

    def load(self, create: Callable[[], Coroutine[Any, Any, VoiceModel]]) -> VoiceModel:
        """Start the thread, build the voice inside its loop and watch its processes; raise what `create` raises.

        What it has started by then is ended.
        """
        prepare_environment()
        before = set(descendants(os.getpid()))
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()
        try:
            self.voice = asyncio.run_coroutine_threadsafe(create(), self._loop).result()
        finally:
            started = filter(is_alive, set(descendants(os.getpid())) - before)  # a dead one may have changed parents
            self._processes = {pid: name for pid in started if (name := vital_name(pid))}
            if self.voice is None:
                end_processes(self._processes, CLOSE_TIMEOUT_S)
                self._processes = {}
        log.info("engine processes: %s", self._processes or "none")
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()
        return self.voice

    def run(
        self, work: Coroutine[Any, Any, Spoken], timeout_s: float, on_cancel: Callable[[Callable[[], Any]], None]
    ) -> Spoken:
        """Run a coroutine in the loop; raise EngineDead, DeadlinePassed, GivenUp or what it raises.

        on_cancel: is given what to call when nobody wants the result any more.
        """
        if reason := self.ailment():
            work.close()
            raise EngineDead(reason)
        given_up = threading.Event()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        with self._lock:
            self._running.add(future)
        if self.ailment():  # it died in between
            future.cancel()
        try:
            on_cancel(lambda: (given_up.set(), future.cancel()))
            return future.result(timeout_s)
        except FutureTimeout:
            if future.done():
                raise  # the work's own TimeoutError
            raise DeadlinePassed(f"the engine did not speak an utterance within {timeout_s:g} s") from None
        except CancelledError:
            if self._ailment:
                raise EngineDead(self._ailment) from None
            if not given_up.is_set():
                raise RuntimeError("the engine cancelled an utterance that was still wanted") from None
            raise GivenUp from None
        finally:
            future.cancel()  # waiting alone would leave the work in the engine
            with self._lock:
                self._running.discard(future)

    def ailment(self) -> str | None:
        """Return None, or why the engine is of no more use."""
        return self._ailment

    def close(self) -> None:
        """Let go of the engine; kill those of its processes that have not ended within CLOSE_TIMEOUT_S."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._fail("the engine is shut down")
        if self.voice and self._thread.is_alive():  # one that has ended would never answer
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(call(self.voice.close), self._loop).result(CLOSE_TIMEOUT_S)
        end_processes(self._processes, CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(ImportError):
            import torch

            # Once, here: no_grad() held across an await would give one request's mode to another.
            torch.set_grad_enabled(False)
        self._loop.run_forever()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S):
            gone = [f"{name} ({pid})" for pid, name in self._processes.items() if not is_alive(pid)]
            reason = f"the engine's process {gone[0]} has ended" if gone else self.voice and self.voice.ailment()
            if not self._thread.is_alive():
                reason = "the engine's thread has ended"
            if reason:
                self._fail(reason)
                return

    def _fail(self, reason: str) -> None:
        """From now on the engine is dead: what runs in it is answered at once."""
        self._ailment = reason
        with self._lock:
            running = list(self._running)
        for future in running:
            future.cancel()


async def call(function: Callable[[], Any]) -> Any:
    """Call a plain function in the loop's thread."""
    return function()


def prepare_environment() -> None:
    """Let spawned engine processes find vllm_plugin.py, and keep vLLM from forking a process that has threads."""
    paths = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if plugins := os.environ.get("VLLM_PLUGINS"):  # a list of the only ones to load
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), PLUGIN]))


def memory_advice(fault: str, setting: str) -> str | None:
    """Return what to do with a share of the GPU's memory where a fault is, or may be, for want of it."""
    return next((advice.format(setting) for sign, advice in SHORT_MEMORY.items() if sign.search(fault)), None)


def sees_gpu() -> bool:
    """Tell whether torch sees a GPU, or vLLM is its own CPU build, which needs none.

    True where either is missing, too: that is for the engine's own import to tell.
    """
    try:
        import torch
        from vllm.platforms import current_platform
    except ImportError:
        return True
    return torch.cuda.is_available() or current_platform.is_cpu()


def gpus() -> list[dict[str, Any]]:
    """Return each GPU's name, total and free memory in MiB, as nvidia-smi tells; none where it does not."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        rows = [[part.strip() for part in line.rsplit(",", 2)] for line in lines]
        return [{"name": name, "total_mib": int(total), "free_mib": int(free)} for name, total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


# === Processes (Linux) ===


def children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, theirs, and so on."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Tell whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def vital_name(pid: int, once_more: bool = True) -> str | None:
    """Return a process's name, None for one without which an engine goes on."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
    if command == Path("/proc/self/cmdline").read_bytes():  # it is about to become another program
        time.sleep(BECOMING_S)
        return vital_name(pid, once_more=False) if once_more and is_alive(pid) else name
    return None if any(each in command for each in PASSING) else name


def end_processes(pids: dict[int, str], timeout_s: float) -> None:
    """End processes by their ids: TERM, and KILL for those that are still there at the deadline."""
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 1.0)):
        deadline = time.monotonic() + patience_s
        for pid in filter(is_alive, pids):
            log.info("sending %s to %s (%d)", number.name, pids[pid], pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
