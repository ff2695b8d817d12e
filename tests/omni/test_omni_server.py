"""The real gunicorn with TTS_ENGINE=omni: what comes back, what is refused, what dies and what takes its place."""

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from models import cpu_profile, lay_in_hub_cache, wait_for
from serving import REPOSITORY, Server, decode, pcm

from vllm_engine import children, descendants, is_alive, vital_name

SPEECH = "/v1/audio/speech"
READY_S = 600  # a busy machine takes minutes to start five processes that import torch
SENTENCES = ("Hello world.", "今天天气很好。", "This is a test.", "我们在测试。") * 2


def omni_server(model: str, checkpoints, folder, config=None, **environment: str) -> Server:
    """Start gunicorn on a checkpoint, with a folder of reference audio and without the cache of finished utterances."""
    profile = folder / "deploy.yaml"
    profile.write_text(json.dumps(cpu_profile(model, config)))
    (folder / "references").mkdir()
    settings = {
        "TTS_ENGINE": "omni", "TTS_MODEL": str(checkpoints / model), "TTS_OMNI_DEPLOY_CONFIG": str(profile),
        "TTS_REFERENCE_DIRS": str(folder / "references"), "TTS_CACHE_BYTES": "0",
    }  # fmt: skip
    server = Server(folder / "log", **settings | environment)
    server.references = folder / "references"
    return server


@pytest.fixture(scope="module", params=["indextts2_5", "indextts2"])
def server(request, checkpoints, tmp_path_factory):
    """A server that is ready: of IndexTTS-2.5 in a folder, and of IndexTTS-2 by its hub id."""
    folder, named = tmp_path_factory.mktemp(request.param), {}
    if request.param == "indextts2":
        hub_id, config = lay_in_hub_cache(checkpoints / request.param, folder / "hub")
        named = {"config": config, "TTS_MODEL": hub_id, "HF_HUB_CACHE": str(folder / "hub")}
    with omni_server(request.param, checkpoints, folder, **named) as running:
        began = time.monotonic()
        running.model, running.report = request.param, running.wait_until(200, READY_S)
        print(f"\n{request.param} ready after {time.monotonic() - began:.0f} s, {resident_gb(running):.1f} GB")
        yield running


def resident_gb(server: Server) -> float:
    """Return the resident memory of a server's processes in GB; what they share is counted in each."""
    pids = [server.process.pid, *descendants(server.process.pid)]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9


def health(server: Server) -> tuple[int | None, dict]:
    """Return what /health answers, (None, {}) while nobody does."""
    try:
        status, _, body = server.get("/health")
        return status, json.loads(body)
    except OSError:
        return None, {}


def speak(server: Server, text: str = SENTENCES[0], **fields) -> np.ndarray:
    """Return the samples of a WAV from /v1/audio/speech."""
    samples, rate = server.speak(text, **{"seed": 1} | fields)
    assert rate == 22_050
    return samples


def test_health_tells_which_model_is_ready(server):
    kind = {"indextts2": "IndexTTS-2", "indextts2_5": "IndexTTS-2.5"}[server.model]
    name = {"indextts2": "IndexTTS-2", "indextts2_5": "indextts2_5"}[server.model]
    expected = {"status": "healthy", "engine": "omni", "model": name, "model_kind": kind, "voices": 11}
    assert server.report | expected == server.report
    assert server.report["emotes_by_text"] == (server.model == "indextts2")


@pytest.mark.parametrize("path", [SPEECH, "/audio/speech"])
def test_a_wav_has_the_models_rate_and_a_plausible_length(server, path):
    status, headers, body = server.post(path, {"model": "m", "input": SENTENCES[0], "voice": "nova"})
    samples, rate = decode(body)
    assert (status, headers["content-type"]) == (200, "audio/wav")
    assert (headers["x-engine"], headers["x-voice"]) == ("omni", "nova")
    assert rate == 22_050 and 0.5 < len(samples) / rate < 4
    assert 0.01 < np.abs(samples).max() <= 1


