"""The indextts voice on the real class of a checkout: what it says is what infer() would say, and its faults are gone.

Skipped unless INDEXTTS_CHECKOUT names a checkout: make test-indextts INDEXTTS_CHECKOUT=DIR.
"""

import asyncio
import os
import threading
import time

import numpy as np
import pytest

if not os.environ.get("INDEXTTS_CHECKOUT"):
    pytest.skip("INDEXTTS_CHECKOUT names no index-tts-vllm checkout", allow_module_level=True)

from serving import REPOSITORY

from indextts_voice import IndexTTSVoice, LoadError
from reference_audio import load_reference
from vllm_engine import Emotion, EngineLoop, descendants, is_alive

TEXT = "大家好，欢迎收看本期节目！"
SPEAKER, OTHER = (REPOSITORY / "examples" / f"voice_{number}.wav" for number in ("01", "02"))
SAD = (0.1, 0.0, 0.8, 0.0, 0.0, 0.1, 0.0, 0.0)


def start(owner, text=TEXT, emotion=None, seed=None, speaker=SPEAKER):
    """Begin an utterance; return its future."""
    work = owner.voice.speak(text, load_reference(speaker), emotion=emotion or Emotion(), speed=1.0, seed=seed)
    return asyncio.run_coroutine_threadsafe(work, owner._loop)


def speak(owner, *args, **kwargs):
    """Speak one utterance."""
    return start(owner, *args, **kwargs).result(300)


@pytest.fixture
def tts(owner):
    """The checkout's object."""
    return owner.voice._stages._tts


@pytest.fixture
def codes(owner, monkeypatch):
    """The audio codes of each utterance."""
    seen, sound = [], owner.voice._stages.sound
    monkeypatch.setattr(
        owner.voice._stages, "sound", lambda line, codes, seed: seen.append(codes) or sound(line, codes, seed)
    )
    return seen


def until(condition, deadline_s=30.0):
    """Wait for a condition to hold."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


# --- what it says ---


def infer(owner, tts, monkeypatch, seed, **emotion):
    """Return the int16 samples of the checkout's own infer(), seeded as the voice seeds its stages."""
    import torch

    cfm = tts.s2mel.models["cfm"]
    flow = cfm.inference

    def seeded_flow(*args, **kwargs):
        torch.manual_seed(seed)
        return flow(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tts.gpt.sampling_params, "seed", seed)
        patch.setattr(cfm, "inference", seeded_flow)
        work = tts.infer(str(SPEAKER), TEXT, None, **emotion)
        _, samples = asyncio.run_coroutine_threadsafe(work, owner._loop).result(300)
    return samples[:, 0]


def as_int16(samples):
    """Return float samples as infer() returns them."""
    return np.clip(samples * np.float32(32767), -32767, 32767).astype(np.int16)


EMOTIONS = {
    "the speaker's own": (Emotion(), {}),
    "another audio's": (
        Emotion(audio=load_reference(OTHER), weight=0.6),
        {"emo_audio_prompt": str(OTHER), "emo_alpha": 0.6},
    ),
    "a vector's": (Emotion(vector=SAD), {"emo_vector": list(SAD)}),
}


@pytest.mark.parametrize("name", EMOTIONS)
def test_an_utterance_is_what_infer_makes_of_the_same_codes(owner, tts, monkeypatch, name):
    ours, theirs = EMOTIONS[name]
    spoken = speak(owner, emotion=ours, seed=5)
    assert spoken.samples.size
    assert np.array_equal(as_int16(spoken.samples), infer(owner, tts, monkeypatch, 5, **theirs))


@pytest.mark.parametrize("count", [0, 5, 40])
def test_the_flow_leaves_the_reference_s_frames_out_unheard(tts, count):
    import torch

    from indextts_stages import without_frames

    wavenet = tts.s2mel.models["cfm"].estimator.wavenet
    x, mask = torch.randn(2, wavenet.hidden_channels, 90), torch.ones(1, 1, 90)
    step = torch.randn(2, wavenet.hidden_channels, 1)
    with torch.no_grad():
        whole = wavenet(x, mask, g=step)
        with without_frames(wavenet, count):
            rest = wavenet(x, mask, g=step)
        again = wavenet(x, mask, g=step)
    assert torch.allclose(rest[..., count:], whole[..., count:], atol=1e-5)
    assert not rest[..., : max(0, count - 16)].any(), "8 layers of 5 frames reach 16 of them far"
    assert torch.equal(again, whole)


def test_emotions_make_a_difference(owner):
    sounds = {speak(owner, emotion=ours, seed=5).samples.tobytes() for ours, _ in EMOTIONS.values()}
    assert len(sounds) == len(EMOTIONS)


def test_emotion_words_are_read_and_spoken(owner):
    assert owner.voice.emotes_by_text
    assert speak(owner, emotion=Emotion(text="难过地说"), seed=5).samples.size


