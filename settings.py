"""What an operator can set: the TTS_* variables, read once; and what the CPU can do."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

HERE = Path(__file__).resolve().parent
CPU_INFO = Path("/proc/cpuinfo")
OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
log = logging.getLogger("speech")


def cpu_has(flag: str) -> bool:
    """Tell whether Linux lists a flag of the CPU, as avx2; elsewhere none is known."""
    return CPU_INFO.is_file() and flag in CPU_INFO.read_text().split()


def usable_cores() -> int:
    """Return how many cores this process may use, one at least: its affinity, and its cgroup's quota rounded down.

    The quota is that of cgroup v2, as a container's or a systemd unit's CPUQuota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, no such line, or "max"
        [path] = [line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::")]
        quota_us, period_us = map(int, (CGROUPS / path.lstrip("/") / "cpu.max").read_text().split())
        cores = min(cores, quota_us // period_us)
    return max(1, cores)


def split_list(value: object) -> object:
    """Turn the comma-separated text of a variable into a tuple; raise ValueError where nothing is in it."""
    if not isinstance(value, str):
        return value
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if not parts or not value.isascii():
        raise ValueError("name at least one, in ASCII, or leave the variable out")
    return parts


def split_networks(value: object) -> object:
    """Turn comma-separated addresses and networks into a tuple; raise ValueError on what is neither."""
    networks = split_list(value)
    return tuple(str(ipaddress.ip_network(network)) for network in networks) if isinstance(value, str) else networks


def split_folders(value: object) -> object:
    """Turn a variable like PATH into a tuple of folders."""
    return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value


@dataclass(frozen=True)
class Settings:
    """What an operator can set: each field is the variable TTS_<FIELD IN CAPITALS>."""

    engine: Literal["auto", "omni", "indextts", "embedded"] = "auto"  # auto takes the best one this machine can run
    model: str = ""  # omni: the folder or hub id of IndexTTS-2 or 2.5
    omni_deploy_config: Path | None = None  # omni: vLLM-Omni's deploy file, instead of the one made for the model
    indextts_dir: Path = HERE  # indextts: the index-tts-vllm checkout
    model_dir: Path = Path("checkpoints/IndexTTS-2-vLLM")  # indextts: its weights, below the checkout
    fp16: bool = False  # indextts: half precision where the checkout takes it
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.25  # share of the GPU for the speech model
    qwenemo_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.10  # and for the emotion-text model
    voices_file: Path = HERE / "voices.json"
    reference_dirs: Annotated[tuple[Path, ...], BeforeValidator(split_folders)] = (HERE / "examples",)  # A:B:C
    max_reference_bytes: Annotated[int, Field(ge=1024)] = 32 << 20
    embedded_runtime: Literal["auto", "openvino", "onnxruntime"] = "auto"  # auto takes the faster one on this CPU
    lexicon: Path | None = None  # pronunciations, word = reading, one a line
    cache_dir: Path = HERE / "cache"  # what the embedded engine keeps for its next start
    api_keys: Annotated[tuple[str, ...], BeforeValidator(split_list)] = ()  # comma separated; empty: open
    api_keys_file: Path | None = None  # further keys, one a line; read again whenever it changes
    trusted_proxies: Annotated[tuple[str, ...], BeforeValidator(split_networks)] = ()  # whose X-Forwarded-For holds
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(split_list)] = ()  # web pages that may ask; empty: none
    log_text_characters: Annotated[int, Field(ge=0)] = 0  # of a text to be spoken that its log line shows
    slots: Annotated[int, Field(ge=0, le=64)] = 0  # utterances at once, and one that begins a request; 0: auto
    threads: Annotated[int, Field(ge=0, le=256)] = 0  # cores of the embedded engine; 0: usable_cores(), 4 at the most
    queue_requests: Annotated[int, Field(ge=1, le=4096)] = 128  # requests under way or waiting, before 429
    queue_characters: Annotated[int, Field(ge=1)] = 300_000  # and their text in all: about 20 hours of speech
    cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20  # finished utterances kept for who asks again; 0: none
    utterance_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # patience for one utterance, its wait included
    drain_timeout_s: Annotated[int, Field(ge=0)] = 600  # how long TERM waits for running requests
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 10 << 20  # of a recording; OpenAI's limit
    open_uploads: bool = False  # take /upload_audio without a key where keys are set: the dubbing worker sends none
    upload_dir: Path = HERE / "uploads"
    upload_dir_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30  # in all; the longest unused are removed first
    upload_max_age_s: Annotated[float, Field(gt=0)] = 86_400.0  # since its last use
    own_voices_dir: Path = HERE / "own_voices"  # voices that clients made
    max_own_voices: Annotated[int, Field(ge=0, le=1000)] = 100

    @classmethod
    def from_env(cls, environ: dict[str, str] | None = None) -> Settings:
        """Read the TTS_* variables once; raise ValueError naming the variable that is wrong, log unknown ones."""
        environ = dict(os.environ) if environ is None else environ
        given = {name: value for name, value in environ.items() if name.startswith("TTS_") and value}
        known = {f"TTS_{f.name.upper()}": f.name for f in fields(cls)}
        for name in sorted(given.keys() - known.keys()):
            log.warning("unknown setting %s is ignored; the settings are %s", name, ", ".join(known))
        values = {known[name]: value for name, value in given.items() if name in known}
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            given = "" if first["loc"][0] == "api_keys" else f", not {first['input']!r}"  # which no log may show
            raise ValueError(f"TTS_{str(first['loc'][0]).upper()}: {first['msg']}{given}") from None
