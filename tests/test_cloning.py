"""Uploads, the native call that clones them, and voices that clients make, as a client sees them."""

import errno
import importlib
import io
import json
import os
import time

import numpy as np
import openai
import pytest
import soundfile
from scripted import RATE, ScriptedVoice
from test_reference_audio import encoded, speech_like

import reference_store
from app import create_app
from engines import VllmEngine
from settings import HERE, Settings

CLONING, UPLOAD, VOICES, SPEECH = "/tts_url_with_cloning", "/upload_audio", "/v1/audio/voices", "/v1/audio/speech"


@pytest.fixture
def voice():
    """A scripted voice model that clones, not created yet."""
    return ScriptedVoice()


@pytest.fixture
def start(voice, tmp_path):
    """A function that starts the real app around that voice, with folders of its own."""
    started = []

    async def create(_settings):
        return await voice.create()

    def start_app(**settings):
        folders = {"upload_dir": tmp_path / "uploads", "own_voices_dir": tmp_path / "own"}
        settings = Settings(**{**folders, **settings})
        engine = VllmEngine("indextts", settings, "scripted", create)
        engine.load()
        started.append(engine)
        app = create_app(settings, engine)
        service = app.extensions["speech"]
        service.trouble = None
        service.uploads.start()
        service.own_voices.start()
        return app.test_client()

    yield start_app
    for engine in started:
        engine.close()


@pytest.fixture
def cloner(start):
    """A client of that app."""
    return start()


def wav(samples=None, rate=24_000):
    """A WAV of speech-like noise."""
    file = io.BytesIO()
    soundfile.write(file, speech_like(3) if samples is None else samples, rate, format="WAV")
    return file.getvalue()


def upload(client, data=None, name="prompt.wav", field="file", **fields):
    """Send a file as the worker does."""
    file = (io.BytesIO(wav() if data is None else data), name)
    return client.post(UPLOAD, data={field: file, **fields}, content_type="multipart/form-data")


def make_voice(client, data=None, **fields):
    """Make a voice as OpenAI's client does."""
    form = {"name": "Aunt May", "consent": "cons_1", **fields, "audio_sample": (io.BytesIO(data or wav()), "may.wav")}
    return client.post(VOICES, data=form, content_type="multipart/form-data")


def speak_like(client, path, text="Hello there.", **fields):
    """Ask the native call that clones."""
    return client.post(CLONING, json={"text": text, "spk_audio_path": path, **fields})


def kept(tmp_path, folder="uploads"):
    """Names of what a folder holds."""
    return sorted(os.listdir(tmp_path / folder)) if (tmp_path / folder).exists() else []


