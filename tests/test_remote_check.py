"""remote_check.sh against boxes in good and in bad states."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from deploying import Box, make_release
from serving import REPOSITORY

SCRIPT = REPOSITORY / "remote_check.sh"
KEY = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A box on which the stand-in is serving, with a key."""
    folder = tmp_path_factory.mktemp("check")
    with Box(folder / "index tts 语音", TTS_API_KEYS=KEY) as box:
        status, said = box.run(source=make_release(folder / "release"))
        assert status == 0, said
        yield box


def check(box: Box, **environment: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Run it the way ssh does; return its status and, by name, levels and values."""
    settings = {"PATH": box.environment["PATH"], "APP_DIR": str(box.app_dir), "PORT": str(box.port), **environment}
    with SCRIPT.open("rb") as script:
        done = subprocess.run(["bash", "-s", "--", "--json"], stdin=script, env=settings, capture_output=True)
    assert not done.stderr, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    found: dict[str, list[tuple[str, str]]] = {}
    for line in report["checks"]:
        found.setdefault(line["name"], []).append((line["level"], line["value"]))
    return done.returncode, found


def test_a_serving_box_is_well(box):
    status, found = check(box)
    assert status == 0
    assert found["health"] == [("ok", "healthy")]
    assert found["release"] == [("ok", box.release())]
    assert found["reference_audio"] == [("ok", "all 11 files")]
    assert len(found["process"]) == 2


def test_it_finds_the_folder_by_the_port(box):
    settings = {"PATH": box.environment["PATH"], "PORT": str(box.port)}
    done = subprocess.run(["bash", str(SCRIPT)], env=settings, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"Speech server in {box.app_dir}, port {box.port}" in done.stdout
    assert "nothing stops it from speaking" in done.stdout


def test_it_changes_nothing(box):
    before = box.files()
    check(box)
    assert box.files() == before


def test_it_prints_no_secrets(box):
    with (box.app_dir / "logs/server.log").open("a") as log:
        log.write(f"ERROR refused Authorization: Bearer {KEY} and api_key={KEY}2 and sk-0123456789abcdef\n")
    done = subprocess.run(["bash", str(SCRIPT)], env=box.environment, capture_output=True, text=True)
    assert "refused Authorization" in done.stdout and "asks for keys" in done.stdout
    assert KEY not in done.stdout and "sk-0123" not in done.stdout


def test_keys_of_a_file_are_told_and_not_printed(tmp_path):
    with Box(tmp_path / "box") as box:
        (box.app_dir / "logs").mkdir(parents=True)
        (box.app_dir / "keys.txt").write_text("# whose\n Key.Of.A.File # of Ann\n")
        (box.app_dir / "server.env").write_text("TTS_API_KEYS_FILE=keys.txt\n")
        (box.app_dir / "logs/server.log").write_text("ERROR for Key.Of.A.File\n")
        found = check(box)[1]
    assert "asks for keys" in found["settings"][0][1] and found["log"] == [("note", "ERROR for ***")]


def test_a_log_in_any_encoding_is_json(box):
    with (box.app_dir / "logs/server.log").open("ab") as log:
        log.write(b"ERROR " + "第一句".encode() * 60 + b"\n" + b"ERROR \xff\xfe\x80 bytes\n")
    for locale in ("C", "C.UTF-8"):
        assert any("第一句" in value for _, value in check(box, LC_ALL=locale)[1]["log"])


@pytest.mark.parametrize("line", ['{"api_key": "abc-12345"}', "GET http://me:abc-12345@127.0.0.1/", "token='abc-12345"])
def test_secrets_that_nobody_told_it_are_hidden_too(box, line):
    with (box.app_dir / "logs/server.log").open("a") as log:
        log.write(f"ERROR {line}\n")
    done = subprocess.run(["bash", str(SCRIPT)], env=box.environment, capture_output=True, text=True)
    assert "***" in done.stdout and "abc-12345" not in done.stdout


def test_what_was_copied_and_not_restarted_is_told(box):
    assert "running" not in check(box)[1]
    manifest = box.app_dir / "release.sha256"
    original = manifest.read_bytes()
    manifest.write_bytes(original + original[:100])
    try:
        found = check(box)[1]
    finally:
        manifest.write_bytes(original)
    assert found["running"][0][0] == "note" and box.release() in found["running"][0][1]


def test_edited_files_are_named(box):
    voices = box.app_dir / "voices.json"
    original = voices.read_bytes()
    voices.write_bytes(original + b"\n")
    try:
        status, found = check(box)
    finally:
        voices.write_bytes(original)
    assert status == 0
    assert found["files"] == [("note", "edited since they were deployed: voices.json")]


def test_missing_reference_audio_stops_it(box):
    file = box.app_dir / "examples/voice_07.wav"
    file.rename(file.with_suffix(".gone"))
    try:
        status, found = check(box)
    finally:
        file.with_suffix(".gone").rename(file)
    assert status == 1
    assert found["reference_audio"][0][0] == "FAIL" and "voice_07.wav" in found["reference_audio"][0][1]


def test_what_the_public_address_answers_is_told(box):
    assert check(box, PUBLIC_URL=box.url)[1]["public_url"][0][0] == "ok"
    status, found = check(box, PUBLIC_URL="http://127.0.0.1:9")
    assert status == 1 and found["public_url"][0][0] == "FAIL"


def test_a_full_disk_stops_it(box):
    status, found = check(box, MIN_DISK_MB="999999999")
    assert status == 1 and found["disk"][0][0] == "FAIL"


def test_missing_weights_of_a_named_engine_stop_it(box):
    settings = box.app_dir / "server.env"
    original = settings.read_text()
    settings.write_text(original.replace("TTS_ENGINE=embedded", "TTS_ENGINE=indextts"))
    try:
        status, found = check(box)
    finally:
        settings.write_text(original)
    assert status == 1 and "TTS_MODEL_DIR" in found["weights"][0][1]


def test_an_interrupted_deploy_is_told(box):
    mark = box.app_dir / "run/unfinished"
    mark.write_text("somewhere\n")
    try:
        status, found = check(box)
    finally:
        mark.unlink()
    assert status == 1 and "interrupted" in found["deploy"][0][1]


def test_a_stopped_server_is_told(tmp_path):
    with Box(tmp_path / "empty") as box:
        box.app_dir.mkdir()
        status, found = check(box)
        assert status == 1 and "stopped" in found["port"][0][1]


def test_a_stranger_on_the_port_is_told(box, tmp_path):
    program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
    with Box(tmp_path / "empty") as other:
        other.app_dir.mkdir()
        stranger = subprocess.Popen([*program, str(other.port)], cwd=tmp_path, stderr=subprocess.DEVNULL)
        try:
            other.wait_until(lambda: other.get("/"))
            status, found = check(other)
        finally:
            stranger.kill()
            stranger.wait()
    assert status == 1 and f"process {stranger.pid}" in found["port"][0][1]


def test_a_release_that_is_loading_is_told(tmp_path):
    release = make_release(tmp_path / "release", "loading")
    with Box(tmp_path / "box") as box:
        shutil.copytree(release, box.app_dir)
        command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:create_app()"]
        environment = os.environ | box.environment
        running = subprocess.Popen(command, cwd=box.app_dir, env=environment, stderr=subprocess.DEVNULL)
        try:
            box.wait_until(lambda: box.get("/health"))
            status, found = check(box)
        finally:
            running.terminate()
            running.wait()
    assert status == 1 and found["health"] == [("FAIL", "a stand-in")]
