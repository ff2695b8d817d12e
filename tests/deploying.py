"""Throw-away boxes to deploy to: a folder, a port, releases that fail as asked, and an older server to replace."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import REPOSITORY, free_port

SCRIPT = "deploy_openai_api.sh"

# A release that starts in half a second; FAULT says how it fails, MARK makes its checksum its own.
STAND_IN = '''
import hashlib, io, json, math, os, struct, sys, types, wave
from pathlib import Path

FAULT, MARK = {fault!r}, {mark!r}
HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "release.sha256"
RELEASE = hashlib.sha256((MANIFEST if MANIFEST.exists() else Path(__file__)).read_bytes()).hexdigest()[:12]
VOICES = [voice["id"] for voice in json.loads((HERE / "voices.json").read_text())["voices"]]
if FAULT == "import":
    import a_module_that_is_not_there


def sound():
    loudness, file = 0 if FAULT == "silence" else 9000, io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000 if FAULT == "rate" else 24000, 0, "NONE", ""))
        seconds = 0.1 if FAULT == "short" else 1
        out.writeframes(b"".join(
            struct.pack("<h", int(loudness * math.sin(i / 9))) for i in range(int(24000 * seconds))))
    return b"no sound" if FAULT == "noise" else file.getvalue()


class App:
    extensions = {{"speech": types.SimpleNamespace(
        engine=types.SimpleNamespace(name="stand-in"), voices=types.SimpleNamespace(voices=VOICES))}}

    def __call__(self, environ, start_response):
        status, kind, body = self.answer(environ["PATH_INFO"], environ)
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def answer(self, path, environ):
        file = os.environ.get("TTS_API_KEYS_FILE")
        key = Path(file).read_text().split()[-1] if file else os.environ.get("TTS_API_KEYS")
        if path == "/health":
            state = {{"loading": "loading", "unhealthy": "unhealthy"}}.get(FAULT, "healthy")
            told = json.dumps({{"status": state, "message": "a stand-in", "release": RELEASE}}, separators=(",", ":"))
            return "200 OK" if state == "healthy" else "503 Unavailable", "application/json", told.encode()
        if path == "/v1/audio/voices":
            listed = VOICES[1:] if FAULT == "voices" else VOICES
            return "200 OK", "application/json", json.dumps({{"voices": [{{"id": v}} for v in listed]}}).encode()
        if key and environ.get("HTTP_AUTHORIZATION") != f"Bearer {{key}}":
            return "401 Unauthorized", "application/json", b"{{}}"
        return "200 OK", "audio/wav", sound()


def create_app():
    if FAULT == "boot" and "gunicorn" in sys.modules:
        raise RuntimeError("this release does not boot")
    return App()
'''

GUNICORN = """
import os
bind = f"{os.environ['HOST']}:{os.environ['PORT']}"
worker_class, threads, graceful_timeout = "gthread", 4, 30
control_socket_disable = True
"""

# What a box runs before the first deploy.
OLDER_SERVER = '''
import argparse, http.server, os, signal, subprocess

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"/": f"older server, {options.model_dir}, {os.environ.get('OLDER_SECRET')}", "/child": f"{child.pid}"}
        self.send_response(200 if self.path in said else 404)
        self.end_headers()
        self.wfile.write(said.get(self.path, "").encode())

    def log_message(self, *_):
        pass

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--model_dir")
parser.add_argument("--gpu_memory_utilization")
parser.add_argument("--is_fp16", action="store_true")
parser.add_argument("--stubborn", action="store_true")
options = parser.parse_args()
if options.stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Answer).serve_forever()
'''

# What a deploy does one after the other, by function.
STEPS = (
    "check_import", "install_packages", "stage", "install_extras", "backup", "keep_files", "stop_server",
    "await_gpu_memory", "install_from", "put", "start_server", "start_checked", "wait_healthy", "verify",
)  # fmt: skip


def heed_interrupts() -> None:
    """Let SIGINT end what is run next: tests that run in the background ignore it, and bash could not change that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_step(step: str, command: str, folder: Path) -> str:
    """Write what makes bash (by BASH_ENV) run a command once a deploy has come to a step; return its path."""
    trap, action = folder / f"at {step}", folder / f"action at {step}"
    action.write_text(f'mv "{action}" "{action}.done"\n{command}\n')
    trap.write_text(f"""set -T
trap '[[ ${{FUNCNAME[0]-}} != {step} || ! -e "{action}" ]] || source "{action}"' DEBUG
""")
    return str(trap)


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own at a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_wheel(folder: Path, name: str, *requires: str, version: str = "1.0") -> str:
    """Make a wheel with nothing in it; return its sha256."""
    file, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def release_files() -> list[str]:
    """The release as the script lists it."""
    text = (REPOSITORY / SCRIPT).read_text()
    return text.split("RELEASE_FILES=(", 1)[1].split(")", 1)[0].split()


