"""The indextts voice on a scripted stand-in: order, timing and faults. tests/indextts has the real checkout's."""

import asyncio
import enum
import random
import threading
import time
import weakref
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import indextts_voice
from engines import create_indextts
from indextts_voice import (
    CODES_PER_SECOND,
    EMOTION_TOKENS,
    EMOTIONS,
    KEPT_REFERENCES,
    LONGEST_S,
    WEIGHTS,
    IndexTTSVoice,
    LoadError,
    construct,
    make_greedy,
)
from settings import Settings
from vllm_engine import DeadlinePassed, Emotion, EngineDead, EngineLoop, Reference

STOP = 8193
HAPPY = (0.9, 0, 0, 0, 0, 0, 0, 0.1)


class OutputKind(enum.Enum):
    """As vLLM's."""

    CUMULATIVE = 0
    FINAL_ONLY = 2


@dataclass
class Sampling:
    """As vLLM's SamplingParams."""

    max_tokens: int = 2048
    seed: int | None = None
    detokenize: bool = True
    output_kind: OutputKind = OutputKind.CUMULATIVE
    clone = copy


class ScriptedGPT:
    """vLLM's AsyncLLM as far as it is used: a code a millisecond, until the stop code, the limit, abort or death."""

    def __init__(self):
        self.errored, self.codes, self.stopped = False, 30, True
        self.running = self.most = 0
        self.aborted, self.asked = [], []

    async def generate(self, prompt, sampling, request_id):
        """Yield one final output."""
        self.asked.append(sampling)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            count = min(self.codes, sampling.max_tokens) if self.stopped else sampling.max_tokens
            for _ in range(min(count, 300)):
                await asyncio.sleep(0.001)
                if self.errored:
                    raise RuntimeError("EngineCore has died")
            ends = [STOP] if self.stopped and self.codes <= sampling.max_tokens else [7]
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * (count - 1) + ends)])
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        finally:
            self.running -= 1

    def shutdown(self):
        """Whoever is asked later fails."""
        self.errored = True


@dataclass
class ScriptedStages:
    """The stages with the checkout's manners: they block, and no codes are an error to them."""

    engine: ScriptedGPT = field(default_factory=ScriptedGPT)
    sampling: Sampling = field(default_factory=Sampling)
    stop_code, max_text_tokens, max_codes = STOP, 600, 1815
    seconds: float = 0.002  # that each stage blocks
    calls: list = field(default_factory=list)
    threads: set = field(default_factory=set)
    prepared: list = field(default_factory=list)
    fault: Exception | None = None  # of whatever makes sound

    def prepare_thread(self):
        self.prepared.append(threading.get_ident())

    def tokenize(self, text):
        return tuple(range(len(text)))

    def condition(self, reference):
        self._block("condition", reference.digest)
        if reference.digest == "broken":
            raise RuntimeError("no")
        return f"heard {reference.digest}"

    def write(self, ids, speaker, emotional=None, weight=1.0, vector=None, choice=None):
        self._block("write", (speaker, emotional, weight, vector, choice and choice.random()))
        return SimpleNamespace(prompt={"prompt": "!"})

    def sound(self, line, codes, seed):
        self._block("sound", (len(codes), seed))
        if self.fault:
            raise self.fault
        if not codes:
            raise RuntimeError("cannot reshape tensor of 0 elements")
        return np.full(len(codes) * 440, 0.5, np.float32)

    def _block(self, name, what):
        self.threads.add(threading.get_ident())
        self.calls.append((name, what))
        time.sleep(self.seconds)

    def called(self, name):
        return [what for called, what in self.calls if called == name]


class ScriptedEmotionModel:
    """The checkout's QwenEmotion."""

    def __init__(self):
        self.read, self.model = [], SimpleNamespace(errored=False, shutdown=lambda: None)

    async def inference(self, text):
        self.read.append(text)
        return dict(reversed(list(zip(EMOTIONS, HAPPY, strict=True)))), "what it said"


@pytest.fixture
def stages():
    return ScriptedStages()


@pytest.fixture
def emotion_model():
    return ScriptedEmotionModel()


@pytest.fixture
def owner(stages, emotion_model):
    """The real owner, whose loop the voice lives in."""
    owner = EngineLoop()

    async def create():
        return IndexTTSVoice(stages, emotion_model)

    owner.load(create)
    yield owner
    owner.close()


def reference(digest="one"):
    """A second of something."""
    return Reference(np.zeros(24_000, np.float32), 24_000, digest)


def start(owner, text="text to speak", digest="one", emotion=None, seed=None):
    """Begin an utterance; return its future."""
    work = owner.voice.speak(text, reference(digest), emotion=emotion or Emotion(), speed=1.0, seed=seed)
    return asyncio.run_coroutine_threadsafe(work, owner._loop)


