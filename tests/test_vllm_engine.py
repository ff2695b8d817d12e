"""The owner of a vLLM engine and what both vLLM engines share: a scripted voice, a real loop, real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from scripted import RATE, ScriptedVoice, noise

from app import Order, create_app
from engines import SynthesisOptions, VllmEngine
from errors import EngineFault, Unavailable
from settings import Settings
from utterances import split_to_fit, split_utterances
from vllm_engine import (
    DeadlinePassed,
    Emotion,
    EngineDead,
    EngineLoop,
    GivenUp,
    Reference,
    Spoken,
    children,
    descendants,
    end_processes,
    is_alive,
    vital_name,
)  # fmt: skip

SPEECH = "/v1/audio/speech"
OTHER_REFERENCE = Reference(noise(1), RATE, "another recording")


def until(condition, deadline_s=5.0):
    """Wait for a condition to hold."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def ignore(_):
    """Take a callback and never call it."""


@pytest.fixture
def voice():
    """A scripted voice, not created yet."""
    return ScriptedVoice()


@pytest.fixture
def owner(voice):
    """An owner with that voice loaded."""
    loop = EngineLoop()
    loop.load(voice.create)
    yield loop
    loop.close()


class TestOwner:
    """EngineLoop."""

    def test_the_voice_is_made_and_runs_in_one_other_thread(self, owner, voice):
        async def where():
            return threading.get_ident()

        assert voice.thread == owner.run(where(), 5, ignore) != threading.get_ident()

    def test_grad_is_off_in_the_loop_and_nowhere_else(self, voice, monkeypatch):
        switched = []
        torch = SimpleNamespace(set_grad_enabled=lambda on: switched.append((threading.get_ident(), on)))
        monkeypatch.setitem(sys.modules, "torch", torch)
        owner = EngineLoop()
        owner.load(voice.create)
        assert switched == [(voice.thread, False)]
        owner.close()

    def test_utterances_run_side_by_side(self, owner, voice):
        voice.delay_s = 0.3
        began = time.monotonic()
        runs = [threading.Thread(target=lambda: owner.run(voice.speak("a", None), 5, ignore)) for _ in range(8)]
        for run in runs:
            run.start()
        until(lambda: owner.in_flight == 8)
        for run in runs:
            run.join()
        assert time.monotonic() - began < 8 * 0.3
        assert owner.in_flight == 0

    def test_a_deadline_stops_the_work(self, owner, voice):
        voice.delay_s = 60
        with pytest.raises(DeadlinePassed):
            owner.run(voice.speak("a", None), 0.1, ignore)
        until(lambda: voice.cancelled == 1)
        assert owner.in_flight == 0

    def test_giving_up_stops_the_work(self, owner, voice):
        voice.delay_s = 60
        with pytest.raises(GivenUp):
            owner.run(voice.speak("a", None), 5, lambda cancel: threading.Timer(0.1, cancel).start())
        until(lambda: voice.cancelled == 1)

    def test_an_engine_that_dies_between_being_asked_and_its_work_stops_it(self, owner, voice, monkeypatch):
        voice.delay_s, owner._ailment, told = 60, "gone", iter([None, "gone"])
        monkeypatch.setattr(owner, "ailment", lambda: next(told))
        with pytest.raises(EngineDead, match="gone"):
            owner.run(voice.speak("a", None), 5, ignore)
        assert owner.in_flight == 0

    def test_what_the_voice_raises_comes_through(self, owner):
        async def fail():
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            owner.run(fail(), 5, ignore)

    def test_a_dead_process_is_seen_within_two_seconds_and_ends_what_runs(self, owner, voice):
        voice.delay_s = 60
        threading.Timer(0.2, voice.process.kill).start()
        began = time.monotonic()
        with pytest.raises(EngineDead, match="has ended"):
            owner.run(voice.speak("a", None), 30, ignore)
        assert time.monotonic() - began < 2.2
        assert "has ended" in owner.ailment()
        with pytest.raises(EngineDead):
            owner.run(voice.speak("b", None), 5, ignore)

    def test_an_engine_that_says_it_is_dead_is_believed(self, owner, voice):
        voice.sick = "stage 0 is dead"
        until(lambda: owner.ailment() == "stage 0 is dead", 2)

    def test_a_loop_that_ends_is_seen_within_two_seconds(self, owner):
        owner._loop.call_soon_threadsafe(owner._loop.stop)  # as what raises SystemExit does
        until(lambda: "thread has ended" in (owner.ailment() or ""), 2)

    def test_a_loop_that_has_ended_is_asked_for_nothing_more(self, owner, monkeypatch):
        """It would be waited for, ten seconds, in vain."""
        asked = []
        monkeypatch.setattr("vllm_engine.call", asked.append)
        owner._loop.call_soon_threadsafe(owner._loop.stop)
        owner._thread.join(2)
        owner.close()
        assert not asked

    def test_work_that_the_engine_cancels_by_itself_is_a_fault(self, owner):
        async def cancel():
            raise asyncio.CancelledError

        with pytest.raises(RuntimeError, match="still wanted"):
            owner.run(cancel(), 5, ignore)

    def test_a_process_that_becomes_another_is_judged_by_what_it_becomes(self, monkeypatch):
        monkeypatch.setattr("vllm_engine.BECOMING_S", 1)
        became = os.fork()
        if not became:
            time.sleep(0.05)
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "audio_decoder.py"])
        try:
            assert vital_name(became) is None
        finally:
            os.kill(became, signal.SIGKILL)
            os.waitpid(became, 0)

    def test_closing_leaves_no_process(self, owner, voice):
        owner.close()
        assert voice.closed and not is_alive(voice.process.pid)

    def test_what_fails_to_load_is_told(self):
        async def create():
            raise RuntimeError("TTS_MODEL names no folder")

        with pytest.raises(RuntimeError, match="TTS_MODEL"):
            EngineLoop().load(create)

    def test_what_failed_to_load_leaves_no_process(self):
        started = []

        async def create():
            started.append(subprocess.Popen(["sleep", "600"]))
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            EngineLoop().load(create)
        assert started[0].wait(1) == -signal.SIGTERM

    def test_a_process_that_ignores_term_is_killed(self):
        stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"], stdout=-1)
        stubborn.stdout.readline()
        end_processes({stubborn.pid: "sleep"}, 0.2)
        assert not is_alive(stubborn.pid)
        stubborn.wait()

    def test_the_whole_tree_of_processes_is_known(self):
        tree = subprocess.Popen(["sh", "-c", "sleep 600 & echo ready; wait"], stdout=subprocess.PIPE)
        tree.stdout.readline()
        [grandchild] = children(tree.pid)
        assert {tree.pid, grandchild} <= set(descendants(os.getpid()))
        end_processes({grandchild: "sleep", tree.pid: "sh"}, 0)
        tree.wait()


