"""omni_voice.py on the real vLLM-Omni, in a loop of its own as the server has one: IndexTTS-2 and 2.5."""

import asyncio
import os
import signal
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest
from models import cpu_profile, wait_for

import omni_model
import omni_voice
import vllm_plugin
from omni_voice import OmniVoice
from vllm_engine import Emotion, EngineDead, EngineLoop, Reference, is_alive

HELLO, NIHAO = "Hello world, this is a test.", "你好世界，今天天气很好。"


def tone(hertz: float, seconds: float = 3, sample_rate: int = 24_000) -> Reference:
    """Return a reference audio that is told from others by its pitch."""
    samples = 0.1 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * sample_rate)) / sample_rate)
    return Reference(samples.astype(np.float32), sample_rate, f"digest-of-{hertz}-{seconds}-{sample_rate}")


def closest(samples: np.ndarray, others: list[np.ndarray]) -> int:
    """Return which of the others has the same length and the least difference."""
    far = [np.abs(samples - other).mean() if len(other) == len(samples) else np.inf for other in others]
    return int(np.argmin(far))


def longest(model: OmniVoice) -> str:
    """Return a text of as many tokens as an utterance may have."""
    words = 1
    while model.count_tokens("hello " * (words + 1)) <= model.max_utterance_tokens:
        words += 1
    return "hello " * words


class Voice:
    """An OmniVoice and its loop, asked from the test's thread."""

    def __init__(self, model: str, deploy_config):
        self.owner = EngineLoop()
        settings = {"model": model, "deploy_config": deploy_config, "gpu_memory_utilization": 0.25}
        self.model: OmniVoice = self.owner.load(lambda: OmniVoice.create(**settings))

    def start(self, text=HELLO, reference=None, *, emotion=None, speed=1.0, seed=1):
        """Start an utterance; return its future."""
        spoken = self.model.speak(
            text, reference or tone(220), emotion=emotion or Emotion(), speed=speed, seed=seed
        )
        return asyncio.run_coroutine_threadsafe(spoken, self.owner._loop)

    def speak(self, *args, **options):
        """Speak one utterance."""
        return self.start(*args, **options).result(120)


