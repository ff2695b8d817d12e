"""Reference audio: finding the file a client names, and decoding it into what an engine can clone.

A name is never trusted: only regular files below the configured folders are read, never through a symbolic link.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from audio import QUIET
from vllm_engine import Reference

MIN_S, MAX_S = 1.0, 30.0  # what IndexTTS clones well
HEARD_S = 15  # it listens to no more of it
WANTED = f"give {MIN_S:g} to {MAX_S:g} s of speech"
CACHED = 64  # decoded files kept: 30 s at 48 kHz are 6 MB
DECODER = Path(__file__).resolve().parent / "audio_decoder.py"
DECODERS = threading.Semaphore(2)  # decoding at once: what bounds its memory
DECODE_TIMEOUT_S = 60  # of waiting for a second of CPU: at a start on a busy machine ten were too few


class BadReference(ValueError):
    """Reference audio that cannot be used; the message says why and what would do."""


def find_reference(name: str, folders: tuple[Path, ...], max_bytes: int) -> Path | None:
    """Return the file below one of the folders that a name means, None where there is none.

    Raises BadReference for what is there but must not be read: a link, a folder, a device, a file of over `max_bytes`.
    """
    for folder in map(Path.resolve, folders):
        try:
            path = Path(os.path.normpath(folder / name))
            if not path.is_relative_to(folder) or path == folder:
                continue
            found = path.lstat()
            linked = path.resolve(strict=True) != path
        except (OSError, ValueError, RuntimeError):  # not there, a loop of links, too long a name, a NUL in it
            continue
        if linked or not stat.S_ISREG(found.st_mode):
            raise BadReference("it is not a plain file; links, folders and devices are not read")
        if found.st_size > max_bytes:
            raise BadReference(f"the file has {found.st_size} bytes, more than TTS_MAX_REFERENCE_BYTES ({max_bytes})")
        return path
    return None


def load_reference(path: Path) -> Reference:
    """Decode a file into mono; raise BadReference where it is no usable reference audio."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadReference(f"{path.name} cannot be read: {error.strerror}") from None
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(CACHED)
def _load(path: Path, _changed_ns: int, _size: int) -> Reference:
    try:
        samples, rate = decode(path.read_bytes(), MAX_S)
        if len(samples) > MAX_S * rate:
            raise BadReference(f"lasts over {MAX_S:g} s; {WANTED}")
        check_speech(samples, rate)
    except BadReference as error:
        raise BadReference(f"{path.name} {error}") from None
    except OSError as error:
        raise BadReference(f"{path.name} cannot be read: {error.strerror}") from None
    return Reference(samples, rate, hashlib.sha256(samples.tobytes() + str(rate).encode()).hexdigest())


def decode(data: bytes, seconds: float) -> tuple[np.ndarray, int]:
    """Return at most a little over `seconds` of a file as float32 mono samples, and their rate in Hz.

    Raises BadReference. FFmpeg runs in a process of its own, with a second of CPU and little memory.
    """
    command = [sys.executable, "-I", str(DECODER), str(seconds)]
    try:
        with DECODERS:
            done = subprocess.run(command, input=data, capture_output=True, timeout=DECODE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BadReference("is not audio that can be decoded in reasonable time") from None
    if done.returncode == 2:
        raise BadReference(done.stderr.decode(errors="replace").strip())
    if done.returncode:
        raise BadReference("is not audio that FFmpeg can decode")
    head, _, packed = done.stdout.partition(b"\n")
    rate, channels = map(int, head.split())
    samples = np.frombuffer(packed, np.float32).reshape(-1, channels).mean(axis=1)  # FFmpeg's own mix clips
    if not np.isfinite(samples).all():
        raise BadReference("holds samples that are not numbers")
    return samples, rate


def check_speech(samples: np.ndarray, rate: int) -> None:
    """Raise BadReference where samples are too short or silent."""
    if len(samples) < MIN_S * rate:
        raise BadReference(f"lasts {len(samples) / rate:.2f} s; {WANTED}")
    if not np.abs(samples[: HEARD_S * rate]).max() > QUIET:
        raise BadReference(f"is silent in the first {HEARD_S} s, all that is listened to; {WANTED}")
