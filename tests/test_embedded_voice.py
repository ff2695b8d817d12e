"""The embedded engine: weights, styles, long and empty texts, giving up."""

import ctypes
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import embedded_voice
from embedded_graph import FEATURES
from embedded_voice import (
    KEPT_FRAMES,
    SILENT_FRAMES,
    STEP_FRAMES,
    Cancelled,
    EmbeddedVoice,
    OnnxDecoder,
    Runtime,
    Styles,
    WeightsError,
    read_weights,
    without_silence,
)
from engines import EmbeddedEngine, SynthesisOptions
from scheduling import NICENESS, Ticket
from settings import HERE, Settings
from voices import Voices


@pytest.fixture(scope="module", params=get_args(Runtime))
def voice(request):
    """The real engine on each of its runtimes, loaded with no way to the network."""
    real, socket.socket = socket.socket, None
    try:
        return EmbeddedVoice(threads=2, runtime=request.param)
    finally:
        socket.socket = real


@pytest.mark.parametrize("field", ["en", "zh", "mixed"])
def test_all_that_shapes_a_voices_sound_is_in_the_key_of_the_cache(field):
    engine, voice = EmbeddedEngine(Settings()), Voices.load(Settings().voices_file).resolve(None)
    louder = voice.embedded.gain_db.model_copy(update={field: 3.0})
    keys = {
        engine.sound_key(voice.model_copy(update={"embedded": voice.embedded.model_copy(update=other)}), options)
        for other in ({}, {field: "af_heart"}, {"gain_db": louder})
        for options in (SynthesisOptions(), SynthesisOptions(seed=1))  # which it does not honour
    }
    assert len(keys) == 3


def test_weights_with_another_checksum_are_refused(monkeypatch):
    monkeypatch.setattr(embedded_voice, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match="sha256"):
        read_weights()


def test_missing_weights_are_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(embedded_voice, "WEIGHT_PACKAGES", ("no_such_package",))
    with pytest.raises(WeightsError, match="make run"):
        read_weights()


def test_a_blend_is_a_weighted_sum_and_a_bar_joins_halves():
    styles = Styles()
    a, b = styles.table("am_onyx"), styles.table("af_heart")
    assert np.allclose(styles.blend("am_onyx*0.75+af_heart*0.25"), 0.75 * a + 0.25 * b, atol=1e-5)
    halves = styles.blend("am_onyx|af_heart")
    assert np.array_equal(halves[:, :128], a[:, :128]) and np.array_equal(halves[:, 128:], b[:, 128:])


def test_an_unknown_style_is_told_the_styles():
    with pytest.raises(ValueError, match="am_onyx"):
        Styles().blend("nobody")


def second_session(voice):
    """onnxruntime's decoder on one core, once it is open."""
    end = time.monotonic() + 60
    while not voice._network._decoder._on_one:
        assert time.monotonic() < end
        time.sleep(0.05)
    return voice._network._decoder._on_one


def test_utterances_made_at_once_are_to_the_bit_what_they_are_alone(voice):
    texts = ["今天天气很好。", "The boats lay still in the harbour.", "这个 bug 修好以后，请告诉我一声。"]
    if isinstance(voice._network._decoder, OnnxDecoder):
        second_session(voice)
    alone = [voice.speak(text, "am_onyx") for text in texts]
    with ThreadPoolExecutor(len(texts)) as threads:
        at_once = list(threads.map(lambda text: voice.speak(text, "am_onyx"), texts))
    assert all(np.array_equal(one, other) for one, other in zip(alone, at_once, strict=True))


def features(energy):
    """What the encoder would give: one number a frame for the phonemes, two for the pitch and the energy."""
    frames = np.arange(len(energy), dtype=np.float32)
    return frames[None, None], np.repeat(frames, 2)[None], np.repeat(np.float32(energy), 2)[None]


def test_frames_of_silence_at_the_ends_are_left_out_but_a_few():
    speech = [5, 4, -9, -9, 6, 5, 5, 5]
    kept = without_silence(*features([-9] * 12 + speech + [-9] * 20))
    assert kept[0].ravel().tolist() == list(range(12 - SILENT_FRAMES, 20 + SILENT_FRAMES))
    assert np.array_equal(kept[1].ravel(), np.repeat(kept[0].ravel(), 2))
    around = [-9] * SILENT_FRAMES
    assert np.array_equal(kept[2].ravel(), np.repeat([*around, *speech, *around], 2))


@pytest.mark.parametrize("spoken", range(1, 2 * STEP_FRAMES))
def test_a_few_more_of_them_make_up_a_whole_step(spoken):
    kept = without_silence(*features([-9] * 12 + [5] * spoken + [-9] * 20))[0].ravel()
    assert len(kept) % STEP_FRAMES == 0
    silent = 12 - kept[0], kept[-1] - 11 - spoken
    assert min(silent) >= SILENT_FRAMES and max(silent) <= SILENT_FRAMES + STEP_FRAMES // 2


