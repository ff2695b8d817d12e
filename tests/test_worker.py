"""The dubbing worker's two generations against the real server: routes, voices, keys, uploads, one format always."""

import http.server
import io
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from dubbing_worker import NewerWorker, OlderWorker, Segment, TaskFailed
from serving import REPOSITORY, Server

from settings import HERE
from voices import Voices

PROBES = ("/synthesize", "/tts", "/api/synthesize", "/api/tts")
LINES = ["Good morning.", "The train leaves at nine. Please be there.", "Thank you, see you tomorrow!"]


def scripted_server(folder: Path, **environment: str) -> Server:
    """A real server whose scripted engine clones, with folders of its own."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    folders = {"TTS_UPLOAD_DIR": str(folder / "uploads"), "TTS_OWN_VOICES_DIR": str(folder / "own")}
    return Server(folder / "log", "scripted:create_app()", PYTHONPATH=paths, **folders, **environment)


@pytest.fixture(scope="module")
def cloner(tmp_path_factory):
    """A real server that clones."""
    with scripted_server(tmp_path_factory.mktemp("cloner")) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def prompt_url():
    """The address of a prompt audio behind a presigned query, which makes a name of over 255 bytes."""

    class Store(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write((HERE / "examples" / "voice_09.wav").read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{store.server_address[1]}/speaker_1.wav?X-Amz-Signature={'0f' * 130}&X-Amz-Expires=900"
        store.shutdown()


def segments(count: int, lines=LINES) -> list[Segment]:
    """A task whose segments are spoken by the eleven voices in turn."""
    return [Segment(n, lines[n % len(lines)], n % 11 + 1) for n in range(count)]


def spoken_by(server: Server, route: str) -> dict[str, int]:
    """How many requests of a route were answered in each voice, by the server's figures."""
    told = server.get("/metrics")[2].decode()
    wanted = rf'speech_requests_total{{format="wav",route="{route}",status="200",voice="(\w+)"}} (\d+)'
    return {voice: int(count) for voice, count in re.findall(wanted, told)}


def log_lines(server: Server, begun: int) -> list[str]:
    """Lines of the log after a number of them, once they are written."""
    time.sleep(0.3)
    return server.log.read_text().splitlines()[begun:]


class TestGenerations:
    """Clean-room clients of both generations."""

    def test_the_older_one_gets_each_segment_in_its_voice_from_the_first_address(self, server):
        before = spoken_by(server, "/tts_url")
        worker = OlderWorker(server.url)
        made = worker.speak_task(segments(11))
        after = spoken_by(server, "/tts_url")
        assert worker.routes == {"/tts_url": 11}
        assert {voice: after[voice] - before.get(voice, 0) for voice in after} == dict.fromkeys(after, 1)
        assert len(after) == 11 and all(wav[:4] == b"RIFF" for wav in made)

    def test_a_base_url_with_a_trailing_slash_works(self, server):
        worker = OlderWorker(server.url + "/")
        worker.speak_task(segments(1))
        assert worker.routes == {"/tts_url": 1}

    def test_where_the_native_call_cannot_be_used_it_comes_to_the_openai_route(self, server):
        worker = OlderWorker(server.url, openai_voice="female_1")
        worker.native_body = lambda segment: {"text": segment.text, "spk_audio_path": "/nobody.wav"}
        before = spoken_by(server, "/audio/speech")
        worker.speak_task(segments(2))
        assert worker.routes == {"/audio/speech": 2}
        assert spoken_by(server, "/audio/speech")["nova"] == before.get("nova", 0) + 2

    def test_the_newer_one_clones_where_the_engine_can(self, cloner, prompt_url):
        worker = NewerWorker(cloner.url, prompt_url=prompt_url)
        worker.speak_task(segments(8))
        assert worker.routes == {"/tts_url_with_cloning": 8}
        assert len(os.listdir(cloner.log.parent / "uploads")) == 1

    def test_the_newer_one_falls_back_to_its_numbered_voice_where_the_engine_cannot_clone(self, server, prompt_url):
        worker, before = NewerWorker(server.url, prompt_url=prompt_url), spoken_by(server, "/tts_url")
        worker.speak_task([Segment(1, "Good evening.", 9)])
        assert worker.routes == {"/tts_url": 1}
        assert spoken_by(server, "/tts_url")["coral"] == before.get("coral", 0) + 1

    def test_a_segment_that_cannot_be_spoken_fails_the_task_with_its_error(self, server, monkeypatch):
        monkeypatch.setattr("dubbing_worker.PAUSE_S", 0.1)
        with pytest.raises(TaskFailed, match="segment 1: /tts_url answered 400.*cannot read.*Привет"):
            OlderWorker(server.url).speak_task([Segment(0, "Hello."), Segment(1, "Привет, мир.")])

    def test_segments_sent_while_the_engine_loads_are_answered_once_it_has(self, tmp_path):
        with Server(tmp_path / "log") as starting:
            starting.wait_until(503)
            worker = OlderWorker(starting.url)
            worker.speak_task(segments(4))
        assert worker.routes == {"/tts_url": 4}


