"""The small random checkpoints, and the deploy profile of omni_model.py made fit for a CPU."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from install import HERE, cache_folder, checksum

from omni_model import KINDS, deploy_profile

CPU_STAGE = {
    "dtype": "float32", "enforce_eager": True, "async_scheduling": False, "kv_cache_memory_bytes": 256 << 20,
    "tokenizer": None, "attention_backend": None,
}  # fmt: skip
CPU_DECODER = {"diffusion_steps": 4, "s2mel_dit_bf16": False, "s2mel_vocoder_bf16": False}
MAX_CODES = 300  # of an utterance; the checkpoints say about 60


def make_checkpoints() -> Path:
    """Return the folder with both checkpoints, made once per version of their maker."""
    maker = HERE / "checkpoints.py"
    folder = cache_folder() / f"omni-checkpoints-{checksum(maker, HERE / 'requirements.txt')}"
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        subprocess.run([sys.executable, maker, unfinished], check=True)
        unfinished.rename(folder)
    return folder


def write_cpu_profile(file: Path, model_type: str) -> Path:
    """Write omni_model.py's deploy profile of a model with what a CPU does without or wants besides."""
    profile = deploy_profile(KINDS[model_type], 0.2)
    talker, decoder = profile["stages"]
    for stage in (talker, decoder):
        stage |= CPU_STAGE
    talker["default_sampling_params"]["max_tokens"] = MAX_CODES
    decoder["hf_overrides"] |= CPU_DECODER
    file.write_text(json.dumps(profile))
    return file


def wait_for(condition: Callable[[], object], deadline_s: float) -> None:
    """Wait until a condition holds; fail where it does not by the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"it did not come to pass in {deadline_s} s"
        time.sleep(0.05)