@pytest.fixture
def engine(voice):
    """A vLLM engine around the scripted voice, loaded."""

    async def create(_settings):
        return await voice.create()

    made = VllmEngine("indextts", Settings(utterance_timeout_s=5), "scripted", create)
    made.load()
    yield made
    made.close()


@pytest.fixture
def refs(tmp_path):
    """A reference folder with one voice of a client's own."""
    folder = tmp_path / "refs"
    folder.mkdir()
    soundfile.write(folder / "me.wav", noise(2), RATE)
    soundfile.write(folder / "angry.wav", noise(3), RATE)
    soundfile.write(folder / "short.wav", noise(0.4), RATE)
    return folder


@pytest.fixture
def app(engine, refs):
    """The real app around that engine, ready."""
    made = create_app(Settings(queue_requests=8, reference_dirs=(refs,)), engine)
    made.extensions["speech"].trouble = None
    return made


def say(app, text="Hello there.", **fields):
    """Ask the OpenAI route."""
    return app.test_client().post(SPEECH, json={"model": "m", "input": text, **fields})


def say_native(app, text="Hello there.", path="voice_03.wav", **fields):
    """Ask the native route."""
    return app.test_client().post("/tts_url", json={"text": text, "spk_audio_path": path, **fields})


class TestEngine:
    """VllmEngine behind the real routes."""

    def test_a_voice_speaks_with_its_reference_audio(self, app, voice):
        response = say(app, voice="fable")
        _, reference, _ = voice.asked[0]
        assert (response.status_code, response.headers["X-Voice"]) == (200, "fable")
        assert response.headers["X-Sample-Rate"] == "22050"
        assert reference.sample_rate == 24_000 and 6 < len(reference.samples) / 24_000 < 9

    @pytest.mark.parametrize(
        "bad",
        [
            Spoken(noise(), True), Spoken(noise(0), False), Spoken(noise(2, 0.0), False),
            Spoken(noise(60), False), Spoken(noise() * np.nan, False),
        ],
    )  # fmt: skip
    def test_an_utterance_that_came_back_wrong_is_taken_once_more_with_another_seed(self, app, voice, bad):
        voice.answers = [bad]
        assert say(app, seed=5).status_code == 200
        seeds = [options["seed"] for *_, options in voice.asked]
        assert seeds == [5, 6]

    def test_twice_wrong_is_refused_and_the_sentence_named(self, app, voice):
        voice.answers = [Spoken(noise(), True)] * 2
        response = say(app)
        assert response.status_code == 500
        assert "Hello there." in response.json["error"]["message"]
        assert response.json["error"]["code"] == "unspoken_sentence"

    @pytest.mark.parametrize("text", ["My number is four.", """it's "four" C:\\x."""])
    def test_a_sentence_that_it_names_to_the_client_is_in_no_line_of_the_log(self, app, voice, caplog, text):
        voice.answers = [Spoken(noise(), True)] * 4
        response = app.test_client().post(SPEECH, json={"model": "m", "input": text})
        assert "four" in response.json["error"]["message"]
        service = app.extensions["speech"]
        with pytest.raises(EngineFault) as caught:  # after the first bytes, gunicorn writes it down
            service.engine.synthesize(text, service.voices.resolve(None), SynthesisOptions())
        assert "four" not in caplog.text + str(caught.value)

    def test_loud_samples_are_turned_down_and_not_clipped(self, engine, app):
        loud = Spoken(noise(1, 3.0), False)
        engine._voice.answers = [loud]
        chunk = engine.synthesize("Hello.", app.extensions["speech"].voices.resolve(None), SynthesisOptions())
        assert np.abs(chunk.samples).max() < 1
        assert np.corrcoef(chunk.samples, loud.samples)[0, 1] > 0.9999

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": 2}, {"reference": OTHER_REFERENCE}, {"emotion": Emotion(audio=OTHER_REFERENCE)},
            {"emotion": Emotion(weight=0.5)}, {"emotion": Emotion(vector=(1.0,) + (0.0,) * 7)},
            {"emotion": Emotion(text="sad")},
        ],
    )  # fmt: skip
    def test_all_that_shapes_its_sound_is_in_the_key_of_the_cache(self, app, engine, other):
        voices = app.extensions["speech"].voices
        key = engine.sound_key(voices.resolve("fable"), SynthesisOptions(seed=1))
        assert engine.sound_key(voices.resolve("fable"), SynthesisOptions(seed=1)) == key is not None
        assert engine.sound_key(voices.resolve("fable"), SynthesisOptions(**{"seed": 1, **other})) != key
        assert engine.sound_key(voices.resolve("nova"), SynthesisOptions(seed=1)) != key

    @pytest.mark.parametrize("fields", [{}, {"seed": 1, "emotion": Emotion(random=True)}], ids=["seedless", "random"])
    def test_what_is_sampled_anew_has_no_key(self, app, engine, fields):
        assert engine.sound_key(app.extensions["speech"].voices.resolve(None), SynthesisOptions(**fields)) is None

    def test_a_model_that_does_not_keep_to_its_seed_has_no_key(self, app, engine, voice):
        voice.seeded = False
        assert engine.sound_key(app.extensions["speech"].voices.resolve(None), SynthesisOptions(seed=1)) is None

    def test_a_dead_engine_answers_503_and_says_come_back(self, app, voice, engine):
        voice.delay_s = 60
        threading.Timer(0.3, voice.process.kill).start()
        response = say(app)
        assert response.status_code == 503 and response.headers["Retry-After"]
        assert response.json["error"]["code"] == "engine_died"
        health = app.test_client().get("/health")
        assert health.status_code == 503 and "has ended" in health.json["message"]

    def test_an_engine_that_hangs_past_its_deadline_answers_503(self, engine, voice, app):
        engine._settings = Settings(utterance_timeout_s=0.2)
        voice.delay_s = 60
        with pytest.raises(Unavailable, match="within 0.2 s"):
            engine.synthesize("Hello.", app.extensions["speech"].voices.resolve(None), SynthesisOptions())
        until(lambda: voice.cancelled == 1)

    def test_long_text_never_passes_the_token_cap(self, app, voice):
        assert say(app, "word " * 800).status_code == 200
        voice.max_utterance_tokens = 20
        assert say(app, "你好世界，今天天气很好，我们去公园散步吧。" * 5).status_code == 200
        assert max(len(text) for text, *_ in voice.asked[-5:]) <= 20

    def test_health_shows_what_the_gpu_may_be_used_for(self, app):
        report = app.test_client().get("/health").json
        assert report["gpu_memory_utilization"] == 0.25 and report["qwenemo_gpu_memory_utilization"] == 0.1
        assert report["conditioning_hits"] == 7 and report["gpus"] == []

    def test_a_file_below_the_reference_folders_is_cloned(self, app, voice):
        response = say_native(app, path="me.wav")
        assert (response.status_code, response.headers["X-Voice"]) == (200, "cloned")
        assert len(voice.asked[0][1].samples) == 2 * RATE

    @pytest.mark.parametrize("path", ["/elsewhere/voice_03.wav", "voice_03.wav", "C:\\x\\voice_03.wav"])
    def test_a_voices_file_in_any_folder_is_that_voice(self, app, voice, path):
        assert say_native(app, path=path).headers["X-Voice"] == "fable"

    @pytest.mark.parametrize("path", ["gone.wav", "../me.wav", "/etc/passwd", "me.wav\0"])
    def test_an_unknown_reference_is_400_and_names_the_setting(self, app, path):
        response = say_native(app, path=path)
        assert response.status_code == 400 and "TTS_REFERENCE_DIRS" in response.json["error"]

    def test_an_unfit_reference_is_400_and_says_why(self, app):
        response = say_native(app, path="short.wav")
        assert response.status_code == 400 and "0.40 s" in response.json["error"]

    def test_an_engine_without_speech_in_reach_of_the_speed_is_stretched(self, app, voice):
        plain, fast = (float(say(app, speed=speed).headers["X-Audio-Duration"]) for speed in (1, 2))
        assert fast == pytest.approx(plain / 2, rel=0.05)
        assert {options["speed"] for *_, options in voice.asked} == {1.0}

    def test_a_voice_with_a_speed_of_its_own_is_given_what_it_can_do(self, app, voice):
        voice.speed_range = (0.5, 2.0)
        say(app, speed=1.5)
        say(app, speed=4)
        assert [options["speed"] for *_, options in voice.asked] == [1.5, 2.0]