@pytest.mark.parametrize(("before", "after"), [(12, 0), (0, 20), (2, 20), (12, 1)])
def test_one_side_gives_what_the_other_has_not(before, after):
    kept = without_silence(*features([-9] * before + [5] * 9 + [-9] * after))[0].ravel()
    assert len(kept) % STEP_FRAMES == 0
    assert kept[0] <= before < before + 9 <= kept[-1] + 1


def test_where_silence_is_scarce_all_of_it_is_kept():
    assert len(without_silence(*features([5] * 9 + [-9] * 2))[0].ravel()) == 11


@pytest.mark.parametrize("energy", [[-9] * 5, [-9, 5, 5, -9], [5] * 3])
def test_what_is_short_or_all_silent_is_kept_whole(energy):
    given = features(energy)
    assert all(np.array_equal(one, other) for one, other in zip(given, without_silence(*given), strict=True))


def loudness_db(samples):
    """Level of the frames of 25 ms that are within 20 dB of the loudest."""
    frames = samples[: len(samples) // 600 * 600].reshape(-1, 600)
    power = np.mean(frames**2, axis=1)
    return 10 * np.log10(power[power > power.max() / 100].mean())


@pytest.mark.parametrize("style", ["am_michael*0.8+zm_yunyang*0.2|zm_yunyang", "zf_xiaoxiao"])
def test_a_short_text_is_as_loud_as_a_long_one_and_has_little_silence(voice, style):
    texts = ["技术。", "你好世界。", "人工智能正在改变世界，很多人都在学习新的技术，也有人担心自己的工作。"]
    spoken = [voice.speak(text, style) for text in texts]
    assert np.ptp([loudness_db(samples) for samples in spoken]) < 2
    for samples in spoken:
        loud = np.flatnonzero(np.abs(samples) > 10 ** (-50 / 20)) / 24_000
        assert 0.02 < loud[0] < 0.4 and 0.02 < len(samples) / 24_000 - loud[-1] < 0.4


def test_on_onnxruntime_an_utterance_alone_has_all_cores_and_one_beside_it_has_one():
    voice = EmbeddedVoice(threads=2, runtime="onnxruntime")
    decoder, single = voice._network._decoder, second_session(voice)
    with decoder._session() as first, decoder._session() as second:
        assert (first, second) == (decoder._on_all, single)
    with decoder._session() as again:
        assert again is decoder._on_all
    for session, cores in ((decoder._on_all, 2), (single, 1)):
        assert session.get_session_options().intra_op_num_threads == cores


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_the_network_s_own_threads_give_way(runtime):
    before = set(os.listdir("/proc/self/task"))
    voice = EmbeddedVoice(threads=3, runtime=runtime)
    voice.speak("Hello.", "am_onyx")
    started = set(os.listdir("/proc/self/task")) - before
    assert len(started) >= 2
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in started} == {min(19, usual + NICENESS)}


def resident_mb():
    """This process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def test_a_long_utterance_keeps_no_memory(voice):
    voice.speak("The boats lay still.", "am_onyx")
    before = resident_mb()
    voice.speak("The boats lay still in the harbour that morning, " * 6, "am_onyx")
    assert resident_mb() - before < 150


def test_long_texts_at_once_leave_no_memory_for_good_with_the_encoder(voice, monkeypatch):
    """Some stays for a while where several end at once, 50 to 150 MB; were all of it kept, 160 to 210 always would."""

    class Decoder:
        """Stands in for the decoder."""

        def run(self, features, ticket, *, keep):
            return np.zeros(1, np.float32)

    monkeypatch.setattr(voice._network, "_decoder", Decoder())
    long = "The boats lay still in the harbour, " * 14
    voice.speak(long, "am_onyx")
    before = resident_mb()
    left = []
    while not left or (min(left) >= 50 and len(left) < 20):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda text: voice.speak(text, "am_onyx"), [long] * 6))
        voice.speak(long, "am_onyx")
        left.append(resident_mb() - before)
    assert min(left) < 50 and max(left) < 250, left


MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # mallinfo2(3)


class Mallinfo2(ctypes.Structure):
    """What the C library knows of its memory, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2.split()]


