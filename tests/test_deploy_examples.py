"""The examples under deploy/: nginx in front of the server, the systemd unit, logrotate."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deploying import Box, make_release, require_program
from serving import REPOSITORY, free_port

EXAMPLES = REPOSITORY / "deploy"


class Nginx:
    """nginx with the example's configuration, its ports, its certificate and its folders exchanged."""

    def __init__(self, folder: Path, upstream: int):
        self.port = free_port()
        self.trust = ssl.create_default_context(cafile=folder / "fullchain.pem")
        program = require_program("/usr/sbin/nginx", "nginx-light")
        self.command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        example = (EXAMPLES / "nginx.conf").read_text()
        for old, new in (
            ("127.0.0.1:6006", f"127.0.0.1:{upstream}"), ("listen [::]:8443 ssl;", ""),
            ("listen 8443", f"listen 127.0.0.1:{self.port}"), ("/etc/ssl/speech.example.com", str(folder)),
        ):  # fmt: skip
            assert old in example
            example = example.replace(old, new)
        paths = "".join(
            f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.geteuid() == 0 else ""  # its folders are in one that others may not enter
        (folder / "nginx.conf").write_text(
            f"{user}\npid {folder}/pid;\nerror_log {folder}/error.log;\nworker_processes 1;\ndaemon off;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{paths}{example}\n}}\n"
        )

    def __enter__(self) -> "Nginx":
        subprocess.run([*self.command, "-t"], check=True, capture_output=True)
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def open(self, path: str, body: bytes | None = None, method: str | None = None):
        """Ask for a path over TLS, checking the certificate."""
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"https://localhost:{self.port}{path}", body, headers, method=method)
        return urllib.request.urlopen(asked, timeout=60, context=self.trust)


class Upstream(ThreadingHTTPServer):
    """A scripted server: /stream waits for its client between two chunks, /shy hangs up the first time."""

    def __init__(self):
        self.go_on, self.asked = threading.Event(), []
        super().__init__(("127.0.0.1", 0), UpstreamAnswer)


class UpstreamAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answer by the script."""
        self.server.asked.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/shy" and self.server.asked.count(f"{self.command} /shy") == 1:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(2):
            if number and self.path == "/stream":
                assert self.server.go_on.wait(30)
            self.wfile.write(b"3e8\r\n" + b"%d" % number * 1000 + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    do_POST = do_DELETE = do_GET

    def log_message(self, *_):
        """Quietly."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a certificate for localhost."""
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    subprocess.run(
        [require_program("openssl", "openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "privkey.pem",
         "-out", folder / "fullchain.pem"], check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def upstream():
    """The scripted server, running."""
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def nginx(folder, upstream):
    """nginx in front of the scripted server."""
    with Nginx(folder, upstream.server_port) as running:
        yield running


def test_nginx_passes_each_chunk_on_as_it_comes(nginx, upstream):
    with nginx.open("/stream", b"{}") as answer:
        first = answer.read(1000)
        upstream.go_on.set()  # only now is the second chunk sent
        assert (first, answer.read()) == (b"0" * 1000, b"1" * 1000)


def test_nginx_asks_a_get_again(nginx, upstream):
    with nginx.open("/shy") as answer:
        assert answer.status == 200
    assert upstream.asked.count("GET /shy") == 2


def test_nginx_asks_no_post_again(nginx, upstream):
    with pytest.raises(urllib.error.HTTPError) as caught:
        nginx.open("/shy", b"{}")
    assert caught.value.code == 502
    assert upstream.asked.count("POST /shy") == 1


def test_nginx_asks_no_delete_again(nginx, upstream):
    for _ in range(2):
        nginx.open("/kept", method="GET").read()  # which leaves a connection open
    with pytest.raises(urllib.error.HTTPError) as caught:
        nginx.open("/shy", method="DELETE")
    assert caught.value.code == 502
    assert upstream.asked.count("DELETE /shy") == 1


def test_nginx_lets_a_recording_through(nginx, upstream):
    with nginx.open("/upload_audio", b"x" * ((10 << 20) + (64 << 10))) as answer:
        assert answer.status == 200


def test_nginx_refuses_a_huge_body_in_openais_words(nginx, upstream):
    with pytest.raises(urllib.error.HTTPError) as caught:
        nginx.open("/huge", b"x" * (11 << 20 | 1))
    assert caught.value.code == 413
    assert json.loads(caught.value.read())["error"]["code"] == "request_too_large"
    assert "POST /huge" not in upstream.asked


def test_speech_streams_through_nginx(folder, server):
    text = "The harbour was quiet that morning. Nobody knew his name, but everybody had seen him before. " * 3
    body = json.dumps({"model": "tts-1", "input": text, "response_format": "pcm"}).encode()
    with Nginx(folder, server.port) as nginx, nginx.open("/v1/audio/speech", body) as answer:
        began, stamps = time.monotonic(), []
        while answer.read1(65536):
            stamps.append(time.monotonic() - began)
    assert stamps[0] < stamps[-1] / 2


# --- systemd and logrotate ---


def test_systemd_takes_the_unit(tmp_path):
    program = require_program("systemd-analyze", "systemd")
    unit = tmp_path / "indextts-openai.service"
    (tmp_path / "index").mkdir()
    unit.write_text((EXAMPLES / unit.name).read_text().replace("/root/index-tts-vllm", str(tmp_path / "index")))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SYSTEMCTL = r"""#!/bin/bash
# A stand-in for systemctl: runs what the unit says, the way systemd would.
unit={folder}/indextts-openai.service pid={folder}/pid
value() {{ sed -n "s/^$1=//p" "$unit"; }}
echo "$*" >>{folder}/asked
case $1 in
  is-active) [[ -s $pid && -d /proc/$(<"$pid") && $(</proc/"$(<"$pid")"/stat) != *") Z "* ]] ;;
  stop) kill -TERM "$(<"$pid")" ;;
  start)
    set -a; source "$(value EnvironmentFile)"; set +a
    cd "$(value WorkingDirectory)" || exit 1
    command=$(value ExecStart)
    read -r -a words <<<"${{command//'${{PYTHON}}'/$PYTHON}}"
    exec setsid "${{words[@]}}" >>"$(value StandardOutput | cut -d: -f2)" 2>&1 </dev/null &
    echo $! >"$pid" ;;
esac
"""


def test_deploy_goes_through_the_unit(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    with Box(tmp_path / "index", PATH=f"{tools}:{os.environ['PATH']}", UNIT="indextts-openai") as box:
        unit = (EXAMPLES / "indextts-openai.service").read_text().replace("/root/index-tts-vllm", str(box.app_dir))
        (tools / "indextts-openai.service").write_text(unit)
        (tools / "systemctl").write_text(SYSTEMCTL.format(folder=tools))
        (tools / "systemctl").chmod(0o755)
        box.start_older_server()
        status, said = box.run(source=make_release(tmp_path / "a"))
        assert status == 0, said
        assert box.release() in said
        status, said = box.run(source=make_release(tmp_path / "silent", "silence"), HEALTH_TIMEOUT_S="10")
        assert status == 4 and box.release(), said
        asked = re.sub(r"is-active.*\n", "", (tools / "asked").read_text())
        assert asked.split("\n")[:2] == ["start indextts-openai", "stop --no-block indextts-openai"]


def test_logrotate_rotates_under_a_running_server(tmp_path):
    program = require_program("/usr/sbin/logrotate", "logrotate")
    with Box(tmp_path / "index") as box:
        assert box.run(source=make_release(tmp_path / "a"))[0] == 0
        log = box.app_dir / "logs/server.log"
        with log.open("ab") as file:
            file.write(b"x" * 11_000_000)
        rules = tmp_path / "rules"
        rules.write_text((EXAMPLES / "logrotate.conf").read_text().replace("/root/index-tts-vllm", str(box.app_dir)))
        rules.chmod(0o644)
        shutil.chown(rules, 0 if os.geteuid() == 0 else os.geteuid())
        subprocess.run([program, "-s", str(tmp_path / "state"), str(rules)], check=True)
        assert log.stat().st_size == 0 and log.with_name("server.log.1.gz").exists()
        for pid in box.listeners():
            os.kill(pid, 0)
        box.run("stop")
        box.wait_until(lambda: b"Shutting down" in log.read_bytes())