class TestEmotion:
    """IndexTTS's four methods and OpenAI's instructions."""

    @pytest.fixture
    def asked(self, app, voice):
        """Ask the native route with a method; return the emotion that reached the voice, or the refusal."""
        voice.emotes_by_text = True

        def ask(**fields):
            response = say_native(app, **fields)
            return voice.asked[-1][2]["emotion"] if response.status_code == 200 else response.json["error"]

        return ask

    def test_method_0_is_the_speakers_own(self, asked):
        emotion = asked(emo_control_method=0, emo_vec=[0.5] + [0] * 7, emo_ref_path="angry.wav")
        assert (emotion.audio, emotion.vector, emotion.text) == (None, None, None)

    def test_method_1_is_another_audios(self, asked):
        emotion = asked(emo_control_method=1, emo_ref_path="angry.wav", emo_weight=0.6)
        assert len(emotion.audio.samples) == 3 * RATE and emotion.weight == 0.6

    def test_method_1_takes_a_voices_file(self, asked):
        assert asked(emo_control_method=1, emo_ref_path="/x/voice_02.wav").audio.sample_rate == 24_000

    def test_method_1_without_a_path_is_refused(self, asked):
        assert "emo_ref_path" in asked(emo_control_method=1)

    def test_method_2_is_a_vector(self, asked):
        emotion = asked(emo_control_method=2, emo_vec=[0, 0.8, 0, 0, 0, 0, 0, 0.2], emo_random=True)
        assert emotion.vector == (0, 0.8, 0, 0, 0, 0, 0, 0.2) and emotion.random

    def test_method_2_over_the_sum_is_refused(self, asked):
        assert "1.5" in asked(emo_control_method=2, emo_vec=[0.8, 0.8, 0, 0, 0, 0, 0, 0])

    def test_method_3_is_a_text_by_default_the_spoken_one(self, asked):
        assert asked(emo_control_method=3, emo_text="furious").text == "furious"
        assert asked(emo_control_method=3).text == "Hello there."

    def test_of_a_long_emotion_text_the_model_hears_what_it_can_take(self, asked):
        assert asked(emo_control_method=3, emo_text="怒" * 4096).text == "怒" * 400
        assert "4096" in asked(emo_control_method=3, emo_text="怒" * 4097)

    def test_a_text_without_its_model_is_refused(self, app):
        for response in (say_native(app, emo_control_method=3), say(app, instructions="Sound happy.")):
            assert response.status_code == 400 and "emotion-text model" in str(response.json["error"])

    def test_while_the_model_loads_nobody_is_told_that_it_reads_no_emotion(self, app, engine, voice):
        voice.emotes_by_text, engine._voice, service = True, None, app.extensions["speech"]
        service.trouble = "loading"

        def come():
            engine._voice, service.trouble = voice, None

        assert say(app, instructions="Sound happy.").json["error"]["code"] == "loading"
        threading.Timer(0.5, come).start()
        assert say_native(app, emo_control_method=3, emo_text="furious").status_code == 200
        assert voice.asked[-1][2]["emotion"].text == "furious"

    def test_instructions_are_a_text(self, app, voice):
        voice.emotes_by_text = True
        assert say(app, instructions="Sound happy.").status_code == 200
        assert voice.asked[-1][2]["emotion"].text == "Sound happy."

    def test_the_extensions_are_a_vector_and_an_audio(self, app, voice):
        say(app, emotion_vector=[0.1] * 8)
        say(app, emotion_audio="angry.wav")
        vector, audio = (options["emotion"] for *_, options in voice.asked)
        assert vector.vector == (0.1,) * 8 and len(audio.audio.samples) == 3 * RATE

    def test_two_at_once_are_refused(self, app):
        response = say(app, emotion_vector=[0.1] * 8, emotion_audio="angry.wav")
        assert response.status_code == 400 and response.json["error"]["param"] == "emotion_audio"


