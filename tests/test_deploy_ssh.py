"""deploy_openai_api.sh over SSH: a real sshd on a loopback port, with a key made for it."""

import getpass
import os
import signal
import subprocess
import time

import pytest
from deploying import SCRIPT, Box, make_release, require_program
from serving import free_port

DONE, NO_CONNECTION = 0, 255


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    """An SSH server for the user who runs the tests; yields the client's command and its port."""
    program = require_program("/usr/sbin/sshd", "openssh-server")
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    server, client = folder / "sshd_config", folder / "ssh_config"
    server.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
        f"UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile {folder}/pid\n"
    )
    client.write_text(
        f"IdentityFile {folder}/user\nUserKnownHostsFile {folder}/known\nStrictHostKeyChecking accept-new\n"
        "LogLevel ERROR\nBatchMode yes\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen([program, "-D", "-e", "-f", str(server)], stderr=log)
    command = f"ssh -F {client}"
    wait_for_login(command, port, folder / "log")
    yield command, str(port)
    running.terminate()
    running.wait(10)


def wait_for_login(command: str, port: int, log) -> None:
    """Poll until a login works."""
    end = time.monotonic() + 20
    while subprocess.run([*command.split(), "-p", str(port), host(), "true"], capture_output=True).returncode:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def host() -> str:
    """Who logs in where."""
    return f"{getpass.getuser()}@127.0.0.1"


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Two releases of the stand-in."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: make_release(folder / name) for name in "ab"}


@pytest.fixture
def box(tmp_path, sshd):
    """A box that is reached over SSH."""
    with Box(tmp_path / "over ssh 语音", SSH_COMMAND=sshd[0]) as box:
        box.over_ssh = ("--ssh", host(), "-p", sshd[1])
        yield box


def test_it_deploys_over_ssh_and_rolls_back(box, releases):
    box.start_older_server()
    greeting = box.get("/")
    deployed = box.run(*box.over_ssh, source=releases["a"]), box.release()
    assert deployed[0][0] == DONE, deployed
    assert f"deployed release {deployed[1]}" in deployed[0][1]
    status, said = box.run("rollback", *box.over_ssh)
    assert (status, box.get("/")) == (DONE, greeting), said


def test_status_comes_from_over_there(box, releases):
    status, said = box.run("status", *box.over_ssh)
    assert status == 1 and "stopped" in said


def test_settings_and_keys_go_along_unseen(box, releases):
    status, said = box.run(*box.over_ssh, source=releases["a"], TTS_API_KEYS="a key's \"$HOME")
    assert status == DONE, said
    assert 'TTS_API_KEYS="a key\'s \\"\\$HOME"\n' in (box.app_dir / "server.env").read_text()
    assert "a key" not in said


def test_what_is_meant_for_the_server_goes_along_and_what_is_of_this_machine_stays(box, releases):
    sent = {"CUDA_VISIBLE_DEVICES": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/data/h f", "VLLM_X": "1"}
    kept = {"LD_LIBRARY_PATH": "/of/the/laptop", "CUDA_HOME": "/of/the/laptop", "HF_TOKEN": "of-the-user"}
    status, said = box.run(*box.over_ssh, source=releases["a"], **sent, **kept)
    assert status == DONE, said
    names = {line.split("=")[0] for line in (box.app_dir / "server.env").read_text().splitlines()}
    assert names & (sent.keys() | kept.keys()) == sent.keys()
    assert "settings that stay here: CUDA_HOME HF_TOKEN LD_LIBRARY_PATH" in said


def test_the_packed_file_deploys_when_piped(box, releases, sshd, tmp_path):
    packed = tmp_path / "deploy_openai.sh"
    subprocess.run(["bash", str(releases["a"] / SCRIPT), "pack", "-o", str(packed)], check=True)
    settings = " ".join(f"{name}='{value}'" for name, value in box.environment.items() if name != "SSH_COMMAND")
    command = [*sshd[0].split(), "-p", sshd[1], host(), f"{settings} bash -s"]
    with packed.open("rb") as script:
        done = subprocess.run(command, stdin=script, capture_output=True, text=True)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert f"deployed release {box.release()}" in done.stdout


def test_a_connection_that_breaks_on_the_way_does_not_stop_it(box, releases):
    assert box.run(source=releases["a"])[0] == DONE
    first = box.release()
    command = ["bash", str(releases["b"] / SCRIPT), *box.over_ssh]
    running = subprocess.Popen(command, env=box.environment, stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert any("backup:" in line for line in running.stdout)
    os.killpg(running.pid, signal.SIGKILL)  # the client, and with it the connection
    running.wait()
    box.wait_until(lambda: box.release() not in (None, first))
    box.wait_until(lambda: f"deployed release {box.release()}" in (box.app_dir / "logs/deploy.log").read_text())


def test_a_connection_that_breaks_before_all_is_there_runs_nothing(box, releases, sshd, tmp_path):
    packed = tmp_path / "deploy_openai.sh"
    subprocess.run(["bash", str(releases["a"] / SCRIPT), "pack", "-o", str(packed)], check=True)
    command = [*sshd[0].split(), "-p", sshd[1], host(), f"APP_DIR='{box.app_dir}' PORT={box.port} bash -s"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    running.stdin.write(packed.read_bytes()[: packed.stat().st_size // 2])
    running.stdin.flush()
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    status, said = box.run("status", *box.over_ssh)
    assert "stopped" in said and not box.app_dir.exists()


def test_no_connection_is_said(box):
    status, said = box.run("status", "--ssh", host(), "-p", str(free_port()))
    assert status == NO_CONNECTION and "no connection" in said