def speak(owner, *args, **kwargs):
    """Speak one utterance."""
    return start(owner, *args, **kwargs).result(10)


def until(condition, deadline_s=5.0):
    """Wait for a condition to hold."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


# --- speaking ---


def test_an_utterance_is_as_long_as_its_codes_less_the_stop_and_the_one_before(owner):
    spoken = speak(owner)
    assert len(spoken.samples) == 28 * 440 and not spoken.truncated


@pytest.mark.parametrize("codes", [1, 2])
def test_no_codes_make_an_empty_utterance_instead_of_an_error(owner, stages, codes):
    stages.engine.codes = codes
    assert speak(owner).samples.size == 0 and not stages.called("sound")


def test_a_text_without_tokens_is_an_empty_utterance(owner, stages):
    assert speak(owner, "").samples.size == 0 and not stages.engine.asked


def test_runaway_generation_ends_at_the_limit_of_its_text_and_is_told(owner, stages):
    stages.engine.stopped = False
    spoken = speak(owner, "ten letter")
    assert spoken.truncated and stages.engine.asked[0].max_tokens == CODES_PER_SECOND * (LONGEST_S + 10)


def test_no_text_asks_for_more_codes_than_the_gpt_has_places(owner, stages):
    speak(owner, "x" * 100)
    assert stages.engine.asked[0].max_tokens == stages.max_codes


def test_a_text_longer_than_the_gpt_reads_is_refused_before_it_does_harm(owner, stages):
    with pytest.raises(ValueError, match="601 text tokens"):
        speak(owner, "x" * 601)
    assert not stages.calls


def test_only_the_last_output_is_asked_for_and_no_text(owner, stages):
    speak(owner)
    assert stages.engine.asked[0].output_kind is OutputKind.FINAL_ONLY and not stages.engine.asked[0].detokenize


def test_the_seed_reaches_the_gpt_and_the_noise(owner, stages):
    speak(owner, seed=7)
    assert stages.engine.asked[0].seed == 7 and stages.called("sound")[0][1] == 7


def test_one_request_s_seed_is_not_the_next_one_s(owner, stages):
    speak(owner, seed=7)
    speak(owner)
    assert stages.engine.asked[1].seed is None and stages.sampling.seed is None


# --- at once ---


def test_the_gpt_speaks_several_utterances_at_once(owner, stages):
    for future in [start(owner) for _ in range(4)]:
        future.result(10)
    assert stages.engine.most == 4


def test_all_stages_run_on_the_one_prepared_thread(owner, stages):
    for future in [start(owner, digest=str(n)) for n in range(4)]:
        future.result(10)
    assert stages.threads == set(stages.prepared) and len(stages.prepared) == 1
    assert threading.get_ident() not in stages.threads


def test_slow_stages_do_not_hold_up_the_loop(owner, stages):
    stages.seconds, gaps = 0.3, []

    async def beat():
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - before)

    beating = asyncio.run_coroutine_threadsafe(beat(), owner._loop)
    speak(owner)
    beating.cancel()
    assert max(gaps) < 0.2, "a stage of 0.3 s held the loop"


def test_what_the_gpt_waits_for_goes_before_what_makes_sound(owner, stages):
    speak(owner)
    stages.calls.clear()
    stages.seconds = 0.1
    first = [start(owner) for _ in range(3)]
    until(lambda: stages.called("sound"))
    late = start(owner)
    for future in [*first, late]:
        future.result(10)
    order = [name for name, _ in stages.calls]
    assert order == ["write", "write", "write", "sound", "write", "sound", "sound", "sound"]


# --- leaving ---


def test_leaving_during_generation_aborts_it_in_the_engine(owner, stages):
    stages.engine.codes = 10_000
    future = start(owner, "x" * 100)
    until(lambda: stages.engine.running)
    future.cancel()
    until(lambda: stages.engine.aborted)
    assert stages.engine.running == 0


def test_a_passed_deadline_aborts_it_in_the_engine(owner, stages):
    stages.engine.codes = 10_000
    work = owner.voice.speak("x" * 100, reference(), emotion=Emotion(), speed=1.0, seed=None)
    with pytest.raises(DeadlinePassed):
        owner.run(work, 0.05, lambda cancel: None)
    until(lambda: stages.engine.aborted)


def test_the_stages_of_one_who_left_are_skipped(owner, stages):
    speak(owner)
    stages.calls.clear()
    stages.seconds = 0.1
    futures = [start(owner) for _ in range(3)]
    until(lambda: stages.called("sound"))
    futures[2].cancel()
    for future in futures[:2]:
        future.result(10)
    speak(owner)
    assert len(stages.called("sound")) == 3


# --- references ---


def test_a_voice_already_heard_is_not_listened_to_again(owner, stages):
    for _ in range(3):
        speak(owner)
    assert stages.called("condition") == ["one"]
    assert owner.voice.report()["conditioning"] == {"hits": 2, "misses": 1, "kept": 1}


def test_a_voice_asked_for_twice_at_once_is_listened_to_once(owner, stages):
    stages.seconds = 0.02
    for future in [start(owner) for _ in range(4)]:
        future.result(10)
    assert stages.called("condition") == ["one"]


def test_the_voices_kept_are_bounded_and_the_oldest_goes(owner, stages):
    stages.seconds = 0
    for n in range(KEPT_REFERENCES):
        speak(owner, digest=str(n))
    for digest in ("0", "new", "0", "1"):
        speak(owner, digest=digest)
    assert owner.voice.report()["conditioning"]["kept"] == KEPT_REFERENCES
    assert stages.called("condition")[KEPT_REFERENCES:] == ["new", "1"]


def test_a_reference_that_failed_is_tried_again(owner, stages):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            speak(owner, digest="broken")
    assert stages.called("condition") == ["broken", "broken"]


def test_one_who_leaves_does_not_take_the_conditioning_from_the_others(owner, stages):
    stages.seconds = 0.1
    leaving, staying = start(owner), start(owner)
    until(lambda: stages.called("condition"))
    leaving.cancel()
    assert staying.result(10).samples.size


# --- emotion ---


def written(stages):
    """What the last utterance was written with: emotion audio, weight, vector, choice."""
    return stages.called("write")[-1][1:]


def test_no_emotion_is_that_of_the_voice(owner, stages):
    speak(owner)
    assert written(stages) == (None, 1.0, None, None)


def test_emotion_audio_is_heard_and_weighed(owner, stages):
    speak(owner, emotion=Emotion(audio=reference("sad"), weight=0.6))
    assert written(stages) == ("heard sad", 0.6, None, None)


def test_an_emotion_vector_is_passed_on(owner, stages):
    speak(owner, emotion=Emotion(vector=HAPPY))
    assert written(stages) == (None, 1.0, HAPPY, None)


def test_emotion_words_become_a_weighed_vector(owner, stages):
    speak(owner, emotion=Emotion(text="cheerfully", weight=0.5))
    assert written(stages) == (None, 1.0, tuple(share / 2 for share in HAPPY), None)


def test_emotion_words_are_read_once(owner, emotion_model):
    for _ in range(3):
        speak(owner, emotion=Emotion(text="cheerfully"))
    assert emotion_model.read == ["cheerfully"]


def test_random_examples_follow_the_seed(owner, stages):
    speak(owner, emotion=Emotion(vector=HAPPY, random=True), seed=3)
    assert written(stages)[-1] == random.Random(3).random()


def test_emotion_words_without_the_model_say_what_is_missing(stages):
    voice = IndexTTSVoice(stages)
    assert not voice.emotes_by_text
    with pytest.raises(ValueError, match="qwen0.6bemo4-merge"):
        asyncio.run(voice.speak("text", reference(), emotion=Emotion(text="sad"), speed=1.0, seed=None))


def test_the_emotion_model_gives_its_likeliest_answer_and_a_short_one():
    asked = []
    make_greedy(lambda *args: asked.append(args))("prompt", SimpleNamespace(temperature=1.0, max_tokens=2048), "id")
    assert asked[0][1].temperature == 0 and asked[0][1].max_tokens == EMOTION_TOKENS


# --- death ---


def test_an_engine_that_dies_is_told_and_fails_what_runs(owner, stages):
    stages.engine.codes = 10_000
    future = start(owner, "x" * 100)
    until(lambda: stages.engine.running)
    stages.engine.errored = True
    with pytest.raises(EngineDead, match="vLLM's engine of the GPT has died"):
        future.result(5)
    until(lambda: owner.ailment() == "vLLM's engine of the GPT has died")


def test_a_dead_emotion_model_is_told(owner, emotion_model):
    emotion_model.model.errored = True
    assert owner.voice.ailment() == "vLLM's engine of the emotion model has died"


def test_a_gpu_that_fails_a_stage_for_good_is_told(owner, stages):
    stages.fault = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
    with pytest.raises(EngineDead, match="the GPU failed a stage: CUDA error: an illegal memory access[a-z ]*$"):
        speak(owner)
    until(lambda: "CUDA error" in (owner.ailment() or ""))


@pytest.mark.parametrize("fault", ["CUDA out of memory. Tried 2 GiB.", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_that_runs_out_in_a_stage_names_the_setting_and_ends_nothing(owner, stages, fault):
    stages.fault = RuntimeError(fault)
    with pytest.raises(RuntimeError, match=f"lower TTS_GPU_MEMORY_UTILIZATION. {fault}"):
        speak(owner)
    stages.fault = None
    assert speak(owner).samples.size and owner.ailment() is None


# --- loading ---


def load(checkout, model_dir="weights"):
    """Try to load."""
    settings = {"fp16": False, "gpu_memory_utilization": 0.25, "qwenemo_gpu_memory_utilization": 0.1}
    asyncio.run(IndexTTSVoice.create(checkout=checkout, model_dir=model_dir, **settings))


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose files are all there, and empty."""
    for name in ("indextts/__init__.py", "indextts/infer_vllm_v2.py", *(f"weights/{name}" for name in WEIGHTS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_relative_checkout_is_joined_to_its_weights_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkout" / "indextts").mkdir(parents=True)
    (tmp_path / "checkout" / "indextts" / "infer_vllm_v2.py").touch()
    with pytest.raises(LoadError, match="^checkout/weights/"):
        asyncio.run(create_indextts(Settings(indextts_dir=Path("checkout"), model_dir=Path("weights"))))


def test_a_folder_that_is_no_checkout_names_its_setting(tmp_path):
    with pytest.raises(LoadError, match="TTS_INDEXTTS_DIR"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "gpt/config.json", "bigvgan/bigvgan_generator.pt"])
def test_a_missing_file_of_the_weights_is_named_with_its_setting(checkout, name):
    (checkout / "weights" / name).unlink()
    with pytest.raises(LoadError, match=f"{name}.*TTS_MODEL_DIR"):
        load(checkout)


def test_the_weights_may_lie_anywhere(checkout, tmp_path_factory):
    with pytest.raises(LoadError, match="TTS_MODEL_DIR"):
        load(checkout, tmp_path_factory.mktemp("elsewhere"))


def test_a_missing_gpu_is_told_before_the_checkout_is_imported(checkout, monkeypatch):
    monkeypatch.setattr(indextts_voice, "sees_gpu", lambda: False)
    with pytest.raises(LoadError, match="torch sees no GPU"):
        load(checkout)


class Started:
    """Something that a constructor starts."""


def fail(message, keep):
    """A constructor that has started something before it fails."""
    started = Started()
    keep.append(weakref.ref(started, lambda _: keep.append("gone")))
    raise RuntimeError(message)


SHARES = {"TTS_GPU_MEMORY_UTILIZATION": 0.25, "TTS_QWENEMO_GPU_MEMORY_UTILIZATION": 0.1}


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate", "Free memory on device (1.2/24.0 GiB)"])
def test_memory_that_ran_out_names_the_settings_to_lower(message):
    both = "TTS_GPU_MEMORY_UTILIZATION=0.25 or TTS_QWENEMO_GPU_MEMORY_UTILIZATION=0.1"
    with pytest.raises(LoadError, match=f"Lower {both}, or free some$"):
        construct(fail, SHARES, message=message, keep=[])


class AsyncLLM:
    """vLLM's engine, by its name."""

    def __init__(self):
        raise RuntimeError("Engine core initialization failed. See root cause above")


class QwenEmotion:
    """The checkout's emotion model, by its name."""

    def __init__(self):
        self.model = AsyncLLM()


@pytest.mark.parametrize("make, name", [(AsyncLLM, "TTS_GPU_MEMORY"), (QwenEmotion, "TTS_QWENEMO_GPU_MEMORY")])
def test_the_setting_of_the_engine_that_did_not_start_is_named(make, name):
    share = f"{name}_UTILIZATION=[0-9.]+"
    with pytest.raises(LoadError, match=f"'No available memory', raise {share}; where .*, lower {share}$"):
        construct(make, SHARES)


def test_a_share_too_small_for_the_cache_is_to_be_raised():
    with pytest.raises(LoadError, match="Raise TTS_GPU_MEMORY_UTILIZATION=0.25"):
        construct(fail, SHARES, message="No available memory for the cache blocks. Try increasing", keep=[])


def test_another_fault_says_nothing_of_memory():
    with pytest.raises(LoadError) as caught:
        construct(fail, SHARES, message="size mismatch for gpt", keep=[])
    assert "TTS_MODEL_DIR: size mismatch" in str(caught.value) and "MEMORY" not in str(caught.value)


def test_a_load_that_failed_lets_go_of_what_it_had_started():
    kept = []
    with pytest.raises(LoadError):
        construct(fail, SHARES, message="size mismatch", keep=kept)
    assert "gone" in kept
