"""Full and read-only disks under the real gunicorn: for the log, for uploads, for temporary files, for everything."""

import io
import os
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import soundfile
from scripted import number_of
from serving import REPOSITORY, Server, decode
from test_reference_audio import speech_like

from vllm_engine import children, is_alive

SPEECH, UPLOAD, VOICES = "/v1/audio/speech", "/upload_audio", "/v1/audio/voices"
PATHS = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
mounts = pytest.mark.skipif(not CAN_MOUNT, reason="a small disk of the test's own needs root or user namespaces")
FULL = 'mount -t tmpfs -o size=128k tmpfs "{0}"; head -c 1M /dev/zero >"{0}/filler" 2>/dev/null; '
READ_ONLY = 'mount -t tmpfs -o ro tmpfs "{0}"; '


@contextmanager
def server_where(log, first, output="", **settings):
    """A real server with a scripted engine, on disks of its own: shell commands before it, and where it prints."""
    in_namespace = ("unshare", "-rm") if first else ()
    under = (*in_namespace, "bash", "-c", f'{first} exec "$@" {output}', "bash")
    with Server(log, "scripted:create_app()", under, PYTHONPATH=PATHS, **settings) as own:
        yield own


def inside(server, path):
    """A path as the server sees it."""
    return f"/proc/{server.process.pid}/root{path}"


def make_room(server, folder):
    """Remove what fills a disk."""
    os.unlink(inside(server, folder / "filler"))


def speaks(server, number=7, **headers):
    """Tell whether it says the right thing."""
    status, _, body = server.post(SPEECH, {"model": "m", "input": f"Number {number}."}, **headers)
    return status == 200 and number_of(decode(body)[0]) == number


def post_file(server, path=UPLOAD, field="file", seconds=3, **fields):
    """Send a recording as a form; return the status and the JSON."""
    wav = io.BytesIO()
    soundfile.write(wav, speech_like(seconds), 24_000, format="WAV")
    return server.send_file(path, field, wav.getvalue(), **fields)


def kill_worker(server):
    """Kill the worker and wait for the next one to speak."""
    [worker] = [pid for pid in children(server.process.pid) if children(pid)]
    os.kill(worker, signal.SIGKILL)
    end = time.monotonic() + 5
    while is_alive(worker):
        assert time.monotonic() < end
        time.sleep(0.02)
    server.wait_until_ready()


class TestLog:
    """What becomes of a service whose log cannot be written."""

    @pytest.mark.parametrize("output", [">/dev/full 2>&1", "> >(true) 2>&1"], ids=["full disk", "reader gone"])
    def test_it_speaks_reloads_and_replaces_its_worker_all_the_same(self, tmp_path, output):
        with server_where(tmp_path / "log", "", output) as own:
            own.wait_until_ready()
            assert speaks(own)
            assert own.post(SPEECH, {"model": "m"})[0] == 400
            own.process.send_signal(signal.SIGHUP)
            kill_worker(own)
            assert speaks(own)
            own.process.send_signal(signal.SIGTERM)
            assert own.process.wait(20) == 0

    @mounts
    def test_the_log_goes_on_once_there_is_room(self, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        with server_where(tmp_path / "log", FULL.format(disk), f'>"{disk}/log" 2>&1') as own:
            own.wait_until_ready()
            assert speaks(own, **{"X-Request-Id": "lost"})
            make_room(own, disk)
            assert speaks(own, **{"X-Request-Id": "kept"})
            time.sleep(0.3)
            with open(inside(own, disk / "log")) as log:
                assert "id=kept" in log.read()


@mounts
class TestUploads:
    """What becomes of recordings where there is no room for them."""

    @pytest.fixture
    def disk(self, tmp_path):
        """A folder to mount a disk at."""
        folder = tmp_path / "disk"
        folder.mkdir()
        return folder

    def test_a_full_disk_is_507_until_there_is_room_and_speech_goes_on(self, tmp_path, disk):
        folders = {"TTS_UPLOAD_DIR": str(disk), "TTS_OWN_VOICES_DIR": str(disk)}
        with server_where(tmp_path / "log", FULL.format(disk), **folders) as own:
            own.wait_until_ready()
            status, told = post_file(own)
            assert status == 507 and told["status"] == "error" and "No space left" in told["error"]
            status, told = post_file(own, VOICES, "audio_sample", name="May", consent="yes")
            assert status == 507 and told["error"]["code"] == "insufficient_storage"
            assert os.listdir(inside(own, disk)) == ["filler"]
            assert own.get("/health")[0] == 200 and speaks(own)
            make_room(own, disk)
            assert post_file(own, seconds=2)[0] == 200
        assert "Traceback" not in own.log.read_text()

    def test_a_read_only_disk_is_507_and_speech_goes_on(self, tmp_path, disk):
        with server_where(tmp_path / "log", READ_ONLY.format(disk), TTS_UPLOAD_DIR=str(disk)) as own:
            own.wait_until_ready()
            status, told = post_file(own)
            assert status == 507 and "Read-only file system" in told["error"]
            assert speaks(own)
        assert "Traceback" not in own.log.read_text()

    def test_a_large_body_that_finds_no_room_on_its_way_is_507_until_there_is(self, tmp_path, disk):
        """Over 500 kB it is laid down in TMPDIR while it comes."""
        folders = {"TMPDIR": str(disk), "TTS_UPLOAD_DIR": str(tmp_path / "uploads")}
        with server_where(tmp_path / "log", f'mount -t tmpfs -o size=2m tmpfs "{disk}"; ', **folders) as own:
            own.wait_until_ready()
            assert post_file(own, seconds=14)[0] == 200
            with pytest.raises(OSError, match="No space left"), open(inside(own, disk / "filler"), "wb", 0) as filler:
                while filler.write(bytes(4096)):
                    pass
            status, told = post_file(own, seconds=14)
            assert status == 507 and "no room" in told["error"]
            assert speaks(own) and post_file(own, seconds=2)[0] == 200
            make_room(own, disk)
            assert post_file(own, seconds=14)[0] == 200
        assert "Traceback" not in own.log.read_text()


@mounts
class TestEverything:
    """What becomes of the service itself where no disk takes a byte."""

    @pytest.mark.parametrize("state", [FULL, READ_ONLY], ids=["full", "read-only"])
    def test_it_starts_speaks_and_replaces_its_worker(self, tmp_path, state):
        disk = tmp_path / "disk"
        disk.mkdir()
        everywhere = "".join(state.format(folder) for folder in (disk, "/dev/shm"))
        folders = {"TTS_UPLOAD_DIR": str(disk)} | ({"TMPDIR": str(disk)} if state == FULL else {})
        with server_where(tmp_path / "log", everywhere, ">/dev/full 2>&1", **folders) as own:
            own.wait_until_ready()
            assert speaks(own)
            kill_worker(own)
            assert speaks(own) and post_file(own)[0] == 507
