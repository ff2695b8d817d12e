"""Starts the real server under gunicorn on a loopback port, and talks to it."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """gunicorn with this repository's settings, ended by its pid."""

    repository = REPOSITORY

    def __init__(self, log: Path, app: str = "app:create_app()", under: tuple[str, ...] = (), **environment: str):
        """under: the command that starts it, where it is to find the machine in a certain state."""
        self.port, self.log = int(environment.get("PORT") or free_port()), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*under, sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", app]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log.open("wb"), stderr=subprocess.STDOUT,
            env={**os.environ, "HOST": "127.0.0.1", "PORT": str(self.port), **environment},
        )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def wait_until(self, status: int, deadline_s: float = 60) -> dict:
        """Poll /health until it answers this status; return its report."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                answered, _, body = self.get("/health")
            except OSError:
                answered = None
            if answered == status:
                return json.loads(body)
            time.sleep(0.1)
        raise AssertionError(f"/health did not answer {status} in {deadline_s} s:\n{self.log.read_text()}")

    def wait_until_ready(self) -> dict:
        """Wait for /health 200, and until what it speaks on is what it stays on: from then on it sounds the same."""
        end = time.monotonic() + 60
        while "next_runtime" in (report := self.wait_until(200)):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        return report

    def get(self, path: str) -> tuple[int, dict, bytes]:
        """Return status, headers (lower case) and body."""
        return open_url(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict | bytes, **headers: str) -> tuple[int, dict, bytes]:
        """Send JSON; return status, headers (lower case) and body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **headers}
        return open_url(urllib.request.Request(self.url + path, data, given, method="POST"))

    def send_file(self, path: str, field: str, data: bytes, **fields: object) -> tuple[int, dict]:
        """Send a recording in a form; return status and JSON."""
        named = "--b\r\nContent-Disposition: form-data; name="
        parts = [f'{named}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
        head = f'{named}"{field}"; filename="a.wav"\r\n\r\n'.encode()
        body = b"".join([*parts, head, data, b"\r\n--b--\r\n"])
        status, _, answer = self.post(path, body, **{"Content-Type": "multipart/form-data; boundary=b"})
        return status, json.loads(answer)

    def clone(self, text: str, recording: bytes, **fields: object) -> tuple[int, dict, bytes]:
        """Speak like a recording, as the dubbing worker asks for it."""
        _, told = self.send_file("/upload_audio", "file", recording)
        return self.post("/tts_url_with_cloning", {"text": text, "spk_audio_path": told["server_path"], **fields})

    def speak(self, text: str, **fields: object) -> tuple[np.ndarray, int]:
        """Return the float32 samples and rate of what POST /v1/audio/speech says."""
        status, _, body = self.post("/v1/audio/speech", {"model": "tts-1", "input": text, **fields})
        assert status == 200, body
        return decode(body)


def open_url(request: urllib.request.Request, timeout_s: float = 120) -> tuple[int, dict, bytes]:
    """Open a request, errors included."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def watch_health(url: str, seconds: float) -> list[float]:
    """Ask /health all the while; return the seconds of each answer. In a crowd's own process it looks late."""
    taken, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        assert open_url(urllib.request.Request(f"{url}/health"))[0] == 200
        taken.append(time.monotonic() - began)
        time.sleep(0.05)
    return taken


def decode(data: bytes, container: str | None = None) -> tuple[np.ndarray, int]:
    """Decode any container with FFmpeg; return float32 mono samples and the rate in Hz."""
    with av.open(io.BytesIO(data), format=container) as file:
        stream = file.streams.audio[0]
        to_float = av.AudioResampler(format="flt", layout="mono")
        frames = [part for frame in file.decode(stream) for part in to_float.resample(frame)]
        return np.concatenate([frame.to_ndarray().ravel() for frame in frames]), stream.rate


def pcm(data: bytes) -> np.ndarray:
    """Return the float32 samples of raw s16le."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768