class TestUploads:
    """POST /upload_audio."""

    def test_an_upload_answers_what_the_worker_reads(self, cloner, tmp_path):
        response = upload(cloner)
        told = response.json
        assert response.status_code == 200
        assert told.keys() == {"server_path", "filename", "size", "status"} and told["status"] == "success"
        assert told["server_path"] == f"uploads/{told['filename']}" and kept(tmp_path) == [told["filename"]]
        assert told["size"] == (tmp_path / told["server_path"]).stat().st_size

    @pytest.mark.parametrize(
        ("container", "codec"),
        [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("ipod", "aac"), ("flac", "flac"), ("ogg", "libopus")],
    )
    def test_the_formats_that_prompts_come_in_are_taken(self, cloner, tmp_path, container, codec):
        assert upload(cloner, encoded(container, codec)).status_code == 200
        [name] = kept(tmp_path)
        info = soundfile.info(tmp_path / "uploads" / name)
        assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
        assert info.duration == pytest.approx(2, abs=0.06)

    def test_of_a_long_recording_15_seconds_are_kept(self, cloner, tmp_path):
        path = upload(cloner, wav(speech_like(40))).json["server_path"]
        assert soundfile.info(tmp_path / path).duration == 15

    def test_the_same_sound_is_kept_once_and_its_conditioning_has_one_key(self, cloner, voice, tmp_path):
        paths = [upload(cloner, name=name).json["server_path"] for name in ("a.wav", "b.wav")]
        for path in paths:
            assert speak_like(cloner, path).status_code == 200
        assert len(set(paths)) == len(kept(tmp_path)) == 1
        assert len({reference.digest for _, reference, _ in voice.asked}) == 1

    @pytest.mark.parametrize("name", ["x" * 259 + ".wav", "../../etc/passwd", "a\0b.wav", "音色.wav?X-Sig=1&b=2", "/"])
    def test_a_clients_file_name_does_not_matter(self, cloner, tmp_path, name):
        assert upload(cloner, name=name).json["server_path"] == upload(cloner).json["server_path"]
        assert len(kept(tmp_path)) == 1

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"", "not audio"),
            (b"<html><body>403 Forbidden</body></html>", "not audio"),
            (b"PK\3\4" + bytes(5000), "not audio"),
            (b"RIFF\xff\xff\xff\xffWAVEfmt ", "not audio"),
            (wav()[:44], "0.00 s"),
            (wav(speech_like(0.5)), "0.50 s"),
            (wav(np.zeros(48_000, np.float32)), "silent"),
            (wav(np.stack([speech_like(2)] * 12, axis=1)), "12 channels"),
        ],
    )
    def test_what_cannot_be_cloned_is_refused_with_the_reason_and_leaves_nothing(self, cloner, tmp_path, data, told):
        response = upload(cloner, data)
        assert response.status_code == 400 and told in response.json["error"] and response.json["status"] == "error"
        assert kept(tmp_path) == []

    def test_a_header_that_lies_about_its_length_does_not_matter(self, cloner, tmp_path):
        lying = bytearray(wav())
        lying[40:44] = b"\xf0\xff\xff\x7f"
        assert upload(cloner, bytes(lying)).status_code == 200
        assert soundfile.info(tmp_path / "uploads" / kept(tmp_path)[0]).duration == 3

    def test_a_body_without_the_file_is_refused(self, cloner):
        assert upload(cloner, field="audio").status_code == 400
        assert cloner.post(UPLOAD, json={"file": "a"}).status_code == 400
        assert cloner.post(UPLOAD, data=b"--x", content_type="multipart/form-data; boundary=x").status_code == 400

    def test_a_body_over_the_limit_is_refused(self, start, tmp_path):
        client = start(max_upload_bytes=100_000)
        for seconds in (3, 30):
            response = upload(client, wav(speech_like(seconds)))
            assert response.status_code == 413 and "TTS_MAX_UPLOAD_BYTES, 100000" in response.json["error"]
        assert upload(client, wav(speech_like(1.5))).status_code == 200

    def test_a_full_disk_is_told_and_leaves_nothing(self, cloner, tmp_path, monkeypatch):
        def fail(_descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(reference_store.os, "fsync", fail)
        response = upload(cloner)
        assert response.status_code == 507 and "No space left" in response.json["error"]
        assert kept(tmp_path) == []

    def test_the_oldest_go_when_there_are_too_many(self, start, tmp_path):
        client = start(upload_dir_bytes=1 << 20)
        paths = []
        for seed in range(3):
            sound = np.random.default_rng(seed).uniform(-0.3, 0.3, 9 * 24_000).astype(np.float32)
            paths.append(upload(client, wav(sound)).json["server_path"])
            if seed == 1:
                upload(client, wav(np.random.default_rng(0).uniform(-0.3, 0.3, 9 * 24_000).astype(np.float32)))
        assert kept(tmp_path) == sorted(os.path.basename(path) for path in (paths[0], paths[2]))
        assert speak_like(client, paths[1]).status_code == 400

    def test_an_old_one_is_not_used_any_more_and_removed(self, start, voice, tmp_path):
        path = upload(start(upload_max_age_s=60)).json["server_path"]
        os.utime(tmp_path / path, (time.time() - 61, time.time()))
        client = start(upload_max_age_s=60)
        response = speak_like(client, path)
        assert response.status_code == 400 and "upload it again" in response.json["error"]
        client.application.extensions["speech"].uploads.expire()
        assert kept(tmp_path) == []

    @pytest.mark.parametrize("step_s", [1e6, -1e6])
    def test_a_stepping_clock_makes_none_old_or_everlasting(self, start, tmp_path, monkeypatch, step_s):
        client, real, began = start(upload_max_age_s=60), time.time, time.monotonic()
        path = upload(client).json["server_path"]
        monkeypatch.setattr(time, "time", lambda: real() + step_s)
        client.application.extensions["speech"].uploads.expire()
        assert speak_like(client, path).status_code == 200
        monkeypatch.setattr(time, "monotonic", lambda: began + 3600)
        client.application.extensions["speech"].uploads.expire()
        assert kept(tmp_path) == []

    def test_being_spoken_with_is_a_use(self, start, tmp_path, monkeypatch):
        client, began = start(upload_max_age_s=60), time.monotonic()
        path = upload(client).json["server_path"]
        for seconds in (50, 100):
            monkeypatch.setattr(time, "monotonic", lambda now=began + seconds: now)
            assert speak_like(client, path).status_code == 200

    def test_what_a_killed_server_left_half_written_is_removed(self, start, tmp_path):
        (tmp_path / "uploads").mkdir()
        (tmp_path / "uploads" / "abc.part").write_bytes(b"half")
        start()
        assert kept(tmp_path) == []

    def test_a_disk_that_lets_nothing_go_stops_no_start_and_no_tidying(self, start, tmp_path, monkeypatch, caplog):
        cloner = start(upload_max_age_s=1)
        path = upload(cloner).json["server_path"]
        (tmp_path / "uploads" / "x.part").touch()
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "voice_half.wav").touch()

        def read_only(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        service = cloner.application.extensions["speech"]
        with monkeypatch.context() as closed:
            closed.setattr("pathlib.Path.unlink", read_only)
            time.sleep(1)
            for tidy in (service.uploads.start, service.own_voices.start, service.uploads.expire):
                tidy()
            assert kept(tmp_path) == [path.removeprefix("uploads/"), "x.part"]
        assert "cannot be removed: Read-only file system" in caplog.text
        service.uploads.expire()
        assert kept(tmp_path) == ["x.part"]

    def test_a_damaged_one_is_refused_until_it_is_sent_again(self, cloner, tmp_path):
        path = upload(cloner).json["server_path"]
        (tmp_path / path).write_bytes(b"")
        assert speak_like(cloner, path).status_code == 400
        assert upload(cloner).json["server_path"] == path
        assert speak_like(cloner, path).status_code == 200

    def test_an_upload_cannot_be_read_over_http(self, cloner):
        path = upload(cloner).json["server_path"]
        assert [cloner.get(f"/{where}").status_code for where in (path, f"static/{path}")] == [404, 404]

    def test_more_than_a_few_at_once_are_told_to_come_back(self, cloner):
        receiving = cloner.application.extensions["speech"].receiving
        while receiving.acquire(blocking=False):
            pass
        response = upload(cloner)
        assert response.status_code == 429 and response.headers["Retry-After"]

    def test_an_engine_that_cannot_clone_says_so(self, client):
        response = upload(client)
        assert response.status_code == 400 and "cannot clone" in response.json["error"]

    @pytest.mark.parametrize(("open_uploads", "status"), [(False, 401), (True, 200)])
    def test_an_upload_without_a_key_is_for_a_setting_to_allow(self, start, open_uploads, status):
        client = start(api_keys=("secret",), open_uploads=open_uploads)
        response = upload(client)
        assert response.status_code == status
        assert make_voice(client).status_code == speak_like(client, "voice_01.wav").status_code == 401


class TestCloning:
    """POST /tts_url_with_cloning."""

    def test_it_speaks_with_the_upload_at_the_rate_of_all_answers(self, cloner, voice, monkeypatch):
        path, given, serve = upload(cloner).json["server_path"], [], cloner.application.wsgi_app
        monkeypatch.setattr(cloner.application, "wsgi_app", lambda *call: given.append(call[0]) or serve(*call))
        response = speak_like(cloner, path, emo_audio_path=path, emo_alpha=0.8)
        assert (response.status_code, response.content_type) == (200, "audio/wav")
        assert response.headers["X-Voice"] == given[0]["speech.voice"] == "cloned", "in the access log, too"
        assert 'voice="cloned"' in cloner.get("/metrics").text
        with soundfile.SoundFile(io.BytesIO(response.data)) as file:
            assert (file.samplerate, file.channels, file.subtype) == (RATE, 1, "PCM_16")
        [(_, reference, options)] = voice.asked
        assert len(reference.samples) == 3 * 24_000
        assert np.abs(reference.samples - speech_like(3)).max() < 1e-3
        assert options["emotion"].audio is None, "its own emotion it has anyway"

    def test_another_recordings_emotion_comes_with_its_weight(self, cloner, voice):
        mine, angry = (upload(cloner, wav(speech_like(s))).json["server_path"] for s in (3, 2))
        assert speak_like(cloner, mine, emo_audio_path=angry, emo_alpha=0.8).status_code == 200
        emotion = voice.asked[0][2]["emotion"]
        assert len(emotion.audio.samples) == 2 * 24_000 and emotion.weight == 0.8

    def test_an_upload_may_also_be_spoken_with_by_the_plain_native_call(self, cloner, voice):
        path = upload(cloner).json["server_path"]
        assert cloner.post("/tts_url", json={"text": "Hi.", "spk_audio_path": path}).status_code == 200
        assert len(voice.asked[0][1].samples) == 3 * 24_000

    @pytest.mark.parametrize(
        "path",
        ["uploads/{}.wav", "uploads/../uploads/{}.wav", "/uploads/{}.wav", "uploads/{}", "{}.wav", "uploads//{}.wav"],
    )
    def test_only_the_exact_token_means_an_upload(self, cloner, voice, tmp_path, path):
        digest = upload(cloner).json["filename"].removesuffix(".wav")
        expected = 200 if path == "uploads/{}.wav" else 400
        assert speak_like(cloner, path.format(digest)).status_code == expected
        assert speak_like(cloner, str(tmp_path / "uploads" / f"{digest}.wav")).status_code == 400

    def test_an_unknown_token_is_refused_in_the_native_shape(self, cloner):
        response = speak_like(cloner, f"uploads/{'0' * 64}.wav")
        assert response.status_code == 400 and response.json["status"] == "error" and "\n" not in response.json["error"]

    def test_the_known_voices_can_be_asked_for_too(self, cloner, voice):
        assert speak_like(cloner, "/any/where/voice_05.wav").headers["X-Voice"] == "nova"

    @pytest.mark.parametrize("path", ["uploads/x.wav", "/srv/examples/voice_01.wav"])
    def test_an_engine_that_cannot_clone_refuses_so_that_the_worker_falls_back(self, client, path):
        response = speak_like(client, path)
        assert response.status_code == 400 and "cannot clone" in response.json["error"]


class TestOwnVoices:
    """POST and DELETE /v1/audio/voices."""

    def test_a_voice_is_made_listed_after_the_eleven_spoken_in_and_forgotten(self, cloner, voice, tmp_path):
        made = make_voice(cloner).json
        assert made == {"id": made["id"], "object": "audio.voice", "type": "audio_sample", "name": "Aunt May",
                        "created_at": pytest.approx(time.time(), abs=5)}  # fmt: skip
        listed = cloner.get(VOICES).json["voices"]
        assert len(listed) == 12 and listed[11]["id"] == made["id"] and listed[11]["name"] == "Aunt May"
        asked = {"model": "m", "input": "Hi.", "voice": {"id": made["id"]}}
        assert cloner.post(SPEECH, json=asked).headers["X-Voice"] == made["id"]
        assert len(voice.asked[0][1].samples) == 3 * 24_000
        figures = cloner.get("/metrics").text
        assert 'voice="own"' in figures and made["id"] not in figures, "or each voice ever made would stay there"
        gone = cloner.delete(f"{VOICES}/{made['id']}")
        assert gone.json == {"id": made["id"], "object": "audio.voice.deleted", "deleted": True}
        assert len(cloner.get(VOICES).json["voices"]) == 11 and kept(tmp_path, "own") == []
        assert cloner.post(SPEECH, json=asked).status_code == 400

    def test_openais_client_makes_and_forgets_a_voice(self, start, tmp_path):
        http = openai.httpx if hasattr(openai, "httpx") else importlib.import_module("httpx2")
        client = start()
        transport = http.WSGITransport(app=client.application)
        with openai.OpenAI(
            base_url="http://127.0.0.1/v1", api_key="none", http_client=openai.DefaultHttpxClient(transport=transport)
        ) as ours:
            made = ours.audio.voices.create(name="May", consent="cons_1", audio_sample=("a.wav", wav()))
            assert made.object == "audio.voice"
            assert ours.audio.voices.delete(made.id).deleted

    def test_it_is_kept_across_restarts(self, start):
        made = make_voice(start()).json
        assert start().get(VOICES).json["voices"][11]["id"] == made["id"]

    def test_a_broken_voice_is_left_out_and_told(self, start, tmp_path, caplog):
        made = make_voice(start()).json["id"]
        (tmp_path / "own" / f"{made}.json").write_text("{")
        assert len(start().get(VOICES).json["voices"]) == 11
        assert made in caplog.text

    def test_a_full_disk_leaves_no_half_voice(self, cloner, tmp_path, monkeypatch):
        written, fsync = [], os.fsync

        def fail_second(descriptor):
            written.append(descriptor)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(reference_store.os, "fsync", fail_second)
        response = make_voice(cloner)
        assert response.status_code == 507 and response.json["error"]["code"] == "insufficient_storage"
        assert kept(tmp_path, "own") == [] and len(cloner.get(VOICES).json["voices"]) == 11

    def test_one_that_the_disk_does_not_let_go_is_507(self, cloner, monkeypatch):
        made = make_voice(cloner).json["id"]

        def read_only(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        with monkeypatch.context() as closed:
            closed.setattr("pathlib.Path.unlink", read_only)
            assert cloner.delete(f"{VOICES}/{made}").status_code == 507
        assert cloner.delete(f"{VOICES}/{made}").status_code == 200

    def test_two_voices_may_have_one_name(self, cloner):
        assert make_voice(cloner).json["id"] != make_voice(cloner).json["id"]

    def test_their_number_is_bounded(self, start):
        client = start(max_own_voices=1)
        assert [make_voice(client).status_code for _ in range(2)] == [200, 400]

    @pytest.mark.parametrize("fields", [{"name": ""}, {"name": "x" * 257}, {"name": "a\nb"}, {"consent": " "}])
    def test_a_name_and_a_consent_are_needed(self, cloner, fields, tmp_path):
        response = make_voice(cloner, **fields)
        assert response.status_code == 400 and response.json["error"]["param"] == next(iter(fields))
        assert kept(tmp_path, "own") == []

    def test_a_bad_recording_is_refused_by_its_field(self, cloner):
        error = make_voice(cloner, b"<html>").json["error"]
        assert (error["param"], error["code"]) == ("audio_sample", "bad_reference_audio")

    @pytest.mark.parametrize("voice_id", ["alloy", "default", "voice_0", "..%2f..", "%00"])
    def test_only_a_voice_of_ones_own_can_be_forgotten(self, cloner, voice_id):
        response = cloner.delete(f"{VOICES}/{voice_id}")
        assert response.status_code == 404 and response.json["error"]["type"] == "invalid_request_error"
        assert len(cloner.get(VOICES).json["voices"]) == 11

    def test_a_voice_forgotten_while_it_speaks_ends_that_request_with_a_reason(self, cloner, voice):
        made = make_voice(cloner).json["id"]
        (cloner.application.extensions["speech"].own_voices._folder / f"{made}.wav").unlink()
        response = cloner.post(SPEECH, json={"model": "m", "input": "Hi.", "voice": made})
        assert response.status_code == 503 and "cannot be used" in response.json["error"]["message"]

    def test_an_engine_that_cannot_clone_refuses_at_creation_and_lists_none(self, start, client, engine, tmp_path):
        made = make_voice(start()).json["id"]
        response = make_voice(client)
        assert response.status_code == 400 and response.json["error"]["code"] == "cannot_clone"
        embedded = create_app(Settings(own_voices_dir=tmp_path / "own"), engine).test_client()
        assert made not in embedded.get(VOICES).text


class TestPaths:
    """What a client may not have read, by whichever field it names it."""

    NAMED = [
        ("/tts_url", "spk_audio_path", {}),
        ("/tts_url", "emo_ref_path", {"spk_audio_path": "voice_01.wav", "emo_control_method": 1}),
        (CLONING, "spk_audio_path", {}),
        (CLONING, "emo_audio_path", {"spk_audio_path": "voice_01.wav"}),
        (SPEECH, "emotion_audio", {"model": "m", "input": "Hello."}),
    ]
    PATHS = ["../secret.wav", "/etc/passwd", "link.wav", "fifo.wav", "up/secret.wav", "sub", "a\0b.wav", "x" * 5000]

    @pytest.fixture
    def exposed(self, start, tmp_path):
        """A client of an app whose reference folder has a link, a FIFO and a folder in it, and a secret beside it."""
        folder = tmp_path / "refs"
        (folder / "sub").mkdir(parents=True)
        (tmp_path / "secret.wav").write_bytes(wav())
        (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
        (folder / "up").symlink_to(tmp_path)
        os.mkfifo(folder / "fifo.wav")
        return start(reference_dirs=(folder,))

    @pytest.mark.parametrize(("route", "field", "fields"), NAMED, ids=[f"{r}-{f}" for r, f, _ in NAMED])
    @pytest.mark.parametrize("path", PATHS, ids=[repr(path[:9]) for path in PATHS])
    def test_it_is_refused_and_nothing_is_spoken(self, exposed, voice, route, field, fields, path):
        response = exposed.post(route, json={"text": "Hello.", **fields, field: path})
        assert response.status_code == 400 and field in response.text and len(response.text) < 800
        assert voice.asked == []


def test_the_description_of_the_api_names_these_routes(client):
    paths = client.get("/openapi.json").json["paths"]
    assert {CLONING, UPLOAD, VOICES, f"{VOICES}/{{voice_id}}"} <= paths.keys()
    assert {"get", "post"} <= paths[VOICES].keys()
    assert json.dumps(paths[CLONING]).count("CloningRequest")


def test_the_shipped_examples_can_be_uploaded(cloner):
    for number in (1, 11):
        assert upload(cloner, (HERE / "examples" / f"voice_{number:02}.wav").read_bytes()).status_code == 200
