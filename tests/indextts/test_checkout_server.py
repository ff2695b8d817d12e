"""The whole server with TTS_ENGINE=indextts on a real checkout: four endpoints, load, death and what is left after it.

Skipped unless INDEXTTS_CHECKOUT names a checkout: make test-indextts INDEXTTS_CHECKOUT=DIR.
"""

import json
import os
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from serving import REPOSITORY, decode, open_url

from vllm_engine import children, descendants, is_alive, vital_name

if not os.environ.get("INDEXTTS_CHECKOUT"):
    pytest.skip("INDEXTTS_CHECKOUT names no index-tts-vllm checkout", allow_module_level=True)

LOAD_S = 500  # on two busy cores
SPEECH = "/v1/audio/speech"
EXAMPLES = REPOSITORY / "examples"
TEXT = "大家好，欢迎收看本期节目！"
SENTENCES = "We are dubbing a video, line by line! How are you today? The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The folder of the files that requests may name, beside the voices'."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def server(start_server, references):
    """A ready server."""
    server = start_server(TTS_REFERENCE_DIRS=f"{EXAMPLES}:{references}")
    server.wait_until(200, LOAD_S)
    return server


def post(server, path, body, timeout_s=540):
    """Send JSON; return status, headers and body, however busy the machine is."""
    sent = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return open_url(sent, timeout_s)


def speak(server, text, **fields):
    """Return the samples and rate of what is said."""
    status, _, body = post(server, SPEECH, {"model": "m", "input": text, **fields})
    assert status == 200, body
    return decode(body)


def health(server):
    """The status and report of /health, (None, {}) while nobody answers."""
    try:
        status, _, body = server.get("/health")
    except OSError:
        return None, {}
    return status, json.loads(body)


def until(condition, deadline_s):
    """Wait for a condition to hold; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, "it did not come to pass"
        time.sleep(0.02)
    return time.monotonic() - began


def worker_of(server):
    """The worker's process id."""
    [worker] = [pid for pid in children(server.process.pid) if children(pid)]
    return worker


def engine_of(server):
    """The id of the GPT's engine process."""
    [engine] = [pid for pid in descendants(worker_of(server)) if vital_name(pid)]
    return engine


@pytest.mark.parametrize("path", [SPEECH, "/audio/speech"])
def test_speech_is_spoken_at_the_model_s_rate(server, path):
    status, headers, body = post(server, path, {"model": "m", "input": TEXT, "voice": "nova"})
    samples, rate = decode(body)
    assert (status, headers["content-type"]) == (200, "audio/wav")
    assert (headers["x-engine"], headers["x-voice"]) == ("indextts", "nova")
    assert rate == 22_050 and 0.2 < len(samples) / rate < 3 and 0.01 < np.abs(samples).max() <= 1


@pytest.mark.parametrize("form", ["pcm", "mp3", "opus", "aac", "flac"])
def test_every_format_is_spoken(server, form):
    asked = {"model": "m", "input": TEXT, "response_format": form, "seed": 1}
    status, _, body = post(server, SPEECH, asked)
    assert status == 200 and len(body) > 1000


def test_the_native_call_speaks_with_each_emotion_method(server):
    asked = {"text": TEXT, "spk_audio_path": "/anywhere/examples/voice_02.wav", "emo_ref_path": "voice_03.wav"}
    methods = [{}, {"emo_control_method": 1}, {"emo_control_method": 2, "emo_vec": [0.5, 0, 0.5, 0, 0, 0, 0, 0]}]
    for method in methods:
        status, headers, body = post(server, "/tts_url", {**asked, **method})
        assert (status, headers["content-type"]) == (200, "audio/wav"), body
        assert decode(body)[0].size


def test_events_carry_audio_and_their_end(server):
    asked = {"model": "m", "input": TEXT, "stream_format": "sse", "response_format": "pcm"}
    status, headers, body = post(server, SPEECH, asked)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert b"speech.audio.delta" in body
    assert body.strip().splitlines()[-1].startswith(b'data: {"type": "speech.audio.done"')


def test_a_recording_is_cloned(server):
    status, headers, body = server.clone(TEXT, (EXAMPLES / "voice_04.wav").read_bytes(), emo_alpha=0.5)
    assert (status, headers["content-type"], headers["x-voice"]) == (200, "audio/wav", "cloned"), body
    assert decode(body)[0].size


def test_a_reference_audio_that_does_not_do_is_refused(server, references):
    soundfile.write(references / "short.wav", np.full(800, 0.1), 16_000)
    soundfile.write(references / "silent.wav", np.zeros(48_000), 16_000)
    (references / "text.wav").write_text("no audio")
    for name in ("short.wav", "silent.wav", "text.wav", "missing.wav", "../log"):
        status, _, body = post(server, "/tts_url", {"text": "Hi.", "spk_audio_path": str(references / name)})
        assert status == 400 and name.split("/")[-1] in json.loads(body)["error"], body
    assert speak(server, TEXT)[0].size