def copy_release(folder: Path, mark: str) -> Path:
    """Copy this repository's release to a folder, with a mark that makes its checksum its own."""
    folder.mkdir(parents=True)
    for name in release_files():
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    with (folder / "embedded_voice.py").open("a") as file:
        file.write(f"# {mark}\n")
    return folder


def make_release(folder: Path, fault: str = "", mark: str = "") -> Path:
    """Make a release of the stand-in in a folder; its other files are this repository's."""
    copy_release(folder, mark or folder.name)
    (folder / "app.py").write_text(STAND_IN.format(fault=fault, mark=mark or folder.name))
    (folder / "gunicorn.conf.py").write_text(GUNICORN)
    return folder


def call(commands: str, **environment: str) -> str:
    """Run commands with the script's functions at hand; return what they print."""
    script = f"source <(sed '$d' '{REPOSITORY / SCRIPT}'); {commands}"
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stdout


class Box:
    """A folder and a port to deploy to, with what runs there ended in the end."""

    def __init__(self, app_dir: Path, **environment: str):
        self.app_dir, self.port = app_dir, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(app_dir.parent), "APP_DIR": str(app_dir), "HOST": "127.0.0.1",
            "PORT": str(self.port), "PYTHON": sys.executable, "HEALTH_TIMEOUT_S": "40", "TTS_ENGINE": "embedded",
            **environment,
        }  # fmt: skip
        self.older: subprocess.Popen | None = None

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        self.run("stop")
        for pid in self.listeners():
            os.kill(pid, signal.SIGKILL)

    def start(self, *arguments: str, source: Path = REPOSITORY, **environment: str) -> subprocess.Popen:
        """Start the script of a release as a terminal does: in a group of its own, which Ctrl-C reaches."""
        return subprocess.Popen(
            ["bash", str(source / SCRIPT), *arguments], env=self.environment | environment, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=heed_interrupts,
        )  # fmt: skip

    def run(self, *arguments: str, source: Path = REPOSITORY, **environment: str) -> tuple[int, str]:
        """Run the script of a release; return its exit status and all that it said."""
        running = self.start(*arguments, source=source, **environment)
        said, _ = running.communicate(timeout=300)
        return running.returncode, said

    def start_older_server(self, *arguments: str, program: str = "api_server_v2.py") -> None:
        """Run an older api_server_v2.py here, the way a person would."""
        self.app_dir.mkdir(parents=True, exist_ok=True)
        (self.app_dir / program).write_text(OLDER_SERVER)
        command = [sys.executable, program, "--port", str(self.port), "--model_dir", "checkpoints/a b"]
        environment = {"PATH": os.environ["PATH"], "OLDER_SECRET": "s3cret"}
        self.older = subprocess.Popen(
            [*command, "--gpu_memory_utilization=0.4", "--is_fp16", *arguments], cwd=self.app_dir, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.wait_until(lambda: self.get("/"))

    def get(self, path: str) -> str | None:
        """What a path answers, None where nobody listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return None

    def release(self) -> str | None:
        """The release that is healthy here, None where none is."""
        answer = json.loads(self.get("/health") or "{}")
        return answer.get("release") if answer.get("status") == "healthy" else None

    def wait_until(self, condition, deadline_s: float = 30) -> None:
        """Poll until a condition holds."""
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, f"not within {deadline_s} s"
            time.sleep(0.05)

    def listeners(self) -> list[int]:
        """The processes that listen on the port."""
        return [int(pid) for pid in call(f"PORT={self.port}; port_pids").split()]

    def files(self) -> dict[str, bytes]:
        """Everything in the folder but the logs."""
        found = (path for path in self.app_dir.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(self.app_dir)): path.read_bytes() for path in found if path.suffix != ".log"}

    def backups(self) -> list[Path]:
        """The backups, oldest first."""
        return sorted((self.app_dir / "backups").glob("*"), key=lambda path: path.name.split(".backup.")[1])



def require_program(program: str, package: str) -> str:
    """Return the path of a Debian program; install it where this user may, else skip the test aloud."""
    places = f"{os.environ['PATH']}:/usr/sbin:/usr/bin"
    if not shutil.which(program, path=places) and os.geteuid() == 0 and shutil.which("apt-get"):
        install_quietly(package)
    return shutil.which(program, path=places) or pytest.skip(f"{program} is missing: install Debian's {package}")


def install_quietly(package: str) -> None:
    """Install a Debian package without starting its service, which is what policy-rc.d is for."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", package]):
            subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL, check=False)
    finally:
        if ours:
            policy.unlink()
