"""deploy_openai_api.sh for real: throw-away folders, the embedded engine, and releases that fail as asked."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deploying import (
    OLDER_SERVER,
    SCRIPT,
    STEPS,
    Box,
    at_step,
    call,
    copy_release,
    make_release,
    make_wheel,
    release_files,
    require_program,
    tmpfs,
)
from serving import REPOSITORY, free_port

DONE, UNHEALTHY, USAGE, UNCHANGED, ROLLED_BACK, DOWN = range(6)
FAULTS = ("boot", "unhealthy", "loading", "silence", "rate", "short", "noise", "voices")
FOLDER = "index: tts & 语音"  # what shells and paths part at, and Chinese characters, in every path


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """Releases of the stand-in by name: a and b are good, the others named after their fault."""
    folder = tmp_path_factory.mktemp("发布 releases")
    names = ("a", "b", "import", *FAULTS)
    return {name: make_release(folder / name, "" if name in ("a", "b") else name) for name in names}


@pytest.fixture
def box(tmp_path):
    """An empty box."""
    with Box(tmp_path / FOLDER) as box:
        yield box


@pytest.fixture
def older(box):
    """A box on which an older api_server_v2.py runs."""
    box.start_older_server()
    box.greeting = box.get("/")
    return box


def serve(box: Box, release: Path) -> Box:
    """Deploy a release and remember its name."""
    status, said = box.run(source=release)
    assert status == DONE, said
    box.first = box.release()
    assert box.first in said
    return box


@pytest.fixture
def served(box, releases):
    """A box on which release a is serving."""
    return serve(box, releases["a"])


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, releases):
    """A box on which release a is serving, for tests after which it still does."""
    with Box(tmp_path_factory.mktemp("lasting") / FOLDER) as box:
        yield serve(box, releases["a"])


def settled(box: Box) -> dict[str, bytes]:
    """What a deploy that came to nothing leaves as it was."""
    passing = ("run/", "backups/")
    return {name: data for name, data in box.files().items() if not name.startswith(passing)}


# --- taking over, and failing to ---


def test_a_second_release_takes_over(served, releases):
    status, said = served.run(source=releases["b"])
    assert status == DONE, said
    assert served.release() not in (None, served.first)
    assert f"deployed release {served.release()}" in said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_release_that_fails_is_taken_back(lasting, releases, fault):
    before = settled(lasting)
    status, said = lasting.run(source=releases[fault], HEALTH_TIMEOUT_S="10")
    assert status == ROLLED_BACK, said
    assert (lasting.release(), settled(lasting)) == (lasting.first, before)
    assert "is serving again" in said


def test_a_release_that_cannot_be_imported_changes_nothing(lasting, releases):
    before = lasting.files()
    status, said = lasting.run(source=releases["import"])
    assert (status, lasting.files()) == (UNCHANGED, before)
    assert "a_module_that_is_not_there" in said


def test_a_release_that_is_not_whole_changes_nothing(lasting, tmp_path):
    release = make_release(tmp_path / "half")
    (release / "voices.json").unlink()
    before = lasting.files()
    status, said = lasting.run(source=release)
    assert (status, lasting.files()) == (UNCHANGED, before)
    assert "voices.json is missing" in said


@pytest.mark.parametrize("action", ["deploy", "restart", "rollback"])
def test_without_a_command_that_it_needs_nothing_changes(lasting, tmp_path, action):
    for program in (Path(folder) / name for folder in ("/usr/bin", "/bin") for name in os.listdir(folder)):
        if program.name != "curl" and not (tmp_path / program.name).is_symlink():
            (tmp_path / program.name).symlink_to(program)
    before = settled(lasting)
    status, said = lasting.run(action, PATH=str(tmp_path))
    assert (status, settled(lasting)) == (UNCHANGED, before) and "curl is missing" in said, said
    assert lasting.release() == lasting.first


def test_the_release_has_every_module():
    modules = {path.name for path in REPOSITORY.glob("*.py")} | {path.name for path in REPOSITORY.glob("*.dist-info")}
    assert modules <= set(release_files())


def test_a_dry_run_changes_nothing(lasting, releases):
    before = lasting.files()
    status, said = lasting.run("--dry-run", source=releases["b"])
    assert (status, lasting.files(), lasting.release()) == (DONE, before, lasting.first)
    assert "nothing was changed" in said


def test_an_edited_voices_file_is_told_and_kept(served, releases):
    voices = served.app_dir / "voices.json"
    voices.write_text(edited := voices.read_text() + "\n")
    status, said = served.run(source=releases["b"])
    assert status == DONE and "to be replaced and kept in the backup: voices.json" in said
    assert (served.backups()[-1] / "voices.json").read_text() == edited != voices.read_text()


def test_the_deployed_folder_is_no_source(lasting):
    status, said = lasting.run(source=lasting.app_dir)
    assert status == UNCHANGED
    assert "is APP_DIR" in said


def test_a_failed_first_deploy_leaves_nothing_behind(box, releases):
    status, said = box.run(source=releases["silence"])
    assert status == DOWN, said
    assert "there was no server before" in said and box.get("/") is None
    assert not (box.app_dir / "app.py").exists()


# --- the older server ---


def test_the_first_deploy_takes_over_from_an_older_server(older, releases):
    serve(older, releases["a"])
    assert older.older.wait(5) == -signal.SIGTERM
    kept = older.backups()[0]
    assert kept.name.startswith("api_server_v2.py.backup.")
    assert (kept / "api_server_v2.py").read_text() == OLDER_SERVER
    assert (kept / "run/started/environ").stat().st_mode & 0o77 == 0


def test_the_older_servers_options_become_settings(older, releases):
    serve(older, releases["a"])
    settings = (older.app_dir / "server.env").read_text()
    assert 'TTS_MODEL_DIR="checkpoints/a b"\n' in settings
    assert "TTS_GPU_MEMORY_UTILIZATION=0.4\n" in settings and "TTS_FP16=true\n" in settings


def test_the_interpreter_is_the_older_servers(older, releases):
    del older.environment["PYTHON"]
    serve(older, releases["a"])
    assert f"PYTHON={sys.executable}\n" in (older.app_dir / "server.env").read_text()


def test_rollback_starts_the_older_server_the_way_it_was_started(older, releases):
    serve(older, releases["a"])
    status, said = older.run("rollback")
    assert status == DONE, said
    assert older.get("/") == older.greeting
    assert "checkpoints/a b" in older.greeting and "s3cret" in older.greeting
    assert not (older.app_dir / "app.py").exists()


def test_a_failed_first_deploy_gives_the_older_server_back(older, releases):
    status, said = older.run(source=releases["silence"])
    assert status == ROLLED_BACK, said
    assert older.get("/") == older.greeting
    ignored = int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{older.listeners()[0]}/status").read_text())[1], 16)
    assert not ignored & 1 << signal.SIGTERM - 1  # it can be ended as before


def test_rollback_reaches_every_backup(older, releases):
    serve(older, releases["a"])
    serve(older, releases["b"])
    first, second = (backup.name.split(".backup.")[1] for backup in older.backups())
    a_again = older.run("rollback", second), older.release()
    older_again = older.run("rollback", first), older.get("/")
    b_again = older.run("rollback", older.backups()[2].name.split(".backup.")[1]), older.release()
    assert [result[0][0] for result in (a_again, older_again, b_again)] == [DONE] * 3
    assert (older_again[1], b_again[1]) == (older.greeting, older.first)
    assert a_again[1] not in (None, older.first)


def test_after_a_failed_deploy_rollback_goes_on_to_the_release_before(older, releases):
    serve(older, releases["a"])
    assert older.run(source=releases["silence"])[0] == ROLLED_BACK
    status, said = older.run("rollback")
    assert (status, older.get("/")) == (DONE, older.greeting), said


def test_a_restart_before_any_deploy_keeps_how_the_older_server_was_started(older, releases):
    status, said = older.run("restart")
    assert (status, older.get("/")) == (DONE, older.greeting), said
    serve(older, releases["a"])
    assert older.run("rollback")[0] == DONE and older.get("/") == older.greeting


def test_a_stranger_on_the_port_is_not_taken_for_the_server_that_is_rolled_back_to(older, releases, tmp_path):
    serve(older, releases["a"])
    assert older.run("stop")[0] == DONE
    program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(older.port)]
    stranger = subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        older.wait_until(lambda: older.get("/"))
        status, said = older.run("rollback")
        assert status == UNCHANGED and f"taken by process {stranger.pid}" in said
    finally:
        stranger.kill()
        stranger.wait()


def test_a_rollback_leaves_no_empty_folders(older, releases):
    serve(older, releases["a"])
    assert older.run("rollback")[0] == DONE
    empty = [path.name for path in older.app_dir.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []


def test_an_older_server_with_spaces_in_its_name_can_be_rolled_back_to(box, releases):
    box.start_older_server(program="api server 语音.py")
    greeting = box.get("/")
    serve(box, releases["a"])
    assert "  api server 语音.py " in box.run("backups")[1]
    status, said = box.run("rollback")
    assert (status, box.get("/")) == (DONE, greeting), said


def test_a_second_rollback_undoes_the_first(served, releases):
    serve(served, releases["b"])
    latest = served.release()
    assert served.run("rollback")[0] == served.run("rollback")[0] == DONE
    assert served.release() == latest


def test_rollback_to_nothing_changes_nothing(served):
    status, said = served.run("rollback")
    assert (status, served.release()) == (UNCHANGED, served.first)
    assert "no server here before" in said


def test_a_dry_run_of_anything_but_deploy_is_refused(lasting):
    status, said = lasting.run("stop", "--dry-run")
    assert (status, lasting.release()) == (USAGE, lasting.first), said


def test_rollback_to_what_is_not_there_changes_nothing(lasting):
    before = lasting.files()
    status, said = lasting.run("rollback", "20010101T000000")
    assert (status, lasting.files()) == (UNCHANGED, before)
    assert "no backup 20010101T000000" in said


def is_running(pid: int) -> bool:
    """Whether a process is there, and is not just waiting to be reaped."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_server_that_does_not_end_is_killed_with_its_children(box, releases):
    box.start_older_server("--stubborn")
    child = int(box.get("/child"))
    status, said = box.run(source=releases["a"], STOP_TIMEOUT_S="1")
    assert status == DONE, said
    assert box.older.wait(5) == -signal.SIGKILL
    box.wait_until(lambda: not is_running(child))


