"""IndexTTS-2 on an index-tts-vllm checkout: its class loaded once, its pipeline driven stage by stage.

The GPT of several utterances runs in vLLM at once, awaited in the engine's loop; everything else is tensor work on one
thread (indextts_stages.py), so that the loop is never held up. What a reference audio comes down to is kept.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import os
import queue
import random
import sys
import threading
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_engine import (
    NO_GPU,
    OUT_OF_MEMORY,
    Emotion,
    EngineDead,
    LoadError,
    Reference,
    Spoken,
    memory_advice,
    sees_gpu,
)
from vllm_plugin import CHECKOUT_VARIABLE, EMOTION_MODEL

KEPT_REFERENCES = 32  # conditionings; each takes up to 8 MB of GPU memory (30 s of audio)
KEPT_EMOTION_TEXTS = 256
CODES_PER_SECOND = 50  # 22,050 Hz / (1.72 frames of 256 samples)
LONGEST_S, LONGEST_S_PER_TOKEN = 5, 1  # more speech than 5 s and a second a text token is runaway generation
DROPPED_CODES = 2  # infer() drops the stop token and the code before it
EMOTIONS = ("happy", "angry", "sad", "fear", "hate", "low", "surprise", "neutral")
EMOTION_TOKENS = 256  # eight emotions with their shares take 80
NOTHING = Spoken(np.zeros(0, np.float32), truncated=False)
SOON, LATER = 0, 1  # what the GPT waits for goes before what makes sound of its codes
WEIGHTS = (
    "config.yaml", "bpe.model", "gpt.pth", "gpt/config.json", "s2mel.pth", "feat1.pt", "feat2.pt",
    "wav2vec2bert_stats.pt", "w2v-bert-2.0/config.json", "w2v-bert-2.0/preprocessor_config.json",
    "semantic_codec/model.safetensors", "campplus/campplus_cn_common.bin", "bigvgan/config.json",
    "bigvgan/bigvgan_generator.pt",
)  # fmt: skip
FOR_GOOD = "CUDA error"  # so begins what torch says of a fault after which no call to the GPU succeeds

log = logging.getLogger("speech.indextts")


class IndexTTSVoice:
    """The checkout's IndexTTS2, several utterances at once. `create` loads it; stages and engine may be scripted."""

    sample_rate = 22_050
    max_utterance_tokens = 120  # what infer() cuts text at; the GPT was trained on sentences
    speed_range = (1.0, 1.0)
    seeded = True  # alone: the company that a request keeps in a batch can change how a GPU rounds

    def __init__(self, stages: Any, emotion_model: Any = None):
        self._stages, self._emotion_model = stages, emotion_model
        self._worker = Worker(stages.prepare_thread)
        self._conditionings = Kept(KEPT_REFERENCES)
        self._emotions = Kept(KEPT_EMOTION_TEXTS)
        self._fault: str | None = None
        self.emotes_by_text = emotion_model is not None

    @classmethod
    async def create(
        cls,
        *,
        checkout: Path,
        model_dir: Path,
        fp16: bool,
        gpu_memory_utilization: float,
        qwenemo_gpu_memory_utilization: float,
    ) -> IndexTTSVoice:
        """Load the checkout's class in the running loop; raise LoadError.

        model_dir: relative to the checkout, or absolute.
        """
        weights = checkout / model_dir
        check_files(checkout, weights)
        shares = {"TTS_GPU_MEMORY_UTILIZATION": gpu_memory_utilization}
        if (weights / EMOTION_MODEL).is_dir():
            shares["TTS_QWENEMO_GPU_MEMORY_UTILIZATION"] = qwenemo_gpu_memory_utilization
        if not sees_gpu():
            raise LoadError(NO_GPU)
        module = import_checkout(checkout, emotes=len(shares) > 1)
        tts = construct(
            module.IndexTTS2,
            shares,
            model_dir=str(weights),
            is_fp16=fp16,
            gpu_memory_utilization=gpu_memory_utilization,
            qwenemo_gpu_memory_utilization=qwenemo_gpu_memory_utilization,
        )
        from indextts_stages import Stages  # torch and librosa, which only this engine has

        voice = cls(Stages(tts), tts.qwen_emo)
        if voice.emotes_by_text:
            tts.qwen_emo.model.generate = make_greedy(tts.qwen_emo.model.generate)
            await voice._read_emotion("平静")  # the first time compiles its template
        return voice

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the GPT reads for a text."""
        return len(self._stages.tokenize(text))

    async def speak(
        self, text: str, reference: Reference, *, emotion: Emotion, speed: float, seed: int | None
    ) -> Spoken:
        """Speak one utterance; empty where there is nothing to say. Raises EngineDead, or ValueError on a long text."""
        try:
            return await self._speak(text, reference, emotion, seed)
        except Exception as error:
            short = OUT_OF_MEMORY.search(str(error))
            if FOR_GOOD in str(error) and not short:
                self._fault = f"the GPU failed a stage: {str(error).splitlines()[0]}"
            if reason := self.ailment():
                raise EngineDead(reason) from error
            if short:
                raise RuntimeError(
                    f"the GPU's memory beside vLLM's share ran out: lower TTS_GPU_MEMORY_UTILIZATION. {error}"
                ) from error
            raise

    async def _speak(self, text: str, reference: Reference, emotion: Emotion, seed: int | None) -> Spoken:
        ids = await asyncio.to_thread(self._stages.tokenize, text)
        if not ids:
            return NOTHING
        if len(ids) > self._stages.max_text_tokens:
            raise ValueError(f"an utterance of {len(ids)} text tokens is over the {self._stages.max_text_tokens}")
        speaker = await self._condition(reference)
        feeling = await self._feeling(emotion, seed)
        line = await self._worker.run(SOON, self._stages.write, ids, speaker, *feeling)
        codes, truncated = await self._generate(line.prompt, len(ids), seed)
        if not codes:
            return NOTHING._replace(truncated=truncated)
        return Spoken(await self._worker.run(LATER, self._stages.sound, line, codes, seed), truncated)

    def ailment(self) -> str | None:
        """Return None, or what has failed for good: one of vLLM's engines, or the GPU in a stage."""
        if self._fault:
            return self._fault
        engines = {"GPT": self._stages.engine, "emotion model": getattr(self._emotion_model, "model", None)}
        dead = [name for name, engine in engines.items() if engine is not None and engine.errored]
        return f"vLLM's engine of the {dead[0]} has died" if dead else None

    def report(self) -> dict[str, Any]:
        """Return how often a reference audio was one already heard."""
        kept = self._conditionings
        return {"conditioning": {"hits": kept.hits, "misses": kept.misses, "kept": len(kept)}}

    def close(self) -> None:
        """End vLLM's processes and the worker thread."""
        self._worker.stop()
        self._stages.engine.shutdown()
        if self._emotion_model is not None:
            self._emotion_model.model.shutdown()

    async def _condition(self, reference: Reference) -> Any:
        """Return what a reference audio comes down to, kept by its content."""
        return await self._conditionings.get(
            reference.digest, lambda: self._worker.run(SOON, self._stages.condition, reference)
        )

    async def _feeling(self, emotion: Emotion, seed: int | None) -> tuple[Any, float, Any, random.Random | None]:
        """Return Stages.write's emotion: an audio's conditioning and weight, eight emotions, what picks examples."""
        if emotion.audio:
            return await self._condition(emotion.audio), emotion.weight, None, None
        vector = emotion.vector
        if emotion.text:
            read = await self._emotions.get(emotion.text, lambda: self._read_emotion(emotion.text))
            vector = tuple(share * emotion.weight for share in read)
        return None, 1.0, vector, random.Random(seed) if emotion.random else None

    async def _read_emotion(self, text: str) -> tuple[float, ...]:
        """Return the eight emotions that the emotion model reads out of words; raise ValueError without it."""
        if self._emotion_model is None:
            raise ValueError(f"emotion by text needs the folder {EMOTION_MODEL} in TTS_MODEL_DIR")
        shares, _ = await self._emotion_model.inference(text)
        return tuple(shares[name] for name in EMOTIONS)  # by name: one that it could not read comes last

    async def _generate(self, prompt: dict[str, Any], tokens: int, seed: int | None) -> tuple[list[int], bool]:
        """Have vLLM's GPT write the audio codes; tell whether they ran to the limit. Cancelling aborts it."""
        sampling = self._stages.sampling.clone()
        longest = round(CODES_PER_SECOND * (LONGEST_S + LONGEST_S_PER_TOKEN * tokens))
        sampling.max_tokens = min(longest, self._stages.max_codes)
        sampling.seed, sampling.detokenize = seed, False
        sampling.output_kind = type(sampling.output_kind).FINAL_ONLY  # one message an utterance, not one a code
        async for output in self._stages.engine.generate(prompt, sampling, uuid.uuid4().hex):
            codes = list(output.outputs[0].token_ids)
        return codes[:-DROPPED_CODES], codes[-1:] != [self._stages.stop_code]


