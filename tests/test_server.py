"""The real server: gunicorn, the embedded engine, HTTP; and the openai client against it."""

import errno
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import openai
import pytest
import soundfile
from hearing import pitch_change, pitch_hz
from serving import Server, decode, pcm

from audio import FORMATS
from engines import EmbeddedEngine, find_runtime
from settings import HERE
from utterances import split_utterances

SPEECH = "/v1/audio/speech"
PARAGRAPH = (
    "The harbour was quiet that morning, and the boats lay still. A man came down the hill with a lantern in his hand. "
    "Nobody knew his name, but everybody had seen him before."
)

JOINED = (
    PARAGRAPH,
    "渡口只有一条旧船，船主想找一个帮手。他等了很久，一直没有人来。\n第二天早上，一个年轻人走了过来！",
    "Nobody who had ever lived in the little town at the end of the long valley could remember a winter in which "
    "the river froze so early that the children walked to school across it before the first of December came",
)


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def samples_of(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode what a format's response holds."""
    return (pcm(data), 24_000) if name == "pcm" else decode(data)


def raw_request(server, body: dict) -> socket.socket:
    """Send a speech request over a bare socket and return the socket."""
    data = json.dumps({"model": "m", **body}).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def requests_under_way(server) -> int:
    """What /health says of it."""
    return json.loads(server.get("/health")[2])["requests"]


def wait_for_requests(server, count: int, deadline_s: float) -> float:
    """Wait until so many requests are under way; return the seconds that took."""
    began = time.monotonic()
    while requests_under_way(server) != count:
        assert time.monotonic() - began < deadline_s, f"{requests_under_way(server)} requests after {deadline_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


def test_health_tells_what_speaks(server):
    status, headers, body = server.get("/health")
    report = json.loads(body)
    assert status == 200
    assert report | {"status": "healthy", "engine": "embedded", "model": "kokoro-82m-int8", "voices": 11} == report
    assert len(report["release"]) == 12 and report["timestamp"] and report["message"]


def test_the_readmes_curl_gives_a_wav(server):
    status, headers, body = server.post(SPEECH, {"model": "tts-1", "input": "你好世界", "voice": "alloy"})
    info = soundfile.info(io.BytesIO(body))
    assert (status, headers["content-type"]) == (200, "audio/wav")
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert 0.7 < info.duration < 2
    assert float(headers["x-audio-duration"]) == pytest.approx(info.duration, abs=0.001)
    assert (headers["x-engine"], headers["x-voice"], headers["x-sample-rate"]) == ("embedded", "alloy", "24000")


@pytest.mark.parametrize("name", FORMATS)
def test_the_openai_client_gets_each_format(client, server, name):
    spoken = client.audio.speech.create(
        model="tts-1", voice="nova", input="Ten boats lay in the harbour.", response_format=name
    )
    assert spoken.response.headers["content-type"] == FORMATS[name].content_type
    samples, rate = samples_of(spoken.content, name)
    whole, _ = server.speak("Ten boats lay in the harbour.", voice="nova")
    assert len(samples) / rate == pytest.approx(len(whole) / 24_000, abs=0.06)
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(np.sqrt(np.mean(whole**2)), rel=0.15)


def test_the_openai_client_streams(client):
    began = time.monotonic()
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="onyx", input=PARAGRAPH, response_format="pcm"
    ) as response:
        stamps = [(time.monotonic() - began, len(part)) for part in response.iter_bytes()]
    assert stamps[0][0] < stamps[-1][0]
    assert sum(size for _, size in stamps) > 24_000 * 2 * 5


def test_the_openai_client_streams_events(server, client):
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="onyx", input="Good morning.", response_format="mp3", stream_format="sse"
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["type"] == "speech.audio.done"


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input="Hello.")
    assert (caught.value.param, caught.value.code) == ("voice", "voice_not_found")
    assert caught.value.request_id.startswith("req_")


def test_the_openai_client_lists_the_models(client):
    assert "tts-1" in [model.id for model in client.models.list()]