# --- strangers, rivals, interruptions ---


def test_a_stranger_on_the_port_is_left_alone(box, releases, tmp_path):
    program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(box.port)]
    stranger = subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        box.wait_until(lambda: box.get("/"))
        status, said = box.run(source=releases["a"])
        assert status == UNCHANGED
        assert f"taken by process {stranger.pid}" in said
        assert stranger.poll() is None and not (box.app_dir / "app.py").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_program_that_only_names_the_folder_is_a_stranger(box, releases, tmp_path):
    box.app_dir.mkdir()
    (box.app_dir / "outputs").mkdir()
    program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(box.port), "--directory"]
    stranger = subprocess.Popen([*program, str(box.app_dir / "outputs")], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        box.wait_until(lambda: box.get("/"))
        status, said = box.run(source=releases["a"])
        assert (status, stranger.poll()) == (UNCHANGED, None), said
    finally:
        stranger.kill()
        stranger.wait()


def test_a_number_that_belongs_to_another_process_by_now_is_not_killed():
    other = subprocess.Popen(["sleep", "60"])
    try:
        told = call(f'b=$(born {other.pid}); all_gone "{other.pid} $((b - 1))" && echo gone; kill_left "{other.pid} 1"')
        assert (told, other.poll()) == ("gone\n", None)
        call(f'kill_left "{other.pid} $(born {other.pid})"')
        assert other.wait(5) == -signal.SIGKILL
    finally:
        other.kill()
        other.wait()


def test_of_two_deploys_at_once_the_second_is_turned_away(served, releases):
    first = served.start(source=releases["b"])
    assert any("Preflight" in line for line in first.stdout)
    status, said = served.run(source=releases["a"])
    assert first.communicate(timeout=120)[0] and first.returncode == DONE
    assert status == UNCHANGED and "another deploy is at work" in said
    assert served.release() not in (None, served.first)


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_at_any_step_the_old_release_answers(lasting, releases, step, tmp_path):
    before = settled(lasting)
    status, said = lasting.run(source=releases["b"], BASH_ENV=at_step(step, "kill -TERM $$", tmp_path))
    assert status in (UNCHANGED, ROLLED_BACK), said
    assert (lasting.release(), settled(lasting)) == (lasting.first, before)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_start_gives_the_old_release_back(lasting, releases, step, tmp_path):
    before = settled(lasting)
    status, said = lasting.run(source=releases["b"], BASH_ENV=at_step(step, "kill -KILL $$", tmp_path))
    assert status == -signal.SIGKILL, said
    status, said = lasting.run("start")
    assert status == DONE, said
    assert (lasting.release(), settled(lasting)) == (lasting.first, before)


def test_interrupted_once_it_serves_it_stays(served, releases, tmp_path):
    status, said = served.run(source=releases["b"], BASH_ENV=at_step("prune_backups", "kill -TERM $$", tmp_path))
    assert status == DONE and served.release() not in (None, served.first), said
    assert served.run("start")[0] == DONE and served.release() != served.first


def test_an_interrupted_restart_says_that_nothing_serves(served, tmp_path):
    status, said = served.run("restart", BASH_ENV=at_step("start_server", "kill -TERM $$", tmp_path))
    assert status == DOWN and "nothing is known to serve" in said
    assert served.run("start")[0] == DONE and served.release() == served.first


def test_ctrl_c_again_and_again_gives_the_old_release_back(served, releases, tmp_path):
    before = settled(served)
    running = served.start(source=releases["b"], BASH_ENV=at_step("wait_healthy", "kill -INT 0", tmp_path))
    said = list(itertools.takewhile(lambda line: "putting back" not in line, running.stdout))
    while running.poll() is None:
        os.killpg(running.pid, signal.SIGINT)  # it and its children, as a terminal does
        time.sleep(0.02)
    assert running.returncode == ROLLED_BACK, (said, running.stdout.read())
    assert (served.release(), settled(served)) == (served.first, before)


def test_ctrl_c_just_as_the_old_release_starts_again_leaves_it_serving(served, releases, tmp_path):
    before, action = settled(served), tmp_path / "action at run_gunicorn"
    interrupt = f'case "${{FUNCNAME[*]}}" in *put_back*) kill -INT 0 ;; *) mv "{action}.done" "{action}" ;; esac'
    status, said = served.run(source=releases["silence"], BASH_ENV=at_step("run_gunicorn", interrupt, tmp_path))
    assert status == ROLLED_BACK, said
    assert not action.exists() and (served.release(), settled(served)) == (served.first, before)


def test_a_file_that_cannot_be_put_back_is_told(served, releases, tmp_path):
    block = at_step("verify", 'mkdir -p "$APP_DIR/access.py.new/access.py"', tmp_path)
    status, said = served.run(source=releases["silence"], BASH_ENV=block)
    assert status == DOWN and "nothing is known to serve" in said
    (served.app_dir / "access.py.new/access.py").rmdir()
    (served.app_dir / "access.py.new").rmdir()
    assert served.run("start")[0] == DONE and served.release() == served.first


def test_killed_halfway_a_deploy_can_be_run_again(older, releases, tmp_path):
    older.run(source=releases["a"], BASH_ENV=at_step("start_server", "kill -KILL $$", tmp_path))
    status, said = older.run(source=releases["b"])
    assert status == DONE, said
    assert "an earlier deploy was interrupted" in said
    status, said = older.run("rollback")
    assert (status, older.get("/")) == (DONE, older.greeting), said


def test_it_goes_on_when_nobody_listens_any_more(served, releases):
    running = served.start(source=releases["b"])
    assert running.stdout.readline()
    running.stdout.close()
    assert running.wait(60) == DONE
    assert served.release() not in (None, served.first)
    assert f"deployed release {served.release()}" in (served.app_dir / "logs/deploy.log").read_text()


# --- folders and disks ---


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_changes_nothing(releases, tmp_path):
    with tmpfs(tmp_path / FOLDER, "size=8m") as folder, Box(folder) as box:
        box.start_older_server()
        before = box.files()
        status, said = box.run(source=releases["a"])
        assert status == UNCHANGED and "disk: " in said
        assert box.files() == before and box.get("/")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_on_the_way_leaves_the_older_server(releases, tmp_path):
    with tmpfs(tmp_path / FOLDER, "size=40m") as folder, Box(folder) as box:
        box.start_older_server()
        greeting = box.get("/")
        fill = f"head -c 60M /dev/zero >'{folder}/filler' || true"
        status, said = box.run(source=releases["a"], BASH_ENV=at_step("install_from", fill, tmp_path))
        assert status == ROLLED_BACK and "No space left" in said, said
        assert box.get("/") == greeting


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only disk needs root")
def test_a_read_only_folder_changes_nothing(releases, tmp_path):
    with tmpfs(tmp_path / FOLDER, "ro") as folder, Box(folder) as box:
        status, said = box.run(source=releases["a"])
        assert status == UNCHANGED and "cannot be written to" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only disk needs root")
def test_a_read_only_log_folder_leaves_running_what_runs(releases, tmp_path):
    with tmpfs(tmp_path / FOLDER / "logs", "ro"), Box(tmp_path / FOLDER) as box:
        box.start_older_server()
        greeting = box.get("/")
        status, said = box.run(source=releases["a"])
        assert status == UNCHANGED and "logs cannot be written to" in said
        assert box.get("/") == greeting


def test_reference_audio_of_ones_own_is_not_overwritten(box, releases):
    own = box.app_dir / "examples/voice_03.wav"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own voice")
    serve(box, releases["a"])
    assert own.read_bytes() == b"my own voice"
    assert len(list(own.parent.glob("voice_*.wav"))) == 11


def test_the_requirements_of_the_folder_stay_its_own(box, releases):
    box.app_dir.mkdir()
    (box.app_dir / "requirements.txt").write_text("vllm\n")
    serve(box, releases["a"])
    assert (box.app_dir / "requirements.txt").read_text() == "vllm\n"


def test_old_backups_go_and_the_very_first_stays(older, releases):
    for name in ("a", "b", "a", "b"):
        assert older.run(source=releases[name], KEEP_BACKUPS="2")[0] == DONE
    names = [backup.name.split(".backup.")[0] for backup in older.backups()]
    assert names == ["api_server_v2.py", "app.py", "app.py"]


def test_a_large_log_is_rotated_when_the_server_starts(served):
    log = served.app_dir / "logs/server.log"
    with log.open("ab") as file:
        file.truncate(11_000_000)
    assert served.run("restart")[0] == DONE
    assert log.with_name("server.log.1").stat().st_size >= 11_000_000 > log.stat().st_size


# --- settings ---


def test_settings_are_remembered(box, releases):
    status, said = box.run(source=releases["a"], TTS_API_KEYS="a-key")
    assert status == DONE, said
    del box.environment["PORT"], box.environment["HOST"], box.environment["PYTHON"]
    status, said = box.run(source=releases["b"])
    assert status == DONE, said
    assert box.get("/anything") == "{}"  # still refused without the key
    assert (box.app_dir / "server.env").stat().st_mode & 0o77 == 0
    assert "a-key" not in said + (box.app_dir / "logs/deploy.log").read_text()


def test_keys_that_lie_in_a_file_of_the_folder_are_used(box, releases):
    box.app_dir.mkdir()
    (box.app_dir / "keys.txt").write_text("# whose\n a-key\n")
    status, said = box.run(source=releases["a"], TTS_API_KEYS_FILE="keys.txt")
    assert status == DONE and box.get("/anything") == "{}", said  # it has spoken with the key, and refuses without


def test_settings_may_name_files_of_the_folder(box):
    box.app_dir.mkdir()
    (box.app_dir / "own.json").write_bytes((REPOSITORY / "voices.json").read_bytes())
    (box.app_dir / "app.py").write_text("an older one")
    assert box.run("--dry-run", TTS_VOICES_FILE="own.json")[0] == DONE
    status, said = box.run("--dry-run", TTS_VOICES_FILE="other.json")
    assert status == UNCHANGED and "other.json" in said


def test_the_settings_of_a_release_that_failed_do_not_stay(box, releases):
    assert box.run(source=releases["a"], TTS_API_KEYS="first")[0] == DONE
    first, settings = box.release(), (box.app_dir / "server.env").read_text()
    status, said = box.run(source=releases["silence"], TTS_API_KEYS="second", HEALTH_TIMEOUT_S="10")
    assert (status, box.release()) == (ROLLED_BACK, first), said  # it was heard speaking, with the first key
    assert (box.app_dir / "server.env").read_text() == settings


def test_a_restart_takes_new_settings(served):
    assert served.run("restart", TTS_API_KEYS="a-key")[0] == DONE
    assert served.get("/anything") == "{}"  # refused without the key
    assert "TTS_API_KEYS=a-key\n" in (served.app_dir / "server.env").read_text()


NASTY = {
    "TTS_A": "two  words", "TTS_B": "a key's \"$HOME\" `id` $(id) \\ \\n #1 ; %h", "TTS_C": "中文 语音 ，。",
    "TTS_D": "# none", "TTS_E": "ends in \\", "TTS_F": "  spaces\t ", "TTS_G": "*!~&|<>(){}[]?^", "TTS_H": "'single'",
    "TTS_I": '"double"', "TTS_J": "-n", "TTS_K": "a=b=c", "TTS_L": "~/models", "TTS_M": "$",
    "TTS_N": "'", "TTS_O": "a\\\"b\\\\",
}  # fmt: skip
SYSTEMD_READS = """
import ctypes, sys
libc, lines = ctypes.CDLL(None), ctypes.POINTER(ctypes.c_char_p)()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"r"))
assert ctypes.CDLL(sys.argv[1]).load_env_file(file, sys.argv[2].encode(), ctypes.byref(lines)) == 0
for i in range(1000):
    if lines[i] is None:
        break
    print(lines[i].decode(), end="\\0")
"""


def by_name(told: str) -> dict[str, str]:
    """The TTS_ variables of NAME=VALUE entries that end in NUL."""
    return dict(entry.split("=", 1) for entry in told.split("\0") if entry.startswith("TTS_"))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A server.env, as the script writes it, of values that a reader may get wrong."""
    file = tmp_path_factory.mktemp("环 境") / "server.env"
    file.write_text(call('settings "$REMEMBERED"', **NASTY))
    return file


def test_bash_reads_the_settings_as_they_were_given(nasty):
    done = subprocess.run(["bash", "-c", 'set -a; . "$1"; env -0', "-", nasty], env={}, capture_output=True, text=True)
    assert by_name(done.stdout) == NASTY


def test_the_script_reads_the_settings_as_they_were_given(nasty):
    assert by_name(call(f"APP_DIR='{nasty.parent}'; take_installed_settings; env -0")) == NASTY


def test_systemd_reads_the_settings_as_they_were_given(nasty):
    require_program("systemd-analyze", "systemd")
    library = next(Path("/usr/lib").glob("*/systemd/libsystemd-shared-*.so"))  # whose function reads EnvironmentFile=
    command = [sys.executable, "-c", SYSTEMD_READS, str(library), str(nasty)]
    assert by_name(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == NASTY


def test_settings_edited_by_hand_are_read_with_any_quotes(tmp_path):
    lines = "TTS_A='one \"$x'", "TTS_B=two words  \r", "# TTS_C=3", "TTS_D=a\\ b", 'TTS_E="x y"', ""
    (tmp_path / "server.env").write_text("\n".join(lines))
    told = by_name(call(f"APP_DIR='{tmp_path}'; take_installed_settings; env -0"))
    assert told == {"TTS_A": 'one "$x', "TTS_B": "two words", "TTS_D": "a b", "TTS_E": "x y"}


def test_a_setting_of_two_lines_is_refused(lasting):
    status, said = lasting.run("restart", TTS_LEXICON="a\nPORT=1")
    assert status == USAGE and "TTS_LEXICON must be one line" in said


def test_another_port_is_moved_to_and_back_from(older, releases):
    port = free_port()
    serve(older, releases["a"])
    status, said = older.run(source=releases["b"], PORT=str(port))
    assert status == DONE and older.get("/") is None, said
    del older.environment["PORT"]
    first = older.backups()[0].name.split(".backup.")[1]
    status, said = older.run("rollback", first)
    assert (status, older.get("/")) == (DONE, older.greeting), said


@pytest.mark.parametrize("setting", [{"PORT": "6006x"}, {"HEALTH_TIMEOUT_S": "0"}, {"PYTHON": "/no/python"}])
def test_a_wrong_setting_is_named(box, setting):
    status, said = box.run("status", **setting)
    assert status == USAGE
    assert next(iter(setting)) in said


def test_help_names_every_action_and_setting(box):
    status, said = box.run("--help")
    assert status == DONE
    wanted = {"deploy", "rollback", "restart", "stop", "start", "status", "backups", "pack", "--ssh", "APP_DIR", "PORT"}
    assert wanted <= set(re.split(r"[\s,]+", said))


@pytest.mark.parametrize("script", [SCRIPT, "test_openai_api.sh", "remote_check.sh"])
def test_help_is_the_same_when_piped(script):
    path = REPOSITORY / script
    asked = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True)
    with path.open("rb") as file:
        piped = subprocess.run(["bash", "-s", "--", "--help"], stdin=file, capture_output=True, text=True)
    assert asked.stdout.startswith(("Put", "Check", "Say")) and f"Usage: {script}" in asked.stdout
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, asked.stdout, "")


def test_an_unknown_argument_is_refused(box):
    status, said = box.run("redeploy")
    assert status == USAGE and "redeploy" in said


@pytest.mark.parametrize("option", ["--source", "-o", "--ssh", "-p"])
def test_an_option_without_its_value_is_refused(box, option):
    status, said = box.run(option)
    assert status == USAGE and option in said


def test_a_source_that_is_no_folder_is_refused(box):
    status, said = box.run("--source", "/no/where")
    assert status == USAGE and "/no/where" in said


def test_a_folder_that_is_a_file_is_told(box, releases):
    box.app_dir.write_text("a file")
    status, said = box.run("--dry-run", source=releases["a"])
    assert status == UNCHANGED and "is no folder" in said


@pytest.mark.parametrize("action", ["rollback", "restart", "start", "stop"])
def test_nothing_but_a_deploy_makes_the_folder(box, action):
    status, said = box.run(action)
    assert (status, box.app_dir.exists()) == (UNCHANGED, False)
    assert "there is no folder" in said


def test_a_pack_that_cannot_be_written_is_told(releases, tmp_path):
    command = ["bash", str(releases["a"] / SCRIPT), "pack", "-o"]
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    for place in (tmp_path / "no/where", full):
        (tmp_path / "full.new").unlink(missing_ok=True)
        (tmp_path / "full.new").symlink_to("/dev/full")
        done = subprocess.run([*command, str(place)], capture_output=True, text=True)
        assert done.returncode == UNCHANGED and "cannot be written" in done.stderr


def test_status_tells_running_from_stopped(served):
    assert served.run("status")[0] == DONE
    assert served.run("stop")[0] == DONE
    status, said = served.run("status")
    assert status == UNHEALTHY and "stopped" in said
    assert served.run("start")[0] == served.run("start")[0] == DONE
    assert served.release() == served.first


def test_status_tells_what_was_copied_and_not_restarted(served):
    assert "restart" not in served.run("status")[1]
    (served.app_dir / "release.sha256").write_text("another\n")
    status, said = served.run("status")
    assert status == DONE and f"release {served.first} is running, and " in said and "restart" in said


def test_backups_lists_what_rollback_takes(lasting):
    status, said = lasting.run("backups")
    assert status == DONE
    assert re.search(r"^\d{8}T\d{6}  app\.py +release [0-9a-f]{12}$", said, re.M)


# --- one file ---


@pytest.fixture(scope="module")
def packed(releases, tmp_path_factory):
    """deploy_openai.sh with release b in it."""
    file = tmp_path_factory.mktemp("packed") / "deploy_openai.sh"
    subprocess.run(["bash", str(releases["b"] / SCRIPT), "pack", "-o", str(file)], check=True)
    return file


def piped(box: Box, script: bytes, *arguments: str) -> tuple[int, str]:
    """Run a script the way ssh HOST bash -s does."""
    done = subprocess.run(
        ["bash", "-s", "--", *arguments], input=script, env=box.environment, cwd="/", capture_output=True
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def test_the_packed_file_deploys(box, packed):
    status, said = piped(box, packed.read_bytes())
    assert status == DONE, said
    assert box.release() in said
    assert os.access(box.app_dir / SCRIPT, os.X_OK)
    assert box.run("status", source=box.app_dir)[0] == DONE


def test_half_a_paste_runs_nothing(box, packed):
    script = packed.read_bytes().rstrip()
    for size in (200, 1000, len(script) // 2, len(script) - 120, len(script) - 2, len(script) - 1):
        _, said = piped(box, script[:size])
        assert "Preflight" not in said
        assert not box.app_dir.exists()


def test_a_damaged_packed_file_runs_nothing(box, packed):
    script = bytearray(packed.read_bytes())
    middle = script.index(b"\n", len(script) // 2) + 5
    script[middle] = ord("A") if script[middle] != ord("A") else ord("B")
    status, said = piped(box, bytes(script))
    assert status == UNCHANGED and "damaged" in said
    assert not box.app_dir.exists()


def test_packing_twice_gives_the_same_file(releases, packed, tmp_path):
    again = tmp_path / "again.sh"
    subprocess.run(["bash", str(releases["b"] / SCRIPT), "pack", "-o", str(again)], check=True)
    assert again.read_bytes() == packed.read_bytes()


# --- packages ---


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with this one's packages and base 1.0, and a folder of wheels to install from."""
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next(venv.glob("lib/*/site-packages"))
    (packages / "outer.pth").write_text(f"{next(path for path in sys.path if path.endswith('site-packages'))}\n")
    wheels.mkdir()
    hashes = {name: make_wheel(wheels, name, *needs) for name, *needs in (("top", "base>=1"), ("strict", "base>=2"))}
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "base", version=version)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    python = str(venv / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "base==1.0"], env=os.environ | pip, check=True)
    return {"PYTHON": python, **pip}, hashes