def test_the_same_seed_gives_the_same_samples_and_another_one_others(owner):
    one, same, other = (speak(owner, seed=seed).samples.tobytes() for seed in (1, 1, 2))
    assert one == same != other


def test_the_same_seed_gives_the_same_samples_in_company(owner):
    alone = speak(owner, seed=1).samples
    company = [start(owner, seed=seed) for seed in (3, 1, 4, 2)]
    assert np.array_equal(company[1].result(300).samples, alone)


def test_without_a_seed_no_two_takes_are_alike(owner):
    assert speak(owner).samples.tobytes() != speak(owner).samples.tobytes()


# --- its faults ---


def test_code_0_decoded_while_others_start_does_no_harm(owner, codes):
    futures = []
    for _ in range(12):
        futures.append(start(owner))
        time.sleep(0.05)
    assert all(future.result(300).samples.size for future in futures)
    assert sum(0 in line for line in codes) > 3, "the weights should make code 0 likely, through the bias"
    assert owner.voice.ailment() is None


def test_the_bias_counts_and_ends_utterances(owner, codes):
    for seed in range(4):
        speak(owner, seed=seed)
    assert all(5 < len(line) < 60 for line in codes)


def test_grad_stays_off_for_requests_at_once(owner):
    import torch

    async def in_loop():
        return torch.is_grad_enabled()

    futures = [start(owner) for _ in range(4)]
    assert all(future.result(300).samples.size for future in futures)
    modes = asyncio.run_coroutine_threadsafe(in_loop(), owner._loop).result(10)
    worker = asyncio.run_coroutine_threadsafe(owner.voice._worker.run(0, torch.is_grad_enabled), owner._loop)
    assert (modes, worker.result(60)) == (False, False)


@pytest.mark.parametrize("limit", [1, 2])
def test_two_codes_or_fewer_are_an_empty_utterance(owner, monkeypatch, limit):
    monkeypatch.setattr(owner.voice._stages, "max_codes", limit)
    spoken = speak(owner)
    assert spoken.truncated and not spoken.samples.size


def test_an_utterance_that_runs_to_the_limit_is_told(owner, monkeypatch):
    monkeypatch.setattr(owner.voice._stages, "max_codes", 6)
    spoken = speak(owner)
    assert spoken.truncated and spoken.samples.size


@pytest.mark.parametrize("text", ["好", ".", "…", "A", "🙂", "1", "<s>", "ａ" * 40, "好" * 119])
def test_no_text_within_the_bound_kills_it(owner, text):
    if owner.voice.count_tokens(text) <= owner.voice.max_utterance_tokens:
        speak(owner, text)
    assert speak(owner).samples.size and owner.voice.ailment() is None


def test_leaving_aborts_the_engine_s_request(owner):
    engine = owner.voice._stages.engine
    futures = [start(owner) for _ in range(3)]
    until(engine.output_processor.has_unfinished_requests)
    for future in futures:
        future.cancel()
    until(lambda: not engine.output_processor.has_unfinished_requests())
    assert speak(owner).samples.size


def test_a_voice_already_heard_is_not_listened_to_again(owner, tts, monkeypatch):
    speak(owner)
    monkeypatch.setattr(tts, "get_emb", lambda *_: pytest.fail("listened again"))
    assert speak(owner).samples.size


def test_tokens_may_be_counted_from_many_threads(owner):
    texts = [f"{TEXT}第{number}次，HELLO WORLD {number}." for number in range(32)]
    counted = dict.fromkeys(texts)
    threads = [threading.Thread(target=lambda t=t: counted.update({t: owner.voice.count_tokens(t)})) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    owner.voice._stages.tokenize.cache_clear()
    assert counted == {text: owner.voice.count_tokens(text) for text in texts}


# --- loading ---


def test_a_load_that_fails_half_way_leaves_no_process(owner, checkout, plain_weights, tmp_path):
    for path in plain_weights.iterdir():
        if path.name != "bigvgan":
            (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / "bigvgan").mkdir()
    (tmp_path / "bigvgan" / "config.json").symlink_to((plain_weights / "bigvgan" / "config.json").resolve())
    (tmp_path / "bigvgan" / "bigvgan_generator.pt").write_bytes(b"half of a download")
    before, failing = set(descendants(os.getpid())), EngineLoop()
    shares = {"gpu_memory_utilization": 0.25, "qwenemo_gpu_memory_utilization": 0.1}
    with pytest.raises(LoadError, match="TTS_MODEL_DIR"):
        failing.load(lambda: IndexTTSVoice.create(checkout=checkout, model_dir=tmp_path, fp16=False, **shares))
    until(lambda: not any(map(is_alive, set(descendants(os.getpid())) - before)))
    assert speak(owner).samples.size, "the other engine is untouched"