@pytest.mark.parametrize(
    "name, rate", [("pcm", 24_000), ("mp3", 22_050), ("opus", 48_000), ("aac", 22_050), ("flac", 22_050)]
)
def test_each_format_is_decoded_at_its_rate(server, name, rate):
    status, _, body = server.post(SPEECH, {"model": "m", "input": SENTENCES[0], "response_format": name})
    samples, decoded_rate = (pcm(body), 24_000) if name == "pcm" else decode(body)
    assert status == 200 and decoded_rate == rate and 0.5 < len(samples) / rate < 4


def test_events_carry_audio_and_their_end(server):
    asked = {"model": "m", "input": SENTENCES[0], "stream_format": "sse", "response_format": "pcm"}
    status, headers, body = server.post(SPEECH, asked)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert b"speech.audio.delta" in body
    assert body.strip().splitlines()[-1].startswith(b'data: {"type": "speech.audio.done"')


def test_the_native_call_speaks_in_a_voice_and_clones_a_file(server):
    time_axis = np.arange(3 * 48_000) / 48_000
    soundfile.write(server.references / "own.wav", 0.2 * np.sin(2 * np.pi * 150 * time_axis), 48_000)
    voices = []
    for path, voice in (("/anywhere/examples/voice_03.wav", "fable"), ("own.wav", "cloned")):
        status, headers, body = server.post("/tts_url", {"text": SENTENCES[0], "spk_audio_path": path})
        assert (status, headers["content-type"], headers["x-voice"]) == (200, "audio/wav", voice), body
        voices.append(decode(body)[0])
    assert all(0.5 < len(samples) / 22_050 < 4 for samples in voices)


def test_a_recording_is_cloned_and_the_voices_are_told(server):
    status, headers, body = server.clone(SENTENCES[0], (REPOSITORY / "examples" / "voice_04.wav").read_bytes())
    assert (status, headers["content-type"], headers["x-voice"]) == (200, "audio/wav", "cloned"), body
    assert len(json.loads(server.get("/v1/audio/voices")[2])["voices"]) == 11


@pytest.mark.parametrize("count", [4, 8])
def test_several_requests_at_once_are_all_answered(server, count):
    with ThreadPoolExecutor(count) as clients:
        spoken = list(clients.map(lambda n: speak(server, SENTENCES[n], seed=n), range(count)))
    assert min(len(samples) for samples in spoken) > 0.5 * 22_050


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(server):
    asked = {"model": "m", "input": SENTENCES[0]}
    first, again, other = (server.post(SPEECH, {**asked, "seed": seed})[2] for seed in (2**63 - 2, 2**63 - 2, 5))
    assert first == again != other


def test_speed_shortens(server):
    assert len(speak(server, speed=2)) == pytest.approx(len(speak(server)) / 2, rel=0.15)


def test_each_voice_sounds_like_another(server):
    spoken = [speak(server, voice=voice).tobytes() for voice in ("alloy", "onyx", "nova")]
    assert len(set(spoken)) == 3


def test_the_native_emotions_are_spoken(server):
    body = {"text": SENTENCES[0], "spk_audio_path": "voice_01.wav"}
    emotions = (
        {"emo_control_method": 1, "emo_ref_path": "voice_05.wav", "emo_weight": 1.6},
        {"emo_control_method": 2, "emo_vec": [1.5, 0, 0, 0, 0, 0, 0, 0]},
        {"emo_control_method": 2, "emo_vec": [0, 0.7, 0, 0, 0, 0, 0.8, 0], "emo_random": True},
    )
    assert [server.post("/tts_url", body | emotion)[0] for emotion in emotions] == [200, 200, 200]


def test_an_emotion_in_words_needs_its_model(server):
    status, _, body = server.post(SPEECH, {"model": "m", "input": SENTENCES[0], "instructions": "Speak cheerfully."})
    assert (status == 200) == server.report["emotes_by_text"]
    if status != 200:
        assert status == 400 and json.loads(body)["error"]["code"] == "no_emotion_text"
    assert speak(server).size


