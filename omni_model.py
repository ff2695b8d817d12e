"""Which IndexTTS model lies in a folder, whether it is whole, and how vLLM-Omni is to deploy it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TALKER_SHARE = 0.65  # of the GPU memory: it holds w2v-bert and the KV cache, the decoder only itself


class LoadError(RuntimeError):
    """The engine did not start; the message says which setting to change."""


@dataclass(frozen=True)
class Kind:
    """What tells the two models apart; overrides: of the deploy profile, by stage."""

    name: str
    model_type: str
    weights: tuple[str, ...]
    prompt_overhead: int  # prompt tokens that are not text: voice, start and stop
    codes_per_s: int
    speed_range: tuple[float, float]
    overrides: tuple[dict[str, Any], dict[str, Any]]


COMMON_WEIGHTS = ("gpt.pth", "s2mel.pth", "wav2vec2bert_stats.pt", "feat1.pt", "feat2.pt")
WHOLE_PREFILL = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2560}  # the talker takes a prompt in one
KINDS = {
    "indextts2": Kind(
        "IndexTTS-2", "indextts2", ("bpe.model", *COMMON_WEIGHTS),
        prompt_overhead=37, codes_per_s=50, speed_range=(1.0, 1.0),
        overrides=(WHOLE_PREFILL, {"max_num_seqs": 1}),  # two at once end its decoder
    ),
    "indextts2_5": Kind(
        "IndexTTS-2.5", "indextts2_5", ("multilingual_zh_ja_yue_char_del.tiktoken", "codec.pth", *COMMON_WEIGHTS),
        prompt_overhead=6, codes_per_s=25, speed_range=(0.5, 2.0), overrides=(WHOLE_PREFILL, {}),
    ),
}  # fmt: skip


def find_model(model: str) -> Path:
    """Return the folder of TTS_MODEL, fetched where it is a hub id; raise LoadError."""
    if not model:
        raise LoadError("TTS_MODEL is not set: name the folder or hub id of IndexTTS-2 or IndexTTS-2.5")
    if os.path.isdir(model):
        return Path(model).resolve()
    if os.path.exists(model) or model.startswith((".", "/", "~")):
        raise LoadError(f"TTS_MODEL: there is no folder {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:
        raise LoadError(f"TTS_MODEL: {model!r} is no folder, and the hub did not give it: {error}") from error


def find(folder: Path, name: str) -> Path | None:
    """Return a file of the model, which may lie one folder down, as in IndexTTS's own repository."""
    return next((path for path in (folder / name, folder / "checkpoints" / name) if path.exists()), None)


def find_kind(folder: Path) -> Kind:
    """Tell IndexTTS-2 from 2.5 by config.json, else by the tokenizer: both come without one. Raises LoadError."""
    config = folder / "config.json"
    try:
        named = json.loads(config.read_text("utf-8")).get("model_type") if config.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"TTS_MODEL: {config} cannot be read: {error}") from None
    kind = KINDS.get(named) or next((k for k in KINDS.values() if not named and find(folder, k.weights[0])), None)
    if kind is None:
        raise LoadError(f"TTS_MODEL: {folder} is neither IndexTTS-2 nor 2.5 (model_type in config.json: {named!r})")
    return kind


def check_weights(folder: Path, kind: Kind) -> None:
    """Raise LoadError naming the files that are missing."""
    if missing := [name for name in kind.weights if not find(folder, name)]:
        raise LoadError(f"TTS_MODEL: {folder} lacks {', '.join(missing)} of {kind.name}")


def deploy_profile(kind: Kind, gpu_memory_utilization: float) -> dict[str, Any]:
    """Return vLLM-Omni's own profile of a model, without what is known to end its stages."""
    import vllm_omni
    import yaml

    file = Path(vllm_omni.__file__).parent / "deploy" / f"{kind.model_type}.yaml"
    profile = yaml.safe_load(file.read_text("utf-8"))
    profile["pipeline"] = kind.model_type  # by config.json, or the folder's name, vLLM-Omni would have to guess
    for stage, overrides, share in zip(
        profile["stages"], kind.overrides, (TALKER_SHARE, 1 - TALKER_SHARE), strict=True
    ):
        stage |= {"gpu_memory_utilization": round(gpu_memory_utilization * share, 4), **overrides}
    return profile


def write_profile(scratch: Path, kind: Kind, gpu_memory_utilization: float) -> Path:
    """Write the deploy profile to a file and return it."""
    file = scratch / "deploy.json"
    file.write_text(json.dumps(deploy_profile(kind, gpu_memory_utilization)))  # which is YAML too
    return file


OUT_OF_MEMORY = re.compile("out of memory|no available memory|kv cache", re.I)
IN_THE_LOG = "See root cause above"  # all that vLLM hands on of what went wrong in a stage's process


def explain(error: BaseException) -> str:
    """Return why the engine did not start, with what to do where the GPU's memory is short, or may be."""
    told, cause = [], error
    while cause and str(cause) not in " / ".join(told):
        told.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    reason = " / ".join(told)[:1000]
    if OUT_OF_MEMORY.search(reason):
        return f"the GPU's memory does not do: change TTS_GPU_MEMORY_UTILIZATION, or free some. {reason}"
    if IN_THE_LOG in reason:
        return (
            "a stage of vLLM-Omni did not start; the log above says why. If it was for want of GPU memory, change "
            f"TTS_GPU_MEMORY_UTILIZATION. {reason}"
        )
    return f"vLLM-Omni did not start with TTS_MODEL: {reason}"
