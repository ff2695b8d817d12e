"""The engines: what the pipeline needs of one, the embedded voice, and IndexTTS on vLLM."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from audio import QUIET, AudioChunk, level
from errors import ClientGone, EngineFault, Unavailable, printable
from reference_audio import BadReference, load_reference
from scheduling import Ticket, give_way
from settings import HERE, Settings, cpu_has, usable_cores
from utterances import FULL_SYLLABLES, count_syllables
from vllm_engine import DeadlinePassed, Emotion, EngineDead, EngineLoop, GivenUp, Reference, Spoken, VoiceModel, gpus
from voices import Voice

if TYPE_CHECKING:
    from embedded_voice import EmbeddedVoice, Runtime

log = logging.getLogger("speech")

ENGINE_OPTIONS = {
    "instructions", "seed", "emotion_vector", "emotion_audio", "emo_control_method", "emo_ref_path", "emo_weight",
    "emo_vec", "emo_text", "emo_random",
}  # fmt: skip


@dataclass(frozen=True)
class SynthesisOptions:
    """What shapes an utterance beside its text and voice."""

    speed: float = 1.0
    seed: int | None = None
    emotion: Emotion = Emotion()
    reference: Reference | None = None  # speak like this, not like the voice
    ticket: Ticket = field(default_factory=Ticket)


class Engine(Protocol):
    """What the pipeline needs of a speech engine; synthesize may be called from several threads at once."""

    name: str
    model: str
    sample_rate: int  # Hz
    max_utterance_tokens: int
    can_clone: bool
    can_emote: bool
    emotes_by_text: bool
    honours: frozenset[str]  # request fields that have an effect on this engine
    speed_range: tuple[float, float]  # speeds it speaks by itself, duration within a few per cent; beyond, stretch()
    slots: int  # utterances that it makes well at once
    usual_syllables: float  # of an utterance, where the text can be cut there unheard
    first_alone: bool  # it makes one sooner than several: a request's first utterance is not made beside its second

    def load(self) -> None:
        """Load the weights; raise with a message for the operator."""

    def check(self, voice: Voice) -> None:
        """Raise ValueError where the engine could not speak in a voice as voices.json describes it."""

    def unspoken(self, text: str) -> str:
        """Return the text's letters and digits that this engine does not read aloud."""

    def fits(self, utterance: str) -> bool:
        """Tell whether the engine takes an utterance of this length in one."""

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable | None:
        """Return all that shapes the sound beside text and speed; None where it never sounds the same twice."""

    def report(self) -> dict[str, Any]:
        """Return what /health shows of this engine beside the rest."""

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance; raise EngineFault."""

    def healthy(self) -> str | None:
        """Return None, or why no utterance would be spoken."""

    def close(self) -> None:
        """Let go of everything."""


class EmbeddedEngine:
    """Kokoro-82M int8 on onnxruntime, on any CPU, its decoder on OpenVINO where that is faster."""

    name, model = "embedded", "kokoro-82m-int8"
    sample_rate = 24_000
    max_utterance_tokens = 508
    can_clone = can_emote = emotes_by_text = False
    honours: frozenset[str] = frozenset()
    speed_range = (1.0, 1.0)  # the network rounds each sound to frames: at 0.8 or 1.25 it is up to 15 % off
    first_alone = True
    usual_syllables = 24  # longer ones are made no faster, and whoever asks for a short text waits longer

    def __init__(self, settings: Settings):
        self._settings = settings
        self._threads = settings.threads or min(4, usable_cores())
        self._chosen = settings.embedded_runtime != "auto"
        # what it speaks on, or will once that is built
        self._runtime: Runtime = settings.embedded_runtime if self._chosen else find_runtime()
        self._voice: EmbeddedVoice | None = None

    @property
    def slots(self) -> int:
        """OpenVINO makes one utterance on all cores."""
        return 1 if self._runtime == "openvino" else self._threads

    def load(self) -> None:
        """Load the weights and the pronunciation data.

        Until OpenVINO's decoder is built, at the first start, it speaks on onnxruntime, unless OpenVINO was asked for.
        """
        try:
            self._voice = self._open(self._runtime)
        except Exception:
            if self._chosen or self._runtime == "onnxruntime":
                raise
            log.exception("the embedded voice does not speak on OpenVINO")
            self._voice = self._open("onnxruntime")
        if self._voice.runtime != self._runtime:
            log.info("the embedded voice speaks on onnxruntime until OpenVINO's decoder is built")
            # no daemon, as the thread that loads is one: a process that ends while OpenVINO compiles would crash
            threading.Thread(target=self._change_runtime, name="build", daemon=False).start()

    def _open(self, runtime: Runtime) -> EmbeddedVoice:
        """Return the voice once it has spoken; raise RuntimeError."""
        from embedded_voice import EmbeddedVoice  # the GPU box does without these files and their packages

        settings = self._settings
        voice = EmbeddedVoice(self._threads, settings.lexicon, settings.cache_dir, runtime, build=self._chosen)
        return self._heard(voice)

    def _heard(self, voice: EmbeddedVoice) -> EmbeddedVoice:
        """Return a voice that speaks: OpenVINO compiles its kernels only then. Raises RuntimeError."""
        from embedded_openvino import forget_builds

        try:
            if not is_speech(voice.speak("Ready.", "am_onyx")):
                raise RuntimeError(f"what {voice.runtime} makes is not speech")
        except Exception:
            if voice.runtime == "openvino":
                forget_builds(self._settings.cache_dir)
            raise
        return voice

    def _change_runtime(self) -> None:
        """Build OpenVINO's decoder beside what is being spoken, and speak on it from then on."""
        from embedded_voice import trim_heap

        give_way()
        try:
            self._voice = self._heard(self._voice.on(self._runtime))
            log.info("the embedded voice speaks on %s now", self._runtime)
        except Exception:
            log.exception("OpenVINO does not work here; the embedded voice stays on onnxruntime")
            self._runtime = "onnxruntime"
            self._voice = self._voice.on("onnxruntime")  # for several at once
        trim_heap(0)  # the decoder before was some 250 MB

    def check(self, voice: Voice) -> None:
        """Raise ValueError on a style that there is not."""
        for recipe in (voice.embedded.en, voice.embedded.zh, voice.embedded.mixed):
            self._voice.check_style(recipe)

    def unspoken(self, text: str) -> str:
        """Return what is neither Latin, nor a digit, nor a Han character with a reading."""
        return self._voice.unspoken(text)

    def fits(self, utterance: str) -> bool:
        """It cuts what is too long itself."""
        return True

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable:
        """Its runtime, styles and gains: it does not sample."""
        return self._speaking_on, voice.embedded.model_dump_json()

    def report(self) -> dict[str, Any]:
        """What the decoder runs on, and what it will once that is built."""
        now, later = self._speaking_on, self._runtime
        return {"runtime": now} | ({} if now == later else {"next_runtime": later})

    @property
    def _speaking_on(self) -> Runtime:
        return self._voice.runtime if self._voice else self._runtime

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance in the style that the voice has for its language."""
        language = self._voice.language(utterance)
        style = getattr(voice.embedded, language)
        samples = self._voice.speak(utterance, style, options.speed, options.ticket)
        return level(AudioChunk(samples, self.sample_rate), getattr(voice.embedded.gain_db, language))

    def healthy(self) -> str | None:
        """There is no process of its own that could die."""
        return None

    def close(self) -> None:
        """Nothing outlives the worker."""


TAKES = 2  # of an utterance that came back wrong, before it is refused
LONGEST_S, LONGEST_S_PER_SYLLABLE = 3.0, 0.8  # a slow speaker takes 0.35 s; more than this is the model running away


class VllmEngine:
    """IndexTTS on vLLM, loaded once in this worker: what `omni` and `indextts` share."""

    sample_rate = 22_050
    can_clone = can_emote = True
    first_alone = False
    usual_syllables = FULL_SYLLABLES
    honours = frozenset(ENGINE_OPTIONS)

    def __init__(self, name: str, settings: Settings, model: str, create: Callable[[Settings], Any], slots: int = 8):
        self.name, self.model = name, model
        self.slots = slots  # enough to keep the first stage busy while the last one works
        self._settings, self._create = settings, create
        self._owner = EngineLoop()
        self._voice: VoiceModel | None = None
        self._gpus: list[dict[str, Any]] = []

    @property
    def speed_range(self) -> tuple[float, float]:
        """Speeds the model speaks by itself."""
        return self._voice.speed_range if self._voice else (1.0, 1.0)

    @property
    def emotes_by_text(self) -> bool:
        """Whether the model that reads an emotion out of words is there."""
        return bool(self._voice and self._voice.emotes_by_text)

    @property
    def max_utterance_tokens(self) -> int:
        """Text tokens of the longest utterance."""
        return self._voice.max_utterance_tokens if self._voice else 0

    def load(self) -> None:
        """Build the engine inside its owner's loop."""
        self._gpus = gpus()  # told where it does not load, too
        self._voice = self._owner.load(lambda: self._create(self._settings))
        self._gpus = gpus()

    def check(self, voice: Voice) -> None:
        """Raise ValueError where a voice's reference audio is missing or unfit."""
        load_reference(reference_file(voice))

    def unspoken(self, text: str) -> str:
        """The model tries whatever has letters."""
        return ""

    def fits(self, utterance: str) -> bool:
        """Count the utterance's tokens: too many kill the engine."""
        return self._voice.count_tokens(utterance) <= self._voice.max_utterance_tokens

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance; what comes back wrong is taken once more with another seed. Raises SpeechError."""
        reference = options.reference or voice_reference(voice)
        for take in range(TAKES):
            seed = None if options.seed is None else options.seed + take
            spoken = self._speak(utterance, reference, options, seed)
            if (fault := take_fault(spoken, self.sample_rate, utterance, options.speed)) is None:
                return level(AudioChunk(spoken.samples, self.sample_rate), 0)
            log.warning("take %d of an utterance of %d characters: %s", take + 1, len(utterance), fault)
        quoted = repr(printable(utterance, 60))
        raise EngineFault(
            f"The engine could not speak {quoted}: {fault}, {TAKES} times. Reword or split it.",
            "input", "unspoken_sentence", quoted,
        )  # fmt: skip

    def _speak(self, utterance: str, reference: Reference, options: SynthesisOptions, seed: int | None) -> Spoken:
        work = self._voice.speak(utterance, reference, emotion=options.emotion, speed=options.speed, seed=seed)
        try:
            return self._owner.run(work, self._settings.utterance_timeout_s, options.ticket.on_cancel)
        except EngineDead as error:
            raise Unavailable(f"The engine died: {error}. Another one is being started.", code="engine_died") from error
        except DeadlinePassed as error:
            raise Unavailable(f"Too late: {error}.", code="timeout") from None
        except GivenUp:
            raise ClientGone from None

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable | None:
        """The seed, the reference audio and the emotion, where the model's sampling keeps to its seed."""
        seed, emotion = options.seed, options.emotion
        if seed is None or emotion.random or not self._voice.seeded:
            return None
        reference = options.reference or voice_reference(voice)
        audio = emotion.audio and emotion.audio.digest
        return seed, reference.digest, audio, emotion.weight, emotion.vector, emotion.text

    def healthy(self) -> str | None:
        """Return why the engine is dead, within a second of its death."""
        return self._owner.ailment()

    def report(self) -> dict[str, Any]:
        """What of the GPU may be used, what the GPU has, and what the model tells."""
        return {
            "gpus": self._gpus,
            "gpu_memory_utilization": self._settings.gpu_memory_utilization,
            "qwenemo_gpu_memory_utilization": self._settings.qwenemo_gpu_memory_utilization,
            "utterances": self._owner.in_flight,
            "emotes_by_text": self.emotes_by_text,
            **(self._voice.report() if self._voice else {}),
        }

    def close(self) -> None:
        """End the engine and its processes."""
        self._owner.close()