class TestKeys:
    """A server with keys."""

    @pytest.mark.parametrize(("open_uploads", "route"), [("0", "/tts_url"), ("1", "/tts_url_with_cloning")])
    def test_both_generations_send_theirs_and_uploads_go_by_the_setting(
        self, tmp_path, prompt_url, open_uploads, route
    ):  # fmt: skip
        with scripted_server(tmp_path, TTS_API_KEYS="secret", TTS_OPEN_UPLOADS=open_uploads) as server:
            server.wait_until_ready()
            older, newer = OlderWorker(server.url, "secret"), NewerWorker(server.url, "secret", prompt_url=prompt_url)
            older.speak_task(segments(1))
            newer.speak_task(segments(1))
        assert older.routes == {"/tts_url": 1} and newer.routes == {route: 1}


class TestProbes:
    """The addresses that the older worker tries in between."""

    @pytest.mark.parametrize("path", PROBES)
    def test_one_is_answered_404_at_once_with_one_quiet_line(self, server, path):
        begun = len(server.log.read_text().splitlines())
        status, headers, _ = server.post(path, {"text": "Hello.", "spk_audio_path": "voice_01.wav"})
        assert status == 404 and int(headers["openai-processing-ms"]) < 50
        [line] = log_lines(server, begun)
        assert f'"POST {path}" 404' in line and "WARNING" not in line and "Hello" not in line


@pytest.mark.parametrize("voice_id", ["male_1", "male_2", "male_young", "male_mature"])
def test_a_male_id_means_a_male_voice(voice_id):
    assert Voices.load(HERE / "voices.json").resolve(voice_id).embedded.en[1] == "m"


@pytest.mark.parametrize("voice_id", ["female_1", "female_2", "female_young", "female_mature"])
def test_a_female_id_means_a_female_voice(voice_id):
    assert Voices.load(HERE / "voices.json").resolve(voice_id).embedded.en[1] == "f"


def joined_seconds(folder: Path, wavs: list[bytes]) -> tuple[float, np.ndarray]:
    """Join WAVs with FFmpeg's concat demuxer, as the worker does; return what comes out: seconds and s16 samples."""
    for number, wav in enumerate(wavs):
        (folder / f"{number}.wav").write_bytes(wav)
    listing = folder / "list.txt"
    listing.write_text("".join(f"file '{number}.wav'\n" for number in range(len(wavs))))
    with av.open(str(listing), format="concat") as joined:
        stream = joined.streams.audio[0]
        samples = np.concatenate([frame.to_ndarray().ravel() for frame in joined.decode(stream)])
        return len(samples) / stream.rate, samples


def clone_of(server: Server, text: str) -> bytes:
    """One segment as the newer worker asks for it."""
    return server.clone(text, (HERE / "examples" / "voice_03.wav").read_bytes())[2]


