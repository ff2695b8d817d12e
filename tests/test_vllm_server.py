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


def start(folder):
    """Start a real server with a scripted engine and its real process; beside a file `no-memory` it does not load."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    script = {"PYTHONPATH": paths, "SCRIPT_DELAY_S": "1", "SCRIPT_NO_MEMORY": str(folder / "no-memory")}
    return Server(folder / "log", "scripted:create_app()", **script)


@pytest.fixture
def server(tmp_path):
    """Such a server, ready."""
    with start(tmp_path) as running:
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


def test_a_replacement_that_does_not_load_is_to_be_replaced(server, tmp_path):
    (tmp_path / "no-memory").touch()
    os.kill(engine_of(server), signal.SIGKILL)
    wait_for(lambda: "the next try is in 60 s" in server.log.read_text(), 20)
    assert "no memory left" in json.loads(server.get("/health")[2])["message"]


def test_a_first_worker_that_does_not_load_stays(tmp_path):
    (tmp_path / "no-memory").touch()
    with start(tmp_path) as server:
        wait_for(lambda: health(server) == 503 and b"no memory left" in server.get("/health")[2], 20)
        assert "the next try" not in server.log.read_text()


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