class Worker:
    """One thread for what blocks; of the jobs that wait, the most urgent runs first."""

    def __init__(self, prepare: Callable[[], None]):
        self._jobs: queue.PriorityQueue = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._serve, args=(prepare,), name="stages", daemon=True).start()

    async def run(self, urgency: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function on the thread; cancelling skips it where it has not begun."""
        future: Future = Future()
        self._jobs.put((urgency, next(self._numbers), future, lambda: function(*args)))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let the thread end after what is waiting."""
        self._jobs.put((LATER + 1, next(self._numbers), None, None))

    def _serve(self, prepare: Callable[[], None]) -> None:
        prepare()
        while True:
            _, _, future, job = self._jobs.get()
            if future is None:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:
                    future.set_exception(error)
            del future, job  # or the last utterance's tensors would stay until the next


class Kept:
    """What was made last, by key, at most `size`; made once for all who ask at the same time."""

    def __init__(self, size: int):
        self._size, self._made = size, OrderedDict[Hashable, asyncio.Task]()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._made)

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `make` gives, or gave; a failure is not kept."""
        task = self._made.pop(key, None)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            self.misses += 1
            task = asyncio.ensure_future(make())
        else:
            self.hits += 1
        self._made[key] = task
        if len(self._made) > self._size:
            self._made.popitem(last=False)
        return await asyncio.shield(task)  # one who leaves does not take it from the others


# === Loading ===


def check_files(checkout: Path, weights: Path) -> None:
    """Raise LoadError where the checkout or a file of its weights is missing."""
    if not (checkout / "indextts" / "infer_vllm_v2.py").is_file():
        raise LoadError(
            f"{checkout} is no index-tts-vllm checkout (indextts/infer_vllm_v2.py is not in it): "
            "set TTS_INDEXTTS_DIR to its folder"
        )
    for name in WEIGHTS:
        if not (weights / name).is_file():
            raise LoadError(f"{weights / name} is missing: set TTS_MODEL_DIR to the folder of the IndexTTS-2 weights")


def import_checkout(checkout: Path, emotes: bool) -> Any:
    """Import the checkout's module, here and in the processes that vLLM spawns; raise LoadError."""
    sys.path.insert(0, str(checkout))
    os.environ[CHECKOUT_VARIABLE] = str(checkout)
    try:
        module = importlib.import_module("indextts.infer_vllm_v2")
        flow = importlib.import_module("indextts.s2mel.modules.flow_matching")
    except Exception as error:
        raise LoadError(
            f"the checkout in TTS_INDEXTTS_DIR cannot be imported: {error}. Install what it needs"
        ) from error
    # No prompt comes twice, and vLLM would keep 4 GiB of them.
    module.AsyncEngineArgs = partial(module.AsyncEngineArgs, mm_processor_cache_gb=0)
    flow.tqdm = iter  # no progress bar for each utterance in the log
    if not emotes:
        module.QwenEmotion = lambda *_, **__: None
    return module


