"""test_openai_api.sh: it passes on the real server, and sees each lie of a server that lies."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import REPOSITORY, free_port
from werkzeug.serving import make_server

from app import create_app
from settings import Settings

SCRIPT = REPOSITORY / "test_openai_api.sh"
SPEECH = "/v1/audio/speech"
ENVELOPE = {"message": "m", "type": "invalid_request_error", "param": None, "code": None}


def run(*arguments: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """Run the checklist; return its status, the verdict of each check by name, and all that it said."""
    command = ["bash", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment})
    lines = re.findall(r"^(ok|not ok) (\d+) - (.*)$", done.stdout, re.M)
    assert [int(number) for _, number, _ in lines] == list(range(1, len(lines) + 1))
    return done.returncode, {name: verdict for verdict, _, name in lines}, done.stdout + done.stderr


class Relay(ThreadingHTTPServer):
    """Passes requests on to a server, keeps its answers, and lies."""

    def __init__(self, upstream: str):
        self.upstream, self.kept, self.lock = upstream, {}, threading.Lock()
        super().__init__(("127.0.0.1", 0), RelayAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        """Return status, content type and body; an answer that was given once is given again."""
        key = method, path, headers.get("Content-Type"), body
        with self.lock:
            if key not in self.kept:
                self.kept[key] = self.fetch(method, path, headers, body)
            return self.kept[key]

    def fetch(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        """Ask the server."""
        kind = {"Content-Type": headers["Content-Type"]} if "Content-Type" in headers else {}
        asked = urllib.request.Request(self.upstream + path, body or None, kind, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read()


def without_wave(wav: bytes) -> bytes:
    """The same length of silence."""
    return wav[:44] + bytes(len(wav) - 44)


# What the relay makes of an answer, and the check that has to see it: (path, part of the body, lie, check).
LIES = (
    ("/v1/audio/voices", "", lambda s, k, b: (s, k, b.replace(b'"echo"', b'"eco"')),
     "the eleven voices, in their order"),
    (SPEECH, '"response_format":"mp3"', lambda s, k, b: (s, k, b[:-50]), "mp3: its type, its first bytes, its length"),
    (SPEECH, '"response_format":"opus"', lambda s, k, b: (s, k, b[: b.rindex(b"OggS")]),
     "opus: its type, its first bytes, its length"),
    (SPEECH, '"response_format":"aac"', lambda s, k, b: (s, k, b[:-20]), "aac: its type, its first bytes, its length"),
    (SPEECH, '"response_format":"flac"', lambda s, k, b: (s, "audio/wav", b),
     "flac: its type, its first bytes, its length"),
    (SPEECH, '"voice":"sage"', lambda s, k, b: (s, k, without_wave(b)), "voice sage"),
    (SPEECH, '"voice":"marin"', lambda s, k, b: (404, k, b), "alias marin"),
    (SPEECH, "Number 3", lambda s, k, b: (429, k, b), "five at once"),
    ("/audio/speech", "", lambda s, k, b: (500, k, b), "/audio/speech is the same"),
    ("/tts_url", "voice_05", lambda s, k, b: (s, k, b'{"status": "ok"}'), "/tts_url speaks"),
    ("/tts_url", '"text":""', lambda s, k, b: (s, k, b'{"detail": "no"}'), "/tts_url refuses in its own words"),
    (SPEECH, '"voice":"nobody"', lambda s, k, b: (s, k, b'{"detail": "no such voice"}'), "400: no such voice"),
    (SPEECH, '"speed":5', lambda s, k, b: (200, k, b), "400: speed out of range"),
    ("/v1/nothing", "", lambda s, k, b: (s, k, b'{"error": {"message": "Traceback"}}'), "404: no such route"),
)  # fmt: skip
# The relay as a whole lies too: it sends nothing before it has all, loses fields, and takes any X-Api-Key; and some
# of the lies above are met twice.
ALSO = (
    "pcm streams", "mp3 streams", "speed 2 halves the length", "server-sent events", "no way around the key",
    "//tts_url is the same", "the voice list is open",
)  # fmt: skip


class RelayAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answer, with the lies that fit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind, answer = self.server.ask(self.command, self.path, dict(self.headers), self.asked(body))
        if not self.may_enter():
            status, kind, answer = 401, "application/json", json.dumps({"error": ENVELOPE}).encode()
        for path, part, lie, _ in LIES:
            if (self.path, status == 401) == (path, False) and part in body.decode(errors="replace"):
                status, kind, answer = lie(status, kind, answer)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def asked(self, body: bytes) -> bytes:
        """The body as the server sees it: speed 2 is lost on the way, and events are cut by a missing field."""
        return body.replace(b',"speed":2', b"").replace(b',"stream_format":"sse"', b"")

    def may_enter(self) -> bool:
        """Whether the key is right; an X-Api-Key is never looked at."""
        speaks = self.path.endswith(("speech", "tts_url"))
        return not speaks or "X-Api-Key" in self.headers or self.headers.get("Authorization") == "Bearer the-key"

    def log_message(self, *_):
        """Quietly."""


@pytest.fixture(scope="module")
def relay(server):
    """The relay in front of the real server."""
    with Relay(server.url) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        yield relay
        relay.shutdown()


@pytest.fixture
def tools(tmp_path):
    """A folder with bash, curl, python3 and what it takes of coreutils, and nothing else."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "curl", "python3", "cat", "head", "mkdir", "mktemp", "rm", "tr"):
        (folder / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))
    return str(folder)


def test_the_real_server_passes_with_bash_curl_and_python3(server, tools, tmp_path):
    status, verdicts, said = run("--url", server.url + "/", "--out", str(tmp_path / "out"), PATH=tools)
    assert "not found" not in said
    assert (status, [name for name, verdict in verdicts.items() if verdict != "ok"]) == (0, []), said
    assert len(verdicts) > 50 and "1..54" in said
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"english_alloy.wav", "chinese_nova.wav", "format.opus", "voice_verse.wav"} <= kept


def test_each_lie_is_seen(relay, tmp_path):
    status, verdicts, said = run("--url", relay.url, "--out", str(tmp_path / "out"), API_KEY="the-key")
    failed = [name for name, verdict in verdicts.items() if verdict != "ok"]
    assert (status, sorted(failed)) == (1, sorted({lie[3] for lie in LIES} | set(ALSO))), said
    assert "the-key" not in said


def test_quick_leaves_out_what_takes_long(server, tmp_path):
    status, verdicts, said = run("--quick", "--out", str(tmp_path / "out"), BASE_URL=server.url)
    assert status == 0, said
    assert 15 < len(verdicts) < 30 and "voice sage" not in verdicts


def test_a_server_with_keys_has_no_holes(engine, tmp_path):
    app = create_app(Settings(api_keys=("the-key",)), engine)
    app.extensions["speech"].trouble = None
    served = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    status, verdicts, said = run(
        "--quick", "--url", f"http://127.0.0.1:{served.server_port}", "--key", "the-key", "--out", str(tmp_path)
    )
    served.shutdown()
    assert verdicts["no way around the key"] == verdicts["health is open"] == "ok", said


def test_no_server_is_told(tmp_path):
    status, _, said = run("--url", f"http://127.0.0.1:{free_port()}", "--out", str(tmp_path))
    assert status == 3 and "no server at" in said


@pytest.mark.parametrize("argument", ["--fast", "--url", "-o"])
def test_an_argument_that_is_not_understood_is_refused(argument):
    status, _, said = run(argument)
    assert status == 2 and argument in said
