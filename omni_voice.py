"""IndexTTS-2 and IndexTTS-2.5 with their official weights, on vLLM through the package vllm-omni (0.30).

Two stages, each a process: the talker turns text and voice into audio codes, the decoder turns codes into audio. An
error in either ends it for good, so whatever is known to cause one is kept from it here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from vllm_engine import Emotion, EngineDead, Reference, Spoken

SAMPLE_RATE = 22_050  # Hz, of both models
REFERENCE_S = 15  # the models hear no more of a reference audio
MAX_UTTERANCE_TOKENS = 120  # IndexTTS's own limit of a segment; about 600 end the talker
MIN_CODES = 8  # an utterance without audio codes ends the decoder
RUNAWAY_S, RUNAWAY_S_PER_TOKEN = 4.0, 1.0  # speech that lasts longer is not of this text
MAX_EMOTION = 1.2  # more of one emotion ends the talker
START_CODE = 8192  # says "audio begins"; the decoder has no sound for it, and ends
TALKER_SHARE = 0.65  # of the GPU memory: it holds w2v-bert and the KV cache, the decoder only itself
EMOTION_MODEL = "qwen0.6bemo4-merge"
log = logging.getLogger("speech.omni")
CACHED_TEXTS = 1024  # texts remembered as written out and counted: first split by that, then spoken


class LoadError(RuntimeError):
    """The engine did not start; the message says which setting to change."""


@dataclass(frozen=True)
class Kind:
    """What tells the two models apart; overrides: of the deploy profile, by stage."""

    name: str
    model_type: str
    architecture: str
    weights: tuple[str, ...]
    prompt_overhead: int  # prompt tokens that are not text: voice, start and stop
    codes_per_s: int
    speed_range: tuple[float, float]
    overrides: tuple[dict[str, Any], dict[str, Any]]


COMMON_WEIGHTS = ("gpt.pth", "s2mel.pth", "wav2vec2bert_stats.pt", "feat1.pt", "feat2.pt")
WHOLE_PREFILL = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2560}  # the talker takes a prompt in one
KINDS = {
    "indextts2": Kind(
        "IndexTTS-2", "indextts2", "IndexTTS2TalkerForConditionalGeneration", ("bpe.model", *COMMON_WEIGHTS),
        prompt_overhead=37, codes_per_s=50, speed_range=(1.0, 1.0),
        overrides=(WHOLE_PREFILL, {"max_num_seqs": 1}),  # two at once end its decoder
    ),
    "indextts2_5": Kind(
        "IndexTTS-2.5", "indextts2_5", "IndexTTS25TalkerForConditionalGeneration",
        ("multilingual_zh_ja_yue_char_del.tiktoken", "codec.pth", *COMMON_WEIGHTS),
        prompt_overhead=6, codes_per_s=25, speed_range=(0.5, 2.0), overrides=(WHOLE_PREFILL, {}),
    ),
}  # fmt: skip


class OmniVoice:
    """A loaded IndexTTS-2 or 2.5; lives in the asyncio loop that made it."""

    sample_rate = SAMPLE_RATE
    max_utterance_tokens = MAX_UTTERANCE_TOKENS
    seeded = True  # but for Emotion.random, for which the model has no seed
    slots = 8

    def __init__(self, folder: Path, kind: Kind, engine: Any, scratch: tempfile.TemporaryDirectory):
        self._folder, self._kind, self._engine, self._scratch = folder, kind, engine, scratch
        self.speed_range = kind.speed_range
        self.emotes_by_text = bool(find(folder, EMOTION_MODEL))
        self._prompt_tokens = lru_cache(CACHED_TEXTS)(self._count_prompt_tokens)

    @classmethod
    async def create(cls, model: str, deploy_config: Path | None, gpu_memory_utilization: float) -> OmniVoice:
        """Load a model folder or hub id; raise LoadError."""
        folder = find_model(model)
        kind = find_kind(folder)
        check_weights(folder, kind)
        if deploy_config and not deploy_config.is_file():
            raise LoadError(f"TTS_OMNI_DEPLOY_CONFIG: there is no file {deploy_config}")
        build = import_engine()
        load_grammars()
        scratch = tempfile.TemporaryDirectory(prefix="indextts-deploy-")
        profile = deploy_config or write_profile(Path(scratch.name), folder, kind, gpu_memory_utilization)
        try:
            engine = build(model=str(folder), deploy_config=str(profile), trust_remote_code=True)
        except Exception as error:
            raise LoadError(explain(error)) from error
        return cls(folder, kind, engine, scratch)

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
            "additional_information": self._conditions(written, reference, emotion, speed),
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
        """Which of the two models this is."""
        return {"model_kind": self._kind.name}

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()
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
    samples = reference.samples[: REFERENCE_S * reference.sample_rate]
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
        raise LoadError(f"TTS_ENGINE=omni needs vllm and vllm-omni (requirements-gpu.txt): {error}") from error
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


def find_model(model: str) -> Path:
    """Return the folder of TTS_MODEL, fetched where it is a hub id; raise LoadError."""
    if not model:
        raise LoadError("TTS_MODEL is not set: name the folder or hub id of IndexTTS-2 or IndexTTS-2.5")
    if os.path.isdir(model):
        return Path(model).resolve()
    if os.path.exists(model) or model.startswith((".", "/", "~")):
        raise LoadError(f"TTS_MODEL: there is no folder {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:
        raise LoadError(f"TTS_MODEL: {model!r} is no folder, and the hub did not give it: {error}") from error


def find(folder: Path, name: str) -> Path | None:
    """Return a file of the model, which may lie one folder down, as in IndexTTS's own repository."""
    return next((path for path in (folder / name, folder / "checkpoints" / name) if path.exists()), None)