def construct(make: Callable[..., Any], shares: dict[str, float], **arguments: Any) -> Any:
    """Make the checkout's object; raise LoadError, having let go of the processes that were started."""
    try:
        return make(**arguments)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold engines, whose processes end with them
        log.error("the checkout's IndexTTS2 did not load", exc_info=error)
        fault = f"IndexTTS2 of the checkout did not load from TTS_MODEL_DIR: {error}"
        advice = memory_advice(fault, settings_of(shares_at_fault(error, shares)))
    raise LoadError(f"{fault}. {advice}" if advice else fault)


def shares_at_fault(error: Exception, shares: dict[str, float]) -> dict[str, float]:
    """Return the share of the engine in whose start an error was raised, all of them where both had started."""
    passed = {frame.f_code.co_qualname.partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    if "AsyncLLM" not in passed:
        return shares
    name = "TTS_QWENEMO_GPU_MEMORY_UTILIZATION" if "QwenEmotion" in passed else "TTS_GPU_MEMORY_UTILIZATION"
    return {name: shares[name]}


def make_greedy(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Let the emotion model give its likeliest answer, the same each time, and not a long one."""

    def generate_greedily(prompt: Any, sampling_params: Any, request_id: str) -> Any:
        sampling_params.temperature, sampling_params.max_tokens = 0.0, EMOTION_TOKENS
        return generate(prompt, sampling_params, request_id)

    return generate_greedily


def settings_of(shares: dict[str, float]) -> str:
    """Name the memory settings with their values."""
    return " or ".join(f"{name}={share:g}" for name, share in shares.items())
