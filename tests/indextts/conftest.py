"""Fixtures on a real index-tts-vllm checkout with random weights: the voice in its owner, and a whole server."""

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Server

MAKE_CHECKPOINT = Path(__file__).with_name("make_checkpoint.py")
# Compiling takes minutes and changes no result; threads of small work wait for each other; the cache is in GiB.
FAST = {
    "TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
if os.environ.get("INDEXTTS_CHECKOUT"):
    os.environ.update(FAST)  # before torch is imported
EMOTION_MODEL = "qwen0.6bemo4-merge"


@pytest.fixture(scope="session")
def checkout():
    """The folder of the checkout."""
    return Path(os.environ["INDEXTTS_CHECKOUT"]).resolve()


@pytest.fixture(scope="session")
def weights(checkout):
    """A small random checkpoint, kept in the user's cache folder until its maker changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "indextts-openai-server"
    folder = cache / f"indextts-weights-{hashlib.sha256(MAKE_CHECKPOINT.read_bytes()).hexdigest()[:12]}"
    if not (folder / EMOTION_MODEL / "model.safetensors").exists():  # what is written last
        subprocess.run([sys.executable, MAKE_CHECKPOINT, checkout, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def owner(checkout, weights):
    """The owner of an engine, whose voice is the checkout's."""
    from indextts_voice import IndexTTSVoice
    from vllm_engine import EngineLoop

    owner = EngineLoop()
    shares = {"gpu_memory_utilization": 0.25, "qwenemo_gpu_memory_utilization": 0.1}
    owner.load(lambda: IndexTTSVoice.create(checkout=checkout, model_dir=weights, fp16=False, **shares))
    yield owner
    owner.close()


@pytest.fixture(scope="session")
def plain_weights(weights, tmp_path_factory):
    """The same without the emotion model."""
    folder = tmp_path_factory.mktemp("plain")
    for path in weights.iterdir():
        if path.name != EMOTION_MODEL:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def start_server(checkout, plain_weights, tmp_path_factory):
    """Start gunicorn with TTS_ENGINE=indextts; give the server."""
    given = {
        "TTS_ENGINE": "indextts", "TTS_INDEXTTS_DIR": str(checkout), "TTS_MODEL_DIR": str(plain_weights),
        "TTS_CACHE_BYTES": "0",
    }  # fmt: skip
    with contextlib.ExitStack() as servers:

        def start(**environment):
            log = tmp_path_factory.mktemp("server") / "log"
            return servers.enter_context(Server(log, **{**FAST, **given, **environment}))

        yield start