def test_text_that_does_not_fit_is_cut_and_nothing_is_lost():
    text = "一二三四五六七八九十，" * 12
    parts = list(split_to_fit(split_utterances(text), lambda part: len(part) <= 7))
    assert all(len(part.text) <= 7 for part in parts)
    assert "".join(part.text for part in parts) == text


def test_a_text_that_can_never_fit_ends():
    assert len(list(split_to_fit(split_utterances("abc def"), lambda _: False))) == len("abcdef")


def test_a_long_text_is_counted_as_it_is_spoken_and_not_before(app, voice):
    counted = []
    voice.count_tokens = lambda text: counted.append(text) or len(text)
    speech = app.extensions["speech"]
    audio = speech.speak(Order("This is one sentence. " * 180, speech.voices.resolve(None)))
    next(audio)
    assert 1 <= len(counted) < 15
    audio.close()


def test_an_engine_fault_is_a_500_of_ours():
    assert EngineFault("x").status == 500


class TestLoading:
    """What the service makes of an engine that does not come to its first words."""

    @pytest.fixture
    def load(self, voice):
        """Load a service, whose engine fails as told; return it and how often it asked for another worker."""
        made = []

        def load(fault=None, how="_load", **attributes):
            async def create(_settings):
                if fault:
                    raise fault
                return await voice.create()

            engine, deaths = VllmEngine("omni", Settings(utterance_timeout_s=5), "scripted", create), []
            made.append(engine)
            service = create_app(engine._settings, engine).extensions["speech"]
            vars(service).update(attributes, on_death=lambda: deaths.append(1))
            getattr(service, how)()
            return service, len(deaths)

        yield load
        for engine in made:
            engine.close()

    def test_one_that_does_not_load_is_told_and_stays(self, load):
        service, deaths = load(RuntimeError("TTS_MODEL: no such folder"))
        assert (service.ailment(), deaths) == ("engine omni did not load: TTS_MODEL: no such folder", 0)

    def test_a_replacement_that_does_not_load_makes_room_for_the_next(self, load):
        service, deaths = load(RuntimeError("out of memory"), retry_load_s=0.1)
        assert "out of memory" in service.ailment() and deaths == 1

    def test_first_words_that_it_misses_are_tried_again(self, load, voice):
        nothing = Spoken(np.zeros(0, np.float32), False)
        voice.answers = [nothing] * 4  # two takes each of two tries
        assert load(how="load")[0].ailment() is None
        voice.answers = [nothing] * 6
        with pytest.raises(EngineFault, match="came back empty"):
            load(how="load")

    def test_one_that_is_shut_down_did_not_die(self, load, caplog):
        service, _ = load(how="start")
        until(lambda: service.ailment() is None)
        service.close()
        until(lambda: all(thread.name != "load" for thread in threading.enumerate()))
        assert "died" not in caplog.text

    def test_one_that_dies_at_its_first_words_is_told(self, load, voice):
        voice.delay_s, voice.sick = 60, "stage 0 is dead"
        fault = load()[0].ailment()
        assert fault == "engine omni did not load: at its first words: stage 0 is dead. The log above says why"
        assert not is_alive(voice.process.pid)