@pytest.fixture(scope="module", params=["indextts2_5", "indextts2"])
def voice(request, checkpoints):
    """Both models, one after the other, on the profile that omni_model.py writes, made fit for a CPU."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omni_model, "deploy_profile", lambda *_: cpu_profile(request.param))
        voice = Voice(str(checkpoints / request.param), None)
    print(f"\n{request.param} loaded in {time.monotonic() - began:.0f} s")
    yield voice
    voice.owner.close()


def test_an_utterance_comes_back_as_audio(voice):
    spoken = voice.speak()
    assert spoken.samples.dtype == np.float32 and spoken.samples.ndim == 1
    assert 0.5 < len(spoken.samples) / voice.model.sample_rate < 4
    assert np.abs(spoken.samples).max() > 0.01
    assert not spoken.truncated


def test_the_same_seed_gives_the_same_samples_and_another_one_others(voice):
    first, again, other = (voice.speak(seed=seed).samples for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_eight_at_once_are_all_spoken(voice):
    utterances = [voice.start(text, seed=seed) for seed in range(4) for text in (HELLO, NIHAO)]
    lengths = [len(each.result(240).samples) for each in utterances]
    assert len(lengths) == 8 and min(lengths) > 0.5 * voice.model.sample_rate


def test_prompts_that_do_not_fit_one_step_of_the_talker_together_are_all_spoken(voice):
    text = longest(voice.model)
    assert all(each.result(240).samples.size for each in [voice.start(text, seed=seed) for seed in range(6)])


def test_the_digest_keeps_two_references_apart(voice):
    low, high = tone(110), tone(330)
    alone = [voice.speak(reference=reference).samples for reference in (low, high)]
    assert not np.array_equal(*alone)
    started = [(pitch, voice.start(reference=(low, high)[pitch])) for pitch in (1, 0, 0, 1)]
    assert all(closest(each.result(240).samples, alone) == pitch for pitch, each in started)
    assert [np.array_equal(voice.speak(reference=low).samples, samples) for samples in alone] == [True, False]


def test_a_reference_already_heard_sounds_as_it_did_at_first(voice):
    reference = tone(440, seconds=20, sample_rate=48_000)
    first, again = (voice.speak(reference=reference).samples for _ in range(2))
    assert np.array_equal(first, again)


def test_each_way_to_give_an_emotion_is_heard(voice):
    plain = voice.speak().samples
    emotions = {
        "vector": Emotion(vector=(0.8, 0, 0, 0, 0, 0, 0.2, 0)),
        "audio": Emotion(audio=tone(500)),
        "half of the audio's": Emotion(audio=tone(500), weight=0.5),
        "random": Emotion(vector=(0, 0, 1.0, 0, 0, 0, 0, 0), random=True),
    }
    spoken = {name: voice.speak(emotion=emotion).samples for name, emotion in emotions.items()}
    assert all(samples.size for samples in spoken.values())
    unheard = [name for name, samples in spoken.items() if np.array_equal(samples, plain)]
    assert not unheard


def test_more_of_one_emotion_than_the_model_takes_is_spoken_with_what_it_takes(voice):
    most, more = (voice.speak(emotion=Emotion(vector=(v, *[0.0] * 7))).samples for v in (1.2, 1.5))
    assert np.array_equal(most, more)


def test_an_emotion_in_words_is_left_out_where_its_model_is_missing(voice):
    spoken = voice.speak(emotion=Emotion(text="very happy")).samples
    assert voice.model.emotes_by_text == (voice.model.report()["model_kind"] == "IndexTTS-2")
    assert np.array_equal(spoken, voice.speak().samples) != voice.model.emotes_by_text


def test_speed_changes_the_duration_where_the_model_can(voice):
    slowest, fastest = voice.model.speed_range
    usual, fast, slow = (len(voice.speak(speed=speed).samples) for speed in (1.0, fastest, slowest))
    assert fast == pytest.approx(usual / fastest, rel=0.02)
    assert slow == pytest.approx(usual / slowest, rel=0.02)


def test_an_utterance_stopped_at_the_limit_says_so(voice, monkeypatch):
    monkeypatch.setattr(omni_voice, "RUNAWAY_S", 0.4)
    monkeypatch.setattr(omni_voice, "RUNAWAY_S_PER_TOKEN", 0.0)
    spoken = voice.speak()
    assert spoken.truncated and 0.3 < len(spoken.samples) / voice.model.sample_rate < 0.5


def test_a_talker_that_would_say_nothing_or_no_sound_leaves_the_decoder_alive(voice, monkeypatch):
    sampling = voice.model._sampling

    def stubborn(*args):
        talker, decoder = sampling(*args)
        talker.logit_bias = {8193: 100.0, **talker.logit_bias}  # the stop token, and what we set
        return [talker, decoder]

    monkeypatch.setattr(voice.model, "_sampling", stubborn)
    assert voice.speak().samples.size
    monkeypatch.undo()
    assert voice.speak().samples.size


@pytest.mark.parametrize("text", ["", " \n", "word " * 800, "今天" * 300], ids=["empty", "blank", "long", "long zh"])
def test_a_text_that_would_end_the_talker_is_refused(voice, text):
    with pytest.raises(ValueError, match="tokens"):
        voice.speak(text)
    assert voice.speak().samples.size


@pytest.mark.parametrize("text", ["。", "😀", "<|endoftext|>", "<|1.00|> <重|chong2>", "\u200b.", "Ω", "1"])
def test_an_odd_text_leaves_the_engine_alive(voice, text):
    voice.speak(text)
    assert voice.speak().samples.size


def test_tokens_are_counted_as_the_model_reads_them(voice):
    count = voice.model.count_tokens
    assert count("") == 0
    assert 0 < count("hello") <= count("hello hello")
    assert count("1999") == count(omni_voice.write_out("1999")) > count("1")


def test_a_cancelled_utterance_leaves_the_engine(voice, caplog):
    caplog.set_level("INFO", "vllm_omni")
    abandoned = [voice.start(seed=seed) for seed in range(3)]
    time.sleep(0.3)
    assert voice.model._engine.request_states
    for each in abandoned:
        each.cancel()
    with pytest.raises(CancelledError):
        abandoned[0].result()
    wait_for(lambda: not voice.model._engine.request_states, 10)
    wait_for(lambda: voice.model._engine.engine._running_counter.value == 0, 10)
    assert "Aborted request" in caplog.text
    assert voice.speak().samples.size


def test_a_dead_stage_is_told_and_what_it_was_speaking_fails_at_once(voice):
    utterance = voice.start()
    stage = next(pid for pid, name in voice.owner._processes.items() if "Worker" in name)
    os.kill(stage, signal.SIGKILL)
    with pytest.raises(EngineDead):
        utterance.result(10)
    wait_for(lambda: voice.owner.ailment(), 5)
    wait_for(lambda: voice.model.ailment(), 10)


def test_closing_leaves_no_process(voice):
    voice.owner.close()
    wait_for(lambda: not any(is_alive(pid) for pid in voice.owner._processes), 5)


def test_the_emotion_model_is_mended(checkpoints, monkeypatch):
    import torch
    from vllm_omni.model_executor.models.indextts2 import indextts2_talker as talker
    from vllm_omni.model_executor.models.indextts2 import preprocess_utils

    kind = talker.IndexTTS2TalkerForConditionalGeneration
    monkeypatch.setattr(kind, "_warmup_external_models", lambda self, device: None)
    vllm_plugin.mend_omni()
    loading = SimpleNamespace(model_path=str(checkpoints / "indextts2"), _ensure_matrix_loaded=lambda *_: None)
    kind._warmup_external_models(loading, torch.device("cpu"))
    assert (loading.model_path, "cpu") in preprocess_utils._qwen_emotion_cache
    model, tokenizer = talker.load_qwen_emotion(str(checkpoints / "indextts2"), torch.device("cpu"))
    assert tokenizer and not model.generation_config.do_sample
    predict = kind._predict_emotion_from_text
    assert predict(SimpleNamespace(), "怒", torch.device("cpu")) == vllm_plugin.CALM, "no model_path: calm, not a death"