def reference_file(voice: Voice) -> Path:
    """Return where a voice's reference audio is: as voices.json says, from this file's folder."""
    return HERE / voice.reference_audio


def voice_reference(voice: Voice) -> Reference:
    """Return a voice's reference audio; raise Unavailable where it is gone, as a voice just deleted is."""
    try:
        return load_reference(reference_file(voice))
    except BadReference as error:
        raise Unavailable(f"The voice {voice.id} cannot be used now: {error}.") from None


def take_fault(spoken: Spoken, sample_rate: int, text: str, speed: float) -> str | None:
    """Return what is wrong with an utterance as the model made it, None where nothing is."""
    samples, seconds = spoken.samples, len(spoken.samples) / sample_rate
    longest = (LONGEST_S + LONGEST_S_PER_SYLLABLE * count_syllables(text)) / speed
    faults = {
        "it came back empty": not samples.size,
        "it ran into the length limit": spoken.truncated,
        "it holds samples that are not numbers": not np.isfinite(samples).all(),
        "it came back silent": not np.abs(samples).max(initial=0) > QUIET,
        f"it lasts {seconds:.1f} s": seconds > longest,
    }
    return next((fault for fault, found in faults.items() if found), None)


async def create_omni(settings: Settings) -> VoiceModel:
    """Load IndexTTS-2 or 2.5 on vLLM-Omni."""
    from omni_voice import OmniVoice

    return await OmniVoice.create(
        model=settings.model,
        deploy_config=settings.omni_deploy_config,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )


async def create_indextts(settings: Settings) -> VoiceModel:
    """Load the IndexTTS2 class of an index-tts-vllm checkout."""
    from indextts_voice import IndexTTSVoice

    return await IndexTTSVoice.create(
        checkout=settings.indextts_dir,
        model_dir=settings.model_dir,
        fp16=settings.fp16,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        qwenemo_gpu_memory_utilization=settings.qwenemo_gpu_memory_utilization,
    )


ENGINES: dict[str, Callable[[Settings], Engine]] = {
    "omni": lambda s: VllmEngine("omni", s, Path(s.model).name, create_omni),
    "indextts": lambda s: VllmEngine("indextts", s, s.model_dir.name, create_indextts, slots=4),
    "embedded": EmbeddedEngine,
}
LOUDEST = 2.0  # of what a voice says before it is levelled
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the latter is WSL's


def choose_engine(settings: Settings) -> Engine:
    """Return the engine asked for, or for `auto` the best one that this machine can run."""
    name = find_engine(settings) if settings.engine == "auto" else settings.engine
    return ENGINES[name](settings)


def find_engine(settings: Settings) -> str:
    """Return omni or indextts where a GPU, the package and the weights are there, else embedded."""
    checkout = settings.indextts_dir
    if not any(device.exists() for device in GPU_DEVICES) or not importlib.util.find_spec("vllm"):
        return "embedded"
    if settings.model and importlib.util.find_spec("vllm_omni"):
        return "omni"
    needed = (checkout / "indextts" / "infer_vllm_v2.py", checkout / settings.model_dir / "config.yaml")
    return "indextts" if all(path.is_file() for path in needed) else "embedded"


def is_speech(samples: np.ndarray) -> bool:
    """Tell the word Ready (0.08 changes of sign a sample, peak 0.5) from silence, a hum, noise and no numbers."""
    changes = np.mean(np.signbit(samples[1:]) != np.signbit(samples[:-1])) if len(samples) > 1 else 0
    return bool(QUIET < np.abs(samples).max(initial=0) < LOUDEST and 0.02 < changes < 0.25)


def find_runtime() -> str:
    """Return openvino where it is installed and the CPU has AVX2, else onnxruntime.

    Elsewhere, as on ARM, OpenVINO is not known to be faster, or right.
    """
    return "openvino" if cpu_has("avx2") and importlib.util.find_spec("openvino") else "onnxruntime"
