"""IndexTTS-2 and IndexTTS-2.5 with their official weights, on vLLM through the package vllm-omni (0.30).

Two stages, each a process: the talker turns text and voice into audio codes, the decoder turns codes into audio. An
error in either ends it for good, so whatever is known to cause one is kept from it here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from omni_model import (
    Kind,
    check_weights,
    complete,
    explain,
    fetched,
    find,
    find_kind,
    find_model,
    write_profile,
)
from reference_audio import HEARD_S
from vllm_engine import NO_GPU, Emotion, EngineDead, LoadError, Reference, Spoken, sees_gpu
from vllm_plugin import EMOTION_MODEL, OMNI_VARIABLE

SAMPLE_RATE = 22_050  # Hz, of both models
MAX_UTTERANCE_TOKENS = 120  # IndexTTS's own limit of a segment; about 600 end the talker
MIN_CODES = 8  # an utterance without audio codes ends the decoder
RUNAWAY_S, RUNAWAY_S_PER_TOKEN = 4.0, 1.0  # speech that lasts longer is not of this text
MAX_EMOTION = 1.2  # more of one emotion ends the talker
START_CODE = 8192  # says "audio begins"; the decoder has no sound for it, and ends
DEPLOYED_SHARE = "gpu_memory_utilization in TTS_OMNI_DEPLOY_CONFIG"
FETCH_S = 3600  # for what a start takes from the hub; vLLM-Omni's own 300 s for a stage are soon over
CACHED_TEXTS = 1024  # texts remembered as written out and counted: first split by that, then spoken

log = logging.getLogger("speech.omni")


class OmniVoice:
    """A loaded IndexTTS-2 or 2.5; lives in the asyncio loop that made it."""

    sample_rate = SAMPLE_RATE
    max_utterance_tokens = MAX_UTTERANCE_TOKENS
    seeded = True  # but for Emotion.random, for which the model has no seed

    def __init__(self, folder: Path, kind: Kind, engine: Any, scratch: tempfile.TemporaryDirectory, deployed: bool):
        self._deployed = deployed  # by TTS_OMNI_DEPLOY_CONFIG
        self._folder, self._kind, self._engine, self._scratch = folder, kind, engine, scratch
        self.speed_range = kind.speed_range
        self.emotes_by_text = bool(find(folder, f"{EMOTION_MODEL}/config.json"))
        self._prompt_tokens = lru_cache(CACHED_TEXTS)(self._count_prompt_tokens)

    @classmethod
    async def create(cls, model: str, deploy_config: Path | None, gpu_memory_utilization: float) -> OmniVoice:
        """Load a model folder or hub id; raise LoadError."""
        folder = find_model(model)
        kind = find_kind(folder)
        check_weights(folder, kind)
        if deploy_config and not deploy_config.is_file():
            raise LoadError(f"TTS_OMNI_DEPLOY_CONFIG: there is no file {deploy_config}")
        if not sees_gpu():
            raise LoadError(NO_GPU)
        build = import_engine()
        load_grammars()
        scratch = tempfile.TemporaryDirectory(prefix="indextts-deploy-")
        folder = complete(folder, kind, Path(scratch.name))
        profile = deploy_config or write_profile(Path(scratch.name), kind, gpu_memory_utilization)
        os.environ[OMNI_VARIABLE] = "1"
        patience = {"init_timeout": FETCH_S, "stage_init_timeout": FETCH_S} if fetched(folder) else {}
        try:
            engine = build(model=str(folder), deploy_config=str(profile), trust_remote_code=True, **patience)
        except Exception as error:
            setting = DEPLOYED_SHARE if deploy_config else "TTS_GPU_MEMORY_UTILIZATION"
            raise LoadError(explain(error, fetched(folder), setting)) from error
        return cls(folder, kind, engine, scratch, deployed=bool(deploy_config))

    def count_tokens(self, text: str) -> int:
        """Return the text tokens of an utterance as the model reads it, numbers written out."""
        return self._prompt_tokens(write_out(text)) - self._kind.prompt_overhead if text.strip() else 0

    async def speak(
        self, text: str, reference: Reference, *, emotion: Emotion, speed: float, seed: int | None
    ) -> Spoken:
        """Speak one utterance; raise ValueError where it would end the engine, EngineDead where it is dead."""
        tokens = self.count_tokens(text)
        if not 0 < tokens <= self.max_utterance_tokens:
            raise ValueError(f"an utterance has 1 to {self.max_utterance_tokens} tokens, not {tokens}")
        written = write_out(text)
        prompt = {
            "prompt_token_ids": [1] * self._prompt_tokens(written),  # their number is all that counts
            "additional_information": await asyncio.to_thread(  # or the loop would stand still for 20 ms
                self._conditions, written, reference, emotion, speed
            ),
        }
        return heard(await self._generate(prompt, self._sampling(tokens, seed)))

    def ailment(self) -> str | None:
        """Return None, or which part of the engine is dead."""
        from vllm_omni.entrypoints.omni_base import OmniBase

        try:
            OmniBase.check_health(self._engine)  # AsyncOmni's own says the same, but to who awaits it
        except Exception as error:
            return f"vLLM-Omni: {error}"
        return None

    def report(self) -> dict[str, Any]:
        """Which of the two models this is; the share is not the setting's where a deploy file has its own."""
        return {"model_kind": self._kind.name, **({"gpu_memory_utilization": None} if self._deployed else {})}

    def close(self) -> None:
        """End the engine's processes."""
        try:
            self._engine.shutdown()
        finally:
            self._scratch.cleanup()

    def _count_prompt_tokens(self, written: str) -> int:
        """Ask the engine's own tokenizer how long the prompt must be: one too many or too few ends the talker."""
        from vllm_omni.model_executor.models.indextts2.prompt_utils import estimate_indextts2_prefill_prompt_len

        return estimate_indextts2_prefill_prompt_len(
            str(self._folder), written, model_type=self._kind.model_type, lang=language(written),
            text_normalization=False,
        )  # fmt: skip

    def _conditions(self, written: str, reference: Reference, emotion: Emotion, speed: float) -> dict[str, list]:
        """Return what shapes an utterance, each value in a list of one, as the engine wants it.

        voice_name and emo_voice_name are the keys of its caches: the digest, so that two audios never mix.
        """
        given = {
            "text": written,
            "voice": heard_by_model(reference),
            "voice_name": reference.digest,
            "emo_alpha": emotion.weight,
            "use_random": emotion.random,
        }
        if self._kind.model_type == "indextts2_5":
            given |= {"lang": language(written), "text_normalization": False, "duration_factor": 1 / speed}
        if emotion.vector:
            given["emo_vector"] = [min(max(float(value), 0.0), MAX_EMOTION) for value in emotion.vector]
        elif emotion.text and self.emotes_by_text:
            given |= {"use_emo_text": True, "emo_text": emotion.text}
        elif emotion.audio:
            given |= {"emo_audio": heard_by_model(emotion.audio), "emo_voice_name": emotion.audio.digest}
        return {name: [value] for name, value in given.items()}

    def _sampling(self, tokens: int, seed: int | None) -> list[Any]:
        """Return the profile's sampling of both stages, bounded so that the decoder gets what it can speak."""
        talker, decoder = (params.clone() for params in self._engine.default_sampling_params_list)
        longest = self._kind.codes_per_s * (RUNAWAY_S + RUNAWAY_S_PER_TOKEN * tokens)
        talker.max_tokens = min(talker.max_tokens, int(longest))
        talker.min_tokens = min(MIN_CODES, talker.max_tokens)
        talker.logit_bias = {START_CODE: -100.0}
        talker.seed = seed
        return [talker, decoder]

    async def _generate(self, prompt: dict[str, Any], sampling: list[Any]) -> Any:
        """Return the engine's last output; it aborts the request where this is cancelled."""
        from vllm.v1.engine.exceptions import EngineDeadError

        outputs = self._engine.generate(
            prompt=prompt, request_id=uuid.uuid4().hex, sampling_params_list=sampling, output_modalities=["audio"]
        )
        try:
            return [output async for output in outputs][-1]
        except EngineDeadError as error:
            raise EngineDead(self.ailment() or str(error)) from None