def versions(environment: dict[str, str]) -> list[str]:
    """What is installed there."""
    command = [environment["PYTHON"], "-m", "pip", "list", "--format=freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def deploy_with(box: Box, environment: dict[str, str], release: Path, requirement: str) -> tuple[int, str]:
    """Deploy a release that requires something."""
    box.app_dir.mkdir()
    file = box.app_dir.parent / "required.txt"
    file.write_text(f"{requirement}\n")
    return box.run(source=release, REQUIREMENTS=str(file), **environment)


def test_a_missing_package_is_installed_and_the_others_are_held(box, releases, environment):
    environment, hashes = environment
    before = versions(environment)
    wanted = f"top==1.0 --hash=sha256:{hashes['top']}\nbase==2.0 --hash=sha256:{'0' * 64}"
    status, said = deploy_with(box, environment, releases["a"], wanted)
    assert status == DONE, said
    assert sorted(versions(environment)) == sorted([*before, "top==1.0"])


def test_a_package_that_would_change_another_is_refused(box, releases, environment):
    environment, hashes = environment
    before = versions(environment)
    status, said = deploy_with(box, environment, releases["a"], f"strict==1.0 --hash=sha256:{hashes['strict']}")
    assert status == UNCHANGED, said
    assert versions(environment) == before
    assert "base==1.0" in (box.app_dir / "logs/deploy.log").read_text()


def test_a_package_with_another_checksum_is_refused(box, releases, environment):
    environment, hashes = environment
    before = versions(environment)
    status, said = deploy_with(box, environment, releases["a"], f"top==1.0 --hash=sha256:{hashes['strict']}")
    assert status == UNCHANGED, said
    assert versions(environment) == before


# --- a GPU, as a stand-in for nvidia-smi tells it ---


@pytest.fixture
def gpu(tmp_path):
    """Install an nvidia-smi: 24 GB, all but 1 GB of it taken while a process lives; return the environment for it."""

    def install(holder: int) -> dict[str, str]:
        tool = tmp_path / "bin/nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"""#!/bin/bash
case "$*" in
  -L) echo "GPU 0: a stand-in" ;;
  *memory.total*) echo 24000 ;;
  *) if [[ -d /proc/{holder} && $(</proc/{holder}/stat) != *") Z "* ]]; then echo 1000; else echo 23000; fi ;;