def given_out():
    """Bytes that malloc has given out and not had back, and blocks that Python has."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo2
    found = ask()
    return np.array([found.uordblks + found.hblkhd, sys.getallocatedblocks()])


def test_an_utterance_leaves_no_memory_behind(voice):
    def grown():
        before = given_out()
        for _ in range(50):
            voice.speak("Hi.", "am_onyx")
        return given_out() - before

    if voice.runtime == "onnxruntime":
        second_session(voice)  # opened beside what is spoken
    most = 10_000, 100  # 200 bytes each: over a day's 50,000 utterances that would be 10 MB
    # Caches fill by ever less; what leaks grows by as much each time.
    assert any((grown() < most).all() for _ in range(6))


def test_the_memory_of_a_short_utterance_is_kept_for_the_next_one(voice, monkeypatch):
    kept = []

    class Recorder:
        """Stands in for the decoder."""

        def run(self, features, ticket, *, keep):
            kept.append((features[FEATURES[0]].shape[2], keep))
            return np.zeros(1, np.float32)

    monkeypatch.setattr(voice._network, "_decoder", Recorder())
    for times in (1, 6):
        voice.speak("The boats lay still in the harbour that morning, " * times, "am_onyx")
    (short, first), (long, last) = kept
    assert first and short <= KEPT_FRAMES
    assert not last and long > KEPT_FRAMES


@pytest.mark.parametrize(
    "text", ["今天天气很好，" * 60, "The boats lay still in the harbour, " * 40, "1234567890" * 30]
)
def test_more_than_508_tokens_are_spoken(voice, text):
    assert len(voice.speak(text, "am_onyx")) > 24_000 * 20


@pytest.mark.parametrize("text", ["", " ", "😀", "。。！", "こんにちは", "مرحبا"])
def test_nothing_to_speak_gives_no_samples(voice, text):
    assert len(voice.speak(text, "am_onyx")) == 0


@pytest.mark.parametrize(
    ("text", "unspoken"),
    [
        ("你", ""), ("aé", ""), ("５½", ""), ("こ", "こ"), ("！🙂", ""), ("𠮷野", "𠮷"), ("Hello Мир", "Мир"),
        ("π", ""), ("5 µg", ""), ("Ω", ""), ("και", "και"),
    ],
)  # fmt: skip
def test_it_knows_what_it_does_not_read(voice, text, unspoken):
    assert voice.unspoken(text) == unspoken


@pytest.mark.parametrize("recipe", ["am_echo*nan", "am_echo*1000", "am_echo*-1", "am_echo*x"])
def test_a_share_out_of_range_is_refused(recipe):
    with pytest.raises(ValueError, match=re.escape(recipe) + "|could not convert"):
        Styles().blend(recipe)


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_nothing_is_written_and_nobody_is_asked(tmp_path, runtime):
    """In a process of its own, with empty home and temp folders, watched from outside: libraries in C++ count too."""
    home, temp, trace = tmp_path / "home", tmp_path / "temp", tmp_path / "trace"
    home.mkdir(), temp.mkdir()
    speak = (
        f"from embedded_voice import EmbeddedVoice; voice = EmbeddedVoice(2, runtime={runtime!r}); "
        "print(len(voice.speak('你好 world.', 'am_onyx')))"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temp), "PYTHONDONTWRITEBYTECODE": "1"}
    watched = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", str(trace)] if shutil.which("strace") else []
    command = [*watched, sys.executable, "-c", speak]
    spoken = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=120, check=True)
    assert int(spoken.stdout) > 12_000
    assert [*home.rglob("*"), *temp.rglob("*")] == []
    if watched:
        assert "AF_INET" not in trace.read_text()


class Watched:
    """A half of the network, real, that tells when it begins a run and keeps how each ended."""

    def __init__(self, half, begins):
        self.half, self.begins, self.ends = half, begins, []

    def run(self, *arguments, **options):
        self.begins()
        try:
            result = self.half.run(*arguments, **options)
        except Exception:
            self.ends.append("failed")
            raise
        self.ends.append("made")
        return result


def test_giving_up_stops_the_encoder(voice, monkeypatch):
    ticket = Ticket()
    encoder = Watched(voice._network._encoder, ticket.cancel)
    decoder = Watched(voice._network._decoder, lambda: None)
    monkeypatch.setattr(voice._network, "_encoder", encoder)
    monkeypatch.setattr(voice._network, "_decoder", decoder)
    with pytest.raises(Cancelled):
        voice.speak("Nobody waits for this.", "am_onyx", 1.0, ticket)
    assert (encoder.ends, decoder.ends) == (["failed"], [])
    assert len(voice.speak("Still here.", "am_onyx")) > 12_000


def test_giving_up_ends_a_long_utterance_early(voice, monkeypatch):
    ticket, begun = Ticket(), threading.Event()
    decoder = Watched(voice._network._decoder, begun.set)
    monkeypatch.setattr(voice._network, "_decoder", decoder)
    text = "The boats lay still in the harbour that morning, " * 60  # several runs of 508 tokens

    def speak():
        with pytest.raises(Cancelled):
            voice.speak(text, "am_onyx", 1.0, ticket)

    thread = threading.Thread(target=speak)
    thread.start()
    assert begun.wait(60)
    time.sleep(0.2)
    ticket.cancel()
    thread.join(300)
    assert not thread.is_alive()
    # OpenVINO finishes the run that it is at, half a minute of speech, and begins no others.
    assert decoder.ends == (["failed"] if isinstance(decoder.half, OnnxDecoder) else ["made"])
    assert len(voice.speak("Still here.", "am_onyx")) > 12_000