def test_speed_shortens(server):
    plain, fast = (len(speak(server, TEXT, seed=1, speed=speed)[0]) for speed in (1, 2))
    assert fast == pytest.approx(plain / 2, rel=0.25)  # so short that the silence at its ends counts


def test_each_voice_sounds_like_another(server):
    assert len({speak(server, TEXT, seed=1, voice=voice)[0].tobytes() for voice in ("alloy", "onyx", "nova")}) == 3


def test_emotion_words_without_their_model_are_refused(server):
    status, _, body = post(server, SPEECH, {"model": "m", "input": TEXT, "instructions": "sadly"})
    assert status == 400 and json.loads(body)["error"]["code"] == "no_emotion_text"


def test_the_voices_and_the_health_are_told(server):
    assert len(json.loads(server.get("/v1/audio/voices")[2])["voices"]) == 11
    status, report = health(server)
    assert (status, report["engine"], report["sample_rate"]) == (200, "indextts", 22_050)
    assert report["conditioning"]["misses"] >= 1 and report["gpu_memory_utilization"] == 0.25


def test_the_same_seed_gives_the_same_bytes(server):
    one, same, other = (
        post(server, SPEECH, {"model": "m", "input": f"{TEXT}{tail}", "seed": seed})[2]
        for seed, tail in ((1, ""), (1, ""), (2, ""))
    )
    assert one == same != other


@pytest.mark.parametrize("requests", [4, 8])
def test_several_requests_at_once_are_all_spoken(server, requests):
    voices = [voice["id"] for voice in json.loads(server.get("/v1/audio/voices")[2])["voices"]]
    asked = [{"model": "m", "input": f"第{n}句。{SENTENCES}", "voice": voices[n]} for n in range(requests)]
    with ThreadPoolExecutor(requests) as pool:
        answers = list(pool.map(lambda body: post(server, SPEECH, body), asked))
    assert all(status == 200 and decode(body)[0].size for status, _, body in answers)


def test_a_text_of_the_greatest_length_is_spoken(server):
    samples, rate = speak(server, (SENTENCES * 50)[:4096])
    assert len(samples) > 10 * rate


def test_a_client_that_leaves_frees_the_engine(server):
    asked = {"model": "m", "input": (SENTENCES * 50)[:4096]}
    with ThreadPoolExecutor(1) as client:
        left = client.submit(post, server, SPEECH, asked, timeout_s=5)
        until(lambda: health(server)[1]["utterances"], 5)
        with pytest.raises(OSError):
            left.result()
    until(lambda: health(server)[1]["utterances"] == 0, 60)


def test_missing_weights_are_told_by_health(start_server, tmp_path):
    server = start_server(TTS_MODEL_DIR=str(tmp_path))
    until(lambda: "TTS_MODEL_DIR" in health(server)[1].get("message", ""), 120)
    assert health(server)[0] == 503


def test_emotion_words_are_spoken_where_their_model_is_and_term_ends_a_load(start_server, weights):
    server = start_server(TTS_MODEL_DIR=str(weights))
    assert server.wait_until(200, LOAD_S)["emotes_by_text"]
    asked = {"model": "m", "input": TEXT, "instructions": "sadly", "seed": 1}
    assert decode(post(server, SPEECH, asked)[2])[0].size
    os.kill(worker_of(server), signal.SIGKILL)
    until(lambda: health(server)[1].get("status") == "loading", 60)
    until(lambda: any("VLLM" in (vital_name(pid) or "") for pid in descendants(server.process.pid)), LOAD_S)
    left = descendants(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    until(lambda: not any(map(is_alive, left)), 10)


# The last ones: each ends the server's worker.


def test_a_killed_engine_is_told_at_once_and_replaced(server):
    answers = []
    asked = {"model": "m", "input": SENTENCES * 9}
    speaking = threading.Thread(target=lambda: answers.append(post(server, SPEECH, asked)))
    speaking.start()
    until(lambda: health(server)[1].get("utterances"), 30)
    os.kill(engine_of(server), signal.SIGKILL)
    assert until(lambda: health(server)[0] != 200, 10) < 2
    speaking.join(30)
    status, _, body = answers[0]
    assert status == 503 and json.loads(body)["error"]["code"] == "engine_died"
    until(lambda: health(server)[0] == 200, LOAD_S)
    assert speak(server, TEXT)[0].size


def test_a_killed_worker_leaves_no_engine_and_is_replaced(server):
    worker, engine = worker_of(server), engine_of(server)
    os.kill(worker, signal.SIGKILL)
    until(lambda: not is_alive(engine), 5)
    until(lambda: health(server)[0] == 200, LOAD_S)


def test_term_leaves_no_process(server):
    left = descendants(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    until(lambda: not any(map(is_alive, left)), 5)
