"""A server as a process on loopback: started, waited for, weighed, and ended by its own process id."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20


class Server:
    """A server process on loopback: entering waits until it is ready, leaving ends it by its own process id."""

    def __init__(self, argv: list[str], port: int, env: dict[str, str] | None = None, log: Path | None = None):
        self.url = f"http://127.0.0.1:{port}"
        self._argv, self._env = argv, os.environ | (env or {})
        self.log = log or RESULTS / "server.log"
        self.ready_s = self.settled_s = 0.0  # from start to ready, and to the runtime that it stays on

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv, env=self._env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while (health := healthy(self.url)) is None or "next_runtime" in health:
            if self._process.poll() is not None or time.perf_counter() - began > START_TIMEOUT_S:
                self.__exit__()
                raise RuntimeError(f"{self._argv[0]} did not start; its output is in {self.log}")
            if health and not self.ready_s:
                self.ready_s = time.perf_counter() - began
            time.sleep(0.02)
        self.settled_s = time.perf_counter() - began
        self.ready_s = self.ready_s or self.settled_s
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: what it started and nothing else
            self._process.wait()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid


def healthy(url: str) -> dict[str, Any] | None:
    """Return what GET /health answers with 200, {} where that is no JSON object; None before."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=5)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        if answer.status != 200:
            return None
        told = json.loads(answer.read())
        return told if isinstance(told, dict) else {}
    except OSError:
        return None
    except ValueError:
        return {}
    finally:
        connection.close()


def with_children(pid: int) -> list[int]:
    """Return a process id and those of its children, at any depth."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in with_children(int(child)))]


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and its children, in MB; pages they share count twice."""
    return sum(resident_kb(each) for each in with_children(pid)) / 1000


def resident_kb(pid: int) -> int:
    """Return a process's resident memory in kB; of one that ended and is not reaped yet, 0."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its children so far, of all their threads, user and system."""
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in with_children(pid)]
    return sum(int(user) + int(system) for *_, user, system in (stat[:13] for stat in stats)) / os.sysconf("SC_CLK_TCK")


def leave_on_term() -> None:
    """Let TERM unwind the program like Ctrl-C does, so that its servers are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_server(app: str = "app:create_app()", **settings: str) -> Server:
    """Return this repository's server with these TTS_* settings, not started yet."""
    port = free_port()
    argv = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", app]
    # Every request is to be made: some benches send one text again and again.
    env = {"HOST": "127.0.0.1", "PORT": str(port), "TTS_CACHE_BYTES": "0", **settings}
    name = "-".join(["server", *(Path(value).name for value in settings.values())])
    return Server(argv, port, env, RESULTS / f"{name}.log")
