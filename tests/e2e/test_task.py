"""A whole dubbing task: a Chinese video in, an English one out, spoken by this server for the worker's generations."""

import json
import signal
import socket
import subprocess
import threading
import time

import pytest
from dubbing import PHRASES, dub, hear_lines, make_video, segments_of, sound_of, translate
from dubbing_worker import NewerWorker, OlderWorker, Segment, TaskFailed
from hearing import word_error_rate
from serving import REPOSITORY, Server, free_port

LINES = list(PHRASES)
PROMPT = (REPOSITORY / "examples" / "voice_09.wav").as_uri() + "?X-Amz-Signature=" + "0f" * 130


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real server with the embedded engine, which makes every segment anew."""
    with Server(tmp_path_factory.mktemp("server") / "log", TTS_CACHE_BYTES="0") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def video(server, tmp_path_factory):
    """A function that makes a video of so many lines."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp("video") / f"{count}.mp4"
            make_video(server, [LINES[number % len(LINES)] for number in range(count)], made[count])
        return made[count]

    return of


@pytest.fixture(scope="module")
def segments(video, listener):
    """A function that hears such a video and returns its lines, translated."""
    heard = {}

    def of(count):
        if count not in heard:
            heard[count] = [translate(line) for line in hear_lines(video(count), listener)]
        assert heard[count] == [PHRASES[LINES[number % len(LINES)]] for number in range(count)]
        return segments_of(heard[count])

    return of


def probed_seconds(path):
    """How long ffprobe says each stream lasts; it fails on what cannot be played."""
    asked = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(path)]
    streams = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)["streams"]
    return {stream["codec_type"]: float(stream["duration"]) for stream in streams}


def check_result(out, task, seconds, listener):
    """A playable video as long as the joined audio, in which whisper hears every line."""
    played = probed_seconds(out)
    assert played["audio"] == pytest.approx(seconds, abs=0.05), "within a frame of AAC"
    assert played["video"] == pytest.approx(seconds, abs=0.11), "within a picture"
    samples, rate = sound_of(out)
    assert len(samples) / rate == pytest.approx(seconds, abs=0.1)
    wrong = word_error_rate(" ".join(segment.text for segment in task), listener.listen(samples, rate, "en"))
    print(f"\n{len(task)} segments, {seconds:.1f} s of audio, word error rate {wrong:.1%}")
    assert wrong <= 0.10


@pytest.mark.parametrize("generation", [OlderWorker, NewerWorker])
def test_a_task_comes_out_right(server, video, segments, listener, tmp_path, generation):
    task, out = segments(20), tmp_path / "out.mp4"
    worker = generation(server.url)
    worker.prompt_url = PROMPT
    seconds = dub(video(20), task, worker, out)
    assert worker.routes == {"/tts_url": 20}, "the embedded engine does not clone"
    check_result(out, task, seconds, listener)


def test_a_hundred_segments_come_out_right(server, video, segments, listener, tmp_path):
    task, out = segments(100), tmp_path / "out.mp4"
    seconds = dub(video(100), task, OlderWorker(server.url), out)
    check_result(out, task, seconds, listener)


def test_a_restart_in_the_middle_loses_nothing(video, segments, listener, tmp_path):
    task, out, port = segments(20), tmp_path / "out.mp4", str(free_port())
    worker, lasted = OlderWorker(f"http://127.0.0.1:{port}"), []
    settings = {"PORT": port, "TTS_CACHE_BYTES": "0"}
    with Server(tmp_path / "first.log", **settings) as first:
        first.wait_until_ready()
        dubbing = threading.Thread(target=lambda: lasted.append(dub(video(20), task, worker, out)))
        dubbing.start()
        wait_for(lambda: worker.routes.total() >= 5)
        first.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(int(port)))
        with Server(tmp_path / "second.log", **settings) as second:
            dubbing.join(600)
            before, after = (each.log.read_text().count('"POST /tts_url" 200') for each in (first, second))
    print(f"\n{before} segments before the restart, {after} after it")
    assert before >= 5 and after >= 5 and before + after == 20
    check_result(out, task, lasted[0], listener)


def test_a_refused_segment_fails_the_task_with_its_error_and_no_file(server, video, segments, tmp_path):
    task, out = segments(20), tmp_path / "out.mp4"
    task[7] = Segment(7, "Привет, мир.", 1)
    with pytest.raises(TaskFailed, match="segment 7: /tts_url answered 400: .*cannot read"):
        dub(video(20), task, OlderWorker(server.url), out)
    assert list(tmp_path.iterdir()) == []


def wait_for(condition, deadline_s=120):
    """Wait for a condition to hold."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def refused(port):
    """Tell whether nobody listens on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
