"""Reference audio: finding the file a client names, and decoding it into what an engine can clone.

A name is never trusted: only regular files below the configured folders are read, never through a symbolic link.
"""

from __future__ import annotations

import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from vllm_engine import Reference

MIN_S, MAX_S = 1.0, 30.0  # what IndexTTS clones well; it reads no more than 15 s of it
QUIET = 10 ** (-50 / 20)  # -50 dBFS: a peak below it is silence
MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_CHANNELS = 8
CACHED = 64  # decoded files kept: 30 s at 48 kHz are 6 MB


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
        except (OSError, ValueError):  # not there, too long a name, a NUL in it
            continue
        if linked or not stat.S_ISREG(found.st_mode):
            raise BadReference("it is not a plain file; links, folders and devices are not read")
        if found.st_size > max_bytes:
            raise BadReference(f"the file has {found.st_size} bytes, more than TTS_MAX_REFERENCE_BYTES ({max_bytes})")
        return path
    return None


def load_reference(path: Path) -> Reference:
    """Decode a file of any format FFmpeg reads into mono; raise BadReference where it is no usable reference audio."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadReference(f"{path.name} cannot be read: {error.strerror}") from None
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(CACHED)
def _load(path: Path, _changed_ns: int, _size: int) -> Reference:
    samples, rate = decode(path)
    seconds = len(samples) / rate
    if seconds < MIN_S:
        raise BadReference(f"{path.name} lasts {seconds:.2f} s; give {MIN_S:g} to {MAX_S:g} s of speech")
    if not np.abs(samples).max() > QUIET:
        raise BadReference(f"{path.name} is silent; give {MIN_S:g} to {MAX_S:g} s of speech")
    return Reference(samples, rate, hashlib.sha256(samples.tobytes() + str(rate).encode()).hexdigest())


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Return float32 mono samples and their rate in Hz; raise BadReference, at the latest MAX_S into the file."""
    parts: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            rate, channels = stream.rate, stream.channels
            if not (MIN_RATE <= rate <= MAX_RATE and 1 <= channels <= MAX_CHANNELS):
                raise BadReference(f"{path.name} has {channels} channels at {rate} Hz; give mono or stereo speech")
            to_float = av.AudioResampler(format="fltp")
            left = int(MAX_S * rate)
            for frame in container.decode(stream):
                parts += [part.to_ndarray().mean(axis=0) for part in to_float.resample(frame)]  # FFmpeg's own mix clips
                left -= frame.samples
                if left < 0:
                    raise BadReference(f"{path.name} lasts over {MAX_S:g} s; give {MIN_S:g} to {MAX_S:g} s of speech")
    except (av.error.FFmpegError, IndexError, ValueError, MemoryError) as error:
        if isinstance(error, BadReference):
            raise
        raise BadReference(f"{path.name} is not audio that FFmpeg can decode") from None
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not np.isfinite(samples).all():
        raise BadReference(f"{path.name} holds samples that are not numbers")
    return samples, rate