def heard(output: Any) -> Spoken:
    """Return what came out: the audio, and whether the talker had to be stopped."""
    samples = output.multimodal_output["audio"].float().cpu().numpy().reshape(-1)
    return Spoken(samples, output.metrics["stage_metrics"]["0"]["finish_reason"] == "length")


def heard_by_model(reference: Reference) -> list[Any]:
    """Return reference audio as the engine wants it: samples in a list, and their rate in Hz."""
    samples = reference.samples[: HEARD_S * reference.sample_rate]
    return [soxr.resample(samples, reference.sample_rate, SAMPLE_RATE).astype(np.float32).tolist(), SAMPLE_RATE]


# === Text ===

SCRIPTS = {  # the first that is found; IndexTTS-2.5 speaks these and, where none is, English
    "ja": re.compile("[\u3040-\u30ff]"),
    "zh": re.compile("[\u3400-\u9fff]"),
    "ar": re.compile("[\u0600-\u06ff]"),
    "es": re.compile(r"[ñ¿¡]|(?:\b(?:el|los|las|que|una?|es|por|para|del|est[eoaá]|muy|pero|con|y)\b.*?){2}", re.I),
}


def language(text: str) -> str:
    """Return the language of an utterance as IndexTTS-2.5 calls it: ja, zh, ar, es or en."""
    return next((name for name, script in SCRIPTS.items() if script.search(text)), "en")


