"""The dubbing worker's way of asking for speech, in both of its generations; written from its wire behaviour alone.

A task's segments are spoken by four threads. Each segment has four tries, 2 s apart, whatever Retry-After says; a try
of the older generation goes through seven addresses, one of the newer uploads the prompt, clones, and falls back.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

TRIES, PAUSE_S, TIMEOUT_S, AT_ONCE = 4, 2.0, 600, 4
NATIVE = ("/tts_url", "/synthesize", "/tts", "/api/synthesize", "/api/tts")
OPENAI = ("/audio/speech", "/v1/audio/speech")
AUDIO = ("audio/", "application/octet-stream")


@dataclass(frozen=True)
class Segment:
    """A line of the task: its number, what to say, and which of the numbered voices says it."""

    number: int
    text: str
    voice_number: int = 1


class Refused(Exception):
    """One answer that was not speech; the message has its status and body."""


class TaskFailed(Exception):
    """A segment could not be had: the whole task fails, with that segment's error."""


@dataclass
class Worker:
    """What both generations share."""

    base_url: str
    key: str | None = None
    openai_voice: str = "default"
    routes: Counter = field(default_factory=Counter)  # how many segments each route spoke
    seconds: dict[int, float] = field(default_factory=dict)  # how long each segment took

    def speak_task(self, segments: list[Segment]) -> list[bytes]:
        """Return the segments' WAVs in their order; raise TaskFailed once all have ended and one of them failed."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [future.result() for future in [pool.submit(self.speak, segment) for segment in segments]]

    def speak(self, segment: Segment) -> bytes:
        """Return a segment's WAV; raise TaskFailed after TRIES."""
        began = time.monotonic()
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            try:
                route, audio = self.attempt(segment)
            except (OSError, http.client.HTTPException, Refused) as error:
                failure = error
                continue
            self.routes[route] += 1
            self.seconds[segment.number] = time.monotonic() - began
            return audio
        raise TaskFailed(f"segment {segment.number}: {failure}")

    def attempt(self, segment: Segment) -> tuple[str, bytes]:
        """Try once; return the route that spoke and the WAV."""
        raise NotImplementedError

    def native_body(self, segment: Segment) -> dict:
        """What /tts_url is sent."""
        path = f"/data/index-tts/examples/voice_{segment.voice_number:02}.wav"
        return {"text": segment.text, "spk_audio_path": path, "max_text_tokens_per_sentence": 120}

    def post(self, path: str, body: dict) -> bytes:
        """Send JSON; return audio, or raise Refused or OSError."""
        keys = {"Authorization": f"Bearer {self.key}", "X-Api-Key": self.key} if self.key else {}
        answered, kind = self.send(path, json.dumps(body).encode(), {"Content-Type": "application/json", **keys})
        if not kind.startswith(AUDIO):
            raise Refused(f"{path} answered {kind}")
        return answered

    def send(self, path: str, data: bytes, headers: dict[str, str]) -> tuple[bytes, str]:
        """Send a request; return the body and content type of a 200, raise Refused or OSError for all else."""
        asked = urllib.request.Request(self.base_url + path, data, headers, method="POST")
        try:
            with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as response:
                return response.read(), response.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            raise Refused(f"{path} answered {error.code}: {error.read(500).decode(errors='replace')}") from None


class OlderWorker(Worker):
    """Tries one address after the other."""

    def attempt(self, segment: Segment) -> tuple[str, bytes]:
        """Return the first audio that an address answers."""
        openai = {"model": "index-tts-v2", "input": segment.text, "voice": self.openai_voice,
                  "response_format": "wav", "speed": 1}  # fmt: skip
        refusals = []
        for path in (*NATIVE, *OPENAI):
            try:
                return path, self.post(path, openai if path in OPENAI else self.native_body(segment))
            except (OSError, http.client.HTTPException, Refused) as error:
                refusals.append(error)
        raise refusals[0]


@dataclass
class NewerWorker(Worker):
    """Uploads the prompt for each segment, clones, and falls back to the plain call; never asks the OpenAI route."""

    prompt_url: str = ""

    def attempt(self, segment: Segment) -> tuple[str, bytes]:
        """Return the cloned audio, or on any error that of /tts_url."""
        try:
            path = self.upload()
            body = {"text": segment.text, "spk_audio_path": path, "emo_audio_path": path, "emo_alpha": 0.8}
            return "/tts_url_with_cloning", self.post("/tts_url_with_cloning", body)
        except (OSError, http.client.HTTPException, Refused, ValueError, KeyError):
            return "/tts_url", self.post("/tts_url", self.native_body(segment))

    def upload(self) -> str:
        """Fetch the prompt and upload it, without a key, under its presigned name; return the server's path for it."""
        with urllib.request.urlopen(self.prompt_url, timeout=TIMEOUT_S) as response:
            prompt = response.read()
        boundary, name = uuid.uuid4().hex, self.prompt_url.rpartition("/")[2]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + prompt + f"\r\n--{boundary}--\r\n".encode()
        answered, _ = self.send("/upload_audio", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        told = json.loads(answered)
        if told["status"] != "success":
            raise Refused(f"/upload_audio answered {told}")
        return told["server_path"]