@pytest.mark.parametrize(
    ("name", "speed"), [*[("wav", s) for s in (0.25, 0.5, 0.8, 1.25, 2, 4)], *[(n, 1.5) for n in FORMATS]]
)
def test_speed_hits_the_duration_and_keeps_the_pitch(server, name, speed):
    text = "The old keeper walked down to the shore, and nobody knew where he had been all those years."
    plain = server.speak(text, voice="onyx")[0]
    _, _, body = server.post(
        SPEECH, {"model": "m", "input": text, "voice": "onyx", "speed": speed, "response_format": name}
    )
    samples, rate = samples_of(body, name)
    assert len(samples) / rate == pytest.approx(len(plain) / 24_000 / speed, rel=0.05, abs=0.03)
    change = pitch_change(pitch_hz(plain, 24_000), pitch_hz(samples, rate), speed)
    assert change == pytest.approx(1, abs=0.03)


def test_streamed_and_whole_answers_are_the_same_sound(server):
    asked = {"model": "m", "input": PARAGRAPH, "voice": "sage"}
    whole = decode(server.post(SPEECH, asked)[2])[0]
    for fields in ({"stream": True}, {"response_format": "flac", "stream": True}):
        assert len(decode(server.post(SPEECH, {**asked, **fields})[2])[0]) == len(whole)