ROUTES = [
    lambda server, text: server.post("/tts_url", {"text": text, "spk_audio_path": "/x/voice_02.wav"})[2],
    lambda server, text: server.post("/v1/audio/speech", {"model": "m", "input": text, "voice": "speaker_2"})[2],
    clone_of,
]


@pytest.mark.parametrize(("which", "routes"), [("cloner", ROUTES), ("server", ROUTES[:2])])
def test_forty_segments_of_all_routes_are_joined_to_the_millisecond(request, tmp_path, which, routes):
    server = request.getfixturevalue(which)
    wavs = [routes[n % len(routes)](server, " ".join(LINES[: n % 3 + 1])) for n in range(40)]
    parts = [soundfile.read(io.BytesIO(wav), dtype="int16") for wav in wavs]
    formats = {(wav[:4], wav[8:16], wav[20:36]) for wav in wavs}
    seconds, samples = joined_seconds(tmp_path, wavs)
    assert len(formats) == 1, "codec, channels, rate and width"
    assert seconds == pytest.approx(sum(len(part) / rate for part, rate in parts), abs=0.001)
    assert np.array_equal(samples, np.concatenate([part for part, _ in parts]))


class TestBadUploads:
    """What must be refused at once by a server that takes uploads."""

    HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'

    def head(self, length: int | None) -> bytes:
        """The headers of an upload of a length, chunked for None."""
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        kind = "Content-Type: multipart/form-data; boundary=x"
        return f"POST /upload_audio HTTP/1.1\r\nHost: a\r\n{kind}\r\n{size}\r\n\r\n".encode()

    def leftovers(self, server: Server) -> list[str]:
        """Files of unfinished uploads."""
        folder = server.log.parent / "uploads"
        return [name for name in (os.listdir(folder) if folder.exists() else []) if not name.endswith(".wav")]

    def test_two_gigabytes_are_refused_before_they_are_sent(self, cloner):
        with socket.create_connection(("127.0.0.1", cloner.port), timeout=10) as client:
            began = time.monotonic()
            client.sendall(self.head(2 << 30) + self.HEAD)
            assert client.recv(12) == b"HTTP/1.1 413"
            assert time.monotonic() - began < 1

    def test_an_endless_chunked_body_is_cut_at_the_limit(self, cloner):
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with socket.create_connection(("127.0.0.1", cloner.port), timeout=10) as client:
            client.sendall(self.head(None) + b"%x\r\n%b\r\n" % (len(self.HEAD), self.HEAD))
            sent = 0
            try:
                while sent < 64:
                    client.sendall(chunk)
                    sent += 1
            except OSError:
                pass
            assert sent < 64 and client.recv(12) in (b"HTTP/1.1 413", b"")
        assert self.leftovers(cloner) == []

    def test_a_body_that_breaks_off_leaves_nothing(self, cloner):
        with socket.create_connection(("127.0.0.1", cloner.port), timeout=10) as client:
            client.sendall(self.head(3 << 20) + self.HEAD + bytes(1 << 20))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(12) == b"HTTP/1.1 400"
        assert self.leftovers(cloner) == []

    def test_a_client_of_megabytes_is_told_that_the_embedded_engine_cannot_clone(self, server):
        body = self.HEAD + bytes(5 << 20) + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        status, _, told = server.post("/upload_audio", body, **kind)
        assert status == 400 and "cannot clone" in json.loads(told)["error"]

    def test_a_server_busy_with_bad_uploads_answers_health_and_speech(self, cloner):
        body = self.HEAD + b"ID3" + os.urandom(5 << 20) + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        sending = [threading.Thread(target=cloner.post, args=("/upload_audio", body), kwargs=kind) for _ in range(8)]
        for thread in sending:
            thread.start()
        assert cloner.get("/health")[0] == 200
        assert cloner.post("/tts_url", {"text": "Hi.", "spk_audio_path": "voice_01.wav"})[0] == 200
        for thread in sending:
            thread.join()
        assert "Traceback" not in cloner.log.read_text()
