"""The small random checkpoints, and the deploy profile of omni_model.py made fit for a CPU."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from install import HERE, cache_folder, checksum

from omni_model import CAMPPLUS, CAMPPLUS_HUB, KINDS, deploy_profile

CPU_STAGE = {
    "dtype": "float32", "enforce_eager": True, "async_scheduling": False, "kv_cache_memory_bytes": 256 << 20,
    "attention_backend": None,
}  # fmt: skip
CPU_DECODER = {"diffusion_steps": 4, "s2mel_dit_bf16": False, "s2mel_vocoder_bf16": False}
REVISION = "0" * 40  # of whatever lies in the hub's cache
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


def cpu_profile(model_type: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return omni_model.py's deploy profile of a model with what a CPU does without or wants besides.

    config: of a model whose folder has none.
    """
    profile = deploy_profile(KINDS[model_type], 0.2)
    talker, decoder = profile["stages"]
    for stage in (talker, decoder):
        stage |= CPU_STAGE
        stage["hf_overrides"] = {**(config or {}), **stage.get("hf_overrides", {})}
    talker["default_sampling_params"]["max_tokens"] = MAX_CODES
    decoder["hf_overrides"] |= CPU_DECODER
    return profile


def lay_in_hub_cache(checkpoint: Path, cache: Path) -> tuple[str, dict[str, Any]]:
    """Lay a checkpoint into an empty cache of the hub's as IndexTTS's repositories are: without config.json, and with
    CAMPPlus, w2v-bert and BigVGAN in repositories of their own. Returns the hub id and the configuration."""
    elsewhere = {
        CAMPPLUS: CAMPPLUS_HUB, "w2v-bert-2.0": "facebook/w2v-bert-2.0",
        "bigvgan": "nvidia/bigvgan_v2_22khz_80band_256x",
    }  # fmt: skip
    hub_id = "IndexTeam/IndexTTS-2"
    for path in checkpoint.iterdir():
        if path.name == "config.json":
            continue
        repository = cache / f"models--{elsewhere.get(path.name, hub_id).replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        for file in path.iterdir() if path.name in ("w2v-bert-2.0", "bigvgan") else [path]:
            (snapshot / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    return hub_id, {name: value for name, value in config.items() if name not in ("model_type", "architectures")}


def wait_for(condition: Callable[[], object], deadline_s: float) -> None:
    """Wait until a condition holds; fail where it does not by the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"it did not come to pass in {deadline_s} s"
        time.sleep(0.05)
