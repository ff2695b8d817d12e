"""Which IndexTTS model lies in a folder, whether it is whole, and how vLLM-Omni is to deploy it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_engine import IN_THE_LOG, LoadError, memory_advice

TALKER_SHARE = 0.65  # of the GPU memory: it holds w2v-bert and the KV cache, the decoder only itself

log = logging.getLogger("speech.omni")


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


FROM_HUB = {  # what vLLM-Omni fetches where the folder has none of these, by hub id
    "facebook/w2v-bert-2.0": ("w2v-bert-2.0", "wav2vec2bert", "hf_cache/w2v-bert-2.0"),
    "nvidia/bigvgan_v2_22khz_80band_256x": ("bigvgan", "hf_cache/bigvgan"),
    "amphion/MaskGCT": ("semantic_codec.pth", "codec.pth"),
}
TAKEN = "TTS_MODEL lacks %s: it is taken from the hub, or from the hub's cache"
CAMPPLUS_HUB, CAMPPLUS = "funasr/campplus", "campplus_cn_common.bin"
CAMPPLUS_PLACES = (CAMPPLUS, "campplus.pth", f"hf_cache/{CAMPPLUS}", f"campplus/{CAMPPLUS}")
COMMON_WEIGHTS = ("gpt.pth", "s2mel.pth", "wav2vec2bert_stats.pt", "feat1.pt", "feat2.pt")
WHOLE_PREFILL = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2560}  # the talker takes a prompt in one
KINDS = {  # in the order in which a folder is asked for their tokenizers: 2.5 may come with that of 2
    "indextts2_5": Kind(
        "IndexTTS-2.5", "indextts2_5", ("multilingual_zh_ja_yue_char_del.tiktoken", "codec.pth", *COMMON_WEIGHTS),
        prompt_overhead=6, codes_per_s=25, speed_range=(0.5, 2.0), overrides=(WHOLE_PREFILL, {}),
    ),
    "indextts2": Kind(
        "IndexTTS-2", "indextts2", ("bpe.model", *COMMON_WEIGHTS),
        prompt_overhead=37, codes_per_s=50, speed_range=(1.0, 1.0),
        overrides=(WHOLE_PREFILL, {"max_num_seqs": 1}),  # two at once end its decoder
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

    return from_hub(f"TTS_MODEL: {model!r} is no folder", snapshot_download, model)


def from_hub(fault: str, fetch: Callable[..., str], *what: str) -> Path:
    """Return where the hub's client put something; raise LoadError that says `fault` where it could not."""
    try:
        return Path(fetch(*what))
    except Exception as error:
        raise LoadError(f"{fault}, and the hub did not give it: {error}") from error


def find(folder: Path, name: str) -> Path | None:
    """Return a file of the model, which may lie one folder down, as in IndexTTS's own repository."""
    return next((path for path in (folder / name, folder / "checkpoints" / name) if path.exists()), None)


def find_kind(folder: Path) -> Kind:
    """Tell IndexTTS-2 from 2.5 by config.json, else by the tokenizer: both come without one. Raises LoadError."""
    named = read_config(folder).get("model_type")
    kind = KINDS.get(named) or next((k for k in KINDS.values() if not named and find(folder, k.weights[0])), None)
    if kind is None:
        raise LoadError(f"TTS_MODEL: {folder} is neither IndexTTS-2 nor 2.5 (model_type in config.json: {named!r})")
    return kind


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says, nothing where it is missing; raise LoadError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8")) if file.exists() else {}
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise LoadError(f"TTS_MODEL: {file} cannot be read: {error}") from None
    return config


def check_weights(folder: Path, kind: Kind) -> None:
    """Raise LoadError naming the files that are missing; log what will be fetched."""
    if missing := [name for name in kind.weights if not find(folder, name)]:
        raise LoadError(f"TTS_MODEL: {folder} lacks {', '.join(missing)} of {kind.name}")
    for hub_id in fetched(folder):
        log.info(TAKEN, hub_id)


def fetched(folder: Path) -> list[str]:
    """Return the hub ids of what vLLM-Omni will fetch, as it is not in the model's folder."""
    return [hub_id for hub_id, names in FROM_HUB.items() if not any(find(folder, name) for name in names)]


def complete(folder: Path, kind: Kind, scratch: Path) -> Path:
    """Return a model's folder whose config.json names the model, and with CAMPPlus; raise LoadError.

    Where it lacks them, as IndexTTS's own repositories do, it is one of links: vLLM-Omni would find neither.
    """
    config, has_campplus = read_config(folder), any(find(folder, place) for place in CAMPPLUS_PLACES)
    if (named := bool(config.get("model_type"))) and has_campplus:
        return folder
    whole = scratch / folder.name
    whole.mkdir()
    for path in folder.iterdir():
        if named or path.name != "config.json":
            (whole / path.name).symlink_to(path)
    if not named:
        (whole / "config.json").write_text(json.dumps(config | {"model_type": kind.model_type}))
    if not has_campplus:
        from huggingface_hub import hf_hub_download

        log.info(TAKEN, CAMPPLUS_HUB)
        file = from_hub(f"TTS_MODEL: {folder} lacks {CAMPPLUS}", hf_hub_download, CAMPPLUS_HUB, CAMPPLUS)
        (whole / CAMPPLUS).symlink_to(file)
    return whole


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
        share = round(gpu_memory_utilization * share, 4)
        stage |= {"gpu_memory_utilization": share, "tokenizer": None, **overrides}  # the hub's gpt2, which is not used
    return profile


def write_profile(scratch: Path, kind: Kind, gpu_memory_utilization: float) -> Path:
    """Write the deploy profile to a file and return it."""
    file = scratch / "deploy.json"
    file.write_text(json.dumps(deploy_profile(kind, gpu_memory_utilization)))  # which is YAML too
    return file


def explain(error: BaseException, from_the_hub: list[str], setting: str = "TTS_GPU_MEMORY_UTILIZATION") -> str:
    """Return why the engine did not start, with what to do where memory or the hub is, or may be, at fault.

    setting: what decides the GPU memory.
    """
    told, cause = [], error
    while cause and str(cause) not in " / ".join(told):
        told.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    reason = " / ".join(told)[:1000]
    said = [f"vLLM-Omni did not start with TTS_MODEL: {reason}", memory_advice(reason, setting)]
    if from_the_hub and IN_THE_LOG in reason:
        said.append(f"Where the hub failed, download {' and '.join(from_the_hub)} into its cache")
    return ". ".join(filter(None, said))