@lru_cache(CACHED_TEXTS)
def write_out(text: str) -> str:
    """Return text with its numbers and signs in words, by the grammars that both models were trained with.

    vLLM-Omni does it for IndexTTS-2.5 alone, and between two steps of the talker, which hold all other requests up.
    """
    from vllm_omni.model_executor.models.indextts2 import text_processing_v2_5 as grammars

    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,234 would be read as one, two hundred thirty-four
    cleaned = grammars.clean_indextts25_text(text)
    try:
        return grammars._normalize_with_official_backend(cleaned, language(cleaned)).strip() or cleaned
    except Exception:
        log.exception("a text of %d characters is spoken as it stands", len(text))
        return cleaned


# === Loading ===


def import_engine() -> Callable[..., Any]:
    """Return vLLM-Omni's engine class; raise LoadError where it is not installed."""
    try:
        from vllm_omni.entrypoints.async_omni import AsyncOmni
    except ImportError as error:
        raise LoadError(f"TTS_ENGINE=omni needs the packages vllm and vllm-omni: {error}") from error
    logging.getLogger("vllm_omni.outputs.output_processor").addFilter(is_news)
    return AsyncOmni


def is_news(record: logging.LogRecord) -> bool:
    """Tell a log record from the traceback that vllm-omni writes, harmlessly, for each audio code of IndexTTS-2."""
    return "consolidating multimodal tensors" not in record.getMessage()


def load_grammars() -> None:
    """Load what writes numbers out, which would hold up the first request; raise LoadError where it is missing."""
    from vllm_omni.model_executor.models.indextts2.text_processing_v2_5 import normalize_indextts25_text

    try:
        for text, lang in (("1", "en"), ("一", "zh"), ("あ", "ja")):
            normalize_indextts25_text(text, lang=lang)
    except (ImportError, RuntimeError) as error:
        raise LoadError(f"TTS_ENGINE=omni needs the packages of vllm-omni[indextts2] as well: {error}") from error