def test_a_reference_audio_that_would_end_the_talker_is_refused(server):
    soundfile.write(server.references / "short.wav", np.full(800, 0.1), 16_000)
    soundfile.write(server.references / "silent.wav", np.zeros(48_000), 16_000)
    (server.references / "text.wav").write_text("no audio")
    for name in ("short.wav", "silent.wav", "text.wav", "missing.wav", "../log"):
        status, _, body = server.post("/tts_url", {"text": "Hi.", "spk_audio_path": str(server.references / name)})
        assert status == 400 and name.split("/")[-1] in json.loads(body)["error"], body
    assert speak(server).size


@pytest.mark.parametrize("text", ["9" * 300, "word" * 200, "今天" * 400], ids=["digits", "word", "zh"])
def test_a_sentence_over_the_talkers_limit_is_split(server, text):
    assert speak(server, text).size > 2 * 22_050


def test_a_text_of_4096_characters_is_spoken_whole(server):
    text = ("The harbour was quiet that morning, and the boats lay still. " * 90)[:4096].strip().ljust(4096, "!")
    status, _, body = server.post(SPEECH, {"model": "m", "input": text, "response_format": "pcm"})
    assert len(text) == 4096 and status == 200
    assert len(pcm(body)) / 24_000 > 30


def test_a_client_that_leaves_takes_its_utterances_out_of_the_engine(server):
    body = json.dumps({"model": "m", "input": "This is a test of leaving. " * 60, "response_format": "pcm"}).encode()
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(head.encode() + body)
        wait_for(lambda: health(server)[1].get("utterances"), 30)
    wait_for(lambda: health(server)[1].get("utterances") == 0, 10)
    assert health(server)[1]["requests"] == 0
    wait_for(lambda: "Aborted request" in server.log.read_text(), 5)
    assert speak(server).size


def worker_of(server: Server) -> int:
    """Return the process id of the worker that has an engine."""
    [worker] = [pid for pid in children(server.process.pid) if children(pid)]
    return worker


def named(pids: list[int], name: str) -> list[int]:
    """Return the processes of that name."""
    return [pid for pid in pids if name in (vital_name(pid) or "")]


def test_a_killed_stage_is_told_at_once_and_replaced(server):
    worker, answers = worker_of(server), []
    asked = {"model": "m", "input": "This is a test of dying. " * 60}
    speaking = threading.Thread(target=lambda: answers.append(server.post(SPEECH, asked)))
    speaking.start()
    wait_for(lambda: health(server)[1].get("utterances"), 30)
    os.kill(named(descendants(worker), "VLLM::Stage")[-1], signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: health(server)[0] == 503, 10)
    assert time.monotonic() - began < 2
    speaking.join(10)
    status, headers, body = answers[0]
    assert status == 503 and json.loads(body)["error"]["code"] == "engine_died" and headers["retry-after"]
    wait_for(lambda: not is_alive(worker), 20)
    server.wait_until(200, READY_S)
    assert speak(server).size


def test_a_killed_worker_leaves_no_engine_process(server):
    worker = worker_of(server)
    engine = descendants(worker)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, engine)), 10)
    wait_for(lambda: health(server)[1].get("status") == "loading", 30)


def test_term_leaves_no_process_of_one_that_is_ready_or_of_one_that_loads(server):
    if is_to_be_ready := server.model == "indextts2":
        server.wait_until(200, READY_S)
    wait_for(lambda: named(descendants(server.process.pid), "VLLM::Stage"), READY_S)
    left = descendants(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0 or not is_to_be_ready
    wait_for(lambda: not any(map(is_alive, left)), 10)


def test_a_worker_and_its_master_killed_together_leave_no_engine_process(checkpoints, tmp_path):
    with omni_server("indextts2_5", checkpoints, tmp_path) as server:
        wait_for(lambda: named(descendants(server.process.pid), "VLLM::Stage"), READY_S)
        left = descendants(server.process.pid)
        for pid in (server.process.pid, worker_of(server)):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, left)), 30)


def test_a_model_that_is_not_there_is_told_by_its_setting(checkpoints, tmp_path):
    with omni_server("indextts2_5", checkpoints, tmp_path, TTS_MODEL="/nowhere/model") as server:
        wait_for(lambda: health(server)[1].get("status") == "unhealthy", READY_S)
        assert "TTS_MODEL" in health(server)[1]["message"]
        assert server.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 503