@pytest.mark.parametrize("text", JOINED, ids=lambda text: text[:14])
@pytest.mark.parametrize("voice", ["alloy", "coral", "onyx"])
def test_joints_do_not_click_and_pause_as_long_as_a_speaker_does(server, voice, text):
    samples, rate = server.speak(text, voice=voice)
    joined = split_utterances(text, usual=EmbeddedEngine.usual_syllables)
    silent = np.flatnonzero(np.diff((samples == 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    joints = [(begin, end) for begin, end in silent[1:-1] if end - begin >= 0.02 * rate]  # else but a zero in speech
    assert len(joints) == len(joined) - 1 > 0
    quiet = np.abs(samples) <= 10 ** (-50 / 20)
    for (begin, end), utterance in zip(joints, joined, strict=False):
        assert quiet[begin - 1] and quiet[end], "a step of more than -50 dBFS"
        before, after = np.flatnonzero(~quiet[:begin])[-1], end + np.flatnonzero(~quiet[end:])[0]
        pause_s = (after - before) / rate
        assert utterance.pause_s <= pause_s <= utterance.pause_s + 0.15, utterance.text
    breaks = np.diff(np.flatnonzero(~quiet)) / rate
    assert breaks.max() < 0.8, "nobody pauses that long"


@pytest.mark.parametrize(
    "path", ["/root/index-tts-vllm/examples/voice_05.wav", "voice_05.wav", "D:\\voices\\voice_05.wav"]
)
def test_the_native_call_speaks_in_the_voice_of_its_reference(server, path):
    status, headers, body = server.post(
        "/tts_url", {"text": "你好世界", "spk_audio_path": path, "max_text_tokens_per_sentence": 120}
    )
    assert (status, headers["content-type"], headers["x-voice"]) == (200, "audio/wav", "nova")
    assert soundfile.info(io.BytesIO(body)).samplerate == 24_000


@pytest.mark.parametrize("path", ["/uploads/me.wav", "/etc/passwd", "../../voices.json", "a\0voice_01.wav", "x" * 5000])
def test_a_reference_that_would_need_cloning_is_refused(server, path):
    status, _, body = server.post("/tts_url", {"text": "你好", "spk_audio_path": path})
    assert status == 400
    assert "cannot clone" in json.loads(body)["error"]


def test_five_at_once_get_their_own_audio(server):
    texts = [
        "One.",
        "Two, three and four.",
        "Five, six, seven, eight, nine, ten.",
        "你好世界。",
        "今天的天气真的非常好。",
    ]
    alone = [len(server.speak(text)[0]) for text in texts]
    together = [0] * len(texts)

    def speak(index):
        together[index] = len(server.speak(texts[index])[0])

    threads = [threading.Thread(target=speak, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("format_name", ["wav", "pcm"])
def test_a_client_that_leaves_frees_its_place_within_a_second_and_its_slot(server, format_name):
    wait_for_requests(server, 0, 5)
    client = raw_request(server, {"input": PARAGRAPH * 5, "response_format": format_name})
    wait_for_requests(server, 1, 5)
    time.sleep(0.5)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert wait_for_requests(server, 0, 5) < 1
    deadline = time.monotonic() + 60  # OpenVINO finishes the utterance that it is at
    while b"\nspeech_slots_busy 0.0\n" not in server.get("/metrics")[2]:
        assert time.monotonic() < deadline, "its slot is taken still"
        time.sleep(0.1)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("body", [b"zz\r\nabc\r\n", b"3\r\nabcdef\r\n", b"-3\r\nabc\r\n"])
def test_a_body_in_broken_chunks_is_400(server, body):
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(head.encode() + body)
        assert client.recv(12) == b"HTTP/1.1 400"
    assert "Traceback" not in server.log.read_text()


def test_a_line_of_the_log_is_one_line(server):
    server.get("/%0d%0aforged")
    time.sleep(0.2)
    assert not [line for line in server.log.read_text().splitlines() if line.startswith("forged")]


def test_a_request_is_told_in_one_line(server):
    server.post(SPEECH, {"model": "m", "input": "Good evening.", "voice": "ash"}, **{"X-Request-Id": "line-1"})
    time.sleep(0.2)
    [line] = [line for line in server.log.read_text().splitlines() if "id=line-1" in line]
    assert "POST /v1/audio/speech" in line and "voice=ash" in line and "audio_s=0" in line and "rtf=" in line
    assert "Good evening" not in server.log.read_text()


@pytest.mark.parametrize("text", ["x" * 4096, "好" * 4096, "1" * 4000, "🙂" * 500 + "好", "a\u202eb\u200bc", "ﬁ ½ № ™"])
def test_hard_texts_begin_to_speak(server, text):
    client = raw_request(server, {"input": text, "response_format": "pcm"})
    assert client.recv(12).startswith(b"HTTP/1.1 200")
    client.close()


class TestSignals:
    """What the signals do to a server of its own."""

    @pytest.fixture
    def own(self, tmp_path):
        voices = tmp_path / "voices.json"
        voices.write_text((Server.repository / "voices.json").read_text())
        with Server(tmp_path / "log", TTS_VOICES_FILE=str(voices)) as running:
            running.voices = voices
            loading = running.wait_until(503)
            assert loading["status"] == "loading"
            running.wait_until_ready()
            yield running

    def test_hup_reads_the_voices_and_term_lets_requests_finish(self, own):
        workers = workers_of(own.process.pid)
        own.voices.write_text(own.voices.read_text().replace('"marin"', '"hero"'))
        own.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 5
        while own.post(SPEECH, {"model": "m", "input": "Hi.", "voice": "hero"})[0] != 200:
            assert time.monotonic() < end, own.log.read_text()
        assert workers_of(own.process.pid) == workers, "the engine was loaded again"

        answers = []
        running = threading.Thread(target=lambda: answers.append(own.post(SPEECH, {"model": "m", "input": PARAGRAPH})))
        running.start()
        wait_for_requests(own, 1, 5)
        own.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while not refused(own.port):
            assert time.monotonic() < end and not answers, "connections still hang while requests finish"
        running.join(60)
        assert answers[0][0] == 200
        assert len(decode(answers[0][2])[0]) > 24_000 * 5
        assert own.process.wait(10) == 0
        assert "Traceback" not in own.log.read_text()

    def test_hup_while_loading_reads_the_voices_too(self, tmp_path):
        voices = tmp_path / "voices.json"
        voices.write_text((Server.repository / "voices.json").read_text())
        with Server(tmp_path / "log", TTS_VOICES_FILE=str(voices)) as own:
            assert own.wait_until(503)["status"] == "loading"
            voices.write_text(voices.read_text().replace('"marin"', '"hero"'))
            own.process.send_signal(signal.SIGHUP)
            own.wait_until_ready()
            end = time.monotonic() + 5
            while own.post(SPEECH, {"model": "m", "input": "Hi.", "voice": "hero"})[0] != 200:
                assert time.monotonic() < end, own.log.read_text()

    @pytest.mark.parametrize("late", [0.3, 0.8, 1.3, 1.8, 2.3])
    def test_term_while_loading_ends_it_without_a_crash(self, tmp_path, late):
        with Server(tmp_path / "log", TTS_EMBEDDED_RUNTIME="onnxruntime") as own:
            own.wait_until(503)
            time.sleep(late)
            own.process.send_signal(signal.SIGTERM)
            assert own.process.wait(20) == 0
        assert "SIG" not in own.log.read_text()

    def test_a_bad_setting_keeps_the_server_from_starting(self, tmp_path):
        with Server(tmp_path / "log", TTS_SLOTS="many") as own:
            assert own.process.wait(20) != 0
        assert "TTS_SLOTS" in own.log.read_text()

    def test_a_broken_lexicon_is_told_by_health(self, tmp_path):
        lexicon = tmp_path / "lexicon.txt"
        lexicon.write_text("好 = hao3\nnonsense\n")
        with Server(tmp_path / "log", TTS_LEXICON=str(lexicon)) as own:
            end = time.monotonic() + 30
            while (report := own.wait_until(503))["status"] == "loading":
                assert time.monotonic() < end
        assert report["status"] == "unhealthy"
        assert f"{lexicon}, line 2" in report["message"]


@pytest.mark.skipif(find_runtime() != "openvino", reason="this CPU has one runtime only, which nothing is built for")
class TestFirstStart:
    """A start that finds no decoder kept from one before."""

    @pytest.fixture
    def gate(self, tmp_path):
        """A file without which OpenVINO's decoder is not built."""
        return tmp_path / "gate"

    @pytest.fixture
    def first(self, tmp_path, gate):
        """Ready, with its decoder yet to be built."""
        paths = os.pathsep.join([str(Server.repository), str(Server.repository / "tests")])
        settings = {"TTS_CACHE_DIR": str(tmp_path / "cache"), "GATE": str(gate), "PYTHONPATH": paths}
        with Server(tmp_path / "log", "gated:create_app()", **settings) as running:
            report = running.wait_until(200)
            assert (report["runtime"], report["next_runtime"]) == ("onnxruntime", "openvino")
            yield running
            gate.touch()

    def test_it_speaks_while_the_faster_decoder_is_built_and_then_on_that(self, first, gate):
        asked = {"model": "tts-1", "input": "The boats lay still.", "response_format": "pcm"}
        answers = [first.post(SPEECH, asked)]
        gate.touch()
        assert first.wait_until_ready()["runtime"] == "openvino"
        answers += [first.post(SPEECH, asked) for _ in range(2)]
        assert [headers["x-cache"] for _, headers, _ in answers] == ["miss", "miss", "hit"]
        slow, fast, again = (body for _, _, body in answers)
        assert fast == again and abs(len(slow) / len(fast) - 1) < 0.05
        log = first.log.read_text()
        steps = ("on onnxruntime until", "1 of 2", "2 of 2", "kept in", "speaks on openvino now")
        assert sorted(steps, key=log.index) == list(steps)

    def test_term_meanwhile_is_heeded_and_what_is_built_is_kept(self, first, gate, tmp_path):
        gate.touch()
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        assert "SIG" not in first.log.read_text(), "it crashed"
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_is_written_and_nothing_leaves(server):
    opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for pid in workers_of(server.process.pid)
              for fd in os.listdir(f"/proc/{pid}/fd") if os.path.exists(f"/proc/{pid}/fd/{fd}")]  # fmt: skip
    assert [path for path in opened if path.startswith("/tmp") and "pytest" not in path] == []


def refused(port: int) -> bool:
    """Tell whether nobody listens on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def workers_of(pid: int) -> list[int]:
    """The children of a process."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


def test_preloading_is_refused():
    command = [sys.executable, "-m", "gunicorn", "--preload", "-c", "gunicorn.conf.py", "app:create_app()"]
    environment = {**os.environ, "PORT": "0", "TTS_EMBEDDED_RUNTIME": "onnxruntime"}
    refused = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode and "--preload" in refused.stderr