def find_kind(folder: Path) -> Kind:
    """Tell IndexTTS-2 from 2.5 by config.json, else by the tokenizer, as 2.5 comes without one; raise LoadError."""
    config = folder / "config.json"
    try:
        named = json.loads(config.read_text("utf-8")).get("model_type") if config.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"TTS_MODEL: {config} cannot be read: {error}") from None
    kind = KINDS.get(named) or next((k for k in KINDS.values() if not named and find(folder, k.weights[0])), None)
    if kind is None:
        raise LoadError(f"TTS_MODEL: {folder} is neither IndexTTS-2 nor 2.5 (model_type in config.json: {named!r})")
    return kind


def check_weights(folder: Path, kind: Kind) -> None:
    """Raise LoadError naming the files that are missing."""
    if missing := [name for name in kind.weights if not find(folder, name)]:
        raise LoadError(f"TTS_MODEL: {folder} lacks {', '.join(missing)} of {kind.name}")


def deploy_profile(kind: Kind, gpu_memory_utilization: float) -> dict[str, Any]:
    """Return vLLM-Omni's own profile of a model, without what is known to end its stages."""
    import vllm_omni
    import yaml

    file = Path(vllm_omni.__file__).parent / "deploy" / f"{kind.model_type}.yaml"
    profile = yaml.safe_load(file.read_text("utf-8"))
    profile["pipeline"] = kind.model_type
    for stage, overrides, share in zip(
        profile["stages"], kind.overrides, (TALKER_SHARE, 1 - TALKER_SHARE), strict=True
    ):
        stage |= {"gpu_memory_utilization": round(gpu_memory_utilization * share, 4), **overrides}
    return profile


def write_profile(scratch: Path, folder: Path, kind: Kind, gpu_memory_utilization: float) -> Path:
    """Write the deploy profile to a file and return it, with a config.json beside it where the model has none."""
    profile = deploy_profile(kind, gpu_memory_utilization)
    if not (folder / "config.json").exists():
        named = {"model_type": kind.model_type, "architectures": [kind.architecture]}
        (scratch / "config.json").write_text(json.dumps(named))
        for stage in profile["stages"]:
            stage["hf_config_path"] = str(scratch)
    file = scratch / "deploy.json"
    file.write_text(json.dumps(profile))  # which is YAML too
    return file


OUT_OF_MEMORY = re.compile("out of memory|no available memory|memory.*(?:less|not enough|insufficient)|kv cache", re.I)


def explain(error: BaseException) -> str:
    """Return why the engine did not start, with what to do where the GPU's memory is short."""
    told, cause = [], error
    while cause and str(cause) not in told:
        told.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    reason = " / ".join(told)[:1000]
    if OUT_OF_MEMORY.search(reason):
        return f"the GPU's memory does not do for it: change TTS_GPU_MEMORY_UTILIZATION, or free some. {reason}"
    return f"vLLM-Omni did not start: {reason}"