esac
""")
        tool.chmod(0o755)
        return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "TTS_ENGINE": "auto"}

    return install


def test_gpu_memory_that_the_older_server_holds_is_seen_free(older, releases, gpu):
    status, said = older.run(source=releases["a"], **gpu(older.older.pid))
    assert status == DONE, said
    assert "1000 MiB are free, 12000 are needed" in said and "23000 MiB of GPU memory are free" in said


def test_gpu_memory_that_a_stranger_holds_stops_the_preflight(box, releases, gpu):
    status, said = box.run(source=releases["a"], **gpu(os.getpid()))
    assert status == UNCHANGED
    assert "TTS_GPU_MEMORY_UTILIZATION" in said


def test_a_folder_without_its_engine_is_named(box, releases):
    box.app_dir.mkdir()
    status, said = box.run(source=releases["a"], TTS_ENGINE="indextts")
    assert status == UNCHANGED and "no indextts/infer_vllm_v2.py" in said


# --- the embedded engine ---


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A box that went from an older server to this repository's release, to a newer one, and back."""
    folder = tmp_path_factory.mktemp("real")
    newer = copy_release(folder / "newer", "newer")
    with Box(folder / FOLDER, HEALTH_TIMEOUT_S="120") as box:
        box.start_older_server()
        box.said = [box.run(), box.run(source=newer), box.run("rollback")]
        yield box


def test_the_real_release_is_deployed_redeployed_and_rolled_back(real):
    assert [status for status, _ in real.said] == [DONE] * 3, real.said
    first, second, third = (re.findall(r"healthy: release (\w+)", said)[-1] for _, said in real.said)
    assert first == third == real.release() != second


def test_the_real_release_has_spoken_before_it_is_done(real):
    for _, said in real.said:
        assert re.search(r"it speaks: [12]\.\d\d s at 24000 Hz, -\d\d dBFS, 11 voices", said)


def test_the_real_release_speaks_after_the_session_has_ended(real):
    listeners = real.listeners()
    assert listeners and all(os.getsid(pid) in listeners for pid in listeners)
