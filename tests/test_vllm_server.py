"""A vLLM engine's processes under the real gunicorn: they die with their worker, and a worker with them."""

import json
import os
import signal
import threading
import time

import pytest
from serving import REPOSITORY, Server

from vllm_engine import children, descendants, is_alive

SPEECH = "/v1/audio/speech"


@pytest.fixture
def server(tmp_path):
    """A real server whose engine is scripted and has a real process."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    with Server(tmp_path / "log", "scripted:create_app()", PYTHONPATH=paths, SCRIPT_DELAY_S="1") as running:
        running.wait_until_ready()
        yield running


def worker_of(server):
    """The worker's process id."""
    [worker] = [pid for pid in children(server.process.pid) if children(pid)]
    return worker


def engine_of(server):
    """The id of the engine's process."""
    [engine] = children(worker_of(server))
    return engine


def wait_for(condition, deadline_s):
    """Wait for a condition to hold; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, "it did not come to pass"
        time.sleep(0.02)
    return time.monotonic() - began


def health(server):
    """What /health answers, None while nobody does."""
    try:
        return server.get("/health")[0]
    except OSError:
        return None


def test_a_killed_engine_is_told_at_once_and_replaced(server):
    answers, asked = [], {"model": "m", "input": "Hi. " * 999}
    speaking = threading.Thread(target=lambda: answers.append(server.post(SPEECH, asked)))
    speaking.start()
    wait_for(lambda: json.loads(server.get("/health")[2])["requests"], 5)
    worker = worker_of(server)
    os.kill(engine_of(server), signal.SIGKILL)
    assert wait_for(lambda: health(server) == 503, 5) < 2
    speaking.join(10)
    status, headers, body = answers[0]
    assert status == 503 and headers["retry-after"] and json.loads(body)["error"]["code"] == "engine_died"
    wait_for(lambda: not is_alive(worker), 10)
    wait_for(lambda: health(server) == 200, 20)
    assert server.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_killed_worker_leaves_no_engine_process_and_is_replaced(server):
    worker, engine = worker_of(server), engine_of(server)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_alive(engine), 5)
    wait_for(lambda: health(server) == 200, 20)


def test_term_leaves_no_process(server):
    left = descendants(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    wait_for(lambda: not any(map(is_alive, left)), 5)
